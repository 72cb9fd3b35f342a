"""Pictures to candidate records: the published pipeline, and what is added to it, marked.

    picture → moderator → [image-only adjudication] → query → reasoning ⇄ reflection-and-check → text-only adjudication →
    summary → moderator → record   [→ harmless twin → check → moderator → record]

In brackets what is this library's. Every record is a candidate: nobody has reviewed it, and publication refuses it until
somebody has.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_jax.data.apart import APART
from srpo_jax.data.builder import stages
from srpo_jax.data.builder.agents import Agent
from srpo_jax.data.builder.card import write_card
from srpo_jax.data.builder.guards import Finding, Hook
from srpo_jax.data.builder.intake import IMAGES, Faces, IntakeConfig, Picture, SetAside, take_in
from srpo_jax.data.builder.line import Candidate, Line, Row
from srpo_jax.data.builder.stages import Stage
from srpo_jax.data.privacy import personal_data
from srpo_jax.data.records import CATEGORIES, Record, RecordError
from srpo_jax.data.similarity import TextIndex, repeated, split_groups
from srpo_jax.files import lock_folder, write_json
from srpo_jax.paths import STEP_TITLES

RECORDS, ASIDE, YIELD = "records.jsonl", "set_aside.jsonl", "yield.json"
UNSAFE = ("limited", "omit", "apart")
NAMESPACE = uuid.UUID("6f9a1c0e-6b51-4ad8-9d5e-2f0c8f7f4a11")


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """How a data set is built.

    Attributes:
      name: of the data set.
      contact: where to ask for a picture or record to be taken out; stands in the data card.
      intake: see `IntakeConfig`.
      queries: at most so many risky requests per picture.
      revisions: times that a path which reflection sends back is written anew.
      tries: of a question whose answers cannot be used.
      image_only: whether a judge looks at each picture alone (ours).
      twins: whether a harmless twin is written for each risky record (ours).
      image_moderator: "model": the agent in the role `moderator` looks at every picture before other agents; "none": none does,
        because somebody has looked at all of them, or a hook does.
      unsafe_replies: "limited": in the record; "omit": not written at all; "apart": in a file of their own.
      similarity: of two questions (0 to 100) from which one repeats the other.
      repeats: questions that may repeat each other, on unrelated pictures; None for any number. On related pictures none may.
      splits: split → its share of the records.
      seed: of the splits.
      synthetic: whether pictures or agents were made up for a test; stands in every record.
      images_may_leave: whether pictures may be sent to another machine.

    Raises:
      ValueError: a field out of range.
    """

    name: str
    contact: str
    intake: IntakeConfig = dataclasses.field(default_factory=IntakeConfig)
    queries: int = 2
    revisions: int = 1
    tries: int = 3
    image_only: bool = True
    twins: bool = True
    image_moderator: str = "model"
    unsafe_replies: str = "limited"
    similarity: float = 90.0
    repeats: int | None = 1
    splits: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"train": 0.9, "test": 0.1})
    seed: int = 0
    synthetic: bool = False
    images_may_leave: bool = False

    def __post_init__(self) -> None:
        for name in ("name", "contact"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty; it stands in the data card")
        for name, least in {"queries": 1, "revisions": 0, "tries": 1, "repeats": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: it must be at least {least}")
        if self.queries > 20 or not 0 < self.similarity <= 100:
            raise ValueError("queries is at most 20, similarity above 0 and at most 100")
        if self.unsafe_replies not in UNSAFE or self.image_moderator not in ("model", "none"):
            raise ValueError(f"unsafe_replies is one of {', '.join(UNSAFE)}, image_moderator 'model' or 'none'")
        split_groups([], self.splits)


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build gave.

    Attributes:
      records: accepted candidates, in order.
      aside: what was set aside.
      rows: the yield table.
    """

    records: list[Record]
    aside: list[SetAside]
    rows: list[Row]


def build(
    images: str | Path,
    output: str | Path,
    agents: Mapping[str, Agent],
    config: BuildConfig,
    *,
    manifest: Mapping[str, Mapping[str, str]] | None = None,
    hook: Hook | None = None,
    faces: Faces | None = None,
) -> Built:
    """Builds a data set of candidates from a folder of pictures, or goes on with one that was killed.

    Args:
      images: folder of pictures.
      output: folder to write: records.jsonl, images/, set_aside.jsonl, yield.json, README.md, work/.
      agents: see `agents.read_agents`.
      config: how.
      manifest: see `intake.read_manifest`.
      hook: moderator of yours: sees each picture before any agent and each text after it was generated. What it said is kept
        under its name.
      faces: counts faces in a picture, for a finding.

    Raises:
      ValueError: pictures would leave the machine unasked; an agent is told descriptions that the manifest lacks; there are
        no pictures.
      EndpointError: an agent cannot be used; run again when this is mended.
    """
    output = Path(output)
    _may_leave(agents, config)
    output.mkdir(parents=True, exist_ok=True)
    lock_folder(output)
    pictures, aside = take_in(images, output, manifest or {}, config.intake, hook=hook, faces=faces)
    _described(agents, pictures)
    looked = looks_at_pixels(agents, config, hook)
    if not looked:
        pictures = [dataclasses.replace(p, findings=(*p.findings, UNSEEN)) for p in pictures]
    line = Line(output, agents, hook, config.tries)
    try:
        risky, twins = _stages(line, pictures, config)
    finally:
        line.close()
    intake = Row(stage="intake", entered=len(pictures) + len(aside), passed=len(pictures))
    for one in aside:
        intake.lose(one.kind)
    canary = _canary(config, pictures)
    records = _records(line, risky, twins, config, canary)
    built = Built(records, aside + line.aside, [intake, *line.rows])
    _write(output, built, config, canary, looked)
    return built


UNSEEN = Finding("moderation", "images", "warning", "neither a model nor a hook has looked at the pixels")


def looks_at_pixels(agents: Mapping[str, Agent], config: BuildConfig, hook: Hook | None) -> bool:
    """Whether somebody looks at each picture before the agents that write."""
    model = config.image_moderator == "model" and agents["moderator"].sees == "pixels"
    return model or hook is not None


def _may_leave(agents: Mapping[str, Agent], config: BuildConfig) -> None:
    used = {stage.role for stage in vars(stages).values() if isinstance(stage, Stage) and stage.sees}
    away = sorted({agents[role].name for role in used if agents[role].remote and agents[role].sees == "pixels"})
    if away and not config.images_may_leave:
        raise ValueError(
            f"pictures would leave this machine ({', '.join(away)}); say --images_may_leave if their licences and the people "
            "in them allow it, or name agents on a loopback address"
        )


def _described(agents: Mapping[str, Agent], pictures: Sequence[Picture]) -> None:
    lacking = [picture.name for picture in pictures if not picture.description]
    if lacking and any(agent.sees == "description" for agent in agents.values()):
        raise ValueError(f"an agent is told descriptions, and the manifest has none of {lacking[0]!r}; add it")


def _stages(line: Line, pictures: Sequence[Picture], config: BuildConfig) -> tuple[list[Candidate], list[Candidate]]:
    """Risky candidates and harmless twins that came through."""
    live = [Candidate(picture.id, picture) for picture in pictures]
    if config.image_moderator == "model":
        live = line.run(stages.MODERATE_IMAGE, live, lambda c: {})
    if config.image_only:
        live = line.run(stages.IMAGE_ONLY, live, lambda c: {})
    words = {"question_words": stages.QUESTION_WORDS}
    live = line.run(stages.QUERY, live, lambda c: {"count": config.queries, "categories": CATEGORIES, **words})
    live = [c.child(f"{c.id}-{n}", q) for c in live for n, q in enumerate(c.values["queries"][: config.queries], 1)]
    live = _without_repeats(line, live, config, "repeated questions")
    live = _reasoned(line, live, config.revisions)
    live = line.run(stages.TEXT_ANSWER, live, lambda c: _pick(c, "question"))
    live = line.run(stages.TEXT_JUDGE, live, lambda c: _pick(c, "question", "answer"))
    told = config.unsafe_replies != "omit"
    more = {"unsafe_reply": told, "reply_words": 60}
    live = line.run(
        stages.SUMMARY if told else stages.SAFE_SUMMARY,
        live,
        lambda c: {**_pick(c, "question"), "path": _path(c), **more},
    )
    live = line.run(stages.MODERATE_RECORD, live, lambda c: {"record": _all_text(c)})
    twins: list[Candidate] = []
    if config.twins:
        fresh = [c.child(f"{c.id}-twin", {"question": c.values["question"]}) for c in live]
        twins = line.run(stages.TWIN, fresh, lambda c: {**_pick(c, "question"), "titles": STEP_TITLES, **words})
        twins = _without_repeats(line, twins, config, "repeated twins", beside=live)
        twins = line.run(stages.TWIN_CHECK, twins, lambda c: {**_pick(c, "question"), "reply": c.values["safe_reply"]})
        twins = line.run(stages.MODERATE_RECORD, twins, lambda c: {"record": _all_text(c)}, "moderate_twin")
    return live, twins


def _reasoned(line: Line, live: Sequence[Candidate], revisions: int) -> list[Candidate]:
    """Candidates whose path reflection lets pass; one that it sends back is written anew, with the complaint in view."""
    order = {candidate.id: place for place, candidate in enumerate(live)}
    kept: list[Candidate] = []
    for round in range(revisions + 1):
        again = f" (revision {round})" if round else ""
        live = line.run(stages.REASONING, live, _reasoning_material, f"reasoning{again}")
        live = line.run(
            stages.REFLECTION,
            live,
            lambda c: {**_pick(c, "question", "category"), "path": _path(c)},
            f"reflection{again}",
        )
        kept += [candidate for candidate in live if not candidate.values["complaint"]]
        live = [candidate for candidate in live if candidate.values["complaint"]]
        if not live:
            break
        line.rows[-1].passed -= len(live)
        line.rows[-1].lose("sent back", len(live))
    for candidate in live:
        line.set_aside(candidate, "reflection", "sent back", candidate.values["complaint"])
    return sorted(kept, key=lambda candidate: order[candidate.id])


def _reasoning_material(candidate: Candidate) -> dict[str, Any]:
    earlier = {"complaint": candidate.values.get("complaint"), "earlier": ""}
    if earlier["complaint"]:
        earlier["earlier"] = _path(candidate)
    return {**_pick(candidate, "question", "event", "category"), "titles": STEP_TITLES, **earlier}


def _without_repeats(
    line: Line, live: list[Candidate], config: BuildConfig, label: str, beside: Sequence[Candidate] = ()
) -> list[Candidate]:
    """Those whose question repeats no earlier one on a related picture, nor too many elsewhere, nor one of `beside`."""
    everyone = [*beside, *live]
    gone = _repeats(everyone, config, len(beside))
    row, kept = Row(stage=label, entered=len(live)), []
    for index, candidate in enumerate(live, len(beside)):
        if index in gone:
            line.set_aside(candidate, label, "duplicate", f"its question repeats that of {everyone[gone[index]].id}")
            row.lose("duplicate")
        else:
            kept.append(candidate)
    row.passed = len(kept)
    line.rows.append(row)
    return kept


def _repeats(candidates: Sequence[Candidate], config: BuildConfig, given: int) -> dict[int, int]:
    """Candidates whose question goes → an earlier one that it repeats; the first `given` stay."""
    parts: dict[str, list[int]] = {}
    # Where any number may repeat each other, only related pictures count.
    for place, candidate in enumerate(candidates):
        parts.setdefault(candidate.picture.group if config.repeats is None else "", []).append(place)
    gone: dict[int, int] = {}
    for places in parts.values():
        texts = [candidates[place].values["question"] for place in places]
        groups = [candidates[place].picture.group for place in places]
        stay = bisect.bisect_left(places, given)
        found = repeated(TextIndex(texts, config.similarity).near_own, groups, config.repeats, stay)
        gone |= {places[i]: places[first] for i, first in found.items()}
    return gone


def _pick(candidate: Candidate, *names: str) -> dict[str, Any]:
    return {name: candidate.values[name] for name in names}


def _path(candidate: Candidate) -> str:
    return "\n".join(f"{number}. {step}" for number, step in enumerate(candidate.values["steps"], 1))


def _all_text(candidate: Candidate) -> str:
    names = ("question", "safe_reply", "unsafe_reply")
    texts = {name: candidate.values[name] for name in names if candidate.values.get(name)}
    return "\n".join([_path(candidate), *(f"{name}: {text}" for name, text in texts.items())])


def _records(
    line: Line, risky: Sequence[Candidate], twins: Sequence[Candidate], config: BuildConfig, canary: str
) -> list[Record]:
    """Validated records, twins linked where both came through, each in the split of its picture's group."""
    pairs = {candidate.id for candidate in risky}, {candidate.id.removesuffix("-twin") for candidate in twins}
    row = Row(stage="record", entered=len(risky) + len(twins))
    line.rows.append(row)
    splits = split_groups([c.picture.group for c in (*risky, *twins)], config.splits, config.seed)
    records = []
    for candidate, split in zip((*risky, *twins), splits, strict=True):
        own = candidate.id.removesuffix("-twin")
        twin = None
        if own in pairs[0] & pairs[1]:
            twin = f"{own}-twin" if own == candidate.id else own
        try:
            records.append(_record(candidate, twin, {"split": split, "canary": canary}, config))
        except RecordError as error:
            line.set_aside(candidate, "record", "schema", str(error))
            row.lose("schema")
    row.passed = len(records)
    known = {record.id for record in records}
    records = [r if r.twin in known else dataclasses.replace(r, twin=None) for r in records]
    return sorted(records, key=lambda record: record.id)


def _record(candidate: Candidate, twin: str | None, meta: dict[str, Any], config: BuildConfig) -> Record:
    values = candidate.values
    risky = not candidate.id.endswith("-twin")
    provenance = {"image": candidate.picture.provenance(), "stages": candidate.trail, "synthetic": config.synthetic}
    texts = {**_pick(candidate, "question", "safe_reply"), "steps": "\n".join(values["steps"])}
    texts["unsafe_reply"] = values.get("unsafe_reply") or ""
    findings = [*candidate.picture.findings, *_personal(texts)]
    return Record(
        id=candidate.id,
        images=(Path(candidate.picture.stored),),
        question=values["question"],
        risky=risky,
        category=values["category"] if risky else None,
        steps=tuple(values["steps"]),
        safe_reply=values["safe_reply"],
        unsafe_reply=values.get("unsafe_reply"),
        twin=twin,
        meta=meta
        | {"provenance": provenance, "findings": [f._asdict() for f in findings], "marks": sorted(candidate.marks)},
    )


def _personal(texts: Mapping[str, str]) -> Iterator[Finding]:
    for field, text in texts.items():
        for kind in sorted({span.kind for span in personal_data(text)}):
            yield Finding("personal data", field, "warning", f"an {kind}" if kind[0] in "aeiouI" else f"a {kind}")


def _canary(config: BuildConfig, pictures: Sequence[Picture]) -> str:
    """A string that occurs nowhere else, by which training corpora can be searched for this data set."""
    told = "/".join([config.name, *sorted(picture.sha256 for picture in pictures)])
    return f"srpo-jax data set canary {uuid.uuid5(NAMESPACE, told)}"


def _write(output: Path, built: Built, config: BuildConfig, canary: str, looked: bool) -> None:
    apart = config.unsafe_replies == "apart"
    replies = [{"id": r.id, "unsafe_reply": r.unsafe_reply} for r in built.records if apart and r.unsafe_reply]
    (output / APART).unlink(missing_ok=True)
    if apart:
        _write_lines(output / APART, replies, 0o600)
    _write_lines(output / RECORDS, (_line(record, apart) for record in built.records))
    _write_lines(output / ASIDE, map(dataclasses.asdict, built.aside))
    write_json(output / YIELD, [dataclasses.asdict(row) for row in built.rows])
    write_card(output / "README.md", built.records, config, canary, looked, render(built.rows))
    used = {image.name for record in built.records for image in record.images if isinstance(image, Path)}
    for file in (output / IMAGES).iterdir():
        if file.name not in used:  # what was refused or set aside is no part of the data set
            file.unlink()


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]], mode: int = 0o644) -> None:
    """All lines at once: a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    partial.replace(path)


def _line(record: Record, apart: bool) -> dict[str, Any]:
    """A record as `load_jsonl` reads it."""
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    values["images"] = [str(image) for image in record.images]
    if apart:
        values["unsafe_reply"] = None
    return json.loads(json.dumps(values))


def render(rows: Sequence[Row]) -> str:
    """The yield table as text."""
    head = f"{'stage':<26}{'in':>6}{'out':>6}{'tries':>7}{'tokens in':>11}{'tokens out':>11}{'cost':>9}  set aside"
    lines = [head]
    for row in rows:
        reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(row.aside.items()) if count)
        cost = f"{row.cost:.4f}" + "?" * (row.unpriced > 0) if row.tries and row.cost else "-"
        lines.append(
            f"{row.stage:<26}{row.entered:>6}{row.passed:>6}{row.tries:>7}{row.input_tokens:>11}{row.output_tokens:>11}{cost:>9}"
            f"  {reasons}".rstrip()
        )
    return "\n".join(lines)
