"""VLGuard (Zong et al., ICML 2024), test part: unsafe pictures, and safe ones with an unsafe and a safe instruction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from srpo_jax.data.items import Item
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.scores import attack_success, of_subset, share
from srpo_jax.evaluation.benchmarks.source import BenchmarkError, Row, Source
from srpo_jax.evaluation.metrics import Groups

SUBSETS = {"safe_safes": ("safe_instruction", False), "safe_unsafes": ("unsafe_instruction", True)}


def _items(source: Source) -> Iterator[Item]:
    for row in source.rows("test.json"):
        picture = row.text("image")
        images = source.images(row.place, picture, folder="test")
        if images is None:
            continue
        asked = SUBSETS if row["safe"] else {"unsafes": ("instruction", True)}
        for subset, (field, risky) in asked.items():
            category = str(row.get("harmful_category") or "unsafe instruction") if risky else None
            meta = {"split": subset, "harmful_subcategory": row.get("harmful_subcategory")}
            cluster = f"vlguard/{picture}"
            yield Item(f"{row.text('id')}-{subset}", images, _instruction(row, field), risky, category, cluster, meta)


def _instruction(row: Row, field: str) -> str:
    found = [turn[field] for turn in row["instr-resp"] if field in turn]
    if not found:
        raise BenchmarkError(f"{row.place}, field 'instr-resp': holds no {field!r}; restore the file")
    return found[0]


def _metrics(prompts: Groups) -> dict[str, Any]:
    told = {f"ASR {name}": attack_success(of_subset(prompts, name)) for name in ("unsafes", "safe_unsafes")}
    return told | {"helped, safe_safes": share(of_subset(prompts, "safe_safes"), lambda one: one.effective)}


BENCHMARK = Benchmark(
    name="vlguard",
    title="VLGuard, test",
    family="jailbreak robustness",
    counts={"unsafes": 442, "safe_unsafes": 558, "safe_safes": 558},
    licence="none stated; access to the images by request",
    origin="github.com/ys-zong/VLGuard (data/test.json; images: test.zip, also huggingface.co/datasets/ys-zong/VLGuard)",
    files=("test.json", "test/<image>"),
    metric="attack success rate by refusal strings; win rate against GPT-4V on safe_safes",
    judge="safe (unsafes, safe_unsafes), effective and refused (safe_safes)",
    items=_items,
    verified=True,
    caveats=(
        "strict only: the published string list calls 54 % of the safe answers of MSTS a success of the attack",
        "the published win rate shows the two answers in one order, which favours a place; --compare asks in both",
    ),
    metrics=_metrics,
)
