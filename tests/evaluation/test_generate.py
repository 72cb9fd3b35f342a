"""Generation: greedy is greedy, a response depends on its key alone, a kill loses nothing, nothing stale is used."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from srpo_jax.data import scenes
from srpo_jax.evaluation.generate import GenerateConfig, encode_prompts, generate
from srpo_jax.inputs import batch_inputs
from srpo_jax.models.policy import forward

BUDGET = 12
CONFIG = GenerateConfig(temperature=1.0, samples=2, max_tokens=BUDGET, batch=4, trunk=(64,), seed=3)
GREEDY = dataclasses.replace(CONFIG, temperature=0.0, samples=1)


@pytest.fixture(scope="module")
def records():
    return scenes.records("test_id", 10)


@pytest.fixture(scope="module")
def prompts(policy, records):
    return encode_prompts(records, policy.processor)


@pytest.fixture(scope="module")
def responses(policy, prompts):
    return generate(policy, policy.params, prompts, CONFIG, progress=False)


def same(first, second):
    assert [(r.record_id, r.sample, r.stopped, r.text, r.gap) for r in first] == [
        (r.record_id, r.sample, r.stopped, r.text, r.gap) for r in second
    ]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))


def test_every_prompt_is_answered_in_order(responses, records):
    assert [(r.record_id, r.sample) for r in responses] == [(x.id, s) for x in records for s in range(2)]
    assert all(1 <= len(r.tokens) <= BUDGET for r in responses)
    assert len({r.text for r in responses}) > 10, "a policy that always says the same tests nothing"


def test_greedy_takes_the_best_token_each_time(policy, prompts):
    chosen = prompts[:4]
    for response, prompt in zip(generate(policy, policy.params, chosen, GREEDY, progress=False), chosen, strict=True):
        whole = prompt.encoded.append(response.tokens)
        start = len(prompt.encoded.tokens) - 1
        logits = np.asarray(forward(policy, policy.params, batch_inputs([whole], 64)))[0]
        logits = logits[start : start + len(response.tokens)]
        assert np.diff(np.sort(logits)[:, -2:]).min() > 1e-3, "a near tie: choose another prompt"
        np.testing.assert_array_equal(logits.argmax(-1), response.tokens)
        assert response.stopped == (response.tokens[-1] == policy.processor.eos_id)


def test_a_response_depends_on_its_key_alone(policy, prompts, responses):
    by_id = {(r.record_id, r.sample): r for r in responses}
    order = [7, 2, 9, 0, 5]  # other neighbours, another place, another padding of the last batch
    moved = generate(policy, policy.params, [prompts[i] for i in order], CONFIG, progress=False)
    same(moved, [by_id[r.record_id, r.sample] for r in moved])


def test_another_seed_gives_other_responses(policy, prompts, responses):
    other = generate(policy, policy.params, prompts[:4], dataclasses.replace(CONFIG, seed=4), progress=False)
    assert [r.text for r in other] != [r.text for r in responses[: len(other)]]


def test_a_kill_at_any_line_loses_and_repeats_nothing(policy, prompts, responses, tmp_path):
    same(generate(policy, policy.params, prompts, CONFIG, tmp_path, progress=False), responses)
    file = tmp_path / "responses.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == len(responses)
    file.write_bytes(b"".join(lines[:11]) + lines[11][:20])  # in the middle of a batch and of a line
    same(generate(policy, policy.params, prompts, CONFIG, tmp_path, progress=False), responses)
    assert file.read_bytes() == whole


def test_stored_responses_are_not_sampled_again(policy, prompts, responses, tmp_path, monkeypatch):
    generate(policy, policy.params, prompts, CONFIG, tmp_path, progress=False)
    monkeypatch.setattr("srpo_jax.exploration.scheduler.prefill", None)
    same(generate(policy, policy.params, prompts, CONFIG, tmp_path, progress=False), responses)


@pytest.mark.parametrize("change", ["parameters", "image", "seed", "max_tokens", "temperature"])
def test_what_the_response_depends_on_is_part_of_its_key(change, policy, records, prompts, responses, tmp_path):
    generate(policy, policy.params, prompts[:4], CONFIG, tmp_path, progress=False)
    params, config, asked = policy.params, CONFIG, prompts[:4]
    if change == "parameters":
        params = jax.tree.map(lambda x: x, policy.params)
        params["norm"] = jax.tree.map(lambda x: x * 3.0, params["norm"])
    elif change == "image":
        image = records[0].images[0].rotate(90)
        asked = encode_prompts([dataclasses.replace(records[0], images=(image,)), *records[1:4]], policy.processor)
    else:
        value = {"seed": 5, "max_tokens": 6, "temperature": 0.7}[change]
        config = dataclasses.replace(CONFIG, **{change: value})
    found = generate(policy, params, asked, config, tmp_path, progress=False)
    same(found, generate(policy, params, asked, config, progress=False))
    lines = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    new = len(lines) - 8
    assert new == (2 if change == "image" else 8)
    # The first run's responses are still there, under their own key.
    same(generate(policy, policy.params, prompts[:4], CONFIG, tmp_path, progress=False), responses[:8])


def test_refused_prompts_and_settings(policy, records, prompts):
    with pytest.raises(ValueError, match=r"record 'test_id-0-00000\d'.*exceed the model's context of 128.*lower"):
        generate(policy, policy.params, prompts, dataclasses.replace(CONFIG, max_tokens=100))
    with pytest.raises(ValueError, match="ids are not unique"):
        encode_prompts([records[0], records[0]], policy.processor)
    with pytest.raises(ValueError, match="samples=1"):
        GenerateConfig(temperature=0, samples=2)
    for field in ({"samples": 0}, {"batch": 0}, {"max_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match=next(iter(field))):
            GenerateConfig(**field)
    assert generate(policy, policy.params, [], CONFIG) == []
