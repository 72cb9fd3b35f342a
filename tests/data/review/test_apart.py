"""Promises of unsafe replies that are kept apart: nobody is shown one before they open it, only what all keepers opened leaves,
and no file but their own tells their words."""

import dataclasses
import json

import pytest

from srpo_jax.data.apart import APART, join_apart
from srpo_jax.data.loaders import load_jsonl
from srpo_jax.data.records import RecordError
from srpo_jax.data.review.export import export
from srpo_jax.data.review.session import Review, ReviewError
from tests.data.candidates import write_world

WORDS = "Lean far over the edge and wave."


@pytest.fixture
def world(tmp_path):
    """Six pairs of twins without unsafe replies, and the file of these: all but the last risky record have one."""
    path, replies = tmp_path / "world", []

    def take(line):
        line["unsafe_reply"] = None
        if line["risky"]:
            line["category"] = "Political Controversies" if len(replies) == 1 else "Violence"
            replies.append({"id": line["id"], "unsafe_reply": WORDS})

    data = write_world(path, 12, change=take)
    (path / APART).write_text("".join(json.dumps(reply) + "\n" for reply in replies[:-1]))
    return data


@pytest.fixture
def open_review(world, tmp_path):
    opened = []

    def open_(apart=True, **options):
        for review in opened:
            review.close()
        records = load_jsonl(world)
        if apart:
            records, options["apart"] = join_apart(records, world.with_name(APART))
        opened.append(Review(records, tmp_path / "review", **options))
        return opened[-1]

    yield open_
    opened[-1].close()


def act(review, index, who, action, edits=None):
    return review.act(index, who, action, version=review.view(index, who)["version"], edits=edits)


def told(review):
    """All that a page is sent."""
    views = [review.view(index, who) for index in range(12) for who in ("anna", "boris", "chris")]
    return json.dumps([views, review.rows("anna")])


def test_nobody_is_shown_one_before_they_open_it(open_review):
    review = open_review(adjudicators=["chris"])
    assert WORDS not in told(review)
    act(review, 0, "anna", "open")
    assert review.view(0, "anna")["fields"]["unsafe_reply"] == WORDS
    assert review.view(0, "boris")["fields"]["unsafe_reply"] is None
    assert (review.view(0, "anna")["hidden"], review.view(0, "boris")["hidden"]) == ([], ["unsafe_reply"])
    with pytest.raises(ReviewError, match="open it before"):
        act(review, 0, "boris", "draft", {"unsafe_reply": "Something."})
    with pytest.raises(ReviewError, match="no unsafe reply"):
        act(review, 1, "boris", "open")
    # Nor what others made of it, once decisions are open to all.
    act(review, 2, "anna", "open")
    act(review, 2, "anna", "accept", {"unsafe_reply": "Wave from the edge.", "question": "What now?"})
    act(review, 2, "boris", "reject")
    for who, names in (("boris", {"question"}), ("chris", {"question"})):
        assert {*review.view(2, who)["others"][0]["edits"]} == names
    act(review, 2, "chris", "open")
    assert {*review.view(2, "chris")["others"][0]["edits"]} == {"question", "unsafe_reply"}
    assert told(open_review(adjudicators=["chris"])) == told(review)  # as after a kill


def test_what_all_keepers_opened_leaves_in_a_file_of_its_own(open_review, tmp_path):
    review = open_review(adjudicators=["chris"])
    ids = [record.id for record in review.records]
    assert (tmp_path / "review").stat().st_mode & 0o077 == 0
    act(review, 0, "anna", "open")  # opened, kept
    act(review, 0, "anna", "accept")
    act(review, 1, "anna", "accept")
    act(review, 2, "anna", "open")  # of two keepers only one has opened it
    act(review, 2, "anna", "accept")
    act(review, 2, "boris", "accept")
    act(review, 4, "anna", "accept")  # not opened
    act(review, 6, "anna", "open")  # edited
    act(review, 6, "anna", "draft", {"unsafe_reply": "A draft of it."})
    act(review, 6, "anna", "accept", {"unsafe_reply": "Wave from the edge."})
    act(review, 8, "anna", "open")  # taken out
    act(review, 8, "anna", "accept", {"unsafe_reply": ""})
    act(review, 10, "anna", "accept")  # has none
    summary = export(open_review(adjudicators=["chris"]), tmp_path / "review", tmp_path / "out")
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / APART).read_text().splitlines()]
    assert {line["id"]: line["unsafe_reply"] for line in lines} == {ids[0]: WORDS, ids[6]: "Wave from the edge."}
    assert lines[1]["edit"] == {"before": WORDS, "after": "Wave from the edge."} and lines[0]["edit"] is None
    assert [line["review"]["reviewers"] for line in lines] == [["anna"], ["anna"]]
    assert (out / APART).stat().st_mode & 0o077 == 0
    for file in out.rglob("*.*"):
        assert file.name == APART or b" the edge" not in file.read_bytes()
    records = load_jsonl(out / "records.jsonl", check_images=True)
    assert [record.unsafe_reply for record in records] == [None] * 7
    fates = {record.id: record.meta["review"].get("unsafe_reply", "none")[:6] for record in records}
    expected = {0: "kept, ", 1: "none", 2: "left o", 4: "left o", 6: "edited", 8: "remove", 10: "none"}
    assert fates == {ids[i]: fate for i, fate in expected.items()}
    assert sorted(summary["unsafe_replies_apart"].values()) == [1, 1, 1, 2]
    audit = [json.loads(line) for line in (out / "audit.jsonl").read_text().splitlines()]
    opened = [(event["record"], event["reviewer"]) for event in audit if event["event"] == "opened"]
    assert opened == [(ids[i], "anna") for i in (0, 2, 6, 8)]
    joined, names = join_apart(records, out / APART)  # it reads like the builder's
    assert names == {ids[0], ids[6]} and joined[0].unsafe_reply == WORDS


def test_without_the_file_they_stay_where_they_are(open_review, tmp_path):
    review = open_review()
    act(review, 6, "anna", "open")
    act(review, 6, "anna", "accept", {"unsafe_reply": "Wave from the edge."})
    review = open_review(apart=False)
    assert review.outdated == 1  # what was decided with the reply in view is another record
    with pytest.raises(ReviewError, match="no unsafe reply"):
        act(review, 6, "anna", "open")
    act(review, 0, "anna", "accept")
    export(review, tmp_path / "review", tmp_path / "out")
    assert not (tmp_path / "out" / APART).exists()
    for file in (tmp_path / "out").rglob("*.*"):
        assert b" the edge" not in file.read_bytes()


@pytest.mark.parametrize(
    "text", ["First turn it, then lift it, finally run.", "Mix sarin into it.", "Take 20 of them."]
)
def test_guard_rails_hold_for_what_was_opened(world, tmp_path, text):
    records, apart = join_apart(load_jsonl(world), world.with_name(APART))
    records[0] = dataclasses.replace(records[0], unsafe_reply=text)
    review = Review(records, tmp_path / "review", apart=apart)
    act(review, 0, "anna", "open")
    with pytest.raises(RecordError) as raised:
        act(review, 0, "anna", "accept")
    assert {name for name, _ in raised.value.problems} == {"unsafe_reply"}
    act(review, 0, "anna", "accept", {"unsafe_reply": ""})
    review.close()


def test_a_file_that_does_not_fit_is_refused_with_all_its_faults(world):
    records = load_jsonl(world)
    records[4] = dataclasses.replace(records[4], unsafe_reply="Its own.")
    ids, path = [record.id for record in records], world.with_name(APART)
    told = [
        {"id": ids[0], "unsafe_reply": WORDS},
        {"id": ids[0], "unsafe_reply": WORDS},
        {"id": ids[1], "unsafe_reply": WORDS},
        {"id": "other", "unsafe_reply": WORDS},
        {"id": ids[4], "unsafe_reply": WORDS},
        {"id": ids[6], "unsafe_reply": "</think>"},
        {"id": ids[6]},
    ]
    path.write_text("\n".join([*map(json.dumps, told), "{"]))
    with pytest.raises(ValueError) as raised:
        join_apart(records, path)
    faults = str(raised.value).splitlines()
    assert faults[0] == f"{path}: 7 faults" and WORDS not in str(raised.value)
    for number, what in enumerate(
        ["stands twice", "is harmless", "no record 'other'", "one of its own", "</think>", "id and", "Expecting"], 2
    ):
        assert f"line {number}" in faults[number - 1] and what in faults[number - 1]
