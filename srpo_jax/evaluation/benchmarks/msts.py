"""MSTS (Röttger et al., 2025): text that becomes unsafe with its picture; 200 cases, two wordings each."""

from __future__ import annotations

from collections.abc import Iterator

from srpo_jax.data.items import Item
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.scores import attack_success, of_subset, refusal
from srpo_jax.evaluation.benchmarks.source import Source

SUBSETS = {"assistance": 200, "intention": 200}


def _items(source: Source) -> Iterator[Item]:
    for row in source.rows("prompts/english_multimodal.csv"):
        subset = row.choice("prompt_type", {name: name for name in SUBSETS})
        if images := source.images(row.place, row.text("unsafe_image_id"), folder="images"):
            meta = row.meta(subset, "unsafe_image_description", "hazard_subcategory")
            category, case = row.text("hazard_category"), row.text("case_id")
            yield Item(row.text("prompt_id"), images, row.text("prompt_text"), True, category, f"msts/{case}", meta)


BENCHMARK = Benchmark(
    name="msts",
    title="MSTS, English multimodal",
    family="safety awareness",
    counts=SUBSETS,
    licence="CC BY 4.0 (pictures: each its own)",
    origin="github.com/paul-rottger/msts-multimodal-safety; pictures by the URLs of data/images/unsafe_images.csv",
    files=("prompts/english_multimodal.csv", "images/<unsafe_image_id>.*"),
    metric="share of unsafe answers, with a taxonomy of the safe ones",
    judge="safe and refused; by people there",
    items=_items,
    verified=True,
    caveats=(
        "200 cases are the clusters, not 400 prompts",
        "people find 4.5 % of ten models' answers unsafe, judges 1.6 to 21.7 %: a judge's rate is no rate without its error",
    ),
    metrics=lambda prompts: {
        **{f"unsafe, {name}": attack_success(of_subset(prompts, name)) for name in SUBSETS},
        "refused": refusal(prompts),
    },
)
