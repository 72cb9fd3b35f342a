"""Preflight: its shapes are those of a run, its sums are the compiler's, and what it advises was compiled."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from srpo_jax import config as configs
from srpo_jax.data import scenes
from srpo_jax.exploration.trunks import make_trunk
from srpo_jax.models.features import FeatureCache
from srpo_jax.models.hf import param_shapes
from srpo_jax.models.released import config_of, released_config
from srpo_jax.preflight import programs, report, slices
from srpo_jax.preflight.advice import advise, candidates, most_trees
from srpo_jax.recipes import released
from srpo_jax.training.data import EncodedTrees
from srpo_jax.trees import ReasoningTree, pack_trees

ROOT = Path(__file__).resolve().parents[1]
# Numbers of parameters as published with the weights (the index of their safetensors files).
PUBLISHED = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336, "72B": 73_410_777_344}


@pytest.mark.parametrize("size", PUBLISHED)
def test_released_sizes_have_the_published_number_of_parameters(size):
    shapes = jax.tree.leaves(param_shapes(released_config(size)))
    assert sum(x.size for x in shapes) == PUBLISHED[size]
    assert config_of(f"/anywhere/Qwen2.5-VL-{size}-Instruct") == released_config(size)


def test_a_name_that_nothing_is_known_of_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint folder"):
        config_of(tmp_path / "Qwen2.5-VL-4B-Instruct")


def quickstart(**changes):
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.batch.trees = 2
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def here() -> slices.Slice:
    """This machine's CPU as a slice of one device."""
    return slices.Slice("cpu", "v5e:1x1", jax.devices("cpu")[:1], 2**30)


def same(a, b) -> bool:
    told = [
        {jax.tree_util.keystr(k): (x.shape, x.dtype) for k, x in jax.tree_util.tree_leaves_with_path(t)} for t in (a, b)
    ]
    return told[0] == told[1]


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 4}, {"lora.rank": 4, "policy.quantize": "int8"}], ids=str)
def test_shapes_are_those_of_a_policy_that_is_loaded(here, changes):
    config = quickstart(**changes)
    mesh = here.mesh(**config.mesh)
    policy = configs.build_policy(config, mesh)
    setting = programs.Setting.of(config, mesh)
    assert same(setting.params, policy.params)
    assert setting.model == policy.config
    assert all(x.sharding is not None for x in jax.tree.leaves(setting.params))


@pytest.mark.parametrize("changes", [{}, {"compute.image_cache": 1.0, "trainable": ("^layers/",)}], ids=str)
def test_the_update_is_compiled_for_the_shapes_of_real_batches(here, changes):
    """The largest of them: a batch that is packed from records fits into what preflight packs."""
    config = quickstart(**changes)
    mesh = here.mesh(**config.mesh)
    setting = programs.Setting.of(config, mesh)
    policy = configs.build_policy(config, mesh)
    trunks = [make_trunk(r, policy.processor) for r in scenes.records("train", 2, 0)]
    pack = dataclasses.replace(setting.run.pack, rows=setting.run.pack.rows[-1:])
    real = [ReasoningTree(t, ()) for t in trunks]
    if setting.run.compute.image_cache:
        real = EncodedTrees(real, FeatureCache(policy, policy.params, setting.run.compute.dtype, 2**20))
    real, _ = pack_trees(list(real), pack)
    (_, _, batches), _ = programs.update_program(setting, here.chip).lower().args_info
    assert same(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches), real)


@pytest.fixture(scope="module")
def explored(here) -> tuple:
    """Exploration of eight trees, compiled for this CPU."""
    setting = programs.Setting.of(quickstart(**{"explore.trees": 8, "explore.max_tokens": 8}), here.mesh())
    program = programs.explore_programs(setting, here.chip)[0]
    return setting, program, report.measure(program, here)


def test_what_a_program_needs_is_what_the_compiler_says(explored, here):
    setting, program, row = explored
    told = program.lower().compile().memory_analysis()
    resident = sum(program.resident.values())
    assert row["peak"] == sum(row["memory"].values())
    assert row["peak"] - resident >= told.argument_size_in_bytes + told.temp_size_in_bytes
    assert row["memory"]["parameters"] == sum(
        4 * x.size for x in jax.tree.leaves(setting.params)
    )  # computes in float32
    assert row["fits"] is (row["peak"] <= here.usable) is True
    # AdamW's two moments and the master copy wait while the policy explores; so does the policy that was loaded.
    masters = row["memory"]["parameters"]
    assert 3 * masters <= row["memory"]["resident: training state"] <= 3 * masters + 64
    assert row["memory"]["resident: initial policy"] == masters // 2
    text_config, tokens = setting.model.text, 8 * (max(setting.run.explore.trunk) + setting.run.explore.width * 8)
    assert row["memory"]["keys and values"] == (
        2 * 4 * text_config.num_layers * text_config.num_kv_heads * text_config.head_dim * tokens
    )
    text = report.table([row])
    assert "explore" in text
    assert "fits" in text
    assert "temporaries" in text


def test_advice_was_compiled(explored, here):
    """On a device that is too small for eight trees and large enough for fewer."""
    setting, _, row = explored
    grows = sum(row["memory"][name] for name in ("keys and values", "engine", "temporaries"))
    small = dataclasses.replace(here, usable=row["peak"] - grows // 4)
    tight = row | {"usable": small.usable, "fits": False}
    advice = advise(setting.config, small, tight, tries=4)
    assert advice["fits"]
    assert advice["peak"] <= small.usable
    trees = advice["changes"]["explore.trees"]
    assert trees < 8
    again = programs.Setting.of(quickstart(**{"explore.trees": trees, "explore.max_tokens": 8}), here.mesh())
    assert report.measure(programs.explore_programs(again, here.chip)[0], here)["peak"] == advice["peak"]


@pytest.mark.slow
def test_the_most_trees_that_fit_are_found(explored, here):
    setting, _, row = explored
    grows = sum(row["memory"][name] for name in ("keys and values", "engine", "temporaries"))
    small = dataclasses.replace(here, usable=row["peak"] - grows // 2)
    found = most_trees(setting.config, small)
    assert 0 < found["trees"] < 8
    assert found["peak"] <= small.usable
    assert most_trees(setting.config, dataclasses.replace(here, usable=2**20))["trees"] == 0


def test_smaller_temporaries_are_no_advice_where_parameters_alone_do_not_fit(explored, here):
    setting, _, row = explored
    hopeless = row | {"usable": 2**20, "fits": False}
    assert next(candidates(setting.config, here, hopeless)) == {"lora.rank": 16, "trainable": None}


HLO = """
HloModule jit_f

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36)
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%open (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %done = pred[] get-tuple-element(%p), index=2
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %gather = f32[64]{0} all-gather(%p), channel_id=1, dimensions={0}, use_global_device_ids=true
  %start = (f32[8], f32[8]) all-reduce-start(%gather), to_apply=%sum
  %done = f32[8] all-reduce-done(%start)
}

%decode (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %layers = (s32[], f32[8]) while(%p), condition=%condition, body=%inner
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %scatter = f32[1] reduce-scatter(%a), to_apply=%sum
  %prefill = (s32[], f32[8]) while(%a), condition=%condition, body=%inner
  %loop = (s32[], f32[8]) while(%a), condition=%open, body=%decode
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    counted = report.collectives(HLO)
    assert counted["all-gather"] == counted["all-reduce"] == 2 * 36  # prefill, and one step of decoding
    assert counted["reduce-scatter"] == 1
    assert counted["all-to-all"] == 0


TPU_HLO = """
HloModule jit_f

%condition (p: (u32[], f32[8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(4)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%windowed_dot_general_body_ag (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %start = (f32[8], f32[8]) collective-permute-start(%p), channel_id=1
  %done = f32[8] collective-permute-done(%start)
}

%begin (p: f32[8]) -> f32[64] {
  %piece = f32[64] all-gather(%p), channel_id=2, frontend_attributes={chain_id="0"}
  ROOT %call = f32[64] custom-call(%piece), custom_call_target="AsyncCollectiveStart"
}

%beside (p: f32[8]) -> f32[64] {
  ROOT %piece.1 = f32[64] all-gather(%p), channel_id=2, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %sum = f32[64] all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %first = (f32[8], f32[8]) collective-permute-start(%a), channel_id=4
  %loop = (u32[], f32[8]) while(%first), condition=%condition, body=%windowed_dot_general_body_ag
  %started = f32[64] fusion(%a), kind=kCustom, calls=%begin
  %product = f32[64] fusion(%a), kind=kOutput, calls=%beside
  %alone = f32[8] all-reduce(%a), replica_groups={{0},{1},{2}}, to_apply=%sum
  ROOT %part = f32[8] fusion(%product), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_collective_counts_once_however_a_tpu_overlaps_it():
    """Pieces beside other work are one gather, a loop of permutations within a product another; one device has none."""
    counted = report.collectives(TPU_HLO)
    assert {kind: n for kind, n in counted.items() if n} == {"all-gather": 2, "reduce-scatter": 1}
    assert report.collective_runs(TPU_HLO)["all-gather", ("f32[64]",)] == 1


@pytest.mark.parametrize("name", ["v5e", "v4-8", "v5e:", "8"])
def test_a_slice_that_nobody_rents_is_refused(name):
    with pytest.raises(ValueError, match="v5e-16"):
        slices.find_slice(name)


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_released_recipe_is_a_valid_run(size, kind):
    config = released(size, kind)
    run = configs.run_config(config)
    local = released(size, f"{kind},runlocal")
    assert local.policy.path == configs.EMBEDDED
    assert configs.run_config(local).trainable == run.trainable
    assert local.lora == config.lora
    with pytest.raises(ValueError, match="runlocal"):
        released(size, f"{kind},local")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'srpo_jax[tpu]'"
)
def test_the_command_compiles_for_a_tpu(tmp_path):
    """The quickstart's exploration on a v5e-8, split over its chips; nothing of it fits a chip that is full."""
    command = [
        sys.executable,
        ROOT / "tpu" / "preflight.py",
        f"--config={ROOT}/configs/quickstart.py",
        "--topology=v5e-8",
    ]
    command += ["--programs=explore", f"--json={tmp_path / 'report.json'}", "--config.mesh.fsdp=8"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    report_ = json.loads((tmp_path / "report.json").read_text())
    (row,) = report_["programs"]
    assert report_["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert row["fits"]
    assert 0 < row["memory"]["parameters"] < row["peak"] < row["usable"] == slices.USABLE["v5e"]
    assert row["collectives"]["all-gather"] > 0
    assert "explore: " in done.stdout
