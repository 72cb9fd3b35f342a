"""The design of a study, fixed before its first test seed runs: methods, trials, budgets, seeds, endpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections

BASE = "base"
BUDGETS = ("updates", "flops")
TUNING_SEED = 1000  # seeds of tuning begin here, those of tests at 0


class StudyError(ValueError):
    """A study that cannot be run; names the field."""


@dataclasses.dataclass(frozen=True)
class TreeOptions:
    """What a method changes about the trees that it learns from.

    Attributes:
      flip: share of branches whose verdict is turned over (a noisy judge).
      prefixes: prefixes whose branches count; None for all.
      harmless: whether harmless twins are trained on.
      steps: whether a favourable branch must also be free of steps that the judge calls unsafe.
      adaptive: fields of `AdaptiveConfig`: of uniformly explored trees, the part that adaptive exploration would have
        sampled.
    """

    flip: float = 0.0
    prefixes: tuple[int, ...] | None = None
    harmless: bool = True
    steps: bool = False
    adaptive: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Design:
    """A study.

    Attributes:
      methods: overrides of the configuration by method, nested like it; its key "trees" holds fields of `TreeOptions`.
      trials: further overrides by method, one run each on the validation split; the best is kept. Every method has as
        many.
      method: the one that the others are compared with.
      against: the others that the confirmatory tests name.
      seeds: test seeds; each has records, exploration, order of questions and sampled answers of its own.
      tuning_seeds: seeds per trial.
      budgets: "updates" (all make equally many) and "flops" (all cost what `method` costs, exploration included).
      confirmatory: whether p-values are reported; needs 12 seeds.

    Raises:
      StudyError: an unknown method or budget, unequal numbers of trials, or too few seeds for a test.
    """

    methods: Mapping[str, Mapping[str, Any]]
    trials: Mapping[str, tuple[Mapping[str, Any], ...]]
    method: str = "srpo"
    against: tuple[str, ...] = ()
    seeds: int = 12
    tuning_seeds: int = 1
    budgets: tuple[str, ...] = BUDGETS
    confirmatory: bool = True

    def __post_init__(self) -> None:
        if unknown := ({self.method, *self.against, *self.trials} - self.methods.keys()) - {BASE}:
            raise StudyError(f"config.study: {sorted(unknown)} is no method; there are {sorted(self.methods)}")
        if unknown := set(self.budgets) - set(BUDGETS):
            raise StudyError(f"config.study.budgets: {sorted(unknown)} is none of {BUDGETS}")
        counts = {name: len(self.trials.get(name, ())) for name in self.methods}
        if len(set(counts.values())) > 1:
            raise StudyError(f"config.study.trials: every method gets the same number of tuning trials, not {counts}")
        if self.confirmatory and self.seeds < 12:
            raise StudyError(
                f"config.study.seeds={self.seeds}: tests need 12; set confirmatory=False for an exploration"
            )
        if self.seeds < 1 or self.tuning_seeds < 1:
            raise StudyError("config.study: at least one seed")


class Cell(NamedTuple):
    """One run of a study.

    Attributes:
      method: its name.
      budget: "updates" or "flops".
      seed: of the run.
      trial: the number of a tuning trial; None for a test.
    """

    method: str
    budget: str
    seed: int
    trial: int | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join(
            [self.method, self.budget, f"seed{self.seed}", *([] if self.trial is None else [f"trial{self.trial}"])]
        )


def read_design(config: ml_collections.ConfigDict) -> Design:
    """The design in `config.study`."""
    values: dict[str, Any] = config.study.to_dict()
    values["trials"] = {name: tuple(given) for name, given in values.get("trials", {}).items()}
    try:
        return Design(**values | {k: tuple(values[k]) for k in ("against", "budgets") if k in values})
    except TypeError as error:
        raise StudyError(f"config.study: {error}") from error


def tuning_cells(design: Design) -> Iterator[Cell]:
    """Runs on the validation split; one trial alone is no choice and takes none."""
    for seed in range(design.tuning_seeds):
        for name in design.methods:
            trials = len(design.trials.get(name, ()))
            yield from (Cell(name, "updates", TUNING_SEED + seed, t) for t in range(trials) if trials > 1)


def measured_cells(design: Design) -> Iterator[Cell]:
    """Runs on the test splits, seed by seed, so that a part of them is a smaller study."""
    for seed in range(design.seeds):
        for budget in design.budgets:
            if budget == design.budgets[0]:
                yield Cell(BASE, budget, seed)
            for name in design.methods:
                if budget == design.budgets[0] or name != design.method:  # its own cost is the budget
                    yield Cell(name, budget, seed)


def cell_config(
    config: ml_collections.ConfigDict, design: Design, cell: Cell, trial: int | None
) -> tuple[ml_collections.ConfigDict, TreeOptions]:
    """The configuration of a run, and what it changes about trees.

    Raises:
      StudyError: an override that names no field.
    """
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        del changed["study"]
    given: list[dict[str, Any]] = [dict(design.methods.get(cell.method, {}))]
    if trial is not None:
        given.append(dict(design.trials[cell.method][trial]))
    trees: dict[str, Any] = {}
    for overrides in given:
        trees |= overrides.pop("trees", {})
        try:
            changed.update(overrides)
        except (KeyError, TypeError, ValueError) as error:
            raise StudyError(f"config.study: {cell.method}: {error}") from error
    changed.seed = cell.seed
    changed.data.seed = cell.seed
    changed.eval.seed = cell.seed
    if prefixes := trees.get("prefixes"):
        trees["prefixes"] = tuple(prefixes)
    return changed, TreeOptions(**trees)
