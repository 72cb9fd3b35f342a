"""JailBreakV-28K (Luo et al., COLM 2024): text attacks with pictures and picture attacks; the mini set or the whole."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from srpo_jax.data.items import Item
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.scores import attack_success
from srpo_jax.evaluation.benchmarks.source import Source
from srpo_jax.evaluation.metrics import Groups


def _items(table: str, subset: str, source: Source) -> Iterator[Item]:
    for row in source.rows(table):
        if images := source.images(row.place, row.text("image_path")):
            meta = row.meta(subset, "redteam_query", "format")
            asked = row.text("redteam_query")
            category = row.text("policy")
            # Many attacks carry one forbidden request.
            yield Item(row.text("id"), images, row.text("jailbreak_query"), True, category, f"jailbreakv/{asked}", meta)


def _metrics(prompts: Groups) -> dict[str, Any]:
    formats = sorted({str(prompt[0].record.meta["format"]) for prompt in prompts})
    told = {"ASR": attack_success(prompts)}
    for name in formats:
        told[f"ASR {name}"] = attack_success([p for p in prompts if str(p[0].record.meta["format"]) == name])
    return told


def _benchmark(name: str, title: str, table: str, n: int) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        family="jailbreak robustness",
        counts={name: n},
        licence="MIT",
        origin="huggingface.co/datasets/JailbreakV-28K/JailBreakV-28k (folder JailBreakV_28K)",
        files=(table, "the pictures under the paths that it names"),
        metric="attack success rate by format",
        judge="safe, seeing redteam_query; a fine-tuned Llama Guard there",
        items=functools.partial(_items, table, name),
        verified=False,
        caveats=("20,000 of the 28,000 are text attacks whose picture is blank, noise or unrelated",),
        metrics=_metrics,
    )


BENCHMARK = _benchmark("jailbreakv", "JailBreakV-28K", "JailBreakV_28K.csv", 28_000)
MINI = _benchmark("jailbreakv_mini", "JailBreakV-28K, mini", "mini_JailBreakV_28K.csv", 280)
