"""The state of a review: records, and what people wrote and decided about them, replayed from an append-only log.

Every write is one line of `review.jsonl`, on the disk before the page hears that it is saved. A slate is what one person has
on one record: a draft, then a decision. It has a version, the number of its writes; a write that names another version is
refused, logged and set aside, where its writer finds it again. Nobody writes on another's slate.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import hashlib
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_jax.data.images import ImageError, open_image
from srpo_jax.data.records import Record, RecordError
from srpo_jax.data.review import decisions
from srpo_jax.data.review.decisions import Decision, Outcome, Status
from srpo_jax.files import Store, lock_folder

LOG = "review.jsonl"
ACTIONS = ("draft", "accept", "reject", "disturbing", "skip", "undo", "open")


class ReviewError(ValueError):
    """A write that does not fit: an unknown action, edits that are none, a decision that cannot be taken back."""


class StaleError(ReviewError):
    """A write on a slate that has moved on; its text was set aside."""


class TakenError(ReviewError):
    """A decision on a record that others have decided meanwhile; its text was kept as a draft."""


@dataclasses.dataclass
class Slate:
    """What one person has on one record.

    Attributes:
      role: of the person, "reviewer" or "adjudicator".
      version: number of writes so far.
      edits: changed fields, of the draft or of the decision.
      note: likewise.
      skipped: whether they put the record off.
      decision: None while there is none.
      place: of the last write in the log.
      aside: texts that were refused as stale, or were made on another version of the record: {"edits", "note", "time"}.
      opened: whether they have opened the unsafe reply, where that is kept apart.
    """

    role: str = "reviewer"
    version: int = 0
    edits: dict[str, str | None] = dataclasses.field(default_factory=dict)
    note: str = ""
    skipped: bool = False
    decision: Decision | None = None
    place: int = 0
    aside: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    opened: bool = False

    @property
    def label(self) -> str:
        """The decision's status, "skipped", "draft" or "" if nobody wrote on it."""
        if self.decision is not None:
            return self.decision.status
        return "skipped" if self.skipped else "draft" if self.version else ""


class Review:
    """Records under review. Threads may use it at the same time; one process at a time may write a folder.

    Args:
      records: with images as files, as `load_jsonl` gives them.
      folder: holds the log; made if missing.
      adjudicators: names that decide where two reviewers differ; all other names are reviewers.
      twice: every record takes two reviewers, not only those of `decisions.CONTESTED`; from then on, in this folder.
      apart: ids of the records whose unsafe reply comes from a file of its own (see `data.apart`). Nobody is shown it before
        they open it, which the log tells; the folder is then readable to its owner only.

    Attributes:
      records: those of `records`.
      apart: those of `apart`.
      outdated: how many decisions of the log are about other versions of their records, or records that are gone. They do
        not count; their texts are set aside.

    Raises:
      files.LockedError: another process writes the folder.
      ValueError: the log is damaged.
    """

    def __init__(
        self,
        records: Sequence[Record],
        folder: str | Path,
        *,
        adjudicators: Sequence[str] = (),
        twice: bool = False,
        apart: Collection[str] = (),
    ):
        self.records, self.adjudicators, self._twice = list(records), frozenset(adjudicators), False
        self.apart = frozenset(apart)
        self._digests = [decisions.digest(record) for record in records]
        self._index = {record.id: index for index, record in enumerate(records)}
        self._slates: dict[int, dict[str, Slate]] = collections.defaultdict(dict)
        self._shown = [0] * len(self.records)  # place of the last write on a record that everybody may know of
        self._lock = threading.RLock()
        self.outdated = self.place = 0
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.apart:
            Path(folder).chmod(0o700)  # the log will hold what people make of these replies
        lock_folder(folder)
        self._log = Store.open(folder, LOG)
        for event in self._log.lines:
            self._replay(event)
        if twice and not self._twice:
            self._write({"event": "rule", "twice": True})

    def act(self, index: int, reviewer: str, action: str, *, version: int, edits: Any = None, note: str = "") -> Slate:
        """Writes on a slate.

        Args:
          index: of the record.
          reviewer: whose slate.
          action: one of `ACTIONS`. "accept" accepts the record with the edits, if there are any; "open" opens the unsafe reply
            that is kept apart, and writes nothing else, so that it needs no version.
          version: of the slate that the writer saw.
          edits: see `decisions.parse_edits`; replace those of the slate.
          note: likewise.

        Returns:
          The slate after it.

        Raises:
          StaleError: the slate has another version.
          TakenError: enough others have decided.
          RecordError: an accepted record would break the schema, has an edit that guard rails refuse, or an unreadable image.
          ReviewError: everything else that does not fit.
        """
        record = self.records[index]
        if action not in ACTIONS:
            raise ReviewError(f"unknown action {action!r}: choose one of {', '.join(ACTIONS)}")
        try:
            parsed = decisions.parse_edits(record, {} if edits is None else edits)
            decisions.storable("note", note)
        except ValueError as error:
            raise ReviewError(str(error)) from None
        if action == "open":
            return self._open(index, reviewer)
        if "unsafe_reply" in parsed and self._hidden(index, reviewer):
            raise ReviewError("the unsafe reply is kept apart; open it before you change it")
        write: dict[str, Any] = {"edits": parsed, "note": note}
        # Pictures may be large: they are opened before others have to wait.
        images = self._check(index, reviewer, parsed) if action == "accept" else ()
        with self._lock:
            slate = self._slate(index, reviewer)
            if version != slate.version:
                if write != {"edits": slate.edits, "note": slate.note}:
                    self._append(index, reviewer, "refused", write)
                raise StaleError("this record was changed in another window; the text that was refused is set aside")
            self._refuse(index, reviewer, action, write)
            if action in ("draft", "skip", "undo"):
                self._append(index, reviewer, action, write if action != "undo" else {})
            else:
                accepted = Status.EDITED if parsed else Status.ACCEPTED
                status = {"accept": accepted, "reject": Status.REJECTED, "disturbing": Status.DISTURBING}[action]
                self._append(index, reviewer, "decision", write | {"status": status, "images": images})
            return slate

    def _open(self, index: int, reviewer: str) -> Slate:
        if self.records[index].id not in self.apart:
            raise ReviewError("this record has no unsafe reply that is kept apart")
        with self._lock:
            if self._hidden(index, reviewer):
                self._append(index, reviewer, "opened", {})
            return self._slate(index, reviewer)

    def _hidden(self, index: int, reviewer: str) -> bool:
        """Whether the record has an unsafe reply that `reviewer` has not opened."""
        return self.records[index].id in self.apart and not self._mine(index, reviewer).opened

    def _refuse(self, index: int, reviewer: str, action: str, write: dict[str, Any]) -> None:
        """Raises what speaks against the action."""
        slate, others = self._slate(index, reviewer), self.decided(index, but=reviewer)
        if slate.version and slate.role != self.role(reviewer):
            raise ReviewError(
                f"{reviewer} wrote on this record as {slate.role}; it takes another person to be the other"
            )
        if action == "undo" and slate.decision is None:
            raise ReviewError("there is no decision to undo")
        if action != "undo" and slate.decision is not None:
            raise ReviewError("this record is decided; undo the decision to change it")
        if self.role(reviewer) == "adjudicator":
            if action != "draft" and len(others) < max(2, self.needed(index)):
                raise ReviewError("two reviewers decide before an adjudicator")
        elif slate.decision is not None and others:
            raise ReviewError("both reviewers have decided; only an adjudicator can change the outcome")
        elif action in ("accept", "reject", "disturbing") and len(others) >= self.needed(index):
            self._append(index, reviewer, "draft", write)
            names = " and ".join(one.reviewer for one in others)
            raise TakenError(f"{names} decided this record meanwhile; your text is kept as a draft")

    def _check(self, index: int, reviewer: str, edits: Mapping[str, str | None]) -> tuple[str, ...]:
        """Digests of the images of a record that is fit to be accepted."""
        record = self.records[index]
        decisions.revised(record, edits)
        opened = record.id in self.apart and not self._hidden(index, reviewer)
        decisions.guarded(record, ({"unsafe_reply": record.unsafe_reply} if opened else {}) | dict(edits))
        found = []
        for image in record.images:
            try:
                open_image(image)
            except ImageError as error:
                raise RecordError(record.id, [("images", str(error))]) from error
            found.append(hashlib.sha256(Path(str(image)).read_bytes()).hexdigest())
        return tuple(found)

    def _append(self, index: int, reviewer: str, event: str, write: Mapping[str, Any]) -> None:
        line: dict[str, Any] = {
            "event": event,
            "record": self.records[index].id,
            "digest": self._digests[index],
            "reviewer": reviewer,
        }
        if self.records[index].id in self.apart and "unsafe_reply" in write.get("edits", {}):
            line["apart"] = True  # an export tells of this text in the file of these replies alone
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._write(line | {"role": self.role(reviewer), "time": time, **write})

    def _write(self, event: dict[str, Any]) -> None:
        self._log.append(event)
        self._log.sync()
        self._replay(event)

    def _replay(self, event: Mapping[str, Any]) -> None:
        """What a line of the log does to the slates; the only place where they change."""
        self.place += 1
        if event["event"] == "rule":
            self._twice = event["twice"]
            return
        index = self._index.get(event["record"])
        if index is None:
            self.outdated += event["event"] == "decision"
            return
        slate = self._slate(index, event["reviewer"])
        text = {"edits": event.get("edits", {}), "note": event.get("note", "")}
        if event["digest"] != self._digests[index] or event["event"] == "refused":
            self.outdated += event["event"] == "decision"
            if any(text.values()):
                slate.aside.append(text | {"time": event["time"]})
            return
        if event["event"] == "opened":
            slate.opened = True
            return
        was_open = self._complete(index)
        slate.version, slate.role, slate.place = slate.version + 1, event["role"], self.place
        slate.decision, slate.skipped = None, event["event"] == "skip"
        if event["event"] != "undo":
            slate.edits, slate.note = dict(text["edits"]), text["note"]
        if event["event"] == "decision":
            status = Status(event["status"])
            edits = slate.edits if status is Status.EDITED else {}
            told = slate.note, event["time"], tuple(event["images"]), self.place, slate.opened
            slate.decision = Decision(event["reviewer"], status, edits, *told)
        if was_open or self._complete(index):
            self._shown[index] = self.place

    def _slate(self, index: int, reviewer: str) -> Slate:
        return self._slates[index].setdefault(reviewer, Slate())

    def role(self, reviewer: str) -> str:
        """ "adjudicator" or "reviewer"."""
        return "adjudicator" if reviewer in self.adjudicators else "reviewer"

    def decided(self, index: int, *, role: str = "reviewer", but: str | None = None) -> list[Decision]:
        """Decisions about a record by those of a role, in the order in which they were made."""
        slates = self._slates.get(index, {})
        made = [s.decision for name, s in slates.items() if s.decision and s.role == role and name != but]
        return sorted(made, key=lambda one: one.place)

    def needed(self, index: int) -> int:
        """How many reviewers have to decide about a record."""
        record = self.records[index]
        return 2 if self._twice else decisions.needed(record, self._twin(record), self.decided(index))

    def outcome(self, index: int) -> Outcome | None:
        """What a record came to; None while it is open."""
        rulings = self.decided(index, role="adjudicator")
        return decisions.outcome(self.decided(index), self.needed(index), rulings[-1] if rulings else None)

    def rows(self, reviewer: str, since: int = -1) -> list[dict[str, Any]]:
        """What `reviewer` may know, without texts, of the records that changed after line `since` of the log (-1: of all)."""
        with self._lock:
            return [
                self._row(index, reviewer)
                for index, shown in enumerate(self._shown)
                if since < 0 or max(shown, self._mine(index, reviewer).place) > since
            ]

    def _row(self, index: int, reviewer: str) -> dict[str, Any]:
        record, slate = self.records[index], self._mine(index, reviewer)
        shown = self._open_to(index, reviewer)
        final = self.outcome(index) if shown else None
        differ = shown and final is None
        sealed = len(self.decided(index)) > 1 and shown and self.role(reviewer) == "reviewer"
        return {
            "index": index,
            "id": record.id,
            "question": record.question[:160],
            "category": record.category,
            "split": str(record.meta.get("split", "")),
            "findings": len(findings(record)),
            "mine": slate.label,
            "final": final.status if final else "differ" if differ else "",
            "todo": differ if self.role(reviewer) == "adjudicator" else slate.decision is None and not shown,
            "place": slate.decision.place if slate.decision and not sealed else 0,  # 0: nothing to take back
        }

    def view(self, index: int, reviewer: str) -> dict[str, Any]:
        """All that `reviewer` may see of a record: its texts, their slate, and others' decisions once these are open."""
        with self._lock:
            record, slate = self.records[index], self._mine(index, reviewer)
            others = self.decided(index, but=reviewer) if self._open_to(index, reviewer) else []
            rulings = self.decided(index, role="adjudicator", but=reviewer) if others else []
            told = {name: value for name, value in record.meta.items() if name not in ("findings", "review")}
            hidden = {"unsafe_reply"} if self._hidden(index, reviewer) else set()
            return {
                "row": self._row(index, reviewer),
                "fields": {n: None if n in hidden else text for n, text in decisions.fields(record).items()},
                "hidden": [*hidden],
                "images": len(record.images),
                "twin": None if record.twin is None else {"id": record.twin, "index": self._index.get(record.twin)},
                "findings": findings(record),
                "meta": told,
                "twice": self._twice or decisions.needed(record, self._twin(record)) > 1,
                "version": slate.version,
                "edits": slate.edits,
                "note": slate.note,
                "aside": slate.aside,
                "others": [
                    {
                        "reviewer": one.reviewer,
                        "status": one.status,
                        "edits": _without(one.edits, hidden),
                        "note": one.note,
                    }
                    for one in (*others, *rulings)
                ],
            }

    def _open_to(self, index: int, reviewer: str) -> bool:
        """Whether decisions of others may be shown: all reviewers have decided. Before that, not even how many have."""
        return self._complete(index) and (self.role(reviewer) == "reviewer" or len(self.decided(index)) > 1)

    def _complete(self, index: int) -> bool:
        return len(self.decided(index)) >= self.needed(index)

    def _mine(self, index: int, reviewer: str) -> Slate:
        """Their slate, to be read only."""
        return self._slates.get(index, {}).get(reviewer) or Slate()

    def _twin(self, record: Record) -> Record | None:
        index = None if record.twin is None else self._index.get(record.twin)
        return None if index is None else self.records[index]

    def close(self) -> None:
        """Closes the log."""
        self._log.__exit__(None, None, None)


def _without(edits: Mapping[str, str | None], names: Collection[str]) -> dict[str, str | None]:
    return {name: text for name, text in edits.items() if name not in names}


def findings(record: Record) -> list[dict[str, str]]:
    """What checks found, from `meta["findings"]`: check, field, level and text; whatever else stands there, as text."""
    found = record.meta.get("findings") or []
    names = ("check", "field", "level", "text")
    return [
        {name: str(one.get(name, "")) for name in names}
        if isinstance(one, Mapping)
        else {"check": "", "field": "", "level": "", "text": str(one)}
        for one in (found if isinstance(found, list) else [found])
    ]
