"""Promise: a policy encodes batches into few shapes, runs as a pure function of its parameters, and is reproducible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.models.hf import param_shapes
from srpo_jax.models.policy import bucket, forward, init_policy, load_policy


@pytest.fixture(scope="session")
def policy(checkpoint):
    return checkpoint("untied").policy


def test_bucket_ladder():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 25, 33)] == [
        1,
        2,
        3,
        4,
        6,
        6,
        8,
        8,
        12,
        16,
        24,
        32,
        48,
    ]
    assert bucket(17, 16) == 32
    assert all(n <= bucket(n) <= max(4, 1.5 * n) for n in range(1, 2000))
    assert len({bucket(n) for n in range(1, 4097)}) < 26


def test_batches_of_a_bucket_share_their_shapes(policy, picture):
    def shapes(size, question):
        batch = policy.encode([{"image": picture(size, size), "question": question}, {"question": "text only"}])
        return jax.tree.map(jnp.shape, batch)

    assert shapes(112, "What is shown?") == shapes(100, "What is there to see?")
    batch = policy.encode([{"images": [], "question": "a"}, {"question": "b"}])
    assert batch.vision is None
    assert batch.tokens.shape == (2, 32) or batch.tokens.shape[1] == bucket(int(batch.lengths.max()))


def test_forward_reads_the_given_params(policy):
    inputs = policy.encode([{"question": "a"}])
    doubled = {**policy.params, "head": policy.params["head"] * 2}
    np.testing.assert_allclose(
        forward(policy, doubled, inputs), 2 * forward(policy, policy.params, inputs), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"question": "a", "picture": None}, r"example 1: unknown field\(s\) \['picture'\]"),
        ({"images": []}, "example 1: give a question"),
        ({"question": "a", "image": None, "images": []}, "not both"),
        ({"question": 3}, "example 1: the question must be text"),
    ],
)
def test_bad_examples_are_named(policy, example, message):
    with pytest.raises(ValueError, match=message):
        policy.encode([{"question": "fine"}, example])


def test_no_examples(policy):
    with pytest.raises(ValueError, match="no examples"):
        policy.encode([])


def test_initial_policy_is_reproducible_and_saves(policy, tmp_path):
    first, second = (init_policy(policy.config, policy.processor, seed) for seed in (3, 3))
    other = init_policy(policy.config, policy.processor, 4)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first.params) == param_shapes(policy.config)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first.params, second.params)))
    assert not bool((first.params["embed"] == other.params["embed"]).all())
    layers = first.params["layers"]["mlp"]["gate"]["kernel"]
    assert not bool((layers[0] == layers[1]).all())
    first.save(tmp_path / "saved")
    loaded = load_policy(tmp_path / "saved")
    assert loaded.config == policy.config
    assert loaded.graphdef == first.graphdef
    inputs = first.encode([{"question": "a"}])
    np.testing.assert_array_equal(forward(loaded, loaded.params, inputs), forward(first, first.params, inputs))
