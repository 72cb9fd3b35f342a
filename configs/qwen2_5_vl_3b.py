"""Aligns Qwen2.5-VL-3B on your own records; adapters by default, `:full` moves the whole decoder.

    python scripts/train.py --config=configs/qwen2_5_vl_3b.py:lora --workdir=runs/srpo_3b --config.judge=my_judge:judge \
        --config.policy.path=/models/Qwen2.5-VL-3B-Instruct --config.data.path=/data/records.jsonl \
        --config.batch.trees=8 --config.explore.trees=8
    python tpu/preflight.py --config=configs/qwen2_5_vl_3b.py:lora --topology=v5e-8 --config.batch.trees=8 \
        --config.explore.trees=8 --config.eval.batch=8

On v5e-8, one question per chip (a trunk of at most 2,048 tokens with 4,096 patches, 24 branches of at most 512), an update
cannot take less than 1.03 s for `lora` and 1.46 s for `full`. Parameters, optimizer and the loaded policy
take 1.21 and 5.19 GiB of a chip, by formula.
`full` compiled: 13.2 of 15.75 GiB for the update, 12.6 for decoding with parameters that are gathered once per round
(`explore.gather`); `lora` was not compiled at these shapes. See docs/preflight.md.

`:lora,runlocal` and `:full,runlocal` run the same on a laptop, small (see srpo_jax/recipes.py).
"""

from srpo_jax.recipes import released


def get_config(variant: str = "lora"):
    return released("3B", variant)
