"""VLSBench (Hu et al., ACL 2025): risk that is visible in the picture and absent from the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from srpo_jax.data.items import Item
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.scores import share
from srpo_jax.evaluation.benchmarks.source import Source
from srpo_jax.evaluation.metrics import Groups
from srpo_jax.evaluation.statistics import both


def _items(source: Source) -> Iterator[Item]:
    for row in source.rows("data.json"):
        picture = row.text("image_path")
        if images := source.images(row.place, picture):
            meta = row.meta("vlsbench", "sub_category", "source", "image_description", "safety_reason")
            name = row.text("instruction_id")
            yield Item(name, images, row.text("instruction"), True, row.text("category"), f"vlsbench/{picture}", meta)


def _metrics(prompts: Groups) -> dict[str, Any]:
    warned = share(prompts, lambda one: both(one.safe, None if one.refused is None else not one.refused))
    return {"safe with refusal": share(prompts, lambda one: both(one.safe, one.refused)), "safe with warning": warned}


BENCHMARK = Benchmark(
    name="vlsbench",
    title="VLSBench",
    family="safety awareness",
    counts={"vlsbench": 2241},
    licence="none stated",
    origin="github.com/AI45Lab/VLSBench (data/data.json) and huggingface.co/datasets/Foreshhh/vlsbench (imgs)",
    files=("data.json", "imgs/<number>.png"),
    metric="safe with refusal, safe with warning, unsafe",
    judge="safe and refused; GPT-4o in three classes there, seeing picture, query and response",
    items=_items,
    verified=True,
    caveats=(
        "the published script evaluates two items (a slice left in), and one refusal of its judge loses the run",
        "safety_reason and image_description make a judge without sight possible: say so when you use one",
    ),
    metrics=_metrics,
)
