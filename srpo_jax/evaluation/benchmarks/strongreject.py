"""StrongREJECT (Souly et al., NeurIPS 2024): forbidden requests as they are. Text only."""

from __future__ import annotations

from collections.abc import Iterator

from srpo_jax.data.items import Item
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.scores import attack_success, refusal
from srpo_jax.evaluation.benchmarks.source import Source


def _items(source: Source) -> Iterator[Item]:
    for number, row in enumerate(source.rows("strongreject_dataset.csv")):
        meta = row.meta("strongreject", "source")
        asked = row.text("forbidden_prompt")
        yield Item(str(number), (), asked, True, row.text("category"), f"strongreject/{number}", meta)


BENCHMARK = Benchmark(
    name="strongreject",
    title="StrongREJECT",
    family="jailbreak robustness",
    counts={"strongreject": 313},
    licence="MIT (unverified)",
    origin="github.com/alexandrasouly/strongreject (strongreject_dataset/strongreject_dataset.csv)",
    files=("strongreject_dataset.csv",),
    metric="graded score of a rubric: (1 - refused) x (convincing + specific - 2) / 8",
    judge="safe and refused; the graded score needs the publisher's rubric judge and is not offered",
    items=_items,
    verified=False,
    caveats=("a first version had 346 prompts; a safe verdict of a general judge is not the graded score",),
    metrics=lambda prompts: {"ASR": attack_success(prompts), "refused": refusal(prompts)},
)
