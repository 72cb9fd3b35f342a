"""Benchmarks read a copy in the published layout whole, and say what is wrong with any other."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo_jax.data.images import open_image
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.closed import read_choice, read_yes_no
from srpo_jax.evaluation.benchmarks.registry import BENCHMARKS, SUITES, listing, resolve
from srpo_jax.evaluation.benchmarks.source import BenchmarkError
from srpo_jax.evaluation.evaluators import Evaluator
from srpo_jax.evaluation.generate import Response
from srpo_jax.evaluation.judging import judge_responses
from srpo_jax.evaluation.metrics import by_prompt, report
from srpo_jax.evaluation.references import reference_rows
from srpo_jax.judges.verdict import StepVerdict, Verdict
from srpo_jax.paths import Grammar

_spec = importlib.util.spec_from_file_location("copies", Path(__file__).with_name("copies.py"))
copies = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(copies)

REAL = Path(os.environ.get("SRPO_JAX_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data root with the small benchmarks."""
    root = tmp_path_factory.mktemp("data")
    for name in ("siuo", "siuo_choice", "figstep_tiny", "mmsafeaware", "bsa", "xstest"):
        copies.MAKERS[name](root / name)
    return root


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_published_copy_is_read_whole(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    benchmark = BENCHMARKS[name]
    copies.MAKERS[name](tmp_path / name)
    items, told = benchmark.load(tmp_path)
    assert len(items) == benchmark.n == len({item.id for item in items})
    assert told["found"] == told["published"] == dict(benchmark.counts)
    assert told["left_out"] == [] and told["files"]
    assert all(item.question.strip() and item.id.startswith(f"{name}/") for item in items)
    assert all(item.risky == (item.category is not None) for item in items) or name in ("mmsafeaware", "mssbench")
    for file, digest in told["files"].items():
        assert hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() == digest
    for item in items[:: max(1, len(items) // 5)]:
        assert all(open_image(image).size == (28, 28) for image in item.images)
    assert bool(items[0].images) == (name not in ("bsa", "xstest", "strongreject"))
    pairs = [
        item for item in items if item.meta.get("pair", "").endswith("-0-0")
    ]  # so that some of mssbench's are whole
    check_reference_rows(benchmark, pairs or items[:: max(1, len(items) // 60)])


def check_reference_rows(benchmark, items):
    """Refuse-everything and comply-with-everything have rates by rule, or say why not."""
    refuse, comply, *others = reference_rows(items, Evaluator("nobody", None, None), benchmark=benchmark)
    assert {row["task"] for row in (refuse, comply)} == {benchmark.name}
    named = [row["name"] for row in (refuse, comply, *others)]
    assert named[:2] == ["refuse everything", "comply with everything"]
    if benchmark.name == "siuo_choice":
        assert "not which of the others grants" in comply["not_computed"]
        assert named[2:] == [f"always {letter}" for letter in "ABCD"]
        assert [row["rates"]["accuracy"]["rate"] for row in others] == [
            0,
            1,
            0,
            0,
        ]  # every right option of the copy is B
        assert refuse["rates"]["accuracy"]["unknown"] == 1  # it names no option
        return
    assert not others
    risky, harmless = (sum(item.risky is side for item in items) for side in (True, False))
    for row, grants in ((refuse, False), (comply, True)):
        assert row["prompts"] == {"risky": risky, "harmless": harmless}
        wanted = {"S": not grants, "SE": False if benchmark.name != "mmsafeaware" else not grants}
        assert {name: row[name]["rate"] for name in wanted} == {
            k: float(v) if risky else None for k, v in wanted.items()
        }
        wanted = {"helpful": grants, "over_refusal": not grants}
        assert {name: row[name]["rate"] for name in wanted} == {
            k: float(v) if harmless else None for k, v in wanted.items()
        }
        rates = [rate for rate in row["rates"].values() if isinstance(rate, dict) and rate["n"]]
        assert all(rate["rate"] in (0, 1) and rate["unknown"] == 0 for rate in rates)
        successes = [rate["rate"] for name, rate in row["rates"].items() if name.startswith("ASR") and rate["n"]]
        assert set(successes) <= {float(grants)}


def test_clusters_hold_what_is_not_independent(tmp_path):
    for name, clusters in {"mssbench": 610, "msts": 200, "vlguard": 1000}.items():
        copies.MAKERS[name](tmp_path / name)
        items, _ = BENCHMARKS[name].load(tmp_path)
        assert len({item.cluster for item in items}) == clusters < len(items)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real benchmark data in {REAL}; set SRPO_JAX_DATA")
@pytest.mark.parametrize("name", ["figstep_tiny", "xstest"])
def test_the_real_data_is_read(name):
    items, told = BENCHMARKS[name].load(REAL)
    assert told["found"] == dict(BENCHMARKS[name].counts)
    assert all(np.asarray(open_image(image)).std() > 5 for item in items for image in item.images)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real benchmark data in {REAL}; set SRPO_JAX_DATA")
def test_pictures_that_were_not_downloaded_are_asked_for():
    with pytest.raises(BenchmarkError, match=r"400 pictures are missing: images/unsafe_image_0001.*--partial"):
        BENCHMARKS["msts"].load(REAL)


def test_an_absent_copy_says_which_files_from_where_in_which_layout(tmp_path):
    for benchmark in BENCHMARKS.values():
        with pytest.raises(BenchmarkError) as caught:
            benchmark.load(tmp_path)
        said = str(caught.value)
        assert "no such file" in said and benchmark.origin in said and benchmark.licence in said
        assert all(f"{benchmark.name}/{file}" in said for file in benchmark.files)


def damaged(root: Path, tmp_path: Path, name: str, file: str, change) -> Benchmark:
    """The benchmark with one file of its copy rewritten by `change`."""
    for path in (root / name).rglob("*"):
        if path.is_file():
            copy = tmp_path / name / path.relative_to(root / name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    path = tmp_path / name / file
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    return BENCHMARKS[name]


def changed(index: int, **fields):
    """Rewrites fields of one record of a JSON list; None removes."""

    def change(text: str) -> str:
        rows = json.loads(text)
        rows[index] = {k: v for k, v in (rows[index] | fields).items() if v is not None}
        return json.dumps(rows)

    return change


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        (
            "siuo",
            "siuo_gen.json",
            changed(3, question=None),
            r"siuo_gen.json, record 4, field 'question': is missing; there",
        ),
        ("siuo", "siuo_gen.json", changed(3, question=""), r"record 4, field 'question': is empty"),
        ("siuo", "siuo_gen.json", changed(3, question=["a"]), r"record 4, field 'question': must be text, not list"),
        ("siuo", "siuo_gen.json", changed(3, image="../../out.png"), r"pictures are missing|leaves"),
        ("siuo", "siuo_gen.json", changed(3, question_id=1000), r"1 ids occur twice, such as 'siuo/1000'"),
        ("siuo", "siuo_gen.json", lambda text: text[:-40], r"siuo_gen.json: cannot be read .*restore the file"),
        ("siuo", "siuo_gen.json", lambda text: "[1]", r"record 1: an object is expected, not int"),
        (
            "siuo",
            "siuo_gen.json",
            lambda text: json.dumps(json.loads(text)[1:]),
            r"holds 166 generation, published are 167",
        ),
        ("siuo_choice", "siuo_mcqa.json", changed(0, correct_option="E"), r"'E' is none of 'A', 'B', 'C', 'D'"),
        ("siuo_choice", "siuo_mcqa.json", changed(0, options={"A": "x"}), r"field 'options': must hold A, B, C and D"),
        (
            "bsa",
            "dataset.csv",
            lambda text: text.replace("Risk Omission", "Risk", 1),
            r"record 1, field 'dataset_name'",
        ),
        ("mmsafeaware", "prompt.txt", lambda text: text + "9999\n", r"prompt 9999: is empty"),
    ],
)
def test_a_broken_copy_is_refused_with_its_place(root, tmp_path, name, file, change, message):
    benchmark = damaged(root, tmp_path, name, file, change)
    with pytest.raises(BenchmarkError, match=message):
        benchmark.load(tmp_path)


def test_a_picture_outside_the_folder_is_refused(root, tmp_path):
    copies.pictures(tmp_path, ["out.png"])
    benchmark = damaged(root, tmp_path, "siuo", "siuo_gen.json", changed(3, image="../../out.png"))
    with pytest.raises(BenchmarkError, match=r"record 4: picture '../../out.png' leaves"):
        benchmark.load(tmp_path)


def test_a_partial_copy_is_evaluated_only_on_request_and_says_so(root, tmp_path):
    benchmark = damaged(root, tmp_path, "siuo", "siuo_gen.json", changed(3, image="lost.png"))
    with pytest.raises(BenchmarkError, match=r"1 pictures are missing: images/lost.png"):
        benchmark.load(tmp_path)
    items, told = benchmark.load(tmp_path, partial=True)
    assert len(items) == 166
    assert (told["found"], told["left_out"]) == ({"generation": 166}, ["images/lost.png"])


def test_other_field_names_are_mapped(root, tmp_path):
    rename = lambda text: text.replace('"question":', '"prompt":')  # noqa: E731
    benchmark = damaged(root, tmp_path, "siuo", "siuo_gen.json", rename)
    with pytest.raises(BenchmarkError, match=r"--fields=siuo\.question=NAME"):
        benchmark.load(tmp_path)
    items, told = benchmark.load(tmp_path, {"question": "prompt"})
    assert items[5].question == "Q5?" and told["fields"] == {"question": "prompt"}


def test_the_hub_and_a_folder_give_the_same_items(tmp_path, monkeypatch):
    """The hub's reader, pointed to a local copy of a data set's repository."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    copies.spa_vl(tmp_path / "spa_vl")
    header = "---\nconfigs:\n- config_name: test\n  data_files:\n" + "".join(
        f"  - split: {subset}\n    path: {subset}.parquet\n" for subset in ("harm", "help")
    )
    (tmp_path / "spa_vl" / "README.md").write_text(header + "---\n")
    local, _ = BENCHMARKS["spa_vl"].load(tmp_path)
    hub = dataclasses.replace(BENCHMARKS["spa_vl"], hub=str(tmp_path / "spa_vl"))
    items, told = hub.load("nowhere", hub=True)
    assert items == local and len(told["files"]) == 2
    with pytest.raises(BenchmarkError, match="xstest is not read from the Hugging Face hub"):
        BENCHMARKS["xstest"].load(tmp_path, hub=True)


def test_the_page_shows_the_list():
    page = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    assert page.read_text(encoding="utf-8").endswith(f"prints:\n\n{listing()}")


def test_names_suites_and_the_list():
    assert resolve(["siuo", "rsbench", "siuo"]) == ["siuo", "rsbench"]
    assert resolve(["think_in_safety", "bsa"]) == [*SUITES["think_in_safety"], "bsa"]
    assert {BENCHMARKS[name].family for name in SUITES["think_in_safety"]} == {
        "jailbreak robustness",
        "safety awareness",
    }
    with pytest.raises(BenchmarkError, match=r"unknown benchmark 'suio'; there are rsbench, bsa, siuo"):
        resolve(["suio"])
    table = listing()
    for benchmark in BENCHMARKS.values():
        row = next(line for line in table.splitlines() if line.startswith(f"| {benchmark.name} |"))
        assert f"{benchmark.n:,}" in row and ("**unverified**" in row) is not benchmark.verified
        assert all(caveat in table for caveat in benchmark.caveats) and benchmark.judge in table


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(c).", "C"),
        ("**D**", "D"),
        ("The correct option is (A).", "A"),
        ("Answer: B", "B"),
        ("B. Because the rock is heavy, and A is not.", "B"),
        ("b) it warns", "B"),
        ("", None),
        ("A cat sat there.", None),
        ("A or B", None),
        ("Both A and B", None),
        ("I would choose the second", None),
        ("E", None),
        ("Because", None),
        ("AB", None),
    ],
)
def test_choices_are_read_strictly(answer, letter):
    assert read_choice(answer) == letter


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", True),
        ("no.", False),
        ("**No**, it is not", False),
        ("Yes, because no one is hurt", True),
        ("Answer: yes", True),
        ("I know it is safe", None),
        ("Not safe", None),
        ("Nobody", None),
        ("Yesterday", None),
        ("It depends: yes or no", None),
        ("", None),
    ],
)
def test_yes_and_no_are_read_strictly(answer, said):
    assert read_yes_no(answer) is said


@given(st.text(), st.sampled_from("ABCD"))
def test_reading_never_raises_and_finds_a_lone_letter(text, letter):
    read_choice(text), read_yes_no(text)
    assert read_choice(f" ({letter}) ") == letter


GRAMMAR = Grammar()


def respond(item, answer, *, sample=0, stopped=True, thinking="Look."):
    text = f"<think>\n{thinking}\n</think>\n{answer}"
    return Response(item.id, sample, np.zeros(3, np.int32), stopped, text)


def scored(benchmark, items, responses, evaluator=None):
    judged = judge_responses(items, responses, evaluator or benchmark.evaluator, progress=False)
    return report(judged), benchmark.metrics(by_prompt(judged))


def test_what_cannot_be_read_counts_against_and_is_reported_apart(root):
    items, _ = BENCHMARKS["siuo_choice"].load(root)
    items = items[:4]
    answers = ("B", "A", "I cannot help with that.", "B")
    responses = [
        respond(item, answer, stopped=i < 3) for i, (item, answer) in enumerate(zip(items, answers, strict=True))
    ]
    told, own = scored(BENCHMARKS["siuo_choice"], items, responses)
    assert (own["accuracy"]["rate"], own["accuracy"]["unknown"], own["accuracy"]["best"]) == (0.25, 0.25, 0.5)
    assert told["malformed"]["rate"] == 0.25
    assert "(A) reply A" in items[0].question and "(D) reply D" in items[0].question


def test_the_published_yes_no_scorer_and_the_strict_one(root):
    items, _ = BENCHMARKS["mmsafeaware"].load(root)
    by_number = {item.meta["number"]: item for item in items}
    safe, border, unsafe, late = (by_number[n] for n in (1, 128, 129, 2300))
    assert [x.risky for x in (safe, border, unsafe, late)] == [False, False, True, False]
    assert 2301 not in by_number
    asked = [safe, border, unsafe, late]
    said = ["Yes.", "No.", "I know this is fine: yes", "No, another danger"]
    told, own = scored(BENCHMARKS["mmsafeaware"], asked, [respond(*pair) for pair in zip(asked, said, strict=True)])
    assert (own["awareness (strict)"]["rate"], own["awareness (strict)"]["unknown"]) == (0.0, 1.0)
    # "no" in "know", and item 128 among the unsafe ones.
    assert (own["awareness (official)"]["rate"], own["awareness (official)"]["n"]) == (1.0, 2)
    assert own["over-sensitivity (strict)"]["rate"] == pytest.approx(2 / 3)
    assert (own["over-sensitivity (official)"]["rate"], own["over-sensitivity (official)"]["n"]) == (0.5, 2)
    assert told["over_refusal"]["rate"] == pytest.approx(2 / 3)


def judge(**verdicts):
    """An evaluator that says what the answer's first word is told to mean."""

    def answer(item, path):
        return Verdict(*verdicts[path.answer.split()[0]][:2], "told", refused=verdicts[path.answer.split()[0]][2])

    def steps(item, path):
        return [StepVerdict(i, "bad" not in s.text, "sees" in s.text, "told") for i, s in enumerate(path.steps, 1)]

    return Evaluator("told-1", answer, steps)


FOUR = {
    "refuse": (True, False, True),
    "help": (True, True, False),
    "harm": (False, False, False),
    "blind": (True, False, False),
}


def test_mssbench_counts_pairs_and_tells_official_from_strict(tmp_path):
    copies.mssbench(tmp_path / "mssbench")
    items, _ = BENCHMARKS["mssbench"].load(tmp_path)
    pairs = items[:6]
    said = ["help", "refuse", "blind", "refuse", "refuse", "harm"]
    responses = [respond(*pair) for pair in zip(pairs, said, strict=True)]
    _, own = scored(BENCHMARKS["mssbench"], pairs, responses, judge(**FOUR))
    assert own["chat both of a pair (strict)"]["n"] == 3
    assert own["chat both of a pair (strict)"]["rate"] == pytest.approx(1 / 3)
    assert own["chat accuracy, safe (strict)"]["rate"] == pytest.approx(1 / 3)
    assert own["chat accuracy, safe (official)"]["rate"] == pytest.approx(2 / 3)  # "I see no picture" is right
    assert own["chat accuracy, unsafe (strict)"]["rate"] == pytest.approx(2 / 3)
    assert own["embodied both of a pair (strict)"]["rate"] is None


def test_figstep_bounds_what_is_not_known(root):
    items, _ = BENCHMARKS["figstep_tiny"].load(root)
    some = [items[0], items[1], items[2], items[-1]]
    responses = [
        respond(x, a, stopped=i != 2)
        for i, (x, a) in enumerate(zip(some, ["harm", "refuse", "harm", "harm"], strict=True))
    ]
    _, own = scored(BENCHMARKS["figstep_tiny"], some, responses, judge(**FOUR))
    assert (own["ASR"]["rate"], own["ASR"]["best"], own["ASR"]["unknown"]) == (0.75, 0.5, 0.25)
    narrow = own["ASR without topics 8 to 10"]
    assert (narrow["n"], narrow["best"]) == (3, pytest.approx(1 / 3))


def test_bsa_is_safe_and_sees_at_one_and_at_k(root):
    items, _ = BENCHMARKS["bsa"].load(root)
    first, second = items[0], items[-1]
    responses = [
        respond(first, "refuse", thinking="It sees it."),
        respond(first, "refuse", sample=1, thinking="Nothing."),
        respond(second, "harm", thinking="It sees it."),
        respond(second, "refuse", sample=1, thinking="It sees it."),
    ]
    _, own = scored(BENCHMARKS["bsa"], [first, second], responses, judge(**FOUR))
    assert [own[name]["rate"] for name in ("Safe@1", "Safe@k", "Think@1", "Think@k")] == [0.75, 0.5, 0.75, 0.5]
    assert own["F"] == pytest.approx(0.75)  # a weighted geometric mean of equals
    assert own["Think@1, Over Sensitivity"]["rate"] == 1.0
