"""Promise: checkpoints come in and go out tensor for tensor, no more of a file is read than a shard needs, and whatever
does not fit is named, all of it at once."""

import copy
import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from srpo_jax.models import hf, saving
from srpo_jax.models.hf import load_params, read_config
from srpo_jax.models.policy import load_policy
from srpo_jax.models.saving import save_params
from srpo_jax.sharding import flatten, unflatten

VARIANTS = ("untied", "tied", "full")


def tensors_of(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same_params(ours, theirs):
    ours, theirs = flatten(ours), flatten(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


@pytest.fixture
def copied(checkpoint, tmp_path):
    """The untied checkpoint in a folder of its own, its tensors and a way to write them back."""
    folder = tmp_path / "copied"
    shutil.copytree(checkpoint("untied").folder, folder)
    return folder


@pytest.fixture(scope="session")
def config(checkpoint):
    return checkpoint("untied").policy.config


@pytest.fixture(scope="session")
def params(checkpoint):
    return checkpoint("untied").policy.params


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_tensor_for_tensor(checkpoint, tmp_path, variant):
    case, folder = checkpoint(variant), tmp_path / "saved"
    case.policy.save(folder)
    before, after = tensors_of(case.folder), tensors_of(folder)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    model, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    for name, value in case.torch.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    original = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(case.folder).config
    for section in ("text_config", "vision_config"):
        assert getattr(model.config, section).to_dict() == getattr(original, section).to_dict()
    assert model.generation_config.eos_token_id == case.policy.processor.eos_id
    assert_same_params(load_policy(folder).params, case.policy.params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(checkpoint, tmp_path, dtype):
    case = checkpoint("untied")
    copy.deepcopy(case.torch).to(dtype).save_pretrained(tmp_path / "half", max_shard_size="40KB")
    assert (tmp_path / "half" / hf.INDEX).is_file()
    config = read_config(tmp_path / "half")
    kept = load_params(tmp_path / "half", config)
    name = str(dtype).removeprefix("torch.")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {name}
    wide = load_params(tmp_path / "half", config, dtype=jnp.float32)
    assert_same_params(wide, jax.tree.map(lambda x: x.astype(jnp.float32), kept))
    save_params(tmp_path / "again", config, kept, max_shard_bytes=30_000)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.dtype == dtype
    assert_same_params(load_params(tmp_path / "again", config), kept)


def test_prefixes_of_newer_checkpoints(copied, config, params):
    renamed = {}
    for name, value in tensors_of(copied).items():
        new = name if name == hf.HEAD else "model." + name.replace("model.", "language_model.")
        renamed[new] = value
    assert "model.language_model.layers.0.mlp.up_proj.weight" in renamed
    assert "model.visual.merger.ln_q.weight" in renamed
    save_file(renamed, copied / hf.WEIGHTS)
    assert_same_params(load_params(copied, config), params)


def test_flat_config_layout(copied, config, params):
    nested = json.loads((copied / "config.json").read_text())
    flat = {**nested.pop("text_config"), **nested}
    flat["rope_theta"], flat["rope_scaling"] = 1e4, {"type": "mrope", "mrope_section": [2, 1, 1]}
    del flat["rope_parameters"]
    (copied / "config.json").write_text(json.dumps(flat))
    assert read_config(copied) == config
    assert_same_params(load_policy(copied).params, params)


def test_a_copy_of_the_tied_head_is_accepted_only_if_equal(checkpoint, tmp_path):
    case, folder = checkpoint("tied"), tmp_path / "tied"
    shutil.copytree(case.folder, folder)
    tensors = tensors_of(folder)
    save_file({**tensors, hf.HEAD: tensors[hf.EMBEDDING]}, folder / hf.WEIGHTS)
    assert_same_params(load_params(folder, case.policy.config), case.policy.params)
    save_file({**tensors, hf.HEAD: tensors[hf.EMBEDDING] + 1}, folder / hf.WEIGHTS)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        load_params(folder, case.policy.config)


class Recorder:
    """A lazy tensor that counts what is read of it."""

    def __init__(self, tensor):
        self.tensor, self.read = tensor, 0

    def __getitem__(self, index):
        out = self.tensor[index]
        self.read += out.size
        return out


@given(st.data())
def test_any_shard_is_read_alone(checkpoint, config, params, data):
    tensors = {name: Recorder(t) for name, t in hf._open_tensors(checkpoint("untied").folder).items()}
    path = data.draw(st.sampled_from(sorted(hf.sources(config))))
    source, whole = hf.sources(config)[path], np.asarray(flatten(params)[path])
    index = []
    for size in whole.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))) if data.draw(st.booleans()) else slice(None))
    part = hf._reader(source, tensors, whole.dtype)(tuple(index))
    np.testing.assert_array_equal(part, whole[tuple(index)])
    if path != "vision/patch_embed/kernel":  # its input axis is flattened after reading
        assert sum(tensor.read for tensor in tensors.values()) == part.size


def test_shardings_are_used(checkpoint, config, params):
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = unflatten(dict.fromkeys(hf.sources(config), one))
    loaded = load_params(checkpoint("untied").folder, config, tree)
    assert_same_params(loaded, params)
    assert all(leaf.sharding == one for leaf in jax.tree.leaves(loaded))


def test_each_device_gets_its_shard(checkpoint):
    """On four devices: kernels split over the input axis, each shard equal to that part of the whole."""
    program = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from srpo_jax.models import hf
from srpo_jax.sharding import flatten, unflatten
config = hf.read_config(sys.argv[1])
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
def where(path, shape):
    axes = [*[None] * (len(shape) - 2), "fsdp"] if path.endswith("kernel") else []
    return NamedSharding(mesh, PartitionSpec(*axes))
places = {path: where(path, source.param_shape) for path, source in hf.sources(config).items()}
split = flatten(hf.load_params(sys.argv[1], config, unflatten(places)))
whole = flatten(hf.load_params(sys.argv[1], config))
for path, value in split.items():
    assert value.sharding == places[path], path
    for shard in value.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[path][shard.index], err_msg=path)
print(len(split["layers/mlp/up/kernel"].addressable_shards))
"""
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", program, str(checkpoint("untied").folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=flags)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "4"


def test_shapes_match_the_module(checkpoint):
    for variant in VARIANTS:
        policy = checkpoint(variant).policy
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), policy.params)
        assert hf.param_shapes(policy.config) == shapes


def test_all_problems_in_one_error(copied, config):
    tensors = tensors_of(copied)
    del tensors["visual.blocks.1.attn.qkv.bias"]
    del tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["visual.merger.mlp.0.bias"] = np.zeros(3, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)
    save_file(tensors, copied / hf.WEIGHTS)
    with pytest.raises(ValueError, match="does not fit its config") as error:
        load_params(copied, config)
    text = str(error.value)
    assert "missing: model.norm.weight, visual.blocks.1.attn.qkv.bias" in text
    assert "unexpected: model.layers.7.mlp.up_proj.weight" in text
    assert "misshapen: visual.merger.mlp.0.bias is (3,), the config needs (128,)" in text
    assert "model.layers.0.mlp.up_proj.weight is I8" in text


def test_unreadable_folders(copied, config):
    whole = (copied / hf.WEIGHTS).read_bytes()
    (copied / hf.WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable"):
        load_params(copied, config)
    (copied / hf.WEIGHTS).unlink()
    (copied / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="convert other formats to safetensors"):
        load_params(copied, config)
    for weight_map, kind, message in [
        ({"a": "gone.safetensors"}, FileNotFoundError, "gone.safetensors"),
        ({"a": "../secret.safetensors"}, ValueError, "leaves the folder"),
        ([], ValueError, "no weight_map"),
    ]:
        (copied / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(kind, match=message):
            load_params(copied, config)
    (copied / hf.INDEX).write_text("{")
    with pytest.raises(ValueError, match="invalid JSON"):
        load_params(copied, config)


def test_unreadable_config(copied):
    for content, message in [("{", "invalid JSON"), ("[]", "JSON object"), ('{"model_type": "llava"}', "'llava'")]:
        (copied / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_config(copied)
    (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_policy(copied)


def test_no_more_than_a_tensor_leaves_the_devices_at_a_time(config, params, tmp_path, monkeypatch):
    """So that a policy can be written which no host holds; stacked layers go one by one."""
    taken, inner = [], saving.to_host

    def spy(x):
        taken.append(x.shape)
        return inner(x)

    monkeypatch.setattr(saving, "to_host", spy)
    save_params(tmp_path / "out", config, params)
    stacked = {path: x.shape for path, x in flatten(params).items() if path.startswith(("layers/", "vision/blocks/"))}
    assert len(taken) == sum(s[0] for s in stacked.values()) + len(flatten(params)) - len(stacked)
    assert not any(len(shape) == 3 for shape in taken) and any(len(shape) == 3 for shape in stacked.values())


def test_nothing_is_overwritten_and_nothing_half_written_remains(config, params, tmp_path, monkeypatch):
    target = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()  # of a run that was killed
    (tmp_path / ".out.partial" / "junk").write_text("x")
    save_params(target, config, params)
    assert sorted(p.name for p in target.iterdir()) == ["config.json", hf.WEIGHTS]
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_params(target, config, params)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_params(tmp_path / "other", config, params)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_params_that_do_not_fit_are_named(config, params, tmp_path):
    flat = flatten(params)
    del flat["head"]
    flat["adapter"] = flat["embed"]
    flat["norm/scale"] = jnp.ones(3)
    with pytest.raises(ValueError, match="missing: head\n  unexpected: adapter\n  misshapen: norm/scale"):
        save_params(tmp_path / "out", config, unflatten(flat))
    assert not list(tmp_path.iterdir())
