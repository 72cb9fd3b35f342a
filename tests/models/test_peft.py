"""Promises of PEFT folders: theirs are read, ours are read by the real library, and what is not plain LoRA is refused."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from srpo_jax.models.lora import LoraConfig
from srpo_jax.models.peft import CONFIG, WEIGHTS, save_adapters
from srpo_jax.models.policy import adapt, forward, load_policy
from srpo_jax.sharding import flatten, unflatten

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def question(checkpoint, picture):
    """One example for both: our inputs, and what transformers makes of it."""
    case = checkpoint("tied")
    image = picture(90, 60)
    ours = case.policy.encode([{"image": image, "question": "What is shown?"}])
    return ours, case.torch_inputs([image], "What is shown?")


def ours(policy, question):
    length = int(question[0].lengths[0])
    return np.asarray(forward(policy, policy.params, question[0]))[0, :length]


def theirs(model, question):
    with torch.no_grad():
        return model(**question[1]).logits[0].float().numpy()


def their_adapters(case, **settings):
    """A PEFT model whose adapters all say something."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})
    return peft.get_peft_model(copy.deepcopy(case.torch), config).eval()


DECODER = r".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SETTINGS = {
    "decoder": {"target_modules": DECODER},
    "everything": {"target_modules": "all-linear", "exclude_modules": ["lm_head", "patch_embed"]},
    "patterns": {
        "target_modules": ["q_proj", "qkv"],
        "rank_pattern": {"qkv": 2, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {r"layers\.0\..*": 1},
    },
    "one layer, rslora": {"target_modules": ["v_proj"], "layers_to_transform": [1], "use_rslora": True},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_adapters_saved_by_peft_give_its_logits(checkpoint, question, tmp_path, kind):
    case = checkpoint("tied")
    model = their_adapters(case, **SETTINGS[kind])
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, base=case.folder)
    expected = theirs(model, question)
    assert np.abs(expected - theirs(case.torch, question)).max() > 0.05
    np.testing.assert_allclose(ours(policy, question), expected, atol=TOLERANCE)


@pytest.mark.parametrize("targets", [("^layers/",), ("attention/q", "mlp", "merger"), ("vision/blocks/attention/v",)])
def test_peft_loads_our_adapters_and_gives_our_logits(checkpoint, question, tmp_path, targets):
    case = checkpoint("tied")
    policy = adapt(case.policy, LoraConfig(rank=3, alpha=5.0, targets=targets), seed=0)
    rng = np.random.default_rng(0)
    policy.params.update(
        unflatten(
            {
                path: jnp.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype) if path.endswith("lora_b") else x
                for path, x in flatten(policy.params).items()
            }
        )
    )
    save_adapters(tmp_path / "adapter", case.policy.config, policy.params, case.folder)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(case.torch), tmp_path / "adapter").eval()
    adapted = ours(policy, question)
    np.testing.assert_allclose(theirs(model, question), adapted, atol=TOLERANCE)
    assert np.abs(adapted - ours(case.policy, question)).max() > 0.05
    # Merged by PEFT, merged by us, and read back: the same function.
    merged = theirs(model.merge_and_unload(), question)
    np.testing.assert_allclose(merged, adapted, atol=TOLERANCE)
    again = load_policy(tmp_path / "adapter")  # the base that the config names
    np.testing.assert_allclose(ours(again, question), adapted, atol=1e-5)
    policy.save(tmp_path / "whole")
    whole = load_policy(tmp_path / "whole")
    np.testing.assert_allclose(ours(whole, question), adapted, atol=1e-5 * np.abs(adapted).max())


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A small adapter folder to spoil."""
    case = checkpoint("tied")
    policy = adapt(case.policy, LoraConfig(rank=2, targets=("attention/q",)), seed=0)
    save_adapters(tmp_path / "adapter", policy.config, policy.params, case.folder, jnp.bfloat16)
    return tmp_path / "adapter"


def test_the_dtype_of_the_file_is_the_one_asked_for_and_training_starts_from_float32(folder):
    assert {str(x.dtype) for x in load_file(folder / WEIGHTS).values()} == {"bfloat16"}
    policy = load_policy(folder, dtype="bfloat16")
    assert {str(x.dtype) for path, x in flatten(policy.params).items() if "lora" in path} == {"float32"}
    with pytest.raises(FileExistsError):
        save_adapters(folder, policy.config, policy.params, "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"r": 5}, "says rank 5 of .*q_proj, whose tensors have 2"),
        ({"r": None}, "r and lora_alpha must be numbers"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern holds no regular expressions"),
        ({"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}, "is no folder here; give the base's folder"),
    ],
)
def test_what_is_not_plain_lora_is_refused(folder, change, message):
    told = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(told | change))
    with pytest.raises(ValueError, match=message):
        load_policy(folder)


def rename(tensors, old, new):
    return {name.replace(old, new): x for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: rename(t, "q_proj", "r_proj"), "r_proj is no linear map of this model"),
        (lambda t: rename(t, "layers.1", "layers.7"), r"layers\.7.*is no linear map of this model"),
        (lambda t: rename(t, "lora_A", "lora_magnitude_vector"), "unexpected tensor"),
        (lambda t: {name: x for name, x in t.items() if "lora_A" in name}, "one of lora_A and lora_B is missing of"),
        (lambda t: {name: x[:, :1] for name, x in t.items()}, r"do not fit \("),
        (lambda t: {}, "holds no adapter"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, spoil, message):
    save_file(spoil(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        load_policy(folder)


def test_pickles_and_cut_files_are_refused(folder, checkpoint):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_policy(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="save the adapter with safetensors"):
        load_policy(folder)
    with pytest.raises(ValueError, match="holds no adapters"):
        load_policy(checkpoint("tied").folder, base="elsewhere")
    with pytest.raises(ValueError, match="has no adapters; write it whole"):
        save_adapters(
            folder, checkpoint("tied").policy.config, jax.tree.map(jnp.asarray, checkpoint("tied").policy.params), ""
        )
