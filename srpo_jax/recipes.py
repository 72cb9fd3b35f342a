"""The shared part of `configs/qwen2_5_vl_*.py`: how a released checkpoint is aligned, and the same on a laptop.

A configuration file takes a string after its name: `configs/qwen2_5_vl_3b.py:full`. It names what moves ("lora", the default,
or "full") and, after a comma, "runlocal" for a small run of the same structure on a CPU: the embedded policy in
the embedded world, two updates, everything small.
"""

from __future__ import annotations

import ml_collections

from srpo_jax.config import EMBEDDED, default_config

KINDS = ("lora", "full")
LOCAL = "runlocal"


def released(size: str, variant: str) -> ml_collections.ConfigDict:
    """Aligns the released checkpoint of a size ("3B") on JSON lines of your own, with a judge of yours.

    Pictures have at most 768 language tokens together, branches at most 512 tokens: prompt and path fit 2,048.

    Args:
      size: which checkpoint; `policy.path` is its released name, to be replaced by its folder.
      variant: "lora", "full", "lora,runlocal" or "full,runlocal".

    Raises:
      ValueError: another variant.
    """
    kind, _, local = variant.partition(",")
    if kind not in KINDS or local not in ("", LOCAL):
        raise ValueError(f"{variant!r}: use one of {', '.join(KINDS)}, followed by ',{LOCAL}' for a small run on a CPU")
    config = default_config()
    config.policy.update(path=f"Qwen2.5-VL-{size}-Instruct", dtype="bfloat16", max_image_tokens=768)
    config.data.name = "jsonl"
    config.judge = ""  # yours: "package.module:function"
    # Ordinary pictures of 768 language tokens are 3,072 patches, 4,096 with their windows filled; strips take up to 8,192.
    shapes = {"trunk": (1536, 2048), "patches": (4096,)}
    config.explore.update(k=4, temperature=1.0, max_tokens=512, trees=8, **shapes)
    config.pack.update(path=(512, 1024), rows=(12, 18, 28), row=512, branches=(24,), branch=(512,), **shapes)
    config.compute.update(dtype="bfloat16", remat="full", logprob_chunk=512)
    config.batch.update(trees=8, accumulate=1)
    config.loss.srpo.lambda_ = 0.3
    # A chip of 16 GB holds all of a 3B beside its share of the training state.
    config.explore.gather = config.eval.gather = size == "3B"
    config.rounds = 1
    config.updates = 200
    config.checkpoint_every = 50
    config.eval.update(max_tokens=512, batch=16, trunk=(1024, 1536), patches=(4096,))
    if kind == "lora":
        config.lora.update(rank=16, alpha=32.0)
        config.optim.update(learning_rate=1e-4, warmup=10)
    else:
        config.trainable = ("^(embed|head)$", "^layers/", "^norm/")  # the vision tower stays as it is
        config.optim.update(learning_rate=1e-6, warmup=10)
    return run_local(config) if local else config


def run_local(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same run made small; what moves, the rank of adapters, remat and the loss stay. Changes and returns `config`."""
    config.policy.update(path=EMBEDDED, dtype="float32", max_image_tokens=None)
    config.data.update(name="scenes", n=8)
    config.judge = "rules"
    config.explore.update(max_tokens=100, trees=8, trunk=(144,), patches=(64,), gather=False)
    config.pack.update(trunk=(144,), path=(112,), patches=(64,), rows=(26,), row=100, branch=(100,))
    config.compute.update(dtype="float32", logprob_chunk=1024)
    config.mesh.update(data=1, fsdp=-1, tensor=1)
    config.batch.update(trees=8, accumulate=1)
    config.optim.warmup = 0
    config.updates = 2
    config.eval.update(n=2, splits=("test_id",), max_tokens=100, batch=8, trunk=(64,), patches=(64,), gather=False)
    return config
