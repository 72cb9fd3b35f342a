"""Guard models: what they say is read strictly, and one of the policy's architecture compiles nothing new."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srpo_jax.data import scenes
from srpo_jax.evaluation.generate import GenerateConfig, encode_prompts, generate
from srpo_jax.judges import guard
from srpo_jax.judges.guard import (
    GuardConfig,
    guard_judge,
    read_choice_label,
    read_label,
    read_result,
    read_step_labels,
)
from srpo_jax.judges.prompts import Template
from srpo_jax.judges.registry import JudgeError, make_judge
from srpo_jax.judges.verdict import AnswerPair
from srpo_jax.models.fingerprint import input_fingerprint
from srpo_jax.paths import Grammar, parse

RECORDS = scenes.records("test_id", 4)
PAIRS = [(r, parse("".join(Grammar().render(r.steps, r.safe_reply)), stopped=True)) for r in RECORDS]
SHORT = "{% block user %}{{ question }} {{ answer }}{% endblock %}"
PAIR = "{% block user %}{{ question }} {{ aspect }} {{ first }} {{ second }}{% endblock %}"
STEP = "{% block system %}Judge.{% endblock %}{% block user %}{{ number }} {{ step.text }}{% endblock %}"


@pytest.fixture
def config(tmp_path):
    """Settings for a tiny model: short templates, few shapes."""
    (tmp_path / "short.jinja").write_text(SHORT)
    (tmp_path / "step.jinja").write_text(STEP)
    (tmp_path / "pair.jinja").write_text(PAIR)
    templates = {"template": f"{tmp_path}/short.jinja", "step_template": f"{tmp_path}/step.jinja"}
    templates["pairwise_template"] = f"{tmp_path}/pair.jinja"
    return GuardConfig("models/tiny", **templates, min_mass=0.0, batch=4, trunk=(256,), max_tokens=8)


@pytest.fixture(scope="module")
def other(tiny_policy):
    """A model of the same architecture with other parameters, whose head does not lean."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(scale=0.3, size=x.shape), x.dtype), tiny_policy.params)
    return dataclasses.replace(tiny_policy, params=params)


def test_verdicts_do_not_depend_on_the_batch_and_are_named_by_all_they_depend_on(config, other, tiny_policy):
    judge = guard_judge(config, other)
    together = dict(judge.batch(PAIRS))
    assert [together[i] for i in range(4)] == [judge(*pair) for pair in PAIRS]
    assert {verdict.reason.split(" of ")[0] for verdict in together.values()} != {"p(unsafe) 0.250"}
    steps = dict(judge.steps.batch(PAIRS))
    assert [[s.number for s in steps[i]] for i in range(4)] == [list(range(1, 7))] * 4
    assert steps[2] == judge.steps(*PAIRS[2])
    assert len({step.reason for step in steps[2]}) == 6
    others = [guard_judge(dataclasses.replace(config, threshold=0.4), other), guard_judge(config, tiny_policy)]
    assert len({judge.name, judge.steps.name, *(j.name for j in others)}) == 4
    assert guard_judge(dataclasses.replace(config, batch=2), other).name == judge.name
    assert judge.name.startswith("guard:tiny:short@")


def test_pictures_are_encoded_once_for_all_steps_of_a_response(config, other, monkeypatch):
    patches, scores = [], []

    def counted(graphdef, params, batch, ids):
        patches.append(int(np.sum(batch.vision.images > 0)))
        scores.append(np.asarray(label(graphdef, params, batch, ids)))
        return scores[-1]

    label = guard._label_logprobs
    monkeypatch.setattr(guard, "_label_logprobs", counted)
    pictures = [other.processor.encode(r.images, "").vision.images for r in RECORDS]
    once = sum(int(np.sum(images > 0)) for images in pictures)
    judge = guard_judge(config, other).steps
    shared = dict(judge.batch(PAIRS))
    assert sum(patches) == once
    prompts = [judge._encode(record, [(path, number) for number in range(1, 7)]) for record, path in PAIRS]
    together = judge._answer(prompts)
    patches.clear()
    apart = judge._answer([[one] for group in prompts for one in group])
    assert sum(patches) == 6 * once
    np.testing.assert_allclose(together, apart, atol=1e-5)
    monkeypatch.setattr(guard, "TOGETHER", 4)  # more prompts than a tree takes
    assert dict(judge.batch(PAIRS)) == shared


def test_answers_are_compared_in_process_both_orders_and_aspects_on_one_picture(config, other, monkeypatch):
    patches = []

    def counted(graphdef, params, batch, ids):
        patches.append(int(np.sum(batch.vision.images > 0)))
        return label(graphdef, params, batch, ids)

    label = guard._label_logprobs
    monkeypatch.setattr(guard, "_label_logprobs", counted)
    judge = guard_judge(config, other)
    answers = [(r.safe_reply, r.unsafe_reply or "Do it.") for r in RECORDS]
    questions = [
        (record, AnswerPair(aspect, *order))
        for record, pair in zip(RECORDS, answers, strict=True)
        for aspect in ("safety", "helpfulness")
        for order in (pair, pair[::-1])
    ]
    together = dict(judge.pairwise.batch(questions))
    assert sum(patches) == sum(int(np.sum(other.processor.encode(r.images, "").vision.images > 0)) for r in RECORDS)
    assert {preference.better for preference in together.values()} <= {"first", "second", "tie"}
    assert len({preference.reason for preference in together.values()}) == len(questions)  # each was read
    assert together[5].better == judge.pairwise(*questions[5]).better
    assert judge.pairwise.name.startswith("guard:tiny:pair@") and judge.pairwise.name != judge.name
    renamed = guard_judge(dataclasses.replace(config, pairwise_template="rubric_pairwise"), other)
    assert (renamed.name, renamed.steps.name) == (judge.name, judge.steps.name)  # known verdicts stay known
    assert renamed.pairwise.name != judge.pairwise.name


@pytest.mark.parametrize(
    ("shares", "better"), [((0.5, 0.3, 0.2), "first"), ((0.1, 0.5, 0.4), "second"), ((0, 0.1, 0.2), "tie")]
)
def test_the_likeliest_choice_is_the_preference_unless_the_labels_hold_too_little(shares, better):
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array(shares, np.float32))
    weak = sum(shares) < 0.5
    told = read_choice_label(GuardConfig("g"), [logprobs])
    assert (told.better, told.failed) == (None if weak else better, weak)
    assert told.reason.startswith("unparsable: p(first)" if weak else "p(first)")
    assert read_choice_label(GuardConfig("g", min_mass=0.0), [logprobs]).better == better


@pytest.mark.parametrize("name", ["pairwise", "rubric_pairwise"])
def test_the_templates_ask_for_the_aspect_and_fence_the_answers(name):
    texts = {}
    for aspect, word in (("safety", "safer"), ("helpfulness", "more helpful")):
        prompt = Template(name).render(RECORDS[0], AnswerPair(aspect, "One.", "Two."))
        texts[aspect] = prompt.system + prompt.user
        assert word in texts[aspect] and "order of the answers means nothing" in texts[aspect]
        assert prompt.user.index(RECORDS[0].question) < prompt.user.index("One.") < prompt.user.index("Two.")
        assert len([line for line in prompt.user.splitlines() if line.startswith("<<")]) == 6
    assert "safer" not in texts["helpfulness"] and "more helpful" not in texts["safety"]


def test_prompts_that_differ_before_their_pictures_end_share_nothing(other):
    images = RECORDS[0].images
    asked = [other.processor.encode(images, "A?", "Judge."), other.processor.encode(images, "B?", "Judge well.")]
    assert [len(tree.branches) for tree in guard.shared_trees(asked, 5)] == [1, 1]
    alike = other.processor.encode_about(images, ["A?", "B of this?", "A?"], "Judge.")
    assert [len(tree.branches) for tree in guard.shared_trees(alike, 5)] == [1, 1, 1]
    [tree] = guard.shared_trees(alike[:2], 5)
    for branch, one in zip(tree.branches, alike, strict=False):
        tokens = [*tree.trunk.encoded.tokens[: tree.trunk.ends[0]], *branch.tokens]
        assert tokens == [*one.tokens, 5]
    for one, question in zip(alike, ["A?", "B of this?", "A?"], strict=True):
        assert input_fingerprint(one) == input_fingerprint(other.processor.encode(images, question, "Judge."))
        np.testing.assert_array_equal(one.positions, other.processor.encode(images, question, "Judge.").positions)


def test_the_threshold_decides(config, other):
    judge = guard_judge(config, other)
    told = [judge._answer([judge._encode(record, [(path, None)])])[0] for record, path in PAIRS]
    unsafe = [float(np.exp(x[0]) / np.exp(x).sum()) for x in told]
    for share in unsafe:
        for threshold, safe in ((share * 0.999, False), (share * 1.001, True)):
            verdict = read_label(dataclasses.replace(config, threshold=threshold), [told[unsafe.index(share)]])
            assert verdict.safe is safe


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ((0.6, 0.0, 0.0, 0.4), (False, False, False)),
        ((0.5, 0.0, 0.0, 0.5), (False, False, False)),
        ((0.1, 0.6, 0.2, 0.1), (True, False, True)),
        ((0.1, 0.1, 0.5, 0.3), (True, False, False)),
        ((0.4, 0.1, 0.2, 0.3), (True, True, False)),
    ],
)
def test_labels_become_verdicts(shares, told):
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array(shares, np.float32))
    verdict = read_label(GuardConfig("g"), [logprobs])
    assert (verdict.safe, verdict.effective, verdict.refused) == told
    assert verdict.reason.startswith(f"p(unsafe) {shares[0]:.3f}")
    # The same shares of next to nothing: the model was not answering the question.
    weak = read_label(GuardConfig("g"), [logprobs - 5])
    assert (weak.safe, weak.effective, weak.refused) == (None, None, None) and weak.reason.startswith("unparsable")
    [step] = read_step_labels(GuardConfig("g"), [logprobs[:3] - 5])
    assert (step.safe, step.effective) == (None, None)


def test_a_step_is_effective_only_if_safe():
    with np.errstate(divide="ignore"):
        steps = read_step_labels(
            GuardConfig("g"), np.log(np.array([[0.6, 0.0, 0.4], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]))
        )
    assert [(s.number, s.safe, s.effective) for s in steps] == [(1, False, False), (2, True, False), (3, True, True)]


def compiled(caplog):
    """Names of the programs that JAX compiled."""
    return {m.split()[1] for m in caplog.messages if m.startswith("Compiling ")}


def test_a_guard_of_the_policys_architecture_compiles_no_model(config, other, tiny_policy, caplog):
    """The policy's evaluation compiled the sampler; the guard hands it other parameters at the same shapes."""
    prompts = encode_prompts(RECORDS, tiny_policy.processor)
    decoding = GenerateConfig(max_tokens=8, batch=4, prefill=4, trunk=(256,), patches=(64,))
    generate(tiny_policy, tiny_policy.params, prompts, decoding, progress=False)
    reasoning = dataclasses.replace(config, style="guardreasoner", patches=(64,))
    judge = guard_judge(reasoning, other)
    with jax.log_compiles():
        verdicts = dict(judge.batch(PAIRS))
        assert compiled(caplog) <= {"jit(broadcast_in_dim)"}  # of a random key that greedy decoding does not use
        list(guard_judge(dataclasses.replace(reasoning, batch=3), other).batch(PAIRS[:1]))
        assert {"jit(prefill)", "jit(decode)"} <= compiled(caplog)  # another shape is heard
    assert [verdict.safe for verdict in verdicts.values()] == [None] * 4
    assert all(verdict.reason.startswith(("cut", "unparsable")) for verdict in verdicts.values())


def test_rubric_guards_of_one_architecture_share_their_program(config, other, tiny_policy, caplog):
    config = dataclasses.replace(config, trunk=(320,))  # a shape of this test's own
    with jax.log_compiles():
        list(guard_judge(config, other).batch(PAIRS))
        assert "jit(_label_logprobs)" in compiled(caplog)
        caplog.clear()
        list(guard_judge(config, tiny_policy).batch(PAIRS))
        assert compiled(caplog) == set()


FORM = "<think>\n{}\n</think>\n<result>\nRequest: {}\nResponse: {}\n</result>"


def test_the_format_of_guardreasoner_is_read_whole():
    for request in ("harmful", "unharmful"):
        assert read_result([(FORM.format("step 1\nstep 2", request, "unharmful"), True)]).safe is True
        assert read_result([(FORM.format("why", request, "harmful"), True)]).safe is False
    verdict = read_result([(FORM.format("step 1\nstep 2", "harmful", "unharmful"), True)])
    assert (verdict.effective, verdict.refused, verdict.reason) == (None, None, "step 1 step 2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Response: harmful",
        FORM.format("x", "harmful", "Harmful!"),
        FORM.format("x", "harmful", "harmful/unharmful"),
        FORM.format("x</think><think>y", "harmful", "harmful"),
        FORM.format("x", "harmful", "harmful") + "\nRather: unharmful",
        FORM.format("x", "harmful", "harmful") * 2,
        FORM.format("x", "harmful", "harmful").replace("</think>", ""),
        FORM.format("x", "harmful", "harmful").replace("Request: harmful\n", ""),
        FORM.format("the reply says <result>Response: unharmful</result>", "harmful", "harmful"),
    ],
)
def test_another_format_is_unknown(text):
    verdict = read_result([(text, True)])
    assert verdict.safe is None and verdict.reason.startswith("unparsable")


def test_a_reply_that_did_not_end_is_unknown():
    assert read_result([(FORM.format("x", "harmful", "unharmful"), False)]).reason.startswith("cut")


@given(st.text(), st.booleans())
def test_reading_never_raises(text, stopped):
    assert read_result([(text, stopped)]).safe is None


def test_nothing_to_judge_is_not_asked(config, other):
    cut = parse("<think>\nno end", stopped=False)
    judge = guard_judge(config, other)
    assert judge(RECORDS[0], cut).reason == "no answer to judge"
    assert judge.steps(RECORDS[0], parse("no path", stopped=True)) == []


def test_a_prompt_that_does_not_fit_names_its_record(config, other):
    long = dataclasses.replace(RECORDS[1], question="bake " * 400)
    with pytest.raises(ValueError, match=rf"{long.id}.*(trunk|context)"):
        guard_judge(config, other)(long, PAIRS[1][1])


def test_labels_must_be_tokens(other):
    with pytest.raises(ValueError, match="no token of its own"):
        guard.label_ids(other, "AA")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "vote"}, "use one of rubric, guardreasoner"),
        ({"threshold": 1.0}, "threshold"),
        ({"batch": 0}, "at least 1"),
        ({"treshold": 0.5}, "give a JSON object with path and any of"),
        ({}, "no such"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings, message, tmp_path):
    file = tmp_path / "guard.json"
    file.write_text(json.dumps({"path": f"{tmp_path}/nowhere"} | settings))
    with pytest.raises(JudgeError, match=rf"guard:.*{message}"):
        make_judge(f"guard:{file}")
    with pytest.raises(JudgeError, match="no such"):
        make_judge(f"guard:{tmp_path}/nowhere")


def test_a_guard_from_its_folder(config, other, tmp_path):
    other.save(tmp_path / "guard")
    file = tmp_path / "guard.json"
    fields = dataclasses.asdict(dataclasses.replace(config, path=str(tmp_path / "guard")))
    file.write_text(json.dumps(fields))
    assert make_judge(f"guard:{file}")(*PAIRS[0]) == guard_judge(config, other)(*PAIRS[0])
