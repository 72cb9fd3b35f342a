"""Promises of the composed objective: a weighted sum, schedules, per-term metrics, early refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax import losses
from srpo_jax.training.objective import TERMS, LossConfig, TreeLogprobs, total_loss
from srpo_jax.training.step import question_sums
from tests.losses.questions import L, M, One, as_arrays


def question() -> TreeLogprobs:
    rng = np.random.default_rng(0)
    made = [One(i % 3, int(i < 3), 1, 1, *(-rng.exponential(size=4) for _ in range(3))) for i in range(6)]
    branches = as_arrays(made)._replace(tokens=jnp.asarray(rng.integers(0, 9, (1, M, L))))
    return trees_of(branches)


def trees_of(branches: losses.BranchLogprobs) -> TreeLogprobs:
    path, key = jnp.asarray([[-1.0, -2.0, -0.5]]), jnp.asarray([[-3.0, -1.0, -9.0]])
    logits, safe = (jnp.asarray([0.5]), jnp.asarray([-1.5])), jnp.asarray([1])
    return TreeLogprobs(path, jnp.asarray([3]), branches, jnp.ones((1, M), int), key, jnp.asarray([2]), logits, safe)


FUNCTIONS = {
    "key_sentence": losses.key_sentence_loss,
    "safety_heads": losses.safety_head_loss,
}  # the others have the names of their functions


@pytest.mark.parametrize("name", TERMS)
def test_a_single_term_is_its_function(name):
    trees, config = question(), LossConfig({name: 1.0})
    total, aux = total_loss(trees, config)
    function = FUNCTIONS.get(name) or getattr(losses, name)
    loss, _ = function(*TERMS[name].arguments(trees))
    np.testing.assert_allclose(total, loss, rtol=1e-6)
    np.testing.assert_allclose(aux[f"loss/{name}"], loss, rtol=1e-6)
    assert float(aux["pairs"][0]) == np.sum(trees.branches.pairs) > 0
    assert all(x.shape == (1,) for x in question_sums_input(aux))


@pytest.mark.parametrize("name", TERMS)
def test_a_term_learns_from_the_branches_that_it_says(name):
    """Those of a prefix on one side, or the unfavourable ones, may then be left out of the update."""
    rng = np.random.default_rng(1)
    # Branch 0 against 1 and 2 of its prefix; prefixes 1 (favourable) and 2 are one-sided.
    places = [(0, 1), (0, 0), (0, 0), (1, 1), (1, 1), (2, 0)]
    made = [One(prefix, verdict, 1, 1, *(-rng.exponential(size=4) for _ in range(3))) for prefix, verdict in places]
    branches = as_arrays(made)._replace(tokens=jnp.asarray(rng.integers(0, 9, (1, M, L))))
    trees, config = trees_of(branches), LossConfig({name: 1.0})

    def loss(logprobs):
        return total_loss(trees._replace(branches=branches._replace(logprobs=logprobs)), config)[0].sum()

    moved = np.abs(jax.grad(loss)(branches.logprobs)[0]).sum(-1) > 0
    read = {"": set(), "all": set(range(6)), "paired": {0, 1, 2}, "favourable": {0, 3, 4}}[TERMS[name].learns]
    assert set(np.flatnonzero(moved)) <= read and moved.any() == bool(read)


@pytest.mark.parametrize(
    ("weights", "learns"),
    [
        ({"srpo": 1.0}, "paired"),
        ({"sft": 1.0}, "paired"),
        ({"sft": 1.0, "rejection_sft": 1.0}, "favourable"),
        ({"favourable_sft": 1.0, "dpo": 1.0}, "all"),
        ({"srpo": 1.0, "kto": 1.0}, "all"),
        ({"srpo": 1.0, "kto": 0.0}, "paired"),
    ],
)
def test_a_sum_of_terms_learns_from_the_branches_of_each(weights, learns):
    assert LossConfig(weights).learns() == learns


def question_sums_input(aux):
    """Every statistic is one number per question, so that it can be summed over micro-batches."""
    question_sums(jnp.ones(1), aux, jnp.ones(1))
    return aux.values()


def test_the_key_sentence_is_scored_as_far_as_it_goes():
    total, aux = total_loss(question(), LossConfig({"sft": 1.0, "key_sentence": 0.2}))
    assert float(total[0]) == pytest.approx(3.5 / 3 + 0.2 * 2.0)
    assert float(aux["key_sentence_loss"][0]) == 2.0 and float(aux["has_key_sentence"][0]) == 1.0


def test_terms_add_up_by_weight():
    trees = question()
    config = LossConfig({"srpo": 0.5, "dpo": 2.0, "kto": 0.0}, {"dpo": {"beta": 0.3}, "srpo": {"lambda_": 0.7}})
    total, aux = total_loss(trees, config)
    srpo = losses.srpo(trees.path, trees.path_lengths, trees.branches, lambda_=0.7)[0]
    np.testing.assert_allclose(total, 0.5 * srpo + 2 * losses.dpo(trees.branches, beta=0.3)[0], rtol=1e-6)
    assert "loss/kto" not in aux and float(aux["weight/dpo"][0]) == 2


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (10, 0.0), (15, 1.0), (20, 2.0), (99, 2.0)])
def test_weights_follow_their_schedule(step, weight):
    trees = question()
    config = LossConfig({"sft": 1.0, "simpo": 2.0}, schedules={"simpo": ((10, 0.0), (20, 1.0))})
    total, aux = jax.jit(lambda step: total_loss(trees, config, step))(step)
    assert float(aux["weight/simpo"][0]) == pytest.approx(weight)
    expected = losses.sft(trees.path, trees.path_lengths)[0] + weight * losses.simpo(trees.branches)[0]
    np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"dop": 1.0}}, r"weights: there is no objective dop; use srpo, rpo, sft"),
        (
            {"weights": {"dpo": 1.0}, "options": {"dpo": {"bta": 0.1}}},
            r"dpo has no option bta; its options: beta, normalise",
        ),
        ({"weights": {"sft": 1.0}, "options": {"sft": {"x": 1}}}, r"sft has no option x; its options: none"),
        ({"weights": {"dpo": 1.0}, "options": {"dpo": {"beta": 0.0}}}, r"dpo: beta=0\.0: it must be more than 0"),
        ({"weights": {"grpo": 1.0}, "options": {"grpo": {"scale": "max"}}}, r"grpo: scale='max': use 'std' or 'none'"),
        (
            {"weights": {"safety_heads": 1.0}, "options": {"safety_heads": {"theta": 2.0}}},
            r"safety_heads: theta=2\.0: a share between 0 and 1",
        ),
        ({"weights": {"srpo": 0.0}}, r"every objective has weight 0"),
        ({"schedules": {"srpo": ((0, -1.0),)}}, r"schedules\.srpo=.*factors 0 or more"),
    ],
)
def test_what_cannot_be_minimised_is_refused_before_anything_is_computed(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**arguments)


def test_an_objective_knows_what_it_needs():
    def needs(name, **options):
        config = LossConfig({name: 1.0}, {name: options})
        return config.contrasts(), bool(config.need_branches()), config.extras()

    assert needs("srpo") == (True, False, ())
    assert needs("srpo", lambda_=0.0) == needs("sft") == needs("favourable_sft") == (False, False, ())
    assert needs("srpo", reference="favourable") == (True, True, ())
    assert needs("rejection_sft") == (False, True, ())
    assert needs("grpo") == (True, True, ()) and needs("grpo", beta=0.1)[2] == ("reference",)
    assert needs("step_dpo") == (True, True, ("reference", "step_lengths"))
