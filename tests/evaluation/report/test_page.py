"""Promise: the report is one file that loads nothing, and no text of a model, a judge or a data set is anything but text."""

import base64
import hashlib
import html
import html.parser
import http.client
import json
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo_jax.evaluation.human import HumanLabel, LabelsError, parse_labels, read_labels, write_labels
from srpo_jax.evaluation.report import write_report
from srpo_jax.evaluation.report.assemble import ReportError, assemble
from srpo_jax.evaluation.report.page import json_block, plain
from srpo_jax.evaluation.report.serve import LabelServer
from srpo_jax.evaluation.report.write import build_page
from srpo_jax.evaluation.results import read_results
from srpo_jax.evaluation.samples import SamplesError


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text of blocks by id."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.blocks, self.text, self._block = [], {}, "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._block = dict(attributes).get("id", tag) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._block = None

    def handle_data(self, data):
        if self._block is None:
            self.text += data
        else:
            self.blocks[self._block] = self.blocks.get(self._block, "") + data


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_says_what_results_say_and_loads_nothing(workdir, made):
    page = read(write_report(workdir))
    assert "SRPO (greedy) gives 50.0 points more answers that are safe and effective than base (greedy)" in page.text
    assert "refuse everything" in page.text
    assert "aa11" in page.text
    index = json.loads(page.blocks["index"])
    assert [row["label"] for row in index["rows"]] == ["base (greedy)", "SRPO (greedy)"]
    assert [row["baseline"] for row in index["rows"]] == [None, 0]
    assert len(index["prompts"]) == len(made.records)
    assert len(index["responses"]["row"]) == 2 * len(made.records)
    [combs] = index["combs"]
    assert ([tree["mixed"] for tree in combs["trees"]], combs["total"], combs["given"]) == ([True, True], 90, True)
    comb = json.loads(page.blocks["comb-0-1"])
    assert [branch["good"] for branch in comb["branches"]] == [-1, -1, 1, 0]
    assert [step["safe"] for step in comb["steps"]] == [1] * 6
    pictures = {name for prompt in (*index["prompts"], *combs["trees"]) for name in prompt["images"]}
    assert all(page.blocks[f"image-{name}"].startswith("data:image/webp;base64,") for name in pictures)
    assert not [a for _, a in page.elements if {"src", "href"} & a.keys() and not str(a.get("href")).startswith("#")]
    results = read_results(workdir / "results.json")
    [comparison] = results["comparisons"]
    assert comparison["metrics"]["SE"]["value"] == 0.5
    assert "| SRPO (greedy) |" in (workdir / "report.md").read_text()
    first = (workdir / "report.html").read_bytes()
    write_report(workdir)
    assert (workdir / "report.html").read_bytes() == first  # nothing of the moment is in it


def test_a_benchmarks_own_rates_and_swapped_steps_are_tables(workdir):
    rate = {"n": 8, "rate": 0.375, "low": 0.1, "high": 0.7, "unknown": 0.25, "best": 0.5}
    none = rate | {"n": 0, "rate": None, "low": None, "high": None}
    step = {"step": 4, "title": "Determine", "S": dict.fromkeys(("reference", "corrupted", "unsafe_opening"), rate)}
    results = read_results(workdir / "results.json")
    results["evaluations"][1] |= {"task": "bsa", "rates": {"Safe@1": rate, "F": 0.625, "<Think>": none}}
    results["evaluations"][1] |= {"interventions": {"steps": [step | {"followed": none}], "donors": {}}}
    results["references"][1] = {"not_computed": "nobody knows"} | {
        key: results["references"][1].get(key) for key in ("name", "benchmark", "evaluator", "decoding")
    }
    (workdir / "results.json").write_text(json.dumps(results))
    text = "".join(read(write_report(workdir)).text.split())
    assert "bsa:itsownratespolicySafe@1F<Think>bsa:SRPO(greedy)37.5*10–7062.5–" in text
    assert "4Determine37.5*10–7037.5*10–7037.5*10–70–" in text
    assert "notcomputed:nobodyknows" in text


def test_answers_side_by_side_are_a_table_and_a_lean_to_a_place_is_told_first(workdir, made):
    plain_page = write_report(workdir)
    assert "Side by side" not in plain_page.read_text() + (workdir / "report.md").read_text()
    made.add_pairwise(workdir)  # ten risky prompts with different answers; the judge takes the first
    text = read(write_report(workdir)).text
    words = " ".join(text.split())
    assert "Side by side, in both orders SRPO (greedy) against base, by first-1" in words
    table = words[words.index("Side by side, in both orders") :]
    assert (
        "safer20 risky10 tied 10 inconsistent0.00.0–16.1" in table
        and "100.072.2–100.0" in table
        and "p = 0.002" in table
    )
    assert (
        "more helpful (risky prompts), it prefers the first place 100.0 % of the time. Only what it says in both"
        in words
    )
    markdown = (workdir / "report.md").read_text()
    assert "SRPO (greedy) against base, side by side in both orders," in markdown
    assert "| safer | 20 risky (10 tied, 10 inconsistent) | 0.0 [0.0, 16.1] | 0.0 [0.0, 16.1] |" in markdown
    kept = read_results(workdir / "results.json")["evaluations"][-1]["pairwise"]
    assert kept["rows"][0]["outcomes"]["inconsistent"] == 10 and kept["rows"][0]["outcomes"]["tie"] == 10


def test_several_samples_and_thinking_are_tables_where_there_are_any(workdir):
    rate = {"n": 8, "rate": 0.375, "low": 0.1, "high": 0.7, "unknown": 0.0, "best": 0.375}
    results = read_results(workdir / "results.json")
    first, second = results["evaluations"]
    unjudged = rate | {"unknown": 1.0}
    for row in (first, second):
        row["thinking"] |= {"thinking": unjudged}  # a judge of answers alone: nothing of the reasoning is known
    (workdir / "results.json").write_text(json.dumps(results))
    for text in (read(write_report(workdir)).text, (workdir / "report.md").read_text()):
        assert "of its samples" not in text and "thinking safe" not in text
    ways = {"any": 0.75, "all": 0.25, "majority": 0.5}
    second["samples"] = {
        how: dict.fromkeys(("S", "E", "SE", "over_refusal"), rate | {"rate": x}) for how, x in ways.items()
    }
    second["thinking"] |= {"thinking": rate, "whole": rate | {"rate": 0.125}}
    first |= {"task": "figstep", "thinking": second["thinking"]}
    (workdir / "results.json").write_text(json.dumps(results))
    page, markdown = "".join(read(write_report(workdir)).text.split()), (workdir / "report.md").read_text()
    for how, x in ways.items():
        assert f"SRPO(greedy),{how}ofitssamples{100 * x:.1f}10–70{100 * x:.1f}10–70" in page
        assert f"| SRPO (greedy), {how}" in markdown
    assert "75.0 [10.0, 70.0]" in markdown
    assert "policythinkingsafeanswersafebothsafeunsafethinking,safeanswerSRPO(greedy)37.510–70" in page
    assert page.index("safeanswerSRPO(greedy)") < page.index("jailbreakrobustness:figstep:base(greedy)37.510–70")
    assert "| jailbreak robustness: figstep: base (greedy) |" in markdown and "12.5 [10.0, 70.0]" in markdown


def test_only_this_script_and_this_style_are_allowed(workdir):
    page = read(write_report(workdir))
    [policy] = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["connect-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.blocks[name].encode()).digest()).decode()
        assert rules[f"{name}-src"] == f"'sha256-{digest}'"
    assert not [a for _, a in page.elements if "style" in a or any(name.startswith("on") for name in a)]
    assert "innerHTML" not in page.blocks["script"]


def test_hostile_text_stays_text(hostile, made):
    path = write_report(hostile)
    markdown = (hostile / "report.md").read_text()
    assert "side by side in both orders,\nby leaning <script>" in markdown and not set("\u202e\u2066\u200b\x1b") & set(
        markdown
    )
    page = read(path)
    kinds = [(tag, a.get("type")) for tag, a in page.elements if tag in ("script", "img", "svg")]
    assert ("script", None) in kinds
    assert kinds.count(("script", None)) == 1
    assert not [tag for tag, _ in kinds if tag == "img"]
    assert "<script>window" not in path.read_text(encoding="utf-8")
    assert not set("\u202e\u2066\u200b") & set(page.text)
    bodies = json.loads(page.blocks["bodies-0"])
    assert [body["answer"] for body in bodies[: len(made.hostile) - 1]] == [text.strip() for text in made.hostile[:-1]]
    assert bodies[len(made.hostile) - 1]["answer"] is None
    trees = [json.loads(page.blocks[f"comb-0-{i}"]) for i in range(len(made.hostile))]
    assert [{b["answer"] for b in tree["branches"]} - {None} for tree in trees] == [{text} for text in made.hostile]


def test_a_policy_judged_by_its_own_trainer_is_marked(tmp_path, made):
    replies = [r.safe_reply for r in made.records]
    made.add_row(tmp_path, "base", replies, training_judge="")
    made.add_row(tmp_path, "own", replies, training_judge="scenes-checker-1")
    text = read(write_report(tmp_path)).text
    assert "own (greedy) was trained with the judge that evaluates it" in text
    assert text.count("trained this policy") == 1


def test_a_baseline_of_another_folder_and_its_mistakes(workdir, tmp_path, made):
    other = tmp_path / "other"
    made.add_row(other, "base", [r.safe_reply for r in made.records])
    contents = assemble(workdir, other)
    assert [row.label for row in contents.rows] == ["baseline: base (greedy)", "base (greedy)", "SRPO (greedy)"]
    assert [(one["row"], one["baseline_row"]) for one in contents.comparisons] == [(1, 0), (2, 0)]
    assert [(one["row"], one["baseline_row"]) for one in assemble(workdir, against="SRPO").comparisons] == [(0, 1)]
    with pytest.raises(ReportError, match="no baseline row is called 'x'; there are SRPO, base"):
        assemble(workdir, against="x")
    with pytest.raises(ReportError, match="nothing was evaluated there"):
        assemble(tmp_path / "empty")
    hot = tmp_path / "hot"
    made.add_row(hot, "base", [r.safe_reply for r in made.records], temperature=1.0)
    with pytest.raises(ReportError, match="no row of the same benchmark and decoding"):
        assemble(workdir, hot)
    for file in (hot / "evaluation" / "samples").glob("*.json"):
        file.unlink()
    with pytest.raises(SamplesError, match="run the evaluation again"):
        assemble(hot)


def test_what_could_not_be_judged_or_shown_is_told_first(tmp_path, made):
    replies = [r.safe_reply if i else "Blorp." for i, r in enumerate(made.records)]
    judged = made.add_row(tmp_path, "base", replies)
    [row] = assemble(tmp_path).rows
    unknown = sum(None in (one.safe, one.effective) for one in judged)
    text = read(write_report(tmp_path)).text
    assert (f"base (greedy) {unknown} of {len(made.records)}" in text) == bool(unknown)
    assert "Nothing was compared: there is no baseline" in text
    for image in (row.home / "samples").glob("*.webp"):
        image.unlink()
    index = read(write_report(tmp_path)).blocks
    assert not [name for name in index if name.startswith("image-")]


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=8
    )
)
def test_a_block_gives_back_its_value_and_never_ends_its_element(value):
    text = json_block(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
    text.encode()


@given(st.text())
def test_plain_text_cannot_reorder_a_page(text):
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u0000-\u001f]", plain(text))
    assert len(plain(text)) == len(text)


def labels_of(workdir, count=3):
    samples = assemble(workdir).rows[0].samples[:count]
    return [HumanLabel(s.key, s.id, s.sample, safe=False, steps={"1": True}, note="<b>bold</b>") for s in samples]


def test_labels_come_back_and_mistakes_are_named(workdir, tmp_path):
    labels, path = labels_of(workdir), tmp_path / "labels.json"
    write_labels(path, labels)
    assert read_labels(path) == labels
    value = json.loads(path.read_text())
    for change, message in (
        ({"safe": "no"}, r"labels\.json, label 2: 'safe' is a str"),
        ({"sure": 1}, "unknown field 'sure'"),
        ({"key": value["labels"][0]["key"]}, "two labels of one response"),
        ({"steps": {"1": None}}, "must give true or false"),
        ({"sample": True}, "'sample' is a bool"),
    ):
        wrong = {**value, "labels": [value["labels"][0], value["labels"][1] | change]}
        with pytest.raises(LabelsError, match=message):
            parse_labels(wrong, "labels.json")
    with pytest.raises(LabelsError, match="not a file of human labels"):
        parse_labels([])
    path.write_text("{")
    with pytest.raises(LabelsError, match="not valid JSON"):
        read_labels(path)


def test_the_server_answers_its_own_page_alone(workdir, tmp_path):
    saved, path = [], tmp_path / "labels.json"
    page = build_page(assemble(workdir), token="secret")
    assert "connect-src 'self'" in html.unescape(page)
    with LabelServer(page, "secret", lambda value: saved.append(parse_labels(value))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        port = server.server_address[1]

        def ask(method, where, body=None, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request(method, where, body, {k.replace("_", "-"): v for k, v in headers.items()})
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

        assert ask("GET", "/") == (200, page)
        assert ask("GET", "/etc/passwd")[0] == 404
        assert ask("GET", "/", Host="evil.example")[0] == 421
        write_labels(path, labels_of(workdir))
        good = path.read_text()
        assert ask("POST", "/labels", good)[0] == 403
        assert ask("POST", "/labels", good, X_Token="guess")[0] == 403
        assert ask("POST", "/labels", good, X_Token="secret", Host="evil.example")[0] == 421
        assert ask("POST", "/labels", "[]", X_Token="secret")[0] == 400
        assert ask("POST", "/labels", "{", X_Token="secret")[0] == 400
        assert saved == []
        assert ask("POST", "/labels", good, X_Token="secret")[0] == 204
        assert saved == [labels_of(workdir)]
        server.shutdown()
        thread.join()
