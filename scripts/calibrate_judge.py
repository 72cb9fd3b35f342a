"""Measures a judge against human labels and writes its card: sensitivity, specificity, κ, and whether it is worth asking.

python scripts/calibrate_judge.py --data=msts --judge=column:gpt-4o-2024-05-13 --data_root=../shared/data --output=runs/cards

--data=msts for harm, --data=xstest for refusal; the two are never pooled. --judge is
  column:NAME            labels that the data set's authors published (a wrong name lists them); "columns" takes them all;
  refusals:NAME          "no refusal phrase, so unsafe" by one of our lists (first_person, broad) or by a file of yours;
  anything else          a judge of docs/judges.md, asked now; verdicts are kept in --output and never asked twice.

A card may disqualify a judge; it never corrects a rate (docs/judges.md).
"""

import re
from pathlib import Path

from absl import app, flags

from srpo_jax import cli
from srpo_jax.exploration.judging import judge_name
from srpo_jax.files import lock_folder, write_json
from srpo_jax.judges import calibration, labelled, refusals
from srpo_jax.judges.registry import make_judge

DATA = flags.DEFINE_enum("data", "msts", list(calibration.LABELS), "msts: harm. xstest: refusal.")
JUDGE = flags.DEFINE_multi_string("judge", None, "Whom to measure; may be given several times.", required=True)
ROOT = flags.DEFINE_string("data_root", "../shared/data", "Folder with msts/ and xstest/ as published.")
OUTPUT = flags.DEFINE_string("output", "runs/cards", "Where to write the card and keep verdicts.")
LIMIT = flags.DEFINE_integer("limit", None, "Prompts to use, for a trial; the card says how many.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the resampling.")


def main(_):
    rows = labelled.load(DATA.value, ROOT.value)
    if LIMIT.value:
        kept = set(list(dict.fromkeys(row.cluster for row in rows))[: LIMIT.value])
        rows = [row for row in rows if row.cluster in kept]
    folder = Path(OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    cards = []
    for judge in JUDGE.value:
        for spec in [f"column:{name}" for name in rows[0].published] if judge == "columns" else [judge]:
            cards.append(make_card(spec, rows, folder))
    print(calibration.render(cards[0]) if len(cards) == 1 else calibration.overview(cards))


def make_card(spec, rows, folder):
    """The card of a judge, written to the folder."""
    name, said = labels(spec, rows, folder)
    card = calibration.make_card(DATA.value, name, rows, said, SEED.value)
    if DATA.value == "msts":
        card["transport"] = calibration.transport(rows, said)
        card["pooled_splits"] = calibration.pooled_splits(rows, said)
    file = folder / f"{DATA.value}-{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}"
    write_json(file.with_name(file.name + ".json"), card)
    file.with_name(file.name + ".md").write_text(calibration.render(card), encoding="utf-8")
    return card


def labels(spec, rows, folder):
    """The judge's name and its labels."""
    kind, _, rest = spec.partition(":")
    if kind == "column":
        if rest not in rows[0].published:
            raise app.UsageError(f"--judge: no column {rest!r}; {DATA.value} has {', '.join(rows[0].published)}")
        return rest, [row.published[rest] for row in rows]
    if kind == "refusals":
        phrases = refusals.LISTS.get(rest) or refusals.read_phrases(rest)
        positive = {"msts": ("safe", "unsafe"), "xstest": ("refusal", "compliance")}[DATA.value]
        return spec, [positive[not refusals.phrases_in(row.response, phrases)] for row in rows]
    judge = make_judge(spec, folder)
    said = calibration.ask_labels(judge, DATA.value, rows, folder)
    if hasattr(judge, "client"):
        print(f"{judge_name(judge)}: {judge.client.spent()}")
    return judge_name(judge), said


if __name__ == "__main__":
    cli.run(main)
