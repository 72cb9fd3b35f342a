"""What a benchmark is: where its files lie, how they become items, how responses are scored, what to beware of."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from srpo_jax.data.items import Item
from srpo_jax.evaluation.benchmarks.source import BenchmarkError, Source
from srpo_jax.evaluation.evaluators import Evaluator
from srpo_jax.evaluation.metrics import Groups

Family = Literal["reasoning path", "safety awareness", "jailbreak robustness", "over-refusal"]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark in its published layout.

    Attributes:
      name: of its folder below the data root, and on the command line.
      title: as published.
      family: what it probes.
      counts: items per subset; of a verified benchmark, a copy with other counts is refused (see `load`).
      licence: of the data, as its publisher states it.
      origin: where the files come from.
      files: what the folder must hold.
      metric: what the publisher reports.
      judge: what a judge of it must tell, and what the publisher used.
      items: reads the folder.
      verified: whether schema and counts were read in the published files; if not, they stem from descriptions, and
        `--fields` adapts the reader to the real ones.
      caveats: what is known to go wrong with it.
      evaluator: of a closed-form benchmark, whose answers are parsed; None where a judge is needed.
      constants: of a closed form, the answers of policies that look at nothing, by name (see `evaluation.references`).
      uncomputed: such policies that no rule scores, and why.
      metrics: its own rates beside those that every evaluation reports.
      hub: id of the data set on the Hugging Face hub, where it can be read from there.
    """

    name: str
    title: str
    family: Family
    counts: Mapping[str, int]
    licence: str
    origin: str
    files: tuple[str, ...]
    metric: str
    judge: str
    items: Callable[[Source], Iterable[Item]]
    verified: bool
    caveats: tuple[str, ...] = ()
    evaluator: Evaluator | None = None
    constants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    uncomputed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metrics: Callable[[Groups], dict[str, Any]] = lambda prompts: {}
    hub: str = ""

    @property
    def n(self) -> int:
        """Items of all subsets."""
        return sum(self.counts.values())

    def load(
        self,
        root: str | Path,
        fields: Mapping[str, str] | None = None,
        *,
        partial: bool = False,
        hub: bool = False,
    ) -> tuple[list[Item], dict[str, Any]]:
        """The items, and where they come from.

        Args:
          root: the folder of all benchmarks; this one lies in the folder of its name.
          fields: published field name to that of the copy, where it differs.
          partial: evaluate what there is of an incomplete or newer copy: items whose picture is missing are left out, and
            other counts are accepted. The provenance tells of both.

          hub: read the data set `self.hub` of the Hugging Face hub instead of the folder.

        Returns:
          The items, and their provenance: SHA-256 of every annotation file read, counts found and published, items left
          out. Pictures are part of the digest that every result carries.

        Raises:
          BenchmarkError: a missing file or picture, a broken record or other counts; names place, cause and remedy.
        """
        if hub and not self.hub:
            raise BenchmarkError(f"{self.name} is not read from the Hugging Face hub: {self._where()}")
        where = Path(root) / self.name
        source = Source(
            where, self.name, fields or {}, partial=partial, where=self._where(), hub=self.hub if hub else ""
        )
        items = [dataclasses.replace(item, id=f"{self.name}/{item.id}") for item in self.items(source)]
        source.check_missing()
        twice = [name for name, times in collections.Counter(item.id for item in items).items() if times > 1]
        if twice:
            raise BenchmarkError(
                f"{source.folder}: {len(twice)} ids occur twice, such as {twice[0]!r}; repair the copy"
            )
        found = dict(collections.Counter(item.subset for item in items))
        if found != dict(self.counts) and self.verified and not partial:
            raise BenchmarkError(
                f"{source.folder}: holds {_counts(found)}, published are {_counts(self.counts)}: another release, or part of "
                "one; complete it, or pass --partial to evaluate what is there (the result says so)"
            )
        if not items:
            raise BenchmarkError(f"{source.folder}: holds no item; {self._where()}")
        told = {"files": source.digests, "found": found, "published": dict(self.counts), "verified": self.verified}
        return items, told | {"left_out": source.missing, "fields": dict(source.fields)}

    def _where(self) -> str:
        layout = ", ".join(f"{self.name}/{file}" for file in self.files)
        return f"{self.title} comes from {self.origin} (licence: {self.licence}); below the data root put {layout}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {subset}" for subset, n in sorted(counts.items())) or "nothing"
