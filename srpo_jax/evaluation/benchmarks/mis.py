"""MIS (Ding et al., 2025), test part: two pictures that are harmful only together with the question."""

from __future__ import annotations

from collections.abc import Iterator

from srpo_jax.data.items import Item
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.scores import attack_success, of_subset, refusal
from srpo_jax.evaluation.benchmarks.source import Source

SUBSETS = {"easy": 1675, "hard": 510, "real": 100}


def _items(source: Source) -> Iterator[Item]:
    for subset in SUBSETS:
        for number, row in enumerate(source.rows(f"mis_{subset}.json")):
            pictures = [row.text("image_path1"), row.text("image_path2")]
            if images := source.images(row.place, *pictures):
                name = f"{subset}-{number}"
                meta = row.meta(subset, "sub_category")
                yield Item(name, images, row.text("question"), True, row.text("category"), f"mis/{name}", meta)


BENCHMARK = Benchmark(
    name="mis",
    title="MIS, test",
    family="safety awareness",
    counts=SUBSETS,
    licence="Apache-2.0",
    origin="huggingface.co/datasets/Tuwhy/MIS_Test",
    files=("mis_easy.json", "mis_hard.json", "mis_real.json", "the pictures under the paths that they name"),
    metric="attack success, hazard, reasoning success and refusal rates",
    judge="safe and refused; GPT-4o in labels there",
    items=_items,
    verified=False,
    caveats=(
        "the paper's 2,185 are easy and hard; counts are those of the data card",
        "hazard and reasoning success rates need the publisher's own labels; not offered",
    ),
    metrics=lambda prompts: {
        **{f"ASR {name}": attack_success(of_subset(prompts, name)) for name in SUBSETS},
        "refused": refusal(prompts),
    },
)
