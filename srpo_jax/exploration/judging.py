"""Asking a judge: one question at a time or many at once, verdicts checked and kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from srpo_jax.data.items import Question
from srpo_jax.data.records import Record
from srpo_jax.files import Store
from srpo_jax.paths import ParsedPath

Pair = tuple[Question, ParsedPath]
Place = tuple[str, int, int]
"""A branch: record id, prefix, number within the prefix."""
T = TypeVar("T")


class Verdict(Protocol):
    """What a judge says of an answer; None where it could not tell."""

    @property
    def safe(self) -> bool | None: ...
    @property
    def effective(self) -> bool | None: ...
    @property
    def reason(self) -> str: ...


Judge = Callable[[Record, ParsedPath], Verdict]
"""What it cannot tell it says with None. If it raises, exploration stops; the verdicts so far are kept.

A judge that answers many questions at a time also has a method `batch`: from a sequence of (record, path) to an iterator of
(index, verdict), each index once, in whatever order the verdicts come."""


def ask(judge: Callable[[Any, Any], T], pairs: Sequence[tuple[Any, Any]]) -> Iterator[tuple[int, T]]:
    """(index of the pair, verdict) as verdicts come: by the judge's `batch` if it has one, else one by one.

    A pair is a question and what is judged of it: a parsed path or, of a judge that compares, two answers.

    Raises:
      ValueError: a batch that answers a question twice or leaves one out.
    """
    batch = getattr(judge, "batch", None)
    if batch is None or not pairs:
        yield from ((index, judge(*pair)) for index, pair in enumerate(pairs))
        return
    missing = set(range(len(pairs)))
    for index, verdict in batch(pairs):
        if index not in missing:
            raise ValueError(f"{judge_name(judge)}.batch gave verdict {index} twice, or of no question")
        missing.remove(index)
        yield index, verdict
    if missing:
        raise ValueError(f"{judge_name(judge)}.batch gave no verdict of {len(missing)} of {len(pairs)} questions")


def judge_name(judge: Callable[..., Any]) -> str:
    """What tells judges apart in stored verdicts: the attribute `name` (put a version in it), else "module:function"."""
    name = getattr(judge, "name", None)
    if isinstance(name, str):
        return name
    named = judge if hasattr(judge, "__qualname__") else type(judge)
    return f"{named.__module__}:{named.__qualname__}"


def known_verdicts(judge: Judge, store: Store, *, failed: bool = False) -> dict[Place, dict[str, Any]]:
    """The stored lines of a judge; failures, which may be asked again, only if `failed`, and never over a verdict."""
    mine = [line for line in store.lines if line.get("judge") == judge_name(judge)]
    mine.sort(key=lambda line: not line.get("failed"))
    kept = [line for line in mine if failed or not line.get("failed")]
    return {(line["record_id"], line["prefix"], line["number"]): line for line in kept}


def store_verdicts(judge: Judge, asked: Mapping[Place, Pair], store: Store) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Asks the judge about branches; each verdict is in the store before it is handed on.

    Raises:
      TypeError: a judge that returns something else than a verdict.
    """
    places = list(asked)
    answers = ask(judge, list(asked.values()))
    for place in places:
        try:
            index, verdict = next(answers)
        except Exception as error:
            where = "" if hasattr(judge, "batch") else f" on {_named(place)}"
            error.add_note(f"The judge raised{where}. Verdicts so far are kept; the same command asks on from here.")
            raise
        record_id, prefix, number = places[index]
        line = {"record_id": record_id, "prefix": prefix, "number": number, "judge": judge_name(judge)}
        line |= _told(verdict, _named(places[index]))
        store.append(line)
        yield places[index], line
    next(answers, None)  # runs the check for verdicts too many


def is_favourable(
    record: Record, safe: bool | None, effective: bool | None, mode: str = "safe_and_effective"
) -> bool | None:
    """Whether an answer is favourable; None if the judge's unknowns leave it open.

    On a risky record it must be safe and, unless `mode` is "safe", effective: redirect and help. On a harmless record it
    must be effective: a needless refusal is unfavourable.
    """
    wanted: tuple[bool | None, ...] = (effective,)
    if record.risky:
        wanted = (safe,) if mode == "safe" else (safe, effective)
    if any(x is False for x in wanted):
        return False
    return None if any(x is None for x in wanted) else True


def _named(place: Place) -> str:
    return "record {!r}, prefix {}, branch {}".format(*place)


def _told(verdict: Any, where: str) -> dict[str, Any]:
    """The verdict as a JSON object. Anything but True, False and None is refused: "no" is a true value."""
    told = {name: getattr(verdict, name, "nothing") for name in ("safe", "effective", "reason")}
    told["refused"] = getattr(verdict, "refused", None)  # a judge need not tell
    failed = {"failed": True} if getattr(verdict, "failed", False) else {}
    if not all(told[name] is None or isinstance(told[name], bool) for name in ("safe", "effective", "refused")):
        raise TypeError(
            f"the judge returned {verdict!r} on {where}; it must return a srpo_jax.judges.verdict.Verdict, whose safe, "
            "effective and refused are True, False or None (unknown)"
        )
    return told | {"reason": str(told["reason"])} | failed
