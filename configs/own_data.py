"""Aligns a real Qwen2.5-VL on your own records: JSON lines, pictures, a judge of yours, a checkpoint in Hugging Face's format.

    PYTHONPATH=. python scripts/train.py --config=configs/own_data.py --workdir=runs/mine \
        --config.policy.path=/models/Qwen2.5-VL-3B-Instruct --config.data.path=/data/records.jsonl \
        --config.judge=my_judge:judge

docs/data.md describes a record; pictures lie in the folder of the JSONL file, or in `--config.data.images`. A judge is a
function (record, parsed path) -> srpo_jax.judges.Verdict; `PYTHONPATH=.` lets Python find `my_judge.py` here. Without
one, `--config.rounds=0` trains on the reference paths alone: a released checkpoint needs that first, because it does not yet
write the path grammar, and a round whose branches are mostly malformed is refused. Then give the exported result (see
scripts/export.py) as `policy.path`.

`--config=configs/own_data.py:lora` trains low-rank adapters on a frozen base instead of the decoder itself, which takes a
fraction of the memory; `--config.policy.quantize=int8` halves that of the base once more (docs/adapters.md).

Every combination of ladder steps in use is a program to compile, minutes each: at most 2 × 2 × 3 (trunk, patches, rows) of the
update, 2 × 2 (trunk, patches) of exploration, one per temperature of evaluation. Ordinary photographs use one size of patches.

No numbers are expected here: they depend on the checkpoint and the records.
"""

from srpo_jax.config import default_config


def get_config(tuning="full"):
    """The recipe; `tuning` is "full" or "lora"."""
    if tuning not in ("full", "lora"):
        raise ValueError(f"own_data.py:{tuning}: use own_data.py, own_data.py:full or own_data.py:lora")
    config = default_config()
    config.policy.max_image_tokens = 768  # pictures of about 770 × 770 pixels together; more cost memory in every trunk
    config.policy.dtype = "bfloat16"
    config.data.name = "jsonl"
    config.judge = ""  # yours: "package.module:function"

    # Trunk: image, question, six steps and the reply. 768 image tokens are 3072 patches, and more in whole windows: up to
    # 4096 for ordinary shapes, 8192 for strips and several pictures.
    trunk, patches = (1536, 2048), (4096, 8192)
    config.explore.update(k=4, temperature=1.0, max_tokens=512, trees=4, trunk=trunk, patches=patches)
    config.pack.update(trunk=trunk, patches=patches, path=(1024,))
    # Branches: 24 of up to 512 tokens; most are shorter and share rows.
    config.pack.update(rows=(12, 18, 28), row=512, branches=(24,), branch=(512,))

    # Full fine-tuning keeps a float32 master copy, its gradient and two moments: 16 bytes per trained parameter.
    # The vision tower stays as it is; drop the pattern to train it, too.
    if tuning == "lora":  # on every linear map of the decoder; nothing else trains
        config.lora.update(rank=16, alpha=32.0)
    else:
        config.trainable = ("^(embed|head)$", "^layers/", "^norm/")  # one pattern: the 3B has no head of its own
    config.compute.update(dtype="bfloat16", remat="full")
    config.mesh.update(data=1, fsdp=-1, tensor=1)  # parameters and questions over all devices

    # Eight questions per update, one at a time. On several devices `trees` must be a multiple of data × fsdp; on eight:
    # trees=8, accumulate=1.
    config.batch.update(trees=1, accumulate=8)
    config.loss.srpo.lambda_ = 0.3
    config.optim.update(learning_rate=1e-4 if tuning == "lora" else 1e-6, warmup=10, weight_decay=0.0)
    config.rounds = 1
    config.updates = 200
    config.checkpoint_every = 50
    # Records kept out of training: --config.eval.path=FILE --config.eval.evaluator=my_judge:EVALUATOR (docs/evaluation.md)
    config.eval.update(max_tokens=512, batch=16, trunk=(1024, 1536), patches=patches)
    return config
