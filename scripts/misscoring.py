"""How common scorers mis-score the same responses: refusal phrases and published judges against human labels.

python scripts/misscoring.py --data_root=../shared/data [--phrases=FILE ...] [--output=misscoring.json]

MSTS: who calls how many of 4,000 responses unsafe. XSTest: who calls how many answers to harmless prompts refusals. A list of
yours (--phrases, one phrase per line) stands beside our two.
"""

import collections
import math
import warnings

from absl import flags
from scipy.stats import ConstantInputWarning, spearmanr

from srpo_jax import cli
from srpo_jax.evaluation.statistics import rate
from srpo_jax.files import write_json
from srpo_jax.judges import calibration, labelled, refusals

ROOT = flags.DEFINE_string("data_root", "../shared/data", "Folder with msts/ and xstest/ as published.")
PHRASES = flags.DEFINE_multi_string("phrases", [], "Refusal list of yours: one phrase per line.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file to write the numbers to.")


def main(_):
    lists = refusals.LISTS | {path: refusals.read_phrases(path) for path in PHRASES.value}
    warnings.simplefilter("ignore", ConstantInputWarning)  # a scorer that says the same of every model orders none: nan
    told = {"msts": harm(labelled.load("msts", ROOT.value), lists)}
    told["xstest"] = over_refusal(labelled.load("xstest", ROOT.value), lists)
    if OUTPUT.value:
        write_json(OUTPUT.value, told)


def harm(rows, lists):
    """MSTS: the share called unsafe, and what became of it."""
    scorers = {"people": [row.label for row in rows]}
    for name, phrases in lists.items():
        found = [refusals.phrases_in(row.response, phrases) for row in rows]
        scorers[f"no refusal phrase ({name})"] = ["safe" if hit else "unsafe" for hit in found]
    scorers |= {name: [row.published[name] for row in rows] for name in rows[0].published}
    people = [m["by_people"] for m in calibration.by_model(rows, scorers["people"], ("safe", "unsafe")).values()]
    print(
        "| scorer | unsafe % [95 %] | right when it says unsafe % | finds of the unsafe % | κ | order of the ten models |"
    )
    print("|---|---|---|---|---|---|")
    table = {}
    for name, said in scorers.items():
        counts = calibration.count([r.label for r in rows], said, [r.cluster for r in rows], ("safe", "unsafe")).sum(0)
        theirs = [m["by_judge"] for m in calibration.by_model(rows, said, ("safe", "unsafe")).values()]
        told = {
            "unsafe": called(rows, [s == "unsafe" for s in said]),
            "precision": counts[1, 1] / counts[:, 1].sum() if counts[:, 1].any() else math.nan,
            "sensitivity": float(calibration.recall(counts, -1)),
            "kappa": float(calibration.kappa(counts)),
            "spearman": float(spearmanr(people, theirs).statistic),
        }
        table[name] = told
        cells = [f"{100 * told[k]:.0f}" for k in ("precision", "sensitivity")]
        cells += [f"{told[k]:.2f}" for k in ("kappa", "spearman")]
        print(f"| {name} | {percent(told['unsafe'])} | {' | '.join(cells)} |")
    print()
    return table


def over_refusal(rows, lists):
    """XSTest: the share of harmless prompts refused, fully or in part, model by model."""
    rows = [row for row in rows if not row.item.risky]
    refused = {"people": [row.label != "compliance" for row in rows]}
    for name in rows[0].published:
        refused[name] = [row.published[name] in ("refusal", "partial") for row in rows]
    for name, phrases in lists.items():
        refused[f"refusal phrase ({name})"] = [bool(refusals.phrases_in(row.response, phrases)) for row in rows]
    models = sorted({row.model for row in rows})
    print(f"| scorer | {' | '.join(models)} |\n|---|{'---|' * len(models)}")
    table = {}
    for name, said in refused.items():
        table[name] = {model: called(*_of(model, rows, said)) for model in models}
        print(f"| {name} | {' | '.join(percent(table[name][model]) for model in models)} |")
    return table


def _of(model, rows, said):
    kept = [(row, s) for row, s in zip(rows, said, strict=True) if row.model == model]
    return [row for row, _ in kept], [s for _, s in kept]


def called(rows, said):
    """The rate over prompts, with its interval: the prompt is n."""
    prompts = collections.defaultdict(list)
    for row, s in zip(rows, said, strict=True):
        prompts[row.cluster].append(s)
    return rate(prompts.values()).to_json()


def percent(told):
    return f"{100 * told['rate']:.1f} [{100 * told['low']:.1f}, {100 * told['high']:.1f}]"


if __name__ == "__main__":
    cli.run(main)
