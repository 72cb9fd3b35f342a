"""One thing changed at a time in SRPO, three seeds each: an exploration, without tests.

    python scripts/study.py --config=configs/study/ablations.py --workdir=runs/ablations --page=docs/ablation_results.md

Half an hour of two CPU cores. The recipe is that of configs/study/main.py.
"""

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("main", Path(__file__).with_name("main.py"))


def srpo(**options):
    return {"loss": {"srpo": options}}


K8 = {"explore": {"k": 8}, "pack": {"branches": (48,), "rows": (11, 20, 30, 52)}}
METHODS = {
    "srpo": {},
    "lambda 0": srpo(lambda_=0.0),
    "lambda 0_1": srpo(lambda_=0.1),
    "lambda 1": srpo(lambda_=1.0),
    "k 2": {"explore": {"k": 2}},
    "k 8": K8,
    "adaptive 2 to 8": K8 | {"trees": {"adaptive": {"first": 2, "most": 8, "wave": 2}}},
    "temperature 0_5": {"explore": {"temperature": 0.5}},
    "temperature 1_5": {"explore": {"temperature": 1.5}},
    "early prefixes": {"trees": {"prefixes": (0, 1, 2)}},
    "late prefixes": {"trees": {"prefixes": (3, 4, 5)}},
    "reference of rpo": srpo(reference="favourable"),
    "safe alone": {"explore": {"favourable": "safe"}},
    "without twins": {"trees": {"harmless": False}},
    "two rounds": {"rounds": 2, "updates": 6},
    "step judge": {"trees": {"steps": True}},
    "noise 10": {"trees": {"flip": 0.1}},
    "noise 20": {"trees": {"flip": 0.2}},
    "noise 30": {"trees": {"flip": 0.3}},
    "unknown unfavourable": {"pack": {"unknown": "unfavourable"}},
}


def get_config():
    main = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(main)
    config = main.recipe()
    with config.unlocked():
        config.study = {
            "methods": METHODS,
            "trials": {},
            "method": "srpo",
            "against": (),
            "seeds": 3,
            "tuning_seeds": 1,
            "budgets": ("updates",),
            "confirmatory": False,
        }
    return config
