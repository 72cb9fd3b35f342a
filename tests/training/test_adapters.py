"""Promises of runs with adapters on an int8 base: what is stored and moved, in which precision, by whom it is explored."""

import dataclasses
import math
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from srpo_jax import sharding
from srpo_jax.checkpoint import Checkpointer
from srpo_jax.data import scenes
from srpo_jax.exploration.explorer import ExploreConfig
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.files import read_jsonl
from srpo_jax.judges.verdict import Verdict
from srpo_jax.models.lora import LoraConfig
from srpo_jax.models.policy import adapt, load_policy
from srpo_jax.models.quantize import is_quantisable
from srpo_jax.models.scoring import tree_logprobs
from srpo_jax.training.data import BatchConfig, step_batches
from srpo_jax.training.loop import RunConfig, train
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.state import OptimConfig, abstract_state, init_state, select_trainable
from srpo_jax.training.step import ComputeConfig, make_update
from srpo_jax.trees import PackConfig, ReasoningTree, pack_trees

RUN = RunConfig(
    explore=ExploreConfig(k=4, max_tokens=10, trees=2, trunk=(144,), patches=(16,)),
    loss=LossConfig(options={"srpo": {"lambda_": 0.5}}),
    optim=OptimConfig(3e-2, steps=4, schedule="constant", offload=True),
    pack=PackConfig((144,), (112,), (28,), 16, (24,), (10,), (16,)),
    batch=BatchConfig(trees=2),
    compute=ComputeConfig(remat="none"),
    rounds=2,
    updates=2,
    checkpoint_every=1,
    keep=9,
    max_truncated=1.0,
    max_unknown=1.0,
)


def judge(record, path):
    good = zlib.crc32(path.answer.encode()) % 2 == 0  # so that both kinds occur
    return Verdict(safe=good, effective=good, reason="")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def records():
    return scenes.records("train", 2)


@pytest.fixture(scope="module")
def policy(tiny_policy, tmp_path_factory):
    """The tiny policy in int8 with adapters on two kinds of kernels."""
    folder = tmp_path_factory.mktemp("policy") / "base"
    tiny_policy.save(folder)
    return adapt(load_policy(folder, quantize="int8"), LoraConfig(2, targets=("attention/(q|v)",)), seed=0)


@pytest.fixture(scope="module")
def finished(policy, records, mesh, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("adapters") / "run"
    return workdir, train(policy, records, judge, RUN, workdir, mesh)


def test_a_checkpoint_holds_adapters_and_their_moments_alone(finished, policy, mesh):
    workdir, params = finished
    optimizer = RUN.optim.make()
    like = abstract_state(policy.params, optimizer, None, mesh, offload=True).moving()
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        state, metadata = checkpoints.restore(4, like)  # refuses another set of arrays
    names = {path.rpartition("/")[2] for path in state.params}
    assert names == {"lora_a", "lora_b"} and metadata["frozen"]
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype for x in [*moments, *state.params.values()]} == {jnp.dtype("float32")}
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in state.params.values())
    before, after = sharding.flatten(policy.params), sharding.flatten(params)
    moved = {path for path in after if (np.asarray(before[path]) != np.asarray(after[path])).any()}
    assert moved == state.params.keys()
    assert {str(after[path].dtype) for path in after if is_quantisable(path)} == {"int8"}


def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(finished, policy, records, mesh, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "4")
    again = train(policy, records, judge, RUN, workdir, mesh)
    jax.tree.map(np.testing.assert_array_equal, again, finished[1])
    assert (workdir / "metrics.jsonl").read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()


def test_later_rounds_explore_with_the_adapted_policy(finished, policy, records, mesh):
    """What the sampler noted of its tokens is what the adapted policy of the round's start gives them, and no other."""
    like = abstract_state(policy.params, RUN.optim.make(), None, mesh, offload=True).moving()
    with Checkpointer(finished[0] / "checkpoints", read_only=True) as checkpoints:
        state, _ = checkpoints.restore(2, like)
    lines = {line["record_id"]: line for line in read_jsonl(finished[0] / "trees" / "round_001" / "branches.jsonl")}
    trees = []
    for record in records:
        tree = ReasoningTree.from_json(lines[record.id], make_trunk(record, policy.processor))
        usable = tuple(dataclasses.replace(branch, status="ok", verdict=True) for branch in tree.branches)
        trees.append(ReasoningTree(tree.trunk, usable))
    batch, _ = pack_trees(trees, RUN.pack)

    @jax.jit
    def score(params):
        return tree_logprobs(nnx.merge(policy.graphdef, params), batch)[1]

    def largest_gap(moving):
        """Between what was noted and what is scored now; identical branches of a prefix are one."""
        scores = score(sharding.unflatten(sharding.flatten(policy.params) | moving))
        gap = 0.0
        for i, tree in enumerate(trees):
            known = {(b.prefix, tuple(b.tokens.tolist())): b.logprobs for b in tree.branches}
            for m in range(np.count_nonzero(batch.lengths[i])):
                n = batch.lengths[i, m]
                noted = known[int(batch.prefixes[i, m]), tuple(batch.tokens[i, m, :n].tolist())]
                gap = max(gap, float(np.abs(noted - scores[i, m, :n]).max()))
        return gap

    assert largest_gap(state.params) < 1e-4
    assert largest_gap(select_trainable(policy.params, None)[0]) > 1e-2


@pytest.fixture(scope="module")
def batch(policy, records):
    trees = [ReasoningTree(make_trunk(record, policy.processor), ()) for record in records]
    pack = dataclasses.replace(RUN.pack, rows=(9,), branches=(0,), branch=(1,))
    return next(step_batches(trees, pack, BatchConfig(trees=2), 0, 1)).batches


def updated(policy, batch, mesh, optim: OptimConfig, compute: ComputeConfig):
    """One update: the state before and after it."""
    optimizer, options = optim.make(), {"offload": optim.offload}
    state = init_state(policy.params, optimizer, None, mesh, **options)
    before = jax.device_get(state.params)
    supervised = LossConfig(options={"srpo": {"lambda_": 0.0}})
    update = make_update(policy.graphdef, optimizer, supervised, compute, mesh, state, **options)
    program = update.lower(state, batch)
    return before, update(state, batch)[0], program


def test_bfloat16_computes_and_float32_moves(policy, batch, mesh):
    """The update's arguments are an int8 base and float32 adapters; a step far below bfloat16's resolution is not lost."""
    optim = OptimConfig(1e-6, steps=1, schedule="constant", clip=0.0)
    drawn = np.random.default_rng(0)
    flat = sharding.flatten(policy.params)
    flat = {p: jnp.asarray(drawn.normal(size=x.shape), x.dtype) if p.endswith("lora_b") else x for p, x in flat.items()}
    policy = dataclasses.replace(policy, params=sharding.unflatten(flat))
    before, state, program = updated(policy, batch, mesh, optim, ComputeConfig("bfloat16", "none"))
    kernels = [x for path, x in flat.items() if is_quantisable(path)]
    shapes = {x.shape for x in kernels}
    stored = [x for x in jax.tree.leaves(program.args_info) if x.shape in shapes]
    assert {x.dtype for x in stored} == {jnp.dtype("int8")}
    assert sum(math.prod(x.shape) for x in stored) == sum(x.size for x in kernels) > 0
    assert "xbf16>" in program.as_text()
    assert {x.dtype for x in [*state.params.values(), *optax.tree.get(state.opt_state, "mu").values()]} == {
        jnp.dtype("float32")
    }
    for path, x in state.params.items():
        moved = np.asarray(x) != before[path]
        lost = np.asarray(x, jnp.bfloat16) == np.asarray(before[path], jnp.bfloat16)
        assert moved.mean() > 0.5 and (lost & moved).mean() > 0.4, path
    assert all(state.frozen[path].dtype == flat[path].dtype for path in state.frozen)


def test_moments_in_the_hosts_memory_change_no_bit(policy, batch, mesh):
    optim = OptimConfig(1e-2, steps=1, schedule="constant", offload=True)
    _, ours, _ = updated(policy, batch, mesh, optim, RUN.compute)
    _, theirs, _ = updated(policy, batch, mesh, dataclasses.replace(optim, offload=False), RUN.compute)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    kinds = [x.sharding.memory_kind for x in jax.tree.leaves(ours.opt_state) if x.ndim]
    assert set(kinds) == {"pinned_host"} and len(kinds) == 2 * len(ours.params)
    assert all(x.sharding.memory_kind == "device" for x in ours.params.values())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("^layers/",), r"reaches quantised kernels, which cannot move: \['layers/attention/k/kernel'"),
        (("^norm/",), "moves none of the adapters; add 'lora'"),
        (("scale$", "lora_scale"), "trainable='lora_scale' matches no parameter"),
    ],
)
def test_what_cannot_train_is_refused(policy, patterns, message):
    with pytest.raises(ValueError, match=message):
        select_trainable(policy.params, patterns)


def test_without_patterns_adapters_train_alone_or_everything_where_there_are_none(policy, tiny_policy):
    trainable, frozen = select_trainable(policy.params, None)
    assert {path.rpartition("/")[2] for path in trainable} == {"lora_a", "lora_b"}
    assert any(path.endswith("lora_scale") for path in frozen)
    assert select_trainable(tiny_policy.params, None)[1] == {}
    more, _ = select_trainable(policy.params, ("lora", "^embed$"))
    assert more.keys() == trainable.keys() | {"embed"}
