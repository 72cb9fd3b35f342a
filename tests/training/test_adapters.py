"""Promises of runs with adapters on an int8 base: what is stored and moved, in which precision, by whom it is explored."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

from srpo_jax import config as configs
from srpo_jax import sharding
from srpo_jax.checkpoint import Checkpointer, CheckpointMismatchError
from srpo_jax.data import scenes
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.files import read_jsonl
from srpo_jax.judges.verdict import Verdict
from srpo_jax.models.policy import forward, load_policy
from srpo_jax.models.quantize import is_quantisable
from srpo_jax.models.scoring import tree_logprobs
from srpo_jax.runs import adapter_base, load_run
from srpo_jax.training.data import BatchConfig, step_batches
from srpo_jax.training.loop import train
from srpo_jax.training.objective import LossConfig
from srpo_jax.training.state import OptimConfig, abstract_state, init_state, select_trainable
from srpo_jax.training.step import ComputeConfig, make_update
from srpo_jax.training.workdir import open_workdir
from srpo_jax.trees import ReasoningTree, pack_trees

ROOT = Path(__file__).resolve().parents[2]
CHANGES = {
    "policy.quantize": "int8",
    "lora.rank": 2,
    "lora.targets": ("attention/(q|v)",),
    "data.n": 2,
    "mesh.data": 1,
    "explore": {"k": 4, "max_tokens": 10, "trees": 2, "trunk": (144,), "patches": (16,)},
    "pack": {"trunk": (144,), "path": (112,), "rows": (33,), "row": 16, "branch": (10,), "patches": (16,)},
    "optim": {"learning_rate": 3e-2, "schedule": "constant", "offload": True},
    "batch.trees": 2,
    "compute.remat": "none",
    "rounds": 2,
    "updates": 2,
    "checkpoint_every": 1,
    "keep": 9,
    "max_truncated": 1.0,
    "max_unknown": 1.0,
}


def run_settings(base: Path) -> ml_collections.ConfigDict:
    config = configs.default_config()
    config.policy.path = str(base)
    for name, value in CHANGES.items():
        fields = {f"{name}.{field}": x for field, x in value.items()} if isinstance(value, dict) else {name: value}
        config.update_from_flattened_dict(fields)
    return config


RUN = configs.run_config(run_settings(Path("nowhere")))


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
def base(tiny_policy, tmp_path_factory):
    """The tiny policy in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("policy") / "base"
    tiny_policy.save(folder)
    return folder


@pytest.fixture(scope="module")
def policy(base, mesh):
    """The tiny policy in int8 with adapters on two kinds of kernels."""
    return configs.build_policy(run_settings(base), mesh)


@pytest.fixture(scope="module")
def finished(base, policy, records, mesh, tmp_path_factory):
    """The work directory of two rounds of two updates, and the parameters that came out."""
    workdir = open_workdir(tmp_path_factory.mktemp("adapters") / "run", run_settings(base))
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


def test_adapters_of_a_run_are_exported_for_their_base_and_merged_into_it(finished, base, policy, tmp_path):
    """Both ways give the logits of the run's policy, the merged one in floating point for whoever cannot read int8."""
    ours, step = load_run(finished[0])
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, ours.params, finished[1])
    flags = [sys.executable, ROOT / "scripts" / "export.py", f"--checkpoint={finished[0]}", "--dtype=float32"]
    for output in ("adapter", "whole"):
        more = [f"--output={tmp_path / output}", *["--adapter"] * (output == "adapter")]
        done = subprocess.run([*flags, *more], capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    inputs = policy.encode([{"question": "May I rest here?"}])
    expected = forward(ours, ours.params, inputs)
    assert float(jnp.abs(forward(policy, policy.params, inputs) - expected).max()) > 1e-2
    for path, options in (("adapter", {"quantize": "int8"}), ("whole", {})):
        other = load_policy(tmp_path / path, **options)
        np.testing.assert_allclose(forward(other, other.params, inputs), expected, atol=1e-4)


def test_a_run_whose_base_has_changed_is_not_read(finished, base, tmp_path, tiny_policy):
    moved = shutil.copytree(finished[0], tmp_path / "run")
    other = tmp_path / "other"
    tiny_policy.save(other, jax.tree.map(lambda x: x * 1.01, tiny_policy.params))
    told = json.loads((moved / "config.json").read_text())
    told["policy"]["path"] = str(other)
    (moved / "config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointMismatchError, match=r"other frozen parameters than .*other holds now"):
        load_run(moved)


def test_what_moved_beside_adapters_is_not_left_behind(finished, policy, tmp_path):
    told = json.loads((finished[0] / "config.json").read_text())
    more = shutil.copytree(finished[0], tmp_path / "run")
    (more / "config.json").write_text(json.dumps(told | {"trainable": ["lora", "^embed$"]}))
    with pytest.raises(ValueError, match="trained embed beside adapters, if any; export it whole"):
        adapter_base(more, policy.params)


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
    batch, _ = pack_trees(trees, dataclasses.replace(RUN.pack, learns="all"))
    assert batch.lengths.any()

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


@pytest.mark.slow  # two programs to compile; the runs above keep their moments there
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
