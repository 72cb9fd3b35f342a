"""Every objective on the same trees of the embedded world, in a size that a laptop's CPU completes: 90 minutes of two cores.

    python scripts/study.py --config=configs/study/main.py --workdir=runs/study --page=docs/study_results.md

Fixed here before a test seed runs: the endpoints (S&E on risky prompts; harmless requests helped), the confirmatory
comparisons (SRPO with each of `against`), the world's difficulty (its default, at which SFT and the base policy leave
room on the validation split), four tuning trials per method on validation, twelve test seeds, two budgets.
"""

from srpo_jax.config import default_config

RATES = (2e-4, 4e-4)


def only(name, **options):
    """The objective `name` alone."""
    loss = {"weights": {"srpo": 0.0} | {name: 1.0}}
    return {"loss": loss | ({name: options} if options else {})}


def rates_and(name, option, values):
    """Learning rates × values of the objective's own option."""
    return tuple({"optim": {"learning_rate": r}, "loss": {name: {option: v}}} for r in RATES for v in values)


def rates():
    """Learning rates alone, where an objective has no option to tune."""
    return tuple({"optim": {"learning_rate": r}} for r in (1e-4, 2e-4, 4e-4, 8e-4))


METHODS = {
    "sft": only("sft") | {"rounds": 0},
    "favourable_sft": only("favourable_sft"),
    "rejection_sft": only("rejection_sft") | {"trees": {"prefixes": (0,)}},  # it needs, and pays for, no others
    "dpo": only("dpo"),
    "orpo": only("orpo"),
    "simpo": only("simpo"),
    "rpo": only("rpo"),
    "step_dpo": only("step_dpo"),
    "grpo": only("grpo"),
    "srpo": {},
}
TRIALS = {
    "sft": rates(),
    "favourable_sft": rates(),
    "rejection_sft": rates(),
    "dpo": rates_and("dpo", "beta", (0.1, 0.5)),
    "orpo": rates_and("orpo", "lambda_", (0.1, 0.3)),
    "simpo": rates_and("simpo", "gamma", (0.5, 1.0)),
    "rpo": rates_and("rpo", "beta", (0.1, 0.3)),
    "step_dpo": rates_and("step_dpo", "beta", (0.1, 0.5)),
    "grpo": rates_and("grpo", "clip_high", (0.2, 0.28)),
    "srpo": rates_and("srpo", "lambda_", (0.1, 0.3)),
}


def recipe():
    """One run: 96 records, 12 updates of 8 trees, 384 test prompts at temperature 1, half of them risky."""
    config = default_config()
    config.data.n = 96
    config.explore.update(k=4, temperature=1.0, max_tokens=100, trees=16, trunk=(144,), patches=(64,))
    config.pack.update(trunk=(144,), path=(112,), patches=(64,), rows=(4, 11, 15, 26), row=100)
    config.pack.update(branches=(24,), branch=(100,))
    config.batch.update(trees=8)
    config.compute.remat = "none"
    config.optim.update(learning_rate=4e-4, warmup=3, weight_decay=0.0)
    config.updates = 12
    config.checkpoint_every = 1000  # a run is short; it starts over
    config.eval.update(n=192, splits=("test_id", "combination"), temperatures=(1.0,), max_tokens=100)
    config.eval.update(batch=192, trunk=(64,), patches=(64,))
    return config


def get_config():
    config = recipe()
    with config.unlocked():
        config.study = {
            "methods": METHODS,
            "trials": TRIALS,
            "method": "srpo",
            "against": ("sft", "favourable_sft", "rejection_sft", "dpo", "orpo", "simpo", "rpo", "step_dpo", "grpo"),
            "seeds": 12,
            "tuning_seeds": 1,
            "budgets": ("updates", "flops"),
            "confirmatory": True,
        }
    return config
