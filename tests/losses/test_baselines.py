"""Every baseline against a plain numpy reading of its formula, and the invariants that its paper promises."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_jax import losses
from tests.losses.questions import PREFIXES, One, as_arrays, branch_lists, plain_pairs

FEW = settings(deadline=None, max_examples=50)


def softplus(x):
    return np.logaddexp(0.0, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def h(b: One) -> float:
    return float(np.sum(b.logprobs - b.reference))


def h_mean(b: One) -> float:
    return h(b) / len(b.logprobs)


def odds(b: One) -> float:
    m = min(np.mean(b.logprobs), -1e-4)
    return m - np.log(-np.expm1(m))


def step_h(b: One) -> float:
    return float(np.sum((b.logprobs - b.reference)[: b.step]))


PAIRWISE = {
    "dpo": (losses.dpo, {"beta": 0.3}, lambda a, b: softplus(-0.3 * (h(a) - h(b)))),
    "dpo per token": (
        losses.dpo,
        {"beta": 2.0, "normalise": True},
        lambda a, b: softplus(-2.0 * (h_mean(a) - h_mean(b))),
    ),
    "ipo": (losses.ipo, {"tau": 0.2}, lambda a, b: (h_mean(a) - h_mean(b) - 2.5) ** 2),
    "ipo of sums": (losses.ipo, {"tau": 0.2, "normalise": False}, lambda a, b: (h(a) - h(b) - 2.5) ** 2),
    "step_dpo": (losses.step_dpo, {"beta": 0.3}, lambda a, b: softplus(-0.3 * (step_h(a) - step_h(b)))),
    "orpo": (
        losses.orpo,
        {"lambda_": 0.7},
        lambda a, b: -np.mean(a.logprobs) + 0.7 * softplus(odds(b) - odds(a)),
    ),
    "simpo": (
        losses.simpo,
        {"beta": 2.0, "gamma": 0.5},
        lambda a, b: softplus(0.5 - 2.0 * (np.mean(a.logprobs) - np.mean(b.logprobs))),
    ),
}


@pytest.mark.parametrize("name", PAIRWISE)
@FEW
@given(branches=branch_lists())
def test_pair_losses_are_their_formulas(name, branches):
    loss, options, plain = PAIRWISE[name]
    with jax.enable_x64(True):
        found, _ = loss(as_arrays(branches), **options)
        assert float(found[0]) == pytest.approx(plain_pairs(branches, plain), rel=1e-9, abs=1e-12)


@FEW
@given(branch_lists())
def test_kto_is_its_formula(branches):
    with jax.enable_x64(True):
        z = max(0.0, np.mean([h(b) for b in branches])) if branches else 0.0
        values = [
            1.5 * (1 - sigmoid(0.3 * (h(b) - z))) if b.verdict else 0.5 * (1 - sigmoid(0.3 * (z - h(b))))
            for b in branches
        ]
        found, told = losses.kto(as_arrays(branches), beta=0.3, desirable=1.5, undesirable=0.5)
        assert float(found[0]) == pytest.approx(np.mean(values) if values else 0.0, rel=1e-9)
        assert float(told["kl_kto"][0]) == pytest.approx(z, rel=1e-9)


@FEW
@given(branch_lists())
def test_supervised_losses_are_their_formulas(branches):
    with jax.enable_x64(True):
        path, lengths = jnp.asarray([[-1.0, -2.0, jnp.nan]]), jnp.asarray([2])
        means = [(b.prefix, np.mean(b.logprobs)) for b in branches if b.verdict]
        every, first = [-m for _, m in means], [-m for prefix, m in means if prefix == 0]
        both, _ = losses.favourable_sft(path, lengths, as_arrays(branches))
        assert float(both[0]) == pytest.approx(1.5 + (np.mean(every) if every else 0.0), rel=1e-9)
        rejection, told = losses.rejection_sft(as_arrays(branches))
        assert float(rejection[0]) == pytest.approx(np.mean(first) if first else 0.0, rel=1e-9)
        assert int(told["samples_accepted"][0]) == len(first)


def plain_grpo(branches: list[One], o: dict) -> float:
    """Sample by sample: every identical one is there on its own."""
    groups = []
    for i in range(PREFIXES):
        group = [b for b in branches if b.prefix == i for _ in range(b.count)]
        if not group:
            continue
        rewards = np.asarray([float(b.verdict) for b in group])
        advantages = rewards - rewards.mean()
        if o["scale"] == "std":
            advantages = advantages / (rewards.std(ddof=1) + 1e-4 if len(group) > 1 else 1e-4)
        terms = []
        for b, a in zip(group, advantages, strict=True):
            log_rho = b.logprobs - b.sampled
            if o["ratio"] == "sequence":
                log_rho = np.full_like(log_rho, log_rho.mean())
            rho = np.exp(log_rho)
            gap = b.reference - b.logprobs
            kl = np.exp(gap) - gap - 1
            terms.append(-np.minimum(rho * a, np.clip(rho, 1 - o["clip_low"], 1 + o["clip_high"]) * a) + o["beta"] * kl)
        if o["aggregate"] == "sequence":
            groups.append(np.mean([t.mean() for t in terms]))
        elif o["aggregate"] == "token":
            groups.append(np.concatenate(terms).mean())
        else:
            groups.append(np.mean([t.sum() / o["max_tokens"] for t in terms]))
    return float(np.mean(groups)) if groups else 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"scale": "none", "aggregate": "constant", "max_tokens": 7},
        {"clip_high": 0.28, "aggregate": "token"},
        {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    ],
    ids=["GRPO with KL", "Dr. GRPO", "DAPO", "GSPO"],
)
@FEW
@given(branches=branch_lists())
def test_grpo_and_its_variants_are_their_formulas(options, branches):
    usual = {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.0, "scale": "std", "ratio": "token", "aggregate": "sequence"}
    with jax.enable_x64(True):
        found, _ = losses.grpo(as_arrays(branches), **options)
        assert float(found[0]) == pytest.approx(plain_grpo(branches, usual | options), rel=1e-7, abs=1e-9)


ALL = {name: (loss, options) for name, (loss, options, _) in PAIRWISE.items()} | {
    "kto": (losses.kto, {}),
    "grpo": (losses.grpo, {"beta": 0.1}),
    "rejection_sft": (losses.rejection_sft, {}),
}


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=15)
@given(branches=branch_lists(), seed=st.integers(0, 99))
def test_order_of_branches_does_not_matter_and_padding_gets_no_gradient(name, branches, seed):
    loss, options = ALL[name]
    shuffled = [branches[i] for i in np.random.default_rng(seed).permutation(len(branches))]
    with jax.enable_x64(True):
        one, other = as_arrays(branches), as_arrays(shuffled)
        assert float(loss(one, **options)[0][0]) == pytest.approx(
            float(loss(other, **options)[0][0]), rel=1e-9, abs=1e-12
        )
        grad = jax.grad(lambda x: loss(one._replace(logprobs=x), **options)[0].sum())(one.logprobs)
        real = jnp.arange(one.logprobs.shape[-1]) < one.lengths[..., None]
        assert np.isfinite(grad).all() and not np.any(np.where(real, 0, grad))


@settings(deadline=None, max_examples=25)
@given(branch_lists(), st.floats(0.05, 5))
def test_dpo_is_ln_2_where_policy_and_reference_coincide(branches, beta):
    same = [dataclasses.replace(b, reference=b.logprobs) for b in branches]
    with jax.enable_x64(True):
        data = as_arrays(same)
        expected = np.log(2) if np.any(data.pairs) else 0.0
        for loss in (losses.dpo, losses.step_dpo):
            assert float(loss(data, beta=beta)[0][0]) == pytest.approx(expected, rel=1e-12)


def one_pair(plus, minus, **more) -> losses.BranchLogprobs:
    """A favourable and an unfavourable branch at prefix 0, log-probs given."""
    made = [One(0, v, 1, len(x), *(np.asarray(x, float),) * 3) for v, x in ((1, plus), (0, minus))]
    return as_arrays(made)._replace(**more)


SIGMOID = {  # each with the slope of its score at equal scores: ½ · d score / d m
    "dpo": (losses.dpo, {"beta": 0.4}, lambda n: 0.5 * 0.4),
    "dpo per token": (losses.dpo, {"beta": 0.4, "normalise": True}, lambda n: 0.5 * 0.4 / n),
    "step_dpo": (losses.step_dpo, {"beta": 0.4}, lambda n: 0.5 * 0.4),
    "simpo": (losses.simpo, {"beta": 0.4, "gamma": 0.0}, lambda n: 0.5 * 0.4 / n),
    "srpo": (lambda b: losses.srpo(jnp.zeros((1, 1)), jnp.ones((1,), int), b, lambda_=1.0), {}, None),
}


@pytest.mark.parametrize("name", SIGMOID)
def test_identical_branches_have_no_gradient_and_equal_scores_weigh_a_half(name):
    """Two copies of one branch, favourable and unfavourable, move the shared parameters not at all."""
    loss, options, slope = SIGMOID[name]
    with jax.enable_x64(True):
        tokens = jnp.asarray([-0.5, -1.5, -0.7])
        data = one_pair(tokens, tokens)

        def value(x):
            return loss(data._replace(logprobs=data.logprobs.at[0, 0, :3].set(x).at[0, 1, :3].set(x)), **options)[
                0
            ].sum()

        np.testing.assert_allclose(jax.grad(value)(tokens), 0, atol=1e-12)
        each = jax.grad(lambda x: loss(data._replace(logprobs=x), **options)[0].sum())(data.logprobs)[0, :2, :3]
        expected = 0.5 / (-np.expm1(tokens.mean())) / 3 if slope is None else slope(3)
        np.testing.assert_allclose(each, [[-expected] * 3, [expected] * 3], rtol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.05, 2), st.floats(-3, 3))
def test_ipo_is_least_at_a_margin_of_one_over_two_tau(tau, shift):
    best = 1 / (2 * tau)
    with jax.enable_x64(True):

        def at(margin):
            data = one_pair([-5.0], [-5.0])
            return losses.ipo(data._replace(logprobs=data.logprobs.at[0, 0, 0].add(margin)), tau=tau)[0][0]

        assert float(at(best)) == pytest.approx(0, abs=1e-18)
        assert float(jax.grad(at)(best)) == pytest.approx(0, abs=1e-9)
        assert float(at(best + shift)) >= float(at(best))


@pytest.mark.parametrize("name", ["dpo per token", "ipo", "orpo", "simpo"])
def test_length_normalised_losses_do_not_see_the_length(name):
    """A branch whose tokens all have one log-prob scores the same at any length; sums do not."""
    loss, options, _ = PAIRWISE[name]

    def at(loss, n, **options):
        data = one_pair([-0.4] * n, [-0.9] * n)
        data = data._replace(reference=data.reference + jnp.asarray([0.1, -0.2, *[0.0] * 5])[:, None])
        return float(loss(data, **options)[0][0])

    assert at(loss, 1, **options) == pytest.approx(at(loss, 5, **options), rel=1e-6)
    assert abs(at(losses.dpo, 1) - at(losses.dpo, 5)) > 1e-3


def test_grpo_learns_nothing_from_a_group_of_one_mind_and_raises_the_better_branch():
    same = one_pair([-1.0], [-1.0], verdicts=jnp.asarray([[1, 1, *[-1] * 5]]))
    gradient = jax.grad(lambda x, d: losses.grpo(d._replace(logprobs=x))[0].sum())
    assert not np.any(gradient(same.logprobs, same))
    split = one_pair([-1.0], [-1.0])
    plus, minus = gradient(split.logprobs, split)[0, :2, 0]
    assert plus < 0 < minus


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "step_dpo", "grpo", "rejection_sft"])
def test_a_missing_array_is_named(name):
    bare = one_pair([-1.0], [-1.0])
    bare = losses.BranchLogprobs(bare.logprobs, bare.lengths, bare.prefixes, bare.pairs)
    with pytest.raises(ValueError, match=rf"{name}.* needs BranchLogprobs\.\w+|dpo needs BranchLogprobs\.reference"):
        getattr(losses, name)(bare)


def test_safety_is_gated_by_effectiveness():
    safe, effective = jnp.asarray([[0, 0, 1, 1]]), jnp.asarray([[0, 1, 0, 1]])
    assert losses.gated_reward(safe, effective).tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_safekey_terms_are_cross_entropies():
    logits, safe = np.asarray([1.2, -0.3]), np.asarray([1, 0])
    loss, told = losses.safety_head_loss(jnp.asarray(logits), jnp.asarray(-logits), jnp.asarray(safe))
    expected = [(softplus(-1.2) + softplus(1.2)) / 2, (softplus(-0.3) + softplus(0.3)) / 2]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    loss, _ = losses.safety_head_loss(jnp.asarray(logits), jnp.asarray(-logits), jnp.asarray(safe), theta=0.25)
    np.testing.assert_allclose(loss[0], 0.75 * softplus(-1.2) + 0.25 * softplus(1.2), rtol=1e-6)
    assert told["head_accuracy_full"].tolist() == [1, 1] and told["head_accuracy_understanding"].tolist() == [0, 0]
    key = jnp.asarray([[True, False, True], [False, False, False]])
    loss, _ = losses.key_sentence_loss(jnp.asarray([[-1.0, -9.0, -3.0], [-1.0, -1.0, -1.0]]), key)
    assert loss.tolist() == [2.0, 0.0]
