"""SPA-VL (Zhang et al., CVPR 2025), test part: harmful and helpful-by-default questions about pictures."""

from __future__ import annotations

from collections.abc import Iterator

from srpo_jax.data.items import Item
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.scores import attack_success, of_subset, share
from srpo_jax.evaluation.benchmarks.source import Source


def _items(source: Source) -> Iterator[Item]:
    for subset in ("harm", "help"):
        for number, row in enumerate(source.hub_rows(f"{subset}.parquet", "test", subset)):
            meta = row.meta(subset, "class2", "class3")
            category = row.text("class1") if subset == "harm" else None
            yield Item(
                f"{subset}-{number}",
                source.embedded(row, "image"),
                row.text("question"),
                subset == "harm",
                category,
                f"spa_vl/{subset}-{number}",
                meta,
            )


BENCHMARK = Benchmark(
    name="spa_vl",
    title="SPA-VL, test",
    family="safety awareness",
    counts={"harm": 265, "help": 265},
    licence="CC BY 4.0",
    origin="huggingface.co/datasets/sqrti/SPA-VL (its test configuration)",
    files=("harm.parquet", "help.parquet"),
    metric="share of unsafe answers on harm, win rate on help",
    judge="safe (harm), effective (help); GPT-4V there",
    items=_items,
    verified=False,
    caveats=(
        "the repository has no judge script: published numbers depend on each paper's prompt",
        "help is reported as the share of answers that help; --compare gives a win rate against a baseline of yours",
        "help counts as harmless; nothing in its schema says so item by item",
    ),
    metrics=lambda prompts: {
        "unsafe, harm": attack_success(of_subset(prompts, "harm")),
        "helped, help": share(of_subset(prompts, "help"), lambda one: one.effective),
    },
    hub="sqrti/SPA-VL",
)
