"""The SRPO loss against a plain reading of its formula, branch by branch and pair by pair, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_jax import losses
from srpo_jax.losses import branches as module
from srpo_jax.trees import FAVOURABLE, UNFAVOURABLE, UNKNOWN, select_pairs

A, M, L, PREFIXES = 9, 8, 6, 3


@st.composite
def questions(draw):
    """Plain lists: path log-probs, and branches (prefix, verdict, tokens, log-probs), some with m near 0."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    path = -rng.exponential(size=draw(st.integers(1, A)))
    branches = []
    for _ in range(draw(st.integers(0, M))):
        n = draw(st.integers(1, L))
        scale = draw(st.sampled_from([1.0, 1.0, 1e-2, 1e-7]))
        verdict = draw(st.sampled_from([FAVOURABLE, UNFAVOURABLE, UNKNOWN]))
        # Few distinct tokens, so that openings are often shared.
        branches.append(
            (draw(st.integers(0, PREFIXES - 1)), verdict, rng.integers(0, 2, n), -scale * rng.exponential(size=n))
        )
    return path, branches


def arrays(path, branches):
    prefixes = np.full(M, -1)
    lengths, tokens, logprobs = (
        np.zeros(M, int),
        np.zeros((M, L), int),
        np.full((M, L), np.nan),
    )  # NaN: padding must not leak
    verdicts = np.full(M, UNKNOWN)
    for m, (prefix, verdict, toks, values) in enumerate(branches):
        prefixes[m], verdicts[m], lengths[m] = prefix, verdict, len(toks)
        tokens[m, : len(toks)], logprobs[m, : len(toks)] = toks, values
    padded = np.full(A, np.nan)
    padded[: len(path)] = path
    pairs = select_pairs(prefixes, verdicts)
    one = losses.BranchLogprobs(*(jnp.asarray(x)[None] for x in (logprobs, lengths, prefixes, pairs, tokens)))
    return jnp.asarray(padded)[None], jnp.asarray([len(path)]), one


def plain_odds(m):
    m = min(m, module.M_CEILING)
    return m - np.log(-np.expm1(m))


def plain_ell(m_plus, m_minus):
    return np.logaddexp(0.0, -(plain_odds(m_plus) - plain_odds(m_minus)))


def plain_srpo(path, branches, lambda_):
    by_prefix = []
    for i in range(PREFIXES):
        plus = [np.mean(v) for p, y, _, v in branches if p == i and y == FAVOURABLE]
        minus = [np.mean(v) for p, y, _, v in branches if p == i and y == UNFAVOURABLE]
        if plus and minus:
            by_prefix.append(np.mean([plain_ell(a, b) for a in plus for b in minus]))
    return -np.mean(path) + lambda_ * (np.mean(by_prefix) if by_prefix else 0.0)


def plain_rpo(path, ends, branches, lambda_):
    """RPO's released objective: per pair, likelihood of prefix + favourable branch, and odds of what the two do not share."""
    terms = []
    for i, y_plus, t_plus, v_plus in branches:
        for j, y_minus, t_minus, v_minus in branches:
            if i != j or y_plus != FAVOURABLE or y_minus != UNFAVOURABLE:
                continue
            shared = 0
            while shared < min(len(t_plus), len(t_minus)) and t_plus[shared] == t_minus[shared]:
                shared += 1
            if shared in (len(t_plus), len(t_minus)):
                continue
            whole = np.concatenate([path[: ends[i]], v_plus])
            ell = plain_ell(np.mean(v_plus[shared:]), np.mean(v_minus[shared:]))
            terms.append(-np.mean(whole) + lambda_ * ell)
    return np.mean(terms) if terms else 0.0


@settings(deadline=None, max_examples=150)
@given(questions(), st.floats(0, 2))
def test_loss_is_the_formula(question, lambda_):
    with jax.enable_x64(True):
        loss, aux = losses.srpo(*arrays(*question), lambda_=lambda_)
        assert float(loss[0]) == pytest.approx(plain_srpo(*question, lambda_), rel=1e-9)
        assert np.isfinite([np.asarray(x) for x in aux.values()]).all()


@settings(deadline=None, max_examples=150)
@given(questions(), st.floats(0, 2))
def test_released_rpo_is_its_own_formula(question, lambda_):
    path, branches = question
    ends = [min(i, len(path)) for i in range(PREFIXES)]
    with jax.enable_x64(True):
        path_logprobs, path_lengths, data = arrays(path, branches)
        prefix_lengths = jnp.asarray([ends[p] if p >= 0 else 0 for p in np.asarray(data.prefixes)[0]])[None]
        loss, _ = losses.rpo(path_logprobs, path_lengths, data, prefix_lengths, beta=lambda_)
        assert float(loss[0]) == pytest.approx(plain_rpo(path, ends, branches, lambda_), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(questions())
def test_gradients_are_finite_and_zero_on_padding(question):
    path_logprobs, path_lengths, data = arrays(*question)

    def total(path, branch):
        return losses.srpo(path, path_lengths, data._replace(logprobs=branch))[0].sum()

    for grad, real in zip(
        jax.grad(total, argnums=(0, 1))(path_logprobs, data.logprobs),
        (jnp.arange(A) < path_lengths[:, None], jnp.arange(L) < data.lengths[..., None]),
        strict=True,
    ):
        assert np.isfinite(grad).all()
        assert not np.any(np.where(real, 0, grad))


def test_log_odds_is_exact_clamped_and_flat_beyond_the_clamp():
    with jax.enable_x64(True):
        m = -np.logspace(-3.9, 1.5, 60)
        exact = [plain_odds(x) for x in m]
        np.testing.assert_allclose(losses.log_odds(jnp.asarray(m)), exact, rtol=1e-12)
        slope = jax.vmap(jax.grad(losses.log_odds))(jnp.asarray(m))
        np.testing.assert_allclose(slope, 1 / -np.expm1(m), rtol=1e-9)
        beyond = jnp.asarray([-1e-5, -1e-300, 0.0])
        np.testing.assert_allclose(losses.log_odds(beyond), plain_odds(module.M_CEILING))
        assert not jax.vmap(jax.grad(losses.log_odds))(beyond).any()


def test_a_favourable_branch_is_raised_and_an_unfavourable_one_lowered():
    data = losses.BranchLogprobs(
        jnp.full((1, 2, 3), -0.5),
        jnp.full((1, 2), 3),
        jnp.zeros((1, 2), int),
        jnp.asarray([[[False, True], [False, False]]]),
    )
    grad = jax.grad(lambda x: losses.srpo(jnp.zeros((1, 1)), jnp.ones((1,), int), data._replace(logprobs=x))[0].sum())
    plus, minus = grad(data.logprobs)[0]
    assert (plus < 0).all()
    assert (minus > 0).all()


def test_prefixes_with_a_pair_weigh_the_same_and_one_sided_prefixes_nothing():
    verdicts = [1, 0, 0, 1, 0, 1, -1]
    prefixes = np.asarray([0, 0, 0, 1, 1, 2, 2])
    pairs = jnp.asarray(select_pairs(prefixes, verdicts))[None]
    weights = np.asarray(module.pair_weights(pairs, jnp.asarray(prefixes)[None])[0])
    assert weights.sum(axis=1).tolist() == pytest.approx([0.5, 0, 0, 0.5, 0, 0, 0])


@pytest.mark.parametrize("options", [{"reference": "prompt"}, {"balance": "token"}, {"reference": "favourable"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match=r"use '|needs prefix_lengths"):
        losses.srpo(*arrays([-1.0], []), **options)
