"""Aligns the embedded 1.8 M-parameter policy in the embedded world; everything fits a laptop's CPU.

    python scripts/train.py --config=configs/quickstart.py --workdir=runs/srpo

`make quickstart` runs it beside SFT on the same trunks (`--config.rounds=0`) and prints the table.
Expected: four minutes on two cores; answered safely and effectively, of 400 risky prompts at temperature 1: base 28.2 %,
SFT 61 %, SRPO 75 %.
"""

from srpo_jax.config import default_config


def get_config():
    config = default_config()
    config.data.n = 384  # 192 risky records and their harmless twins
    config.explore.update(k=4, temperature=1.0, max_tokens=100, trees=16, width=12, trunk=(144,), patches=(64,))
    config.pack.update(trunk=(144,), path=(112,), patches=(64,), rows=(11, 15, 26), row=100)
    config.pack.update(branches=(24,), branch=(100,))
    config.batch.update(trees=8)
    config.loss.srpo.lambda_ = 0.3
    config.optim.update(learning_rate=4e-4, warmup=5, weight_decay=0.0)
    config.rounds = 1
    config.updates = 48
    config.checkpoint_every = 16
    config.eval.update(n=200, max_tokens=100, batch=200, trunk=(64,), patches=(64,))
    return config
