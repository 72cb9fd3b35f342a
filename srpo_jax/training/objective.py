"""What an update minimises: a weighted sum of objectives over the same trees, chosen by configuration.

    L(question) = Σ over terms of  weight(update) · loss(per-token log-probs of the tree)

One forward pass gives the log-probs of path and branches (`training.step`); every term is arithmetic on them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from srpo_jax import losses
from srpo_jax.models.heads import init_heads, safety_logits
from srpo_jax.models.scoring import TreeScores
from srpo_jax.trees import TreeBatch

Options = Mapping[str, Any]


class TreeLogprobs(NamedTuple):
    """What a term reads: log-probs of a batch of trees.

    Attributes:
      path: float[B, A].
      path_lengths: int32[B].
      branches: log-probs of the branches.
      prefix_lengths: int32[B, M].
      key: float[B, A], log-probs of the key sentence with the query hidden; for `key_sentence` alone.
      key_lengths: int32[B], its tokens.
      safety_logits: of both heads, float[B] each; for `safety_heads` alone.
      safe: int[B], 1 for a harmless question, 0 for a risky one, -1 for neither.
    """

    path: jax.Array
    path_lengths: jax.Array
    branches: losses.BranchLogprobs
    prefix_lengths: jax.Array
    key: jax.Array | None = None
    key_lengths: jax.Array | None = None
    safety_logits: tuple[jax.Array, jax.Array] | None = None
    safe: jax.Array | None = None


class Term(NamedTuple):
    """An objective that a configuration can name.

    Attributes:
      loss: the pure function; its keyword-only parameters are the term's options.
      arguments: what it takes of the log-probs.
      contrasts: whether, given the options, it learns nothing from branches that are all favourable or all
        unfavourable.
      path_alone: whether, given the options, a tree without branches still teaches the reference path.
      learns: which branches it reads, as in `PackConfig.learns`; "" for none.
      extras: fields of `trees.EXTRAS` that it reads, given the options.
      parameters: its own by path, fresh, given the width of hidden states.
    """

    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    arguments: Callable[[TreeLogprobs], tuple]
    contrasts: Callable[[Options], bool]
    path_alone: Callable[[Options], bool]
    learns: str
    extras: Callable[[Options], tuple[str, ...]] = lambda options: ()
    parameters: Callable[[int], dict[str, Any]] = lambda width: {}

    def defaults(self) -> dict[str, Any]:
        """The options with their defaults."""
        parameters = inspect.signature(self.loss).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _path(t: TreeLogprobs) -> tuple:
    return t.path, t.path_lengths


def _branches(t: TreeLogprobs) -> tuple:
    return (t.branches,)


def _both(t: TreeLogprobs) -> tuple:
    return t.path, t.path_lengths, t.branches


def _all(t: TreeLogprobs) -> tuple:
    return t.path, t.path_lengths, t.branches, t.prefix_lengths


def _key(t: TreeLogprobs) -> tuple:
    assert t.key is not None and t.key_lengths is not None  # `Term.extras` asks for them
    return t.key, jnp.arange(t.key.shape[-1]) < t.key_lengths[..., None]


def _heads(t: TreeLogprobs) -> tuple:
    if t.safety_logits is None:
        raise ValueError("safety_heads needs heads; `LossConfig.parameters` makes them")
    return *t.safety_logits, t.safe


def _yes(options: Options) -> bool:
    return True


def _no(options: Options) -> bool:
    return False


def _on_path(options: Options) -> bool:
    return options["reference"] == "path"


def _reference(options: Options) -> tuple[str, ...]:
    return ("reference",)


TERMS = {
    "srpo": Term(losses.srpo, _all, lambda o: bool(o["lambda_"]) or not _on_path(o), _on_path, "paired"),
    "rpo": Term(losses.rpo, _all, _yes, _no, "paired"),
    "sft": Term(losses.sft, _path, _no, _yes, ""),
    "favourable_sft": Term(losses.favourable_sft, _both, _no, _yes, "favourable"),
    "rejection_sft": Term(losses.rejection_sft, _branches, _no, _no, "favourable"),
    "dpo": Term(losses.dpo, _branches, _yes, _no, "paired", _reference),
    "ipo": Term(losses.ipo, _branches, _yes, _no, "paired", _reference),
    "step_dpo": Term(losses.step_dpo, _branches, _yes, _no, "paired", lambda o: ("reference", "step_lengths")),
    "orpo": Term(losses.orpo, _branches, _yes, _no, "paired"),
    "simpo": Term(losses.simpo, _branches, _yes, _no, "paired"),
    "kto": Term(losses.kto, _branches, _no, _no, "all", _reference),
    "grpo": Term(losses.grpo, _branches, _yes, _no, "all", lambda o: ("reference",) if o["beta"] else ()),
    "key_sentence": Term(losses.key_sentence_loss, _key, _no, _yes, "", lambda o: ("key_lengths", "key_slots")),
    "safety_heads": Term(
        losses.safety_head_loss, _heads, _no, _yes, "", lambda o: ("safe", "understanding"), init_heads
    ),
}
"""The objectives that `config.loss.weights` names, in the order of docs/loss.md."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Which objectives an update minimises; the default is SRPO.

    Attributes:
      weights: by term of `TERMS`; a term of weight 0 is not computed.
      options: by term, the keyword arguments of its function that differ from their defaults.
      schedules: by term, (update, factor) points between which the term's weight is multiplied by straight lines;
        before the first and after the last it stays level.

    Raises:
      ValueError: an unknown term or option, a value that the term's function refuses, a negative weight, or no term at
        all.
    """

    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"srpo": 1.0})
    options: Mapping[str, Options] = dataclasses.field(default_factory=dict)
    schedules: Mapping[str, tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, given in (("weights", self.weights), ("options", self.options), ("schedules", self.schedules)):
            if unknown := sorted(given.keys() - TERMS.keys()):
                raise ValueError(f"{what}: there is no objective {', '.join(unknown)}; use {', '.join(TERMS)}")
        for name, weight in self.weights.items():
            if not weight >= 0:
                raise ValueError(f"weights.{name}={weight}: a weight is 0 or more")
        if not self.terms:
            raise ValueError("weights: every objective has weight 0; give one of them a weight, such as srpo or sft")
        for name, points in self.schedules.items():
            updates = [update for update, _ in points]
            if updates != sorted(set(updates)) or any(not factor >= 0 for _, factor in points):
                raise ValueError(
                    f"schedules.{name}={points}: (update, factor) points, updates ascending, factors 0 or more"
                )
        for name in self.terms:
            self._check_options(name)

    def _check_options(self, name: str) -> None:
        """Has the term's function look at its options, on one question with one branch and without any arithmetic."""
        if unknown := sorted(self.options.get(name, {}).keys() - TERMS[name].defaults().keys()):
            known = ", ".join(TERMS[name].defaults()) or "none"
            raise ValueError(f"{name} has no option {', '.join(unknown)}; its options: {known}")

        def look() -> Any:
            one = jnp.zeros((1, 1, 1))
            count = jnp.ones((1, 1), jnp.int32)
            branches = losses.BranchLogprobs(
                one, count, count, one > 0, count[..., None], count, one, one, count, count
            )
            trees = TreeLogprobs(one[0], count[0], branches, count, one[0], count[0], (one[0, 0], one[0, 0]), count[0])
            return TERMS[name].loss(*TERMS[name].arguments(trees), **self.options_of(name))

        try:
            jax.eval_shape(look)  # a configuration is read before devices may be touched
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms with a weight."""
        return tuple(name for name in TERMS if self.weights.get(name))

    def options_of(self, name: str) -> dict[str, Any]:
        """All options of a term."""
        return TERMS[name].defaults() | dict(self.options.get(name, {}))

    def contrasts(self) -> bool:
        """Whether a term compares favourable with unfavourable branches."""
        return any(TERMS[name].contrasts(self.options_of(name)) for name in self.terms)

    def need_branches(self) -> list[str]:
        """The terms that learn nothing from trees without branches."""
        return [name for name in self.terms if not TERMS[name].path_alone(self.options_of(name))]

    def learns(self) -> str:
        """Which branches an update has to compute, see `PackConfig.learns`; without terms that read any, those of pairs, whose
        statistics are logged."""
        kinds = {TERMS[name].learns for name in self.terms} - {""}
        return "all" if len(kinds) > 1 else next(iter(kinds), "paired")

    def extras(self) -> tuple[str, ...]:
        """Fields of `trees.EXTRAS` that the terms read."""
        return tuple(sorted({field for name in self.terms for field in TERMS[name].extras(self.options_of(name))}))

    def parameters(self, width: int) -> dict[str, Any]:
        """The terms' own parameters by path, fresh, which train beside the policy's; `width` is that of hidden states."""
        return {path: x for name in self.terms for path, x in TERMS[name].parameters(width).items()}


def tree_view(scores: TreeScores, batch: TreeBatch, own: Mapping[str, Any] | None = None) -> TreeLogprobs:
    """What the objectives read, from what the model tells of a batch, the batch itself and the terms' own parameters."""
    known = {name: getattr(batch, name) for name in losses.BranchLogprobs._fields if name != "logprobs"}
    branches = losses.BranchLogprobs(scores.branch, **known)
    logits = None if scores.means is None or not own else safety_logits(own, scores.means)
    lengths = batch.path_lengths, branches, batch.prefix_lengths
    return TreeLogprobs(scores.path, *lengths, scores.key, batch.key_lengths, logits, batch.safe)


def total_loss(
    trees: TreeLogprobs, config: LossConfig, step: jax.Array | int = 0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Σ weight · loss of every question float[B], and statistics: those of pairs, each term's own, `loss/<term>`,
    `weight/<term>`."""
    aux = losses.pair_statistics(trees.branches)
    total = jnp.zeros(trees.path_lengths.shape, trees.path.dtype)
    for name in config.terms:
        loss, told = TERMS[name].loss(*TERMS[name].arguments(trees), **config.options_of(name))
        weight = weight_at(config, name, step)
        total += weight * loss
        aux |= told | {f"loss/{name}": jax.lax.stop_gradient(loss), f"weight/{name}": jnp.full_like(loss, weight)}
    return total, aux


def weight_at(config: LossConfig, name: str, step: jax.Array | int) -> jax.Array | float:
    """A term's weight at an update."""
    points = config.schedules.get(name)
    if not points:
        return config.weights[name]
    updates, factors = zip(*points, strict=True)
    return config.weights[name] * jnp.interp(jnp.asarray(step, jnp.float32), jnp.asarray(updates), jnp.asarray(factors))
