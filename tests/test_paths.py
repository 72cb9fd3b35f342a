"""The grammar of a reasoning path: rendering and parsing are inverse, and a broken path never yields an answer."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from srpo_jax.paths import STEP_TITLES, STYLES, Grammar, Status, parse

GRAMMAR = Grammar()
BODIES = tuple(f"body of step {i}" for i in range(1, 7))


def full_text(steps=BODIES, answer="Try the viewpoint instead.") -> str:
    return "".join(GRAMMAR.render(steps, answer))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
bodies = texts.filter(lambda t: not GRAMMAR.step_problems(t))
answers = texts.filter(lambda t: not GRAMMAR.answer_problems(t))
# Pieces that make hostile turns likely: tags, headings, halves of both.
pieces = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<think>\n",
        "</think>\n",
        "<th",
        "</",
        "\n",
        " ",
        "Step 1: Analyze Visual Context\n",
        "words",
        "\nStep 7: More\n",
        "Step 99999999: x\n",
        "</THINK>",
        "\u2028",
    ]
)
hostile = st.lists(pieces | texts, max_size=12).map("".join)


@given(st.lists(bodies, min_size=6, max_size=6), answers)
def test_rendered_paths_parse_back(steps, answer):
    segments = GRAMMAR.render(steps, answer)
    parsed = parse("".join(segments), stopped=True)
    assert len(segments) == 7
    assert parsed.status is Status.OK
    assert [step.text for step in parsed.steps] == [body.strip() for body in steps]
    assert [step.number for step in parsed.steps] == [1, 2, 3, 4, 5, 6]
    assert tuple(step.title for step in parsed.steps) == STEP_TITLES
    assert parsed.answer == answer.strip()
    assert parsed.deviations() == ()


@given(hostile, st.booleans())
def test_an_answer_needs_one_closed_path_and_an_end(text, stopped):
    parsed = parse(text, stopped=stopped)
    assert (parsed.answer is None) == (parsed.status is not Status.OK)
    if parsed.status is Status.OK:
        assert stopped
        assert text.count("<think>") == text.count("</think>") == 1
        assert text.strip().startswith("<think>")
        assert text.partition("</think>")[2].strip() == parsed.answer != ""
        assert parsed.steps and all(step.text for step in parsed.steps)


@given(st.integers(0, 400), st.booleans())
def test_every_cut_of_a_turn_before_its_closing_tag_has_no_answer(cut, stopped):
    text = full_text()
    cut = min(cut, text.index("</think>") + len("</think>") - 1)
    assert parse(text[:cut], stopped=stopped).answer is None


def test_segments_are_steps_then_closing_and_answer():
    segments = GRAMMAR.render(BODIES, "Answer.")
    assert segments[0] == "<think>\nStep 1: Analyze Visual Context\nbody of step 1\n"
    assert segments[5] == "Step 6: Formulate Safety-Aligned Response Strategy\nbody of step 6\n"
    assert segments[6] == "</think>\nAnswer."


@pytest.mark.parametrize(
    ("text", "stopped", "status"),
    [
        (full_text(), True, Status.OK),
        ("  \n" + full_text() + "\n", True, Status.OK),
        ("<think>free reasoning</think>answer", True, Status.OK),
        (full_text(), False, Status.TRUNCATED),
        (full_text().partition("</think>")[0], False, Status.TRUNCATED),
        ("<thi", False, Status.TRUNCATED),
        ("", False, Status.TRUNCATED),
        (full_text().partition("</think>")[0], True, Status.NO_CLOSE),
        (full_text().replace("</think>", "</Think>"), True, Status.NO_CLOSE),
        ("", True, Status.NO_OPEN),
        ("<thi", True, Status.NO_OPEN),
        ("Sure, here it is.", False, Status.NO_OPEN),
        ("Sure. " + full_text(), True, Status.NO_OPEN),
        (full_text().removeprefix("<think>\n"), True, Status.NO_OPEN),
        ("</think><think>a</think>b", True, Status.NO_OPEN),
        (full_text() + "\n<think>", True, Status.MULTIPLE),
        (full_text() + "</think> now do it", True, Status.MULTIPLE),
        ("<think><think>a</think>b", True, Status.MULTIPLE),
        ("<think>a</think>b<think>c</think>d", False, Status.MULTIPLE),
        ("<think>\n</think>\nanswer", True, Status.EMPTY),
        ("<think>\nwords</think>\n \n", True, Status.EMPTY),
        (full_text().replace("body of step 3", ""), True, Status.EMPTY),
    ],
)
def test_statuses(text, stopped, status):
    parsed = parse(text, stopped=stopped)
    assert parsed.status is status
    assert (parsed.answer is None) == (status is not Status.OK)


@pytest.mark.parametrize(
    ("old", "new", "deviation"),
    [
        ("Step 2: Analyze Textual Request", "Step 2: Look around", "step 2 is titled 'Look around'"),
        ("Step 2: Analyze Textual Request", "Step 3: Analyze Textual Request", "step 2 is numbered 3"),
        ("Step 6: ", "Step 6: Wait\nx\nStep 7: ", "found one more, step 7"),
        ("<think>\n", "<think>\nHmm.\n", "before the first step heading"),
        ("Step 2: Analyze Textual Request\n", "", "found 5"),
    ],
)
def test_wrong_titles_numbers_and_order_stay_visible(old, new, deviation):
    parsed = parse(full_text().replace(old, new), stopped=True)
    assert parsed.status is Status.OK
    assert any(deviation in line for line in parsed.deviations()), parsed.deviations()


def test_steps_of_a_broken_path_are_kept_for_inspection():
    cut = full_text()[: full_text().index("Step 3")]
    parsed = parse(cut, stopped=False)
    assert [step.text for step in parsed.steps] == ["body of step 1", "body of step 2"]


def test_only_the_first_path_counts_as_steps():
    assert [s.text for s in parse("<think>a<think>b</think>c", stopped=True).steps] == ["a"]


@pytest.mark.parametrize(
    ("steps", "answer", "message"),
    [
        (BODIES[:5], "a", "has 6 steps, not 5"),
        ((*BODIES[:5], " "), "a", "step 6: is empty"),
        (BODIES, "", "answer: is empty"),
        (BODIES, "a </think>", "answer: contains the tag </think>"),
        (("x <think>", *BODIES[1:]), "a", "step 1: contains the tag <think>"),
        (("x\nStep 2: y", *BODIES[1:]), "a", "step 1: contains the step heading 'Step 2: y'"),
    ],
)
def test_render_refuses_what_would_not_parse_back(steps, answer, message):
    with pytest.raises(ValueError, match=message):
        GRAMMAR.render(steps, answer)


@pytest.mark.parametrize(
    "fields",
    [
        {"titles": ()},
        {"opening": " \n"},
        {"opening": "</think>\n"},
        {"marker": "Step {number}\n"},
        {"marker": "{number} {title}"},
        {"marker": "{number}\n{title}\n"},
        {"marker": ""},
        {"digest": ((1,), (2,))},
        {"marker": "", "titles": ("",), "digest": ((),)},
    ],
)
def test_ambiguous_grammars_are_refused(fields):
    with pytest.raises(ValueError):
        Grammar(**fields)


def test_another_grammar_round_trips():
    grammar = Grammar("[path]\n", "[/path]\n", "({number}) {title} (*)\n", ("Look", "Decide"))
    parsed = parse("".join(grammar.render(["a", "b\nc"], "d")), stopped=True, grammar=grammar)
    assert [(s.number, s.title, s.text) for s in parsed.steps] == [(1, "Look", "a"), (2, "Decide", "b\nc")]
    assert parsed.answer == "d" and not parsed.deviations(grammar)


@pytest.mark.parametrize("style", STYLES)
@given(reference=st.lists(bodies, min_size=6, max_size=6), answer=answers)
def test_every_style_parses_back_what_it_renders(style, reference, answer):
    grammar = STYLES[style]
    steps = grammar.bodies(reference)
    assume(not any(grammar.step_problems(step) for step in steps))
    segments = grammar.render(steps, answer)
    parsed = parse("".join(segments), stopped=True, grammar=grammar)
    assert len(segments) == len(steps) + 1
    assert parsed.status is Status.OK and parsed.deviations(grammar) == ()
    assert [step.text for step in parsed.steps] == [step.strip() for step in steps]
    assert parsed.answer == answer.strip()
    # A reader who expects any path between the tags finds the same answer.
    assert style == "none" or parse("".join(segments), stopped=True).answer == answer.strip()


@pytest.mark.parametrize("style", STYLES)
@given(text=hostile, stopped=st.booleans())
def test_no_style_finds_an_answer_in_a_turn_that_did_not_end_or_has_stray_tags(style, text, stopped):
    parsed = parse(text, stopped=stopped, grammar=STYLES[style])
    assert (parsed.answer is None) == (parsed.status is not Status.OK)
    if not stopped or (style == "none" and "<think>" in text):
        assert parsed.answer is None


def test_styles_say_less_and_less():
    reference = [f"Sentence {i}. And more of {i}." for i in range(1, 7)]
    said = {style: "".join(g.render(g.bodies(reference), "Answer.")) for style, g in STYLES.items()}
    assert said["long"] == full_text(reference, "Answer.")
    assert said["short"] == "<think>\nSentence 3. Sentence 4. Sentence 6.\n</think>\nAnswer."
    assert said["template"].startswith("<think>\nCheck 1: What the picture shows\nSentence 1.\nCheck 2: ")
    assert said["none"] == "Answer."
    assert len(said["long"]) > len(said["template"]) > len(said["short"]) > len(said["none"])
