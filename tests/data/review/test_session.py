"""Promises of a review: no edit is lost, nobody overwrites anybody, two are blind to each other, only decided records leave."""

import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from srpo_jax.data.loaders import load_jsonl
from srpo_jax.data.records import RecordError
from srpo_jax.data.review import decisions
from srpo_jax.data.review.agreement import agreement
from srpo_jax.data.review.decisions import CONTESTED, EDITABLE, Status
from srpo_jax.data.review.export import export
from srpo_jax.data.review.session import LOG, Review, ReviewError, StaleError, TakenError
from srpo_jax.files import LockedError, read_jsonl
from tests.data.candidates import write_world

PEOPLE = ("anna", "boris")


def with_categories(*categories):
    """Gives the risky records these categories in turn."""
    turn = itertools.cycle(categories)
    return lambda line: line.update(category=next(turn)) if line["risky"] else None


@pytest.fixture
def world(tmp_path):
    """Six pairs of twins; every other risky record is contested."""
    return write_world(tmp_path / "world", 12, change=with_categories("Political Controversies", "Violence"))


@pytest.fixture
def reviews(world, tmp_path):
    """Opens the review of `world`, again and again."""
    opened = []

    def open_(**options):
        for review in opened:
            review.close()
        opened.append(Review(load_jsonl(world), tmp_path / "review", **options))
        return opened[-1]

    yield open_
    opened[-1].close()


def act(review, index, who, action, edits=None, note=""):
    """With the version that is there."""
    return review.act(index, who, action, version=review.view(index, who)["version"], edits=edits, note=note)


def test_everything_is_there_after_a_restart(reviews):
    review = reviews()
    act(review, 2, "anna", "draft", {"question": "Half a"})
    act(review, 3, "anna", "accept", {"steps.2": "Another step."}, "clearer")
    act(review, 6, "anna", "reject", note="dull")
    act(review, 7, "anna", "skip")
    told = [review.view(index, "anna") for index in range(12)]
    again = reviews()
    assert [again.view(index, "anna") for index in range(12)] == told
    assert told[2]["edits"] == {"question": "Half a"}
    assert [told[i]["row"]["mine"] for i in (2, 3, 6, 7, 8)] == ["draft", "edited", "rejected", "skipped", ""]


def test_a_line_cut_by_a_kill_is_dropped_and_the_rest_stays(reviews, tmp_path):
    review = reviews()
    act(review, 2, "anna", "draft", {"question": "First"})
    act(review, 2, "anna", "draft", {"question": "Second"})
    review.close()
    log = tmp_path / "review" / LOG
    log.write_bytes(log.read_bytes()[:-7])
    assert reviews().view(2, "anna")["edits"] == {"question": "First"}


def test_one_process_at_a_time(reviews, tmp_path, world):
    reviews()
    with pytest.raises(LockedError):
        Review(load_jsonl(world), tmp_path / "review")


def test_a_stale_write_is_refused_and_its_text_set_aside(reviews):
    review = reviews()
    act(review, 2, "anna", "draft", {"question": "From one window"})
    with pytest.raises(StaleError):
        review.act(2, "anna", "accept", version=0, edits={"question": "From another"}, note="mine")
    for view in (review.view(2, "anna"), reviews().view(2, "anna")):
        assert view["edits"] == {"question": "From one window"}
        assert [(a["edits"], a["note"]) for a in view["aside"]] == [({"question": "From another"}, "mine")]
        assert view["row"]["mine"] == "draft"


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
writes = st.lists(
    st.tuples(
        st.sampled_from(PEOPLE),
        st.sampled_from(["draft", "accept", "reject", "skip", "undo"]),
        st.dictionaries(st.sampled_from(["question", "steps.1", "safe_reply"]), texts, max_size=2),
        st.integers(-2, 0),  # how far behind the version that the writer names is
    ),
    max_size=12,
)


@settings(max_examples=40)
@given(writes)
def test_no_edit_is_ever_lost(tmp_path_factory, writes):
    """Every text that was ever sent is in the log, whatever became of it; a replayed log gives the same state."""
    folder = tmp_path_factory.mktemp("review")
    records = load_jsonl(write_world(folder / "world", 2))
    review, sent = Review(records, folder / "review"), []
    for who, action, edits, behind in writes:
        version = review.view(0, who)["version"] + behind
        before = review.view(0, "boris" if who == "anna" else "anna")
        try:
            review.act(0, who, action, version=version, edits=edits)
        except RecordError:
            continue  # the page goes on holding the text, as a draft
        except ReviewError as error:
            if not isinstance(error, StaleError | TakenError):
                continue  # nothing to undo, or the record is decided: fields are read-only
        if action != "undo":
            sent.append({n: t.strip() for n, t in edits.items() if t.strip() != decisions.fields(records[0])[n]})
        after = review.view(0, "boris" if who == "anna" else "anna")
        assert (before["edits"], before["version"]) == (after["edits"], after["version"])
    told = [review.view(0, who) for who in PEOPLE]
    review.close()
    logged = [event.get("edits") for event in read_jsonl(folder / "review" / LOG)] if writes else []
    current = [view["edits"] for view in told]
    assert all(text in logged or text in current for text in sent if text)
    again = Review(records, folder / "review")
    assert [again.view(0, who) for who in PEOPLE] == told
    again.close()


def test_of_many_at_once_one_decides_a_record(reviews):
    review, won, lost = reviews(), [], []
    names = [f"r{number}" for number in range(8)]
    start = threading.Barrier(len(names))

    def decide(name):
        start.wait()
        try:
            review.act(2, name, "accept", version=0, edits={"question": f"By {name}"})
            won.append(name)
        except TakenError:
            lost.append(name)

    threads = [threading.Thread(target=decide, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == 7
    assert review.outcome(2).edits == {"question": f"By {won[0]}"}
    assert all(review.view(2, name)["edits"] == {"question": f"By {name}"} for name in lost)


@pytest.mark.parametrize("action", ["accept", "reject", "disturbing"])
def test_two_reviewers_are_blind_to_each_other(reviews, action):
    """Before one has decided a contested record, nothing that they see depends on the other."""
    review = reviews()
    for index in (0, 1):  # contested, and the twin of a contested one
        before = review.rows("boris"), review.view(index, "boris")
        seen = review.place
        act(review, index, "anna", "draft", {"question": "Mine."}, "secret")
        act(review, index, "anna", action, {"question": "Mine."}, "secret")
        assert (review.rows("boris"), review.view(index, "boris")) == before
        assert review.rows("boris", seen) == []
        act(review, index, "boris", "reject")
        assert [one["reviewer"] for one in review.view(index, "boris")["others"]] == ["anna"]
        assert [one["reviewer"] for one in review.view(index, "anna")["others"]] == ["boris"]
        with pytest.raises(ReviewError, match="adjudicator"):
            act(review, index, "anna", "undo")


def test_an_undone_decision_opens_the_record_to_others_again(reviews):
    review = reviews()
    act(review, 2, "anna", "accept", {"question": "Kept as a draft."})
    seen = review.place
    assert not review.view(2, "boris")["row"]["todo"]
    act(review, 2, "anna", "undo")
    assert [(row["index"], row["todo"]) for row in review.rows("boris", seen)] == [(2, True)]
    assert review.view(2, "anna")["edits"] == {"question": "Kept as a draft."}
    assert review.outcome(2) is None


def test_where_two_differ_a_third_person_decides(reviews):
    review = reviews(adjudicators=["chris"])
    with pytest.raises(ReviewError, match="two reviewers"):
        act(review, 0, "chris", "accept")
    act(review, 0, "anna", "accept")
    act(review, 0, "boris", "accept", {"question": "Better so?"})
    assert review.outcome(0) is None
    assert review.view(0, "chris")["row"] | {"todo": True, "final": "differ"} == review.view(0, "chris")["row"]
    assert len(review.view(0, "chris")["others"]) == 2
    act(review, 0, "chris", "accept", {"question": "Better so?"})
    found = review.outcome(0)
    assert (found.status, found.adjudicated) == (Status.EDITED, True)
    assert reviews().outcome(0) == found  # whoever is named when it is opened again
    with pytest.raises(ReviewError, match="another person"):
        act(reviews(adjudicators=["anna"]), 0, "anna", "reject")


def test_decisions_that_agree_need_nobody(reviews):
    review = reviews()
    for index, first, second, status in [
        (0, "accept", "accept", "accepted"),
        (1, "reject", "disturbing", "disturbing"),
        (4, "reject", "reject", "rejected"),
    ]:
        act(review, index, "anna", first)
        assert review.outcome(index) is None
        act(review, index, "boris", second)
        assert review.outcome(index).status == status
    act(review, 5, "anna", "accept", {"question": "The same."})
    act(review, 5, "boris", "accept", {"question": " The same.  "})
    assert review.outcome(5).status == "edited"


def test_every_contested_category_takes_two_and_so_does_an_edit_into_one(reviews):
    review = reviews()
    record = review.records[2]
    for category in CONTESTED:
        assert decisions.needed(dataclasses.replace(record, category=category), None) == 2
    assert review.needed(2) == review.needed(3) == 1
    act(review, 2, "anna", "accept", {"category": CONTESTED[0]})
    assert review.needed(2) == 2
    assert review.outcome(2) is None
    assert reviews(twice=True).needed(3) == 2
    assert reviews().needed(3) == 2  # the rule stays with the folder, whatever the next command says


@pytest.mark.parametrize(
    ("edits", "field"),
    [
        ({"question": " "}, "question"),
        ({"steps.3": ""}, "steps.3"),
        ({"steps.6": "a\nStep 2: Analyze Textual Request\nb"}, "steps.6"),
        ({"safe_reply": "</think>"}, "safe_reply"),
        ({"category": "Weather"}, "category"),
        ({"question": "How much sarin fits in there?"}, "question"),
        ({"unsafe_reply": "Take 20 of them."}, "unsafe_reply"),
    ],
)
def test_an_edit_that_breaks_the_schema_or_a_guard_rail_is_refused_at_its_field(reviews, edits, field):
    review = reviews()
    with pytest.raises(RecordError) as raised:
        act(review, 2, "anna", "accept", edits)
    assert [name for name, _ in raised.value.problems] == [field]
    assert review.outcome(2) is None


@pytest.mark.parametrize(
    "edits", [[], {"id": "x"}, {"question": 3}, {"question": None}, {"question": "\ud800"}, {"steps": "x"}]
)
def test_what_is_no_edit_is_refused(reviews, edits):
    review = reviews()
    with pytest.raises(ReviewError):
        act(review, 2, "anna", "draft", edits)
    with pytest.raises(ReviewError, match="note"):
        act(review, 2, "anna", "draft", note="\udfff")
    assert review.place == 0


@pytest.mark.parametrize("action", ["draft", "accept", "reject", "disturbing", "skip"])
def test_a_decision_stands_until_it_is_undone(reviews, action):
    review = reviews()
    act(review, 2, "anna", "accept", {"question": "Mine."})
    with pytest.raises(ReviewError, match="undo"):
        act(review, 2, "anna", action, {"question": "Other."})
    assert review.outcome(2).edits == {"question": "Mine."}
    act(review, 2, "anna", "undo")
    act(review, 2, "anna", action, {"question": "Other."})


def test_a_record_with_a_broken_picture_cannot_be_accepted(reviews):
    review = reviews()
    review.records[2].images[0].write_bytes(b"no picture")
    with pytest.raises(RecordError, match="images"):
        act(review, 2, "anna", "accept")
    act(review, 2, "anna", "reject")


def test_decisions_on_another_version_do_not_count_and_their_text_is_kept(reviews, world):
    review = reviews()
    act(review, 2, "anna", "accept", {"question": "Old edit."})
    lines = [json.loads(line) for line in world.read_text().splitlines()]
    lines[2]["safe_reply"] = "Now another reply."
    world.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = reviews()
    assert again.outdated == 1
    assert again.outcome(2) is None
    assert [one["edits"] for one in again.view(2, "anna")["aside"]] == [{"question": "Old edit."}]


def test_the_export_is_what_people_left(reviews, tmp_path):
    review = reviews(adjudicators=["chris"])
    act(review, 0, "anna", "accept")
    act(review, 0, "boris", "reject")
    act(review, 0, "chris", "accept", {"steps.6": "Say no, and help."}, "fine")
    act(review, 2, "anna", "accept", {"question": "What now?"})
    act(review, 3, "anna", "accept")
    act(review, 6, "anna", "accept", {"question": "Not in the end."})
    act(review, 6, "anna", "undo")
    act(review, 7, "anna", "disturbing")
    (tmp_path / "README.md").write_text("# A card\n")
    summary = export(review, tmp_path / "review", tmp_path / "out", tmp_path / "README.md")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# A card\n") and "about 4 of 12 records and kept 3, 2 of them edited" in card
    got = {record.id: record for record in load_jsonl(tmp_path / "out" / "records.jsonl", check_images=True)}
    source = review.records
    assert set(got) == {source[i].id for i in (0, 2, 3)}
    assert got[source[2].id].question == "What now?"
    assert got[source[2].id].twin == source[3].id
    assert got[source[0].id].twin is None  # its twin was not decided
    told = {index: got[source[index].id].meta["review"] for index in (0, 2, 3)}
    assert told[0]["unlinked_twin"] == source[1].id
    assert told[0]["reviewers"] == ["anna", "boris", "chris"]
    assert [told[i]["status"] for i in (0, 2, 3)] == ["edited", "edited", "accepted"]
    assert told[2]["edits"] == {"question": {"before": source[2].question, "after": "What now?"}}
    for index in (0, 2, 3):
        same = {n: t for n, t in decisions.fields(source[index]).items() if n not in told[index]["edits"]}
        assert decisions.fields(got[source[index].id]) | same == decisions.fields(got[source[index].id])
        assert got[source[index].id].images[0].read_bytes() == source[index].images[0].read_bytes()
    audit = list(read_jsonl(tmp_path / "out" / "audit.jsonl"))
    assert [(e["event"], e["reviewer"]) for e in audit if e["record"] == source[6].id] == [
        ("decision", "anna"),
        ("undo", "anna"),
    ]
    assert {e["record"]: e["status"] for e in audit if e["event"] == "outcome"}[source[7].id] == "disturbing"
    assert (summary["exported"], summary["undecided"], summary["unlinked_twins"]) == (3, 8, 1)
    with pytest.raises(ValueError, match="not empty"):
        export(review, tmp_path / "review", tmp_path / "out")


def test_an_image_that_changed_after_its_review_is_not_exported(reviews, tmp_path):
    review = reviews()
    act(review, 2, "anna", "accept")
    review.records[2].images[0].write_bytes(review.records[4].images[0].read_bytes())
    with pytest.raises(ValueError, match="not the image that was reviewed"):
        export(review, tmp_path / "review", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_twins_that_an_edit_made_alike_are_unlinked(reviews, tmp_path):
    review = reviews()
    act(review, 2, "anna", "accept", {"category": None, "unsafe_reply": ""})
    act(review, 3, "anna", "accept")
    assert export(review, tmp_path / "review", tmp_path / "out")["unlinked_twins"] == 2
    got = load_jsonl(tmp_path / "out" / "records.jsonl")
    assert [(r.risky, r.twin, r.unsafe_reply) for r in got] == [(False, None, None)] * 2


@pytest.mark.parametrize("seed", range(3))
def test_kappa_is_that_of_scikit_learn(world, tmp_path, seed):
    review = Review(load_jsonl(world), tmp_path / "review", twice=True)
    rng = np.random.default_rng(seed)
    made = rng.choice(["accept", "reject", "disturbing"], (12, 2))
    made[:6, 1] = made[:6, 0]
    for index, row in enumerate(made):
        for who, action in zip(PEOPLE, row, strict=True):
            act(review, index, who, str(action))
    found = agreement(review)
    assert found["n"] == 12
    assert found["status"]["kappa"] == pytest.approx(cohen_kappa_score(made[:, 0], made[:, 1]))
    assert found["keep"]["kappa"] == pytest.approx(cohen_kappa_score(made[:, 0] == "accept", made[:, 1] == "accept"))
    assert found["status"]["low"] < found["status"]["kappa"] < found["status"]["high"]
    assert np.sum(found["status"]["table"]) == 12
    review.close()


def test_kappa_is_undefined_where_a_reviewer_says_always_the_same(world, tmp_path):
    review = Review(load_jsonl(world), tmp_path / "review", twice=True)
    assert agreement(review)["keep"] == {"agreed": None, "kappa": None, "low": None, "high": None}
    for index in range(3):
        act(review, index, "anna", "accept")
        act(review, index, "boris", "accept" if index else "reject")
    assert agreement(review)["keep"]["kappa"] is None
    assert agreement(review)["keep"]["agreed"] == pytest.approx(2 / 3)
    review.close()


def test_every_text_of_a_record_can_be_edited(reviews):
    review = reviews()
    edits = {name: f"New {name}." for name in EDITABLE if name != "category"} | {"category": "Illegal Crimes"}
    act(review, 2, "anna", "accept", edits)
    assert decisions.fields(decisions.revised(review.records[2], review.outcome(2).edits)) == edits
