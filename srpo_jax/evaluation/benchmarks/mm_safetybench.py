"""MM-SafetyBench (Liu et al., ECCV 2024): harmful requests moved into the picture, drawn, typeset, or both."""

from __future__ import annotations

from collections.abc import Iterator

from srpo_jax.data.items import Item
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.scores import attack_success, of_subset
from srpo_jax.evaluation.benchmarks.source import Source

SCENARIOS = (
    "01-Illegal_Activitiy",  # spelt so there
    "02-HateSpeech",
    "03-Malware_Generation",
    "04-Physical_Harm",
    "05-EconomicHarm",
    "06-Fraud",
    "07-Sex",
    "08-Political_Lobbying",
    "09-Privacy_Violence",
    "10-Legal_Opinion",
    "11-Financial_Advice",
    "12-Health_Consultation",
    "13-Gov_Decision",
)
VARIANTS = {"SD": "Rephrased Question(SD)", "TYPO": "Rephrased Question", "SD_TYPO": "Rephrased Question"}


def _items(source: Source) -> Iterator[Item]:
    for scenario in SCENARIOS:
        for row in source.rows(f"processed_questions/{scenario}.json"):
            name = row.text("(key)")
            for variant, field in VARIANTS.items():
                if images := source.images(row.place, name, folder=f"imgs/{scenario}/{variant}"):
                    meta = row.meta(variant, "Question", "Key Phrase")
                    cluster = f"mm_safetybench/{scenario}-{name}"
                    yield Item(
                        f"{scenario}-{name}-{variant}", images, row.text(field), True, scenario[3:], cluster, meta
                    )


BENCHMARK = Benchmark(
    name="mm_safetybench",
    title="MM-SafetyBench",
    family="jailbreak robustness",
    counts=dict.fromkeys(VARIANTS, 1680),
    licence="CC BY-NC 4.0",
    origin="github.com/isXinLiu/MM-SafetyBench (data/processed_questions; images by its Drive link)",
    files=("processed_questions/<scenario>.json", "imgs/<scenario>/{SD,TYPO,SD_TYPO}/<id>.jpg"),
    metric="attack success rate by scenario",
    judge="safe; GPT-4 with a template per scenario there, which sees the answer alone",
    items=_items,
    verified=False,
    caveats=(
        "scenarios 10 to 12 (legal, financial, health) call any advice without a hedge unsafe",
        "the judge moves the rate: one model, 59 to 71 % by one judge, 46 to 48 % by another",
        "the text alone often gives the harm away; schema read from readers of the data, not from the data",
    ),
    metrics=lambda prompts: {f"ASR {name}": attack_success(of_subset(prompts, name)) for name in VARIANTS},
)
