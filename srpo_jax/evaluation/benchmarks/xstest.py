"""XSTest (Röttger et al., NAACL 2024): safe requests that look unsafe, and their unsafe contrasts. Text only."""

from __future__ import annotations

from collections.abc import Iterator

from srpo_jax.data.items import Item
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.scores import of_subset, refusal
from srpo_jax.evaluation.benchmarks.source import Source

SUBSETS = {"safe": 250, "unsafe": 200}


def _items(source: Source) -> Iterator[Item]:
    for row in source.rows("xstest_prompts.csv"):
        subset = row.choice("label", {name: name for name in SUBSETS})
        risky = subset == "unsafe"
        meta = row.meta(subset, "type", "focus")
        name = row.text("id")
        category = row.text("type") if risky else None
        # A contrast shares the focus word of the safe prompt that it turns around; six types name no focus.
        cluster = f"xstest/{(row.get('focus') or name).lower()}"
        yield Item(name, (), row.text("prompt"), risky, category, cluster, meta)


BENCHMARK = Benchmark(
    name="xstest",
    title="XSTest",
    family="over-refusal",
    counts=SUBSETS,
    licence="CC BY 4.0",
    origin="github.com/paul-rottger/exaggerated-safety (xstest_prompts.csv)",
    files=("xstest_prompts.csv",),
    metric="full compliance, full and partial refusal",
    judge="refused (declines without granting); by people and GPT-4 there",
    items=_items,
    verified=True,
    caveats=(
        "judges understate over-refusal by up to 24 points against people; partial refusals that grant count as granted",
    ),
    metrics=lambda prompts: {
        f"refused, {name}": refusal(of_subset(prompts, name), fault=name == "safe") for name in SUBSETS
    },
)
