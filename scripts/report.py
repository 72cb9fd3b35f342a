"""Writes the report of evaluations: report.html (one file, no network), report.md, comparisons in results.json.

python scripts/report.py --workdir=DIR [--baseline=DIR] [--trees=RUN] [--serve] [--export=inspect|lmms]

DIR is where scripts/evaluate.py or the quickstart kept results.json and evaluation/. Without --baseline, rows are compared with
the first row of the same benchmark and decoding, or with that called --against. --serve opens the page on loopback and saves
human labels to DIR/labels.json as they are made; labels that were downloaded from the page belong there, too. --trees adds
reasoning trees that RUN, a work directory of scripts/train.py or scripts/explore.py, explored in its last round.
"""

import secrets
from pathlib import Path
from typing import Any

from absl import flags

from srpo_jax import cli
from srpo_jax import config as configs
from srpo_jax.evaluation.combs import explored_combs, write_combs
from srpo_jax.evaluation.comparison import MARGIN
from srpo_jax.evaluation.evaluators import EVALUATORS
from srpo_jax.evaluation.human import LABELS, parse_labels, read_labels, write_labels
from srpo_jax.evaluation.interop.export import write_inspect_log, write_lmms_lines
from srpo_jax.evaluation.report import write_report
from srpo_jax.evaluation.report.assemble import EVALUATION, assemble
from srpo_jax.evaluation.report.serve import LabelServer
from srpo_jax.evaluation.report.write import build_page
from srpo_jax.evaluation.results import read_results
from srpo_jax.evaluation.samples import read_samples, samples_name
from srpo_jax.runs import load_processor, workdir_settings

WORKDIR = flags.DEFINE_string("workdir", None, "Where results.json and evaluation/ are.", required=True)
BASELINE = flags.DEFINE_string("baseline", None, "Work directory of the baseline; default: rows of the same one.")
AGAINST = flags.DEFINE_string("against", None, "Name of the baseline's rows; default: the first that fit.")
MARGIN_FLAG = flags.DEFINE_float("margin", 100 * MARGIN, "Of non-inferiority, in points.", lower_bound=0.0)
TITLE = flags.DEFINE_string("title", None, "Of the report.")
EXPORT = flags.DEFINE_enum(
    "export", None, ["inspect", "lmms"], "Write DIR/export/ for Inspect, or in lmms-eval's style."
)
TREES = flags.DEFINE_string("trees", None, "Work directory whose explored trees the report shows.")
TREE_COUNT = flags.DEFINE_integer("tree_count", 48, "About so many of them.", lower_bound=1)
SERVE = flags.DEFINE_bool("serve", False, "Serve the page on 127.0.0.1 and save labels.")
PORT = flags.DEFINE_integer("port", 0, "For --serve; 0 takes a free one.")


def main(_):
    options: dict[str, Any] = {"against": AGAINST.value, "margin": MARGIN_FLAG.value / 100}
    if TREES.value:
        draw(Path(TREES.value), Path(WORKDIR.value) / EVALUATION)
    path = write_report(WORKDIR.value, BASELINE.value, title=TITLE.value, **options)
    print(f"{path}, {path.with_suffix('.md')}")
    if EXPORT.value:
        export(Path(WORKDIR.value), EXPORT.value)
    if SERVE.value:
        serve(Path(WORKDIR.value) / LABELS, **options)


def draw(run, folder):
    """Trees of the run's last round, for the report; steps are judged where the data set has an evaluator of its own."""
    config = workdir_settings(run)
    rounds = sorted(path.parent for path in (run / "trees").rglob("branches.jsonl"))
    if not rounds:
        raise FileNotFoundError(f"{run}/trees: no branches.jsonl there; name a work directory that has explored")
    evaluator = EVALUATORS.get(config.data.name)
    judge = {"judge_steps": evaluator.steps, "step_judge": evaluator.name} if evaluator else {}
    title, count = " ".join((run.absolute().name, *rounds[-1].relative_to(run / "trees").parts)), TREE_COUNT.value
    options = {"title": title, "limit": count, "favourable": config.explore.favourable, **judge}
    found = explored_combs(rounds[-1], configs.build_records(config), load_processor(config), folder, **options)
    write_combs(folder, run.absolute().name, found)


def export(workdir, form):
    """A file per row of results.json."""
    folder = workdir / EVALUATION
    (workdir / "export").mkdir(exist_ok=True)
    for entry in read_results(workdir / "results.json")["evaluations"]:
        samples = read_samples(folder, samples_name(entry))
        if form == "inspect":
            path = write_inspect_log(workdir / "export", entry, samples, folder)
        else:
            path = workdir / "export" / f"{samples_name(entry)}_lmms.jsonl"
            write_lmms_lines(path, samples)
        print(path)


def serve(labels, **options):
    """Until interrupted."""
    token = secrets.token_urlsafe()
    known = read_labels(labels) if labels.exists() else []
    page = build_page(assemble(WORKDIR.value, BASELINE.value, **options), title=TITLE.value, token=token, labels=known)
    with LabelServer(page, token, lambda value: write_labels(labels, parse_labels(value)), PORT.value) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/ saves labels to {labels}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    cli.run(main)
