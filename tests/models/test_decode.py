"""Promise: our decode loop (comb cache, trunk prefilled once) writes what transformers' `generate` writes in torch."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from srpo_jax.exploration.engine import EngineShape
from srpo_jax.exploration.sampler import SampleConfig
from srpo_jax.exploration.scheduler import Request, prefill_shape, sample

COUNT, GAP, NEVER = 64, 1e-3, -1  # no token has the id of this end-of-turn
LATER = 23


@pytest.fixture(params=["untied", "tied", "full"])
def case(request, checkpoint):
    return checkpoint(request.param)


def torch_greedy(case, inputs, tail):
    """What transformers writes after prompt and `tail`: tokens, their log-probs, their lead over the second best."""
    inputs = dict(inputs)
    for name, value in (("input_ids", tail), ("attention_mask", np.ones_like(tail)), ("mm_token_type_ids", 0 * tail)):
        row = torch.as_tensor(value, dtype=inputs[name].dtype)[None]
        inputs[name] = torch.cat([inputs[name], row], dim=1)
    with torch.no_grad():
        out = case.torch.generate(
            **inputs,
            max_new_tokens=COUNT,
            do_sample=False,
            eos_token_id=NEVER,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logprobs = torch.stack(out.logits)[:, 0].log_softmax(-1)
    best = logprobs.topk(2).values
    return (
        out.sequences[0, inputs["input_ids"].shape[1] :].numpy(),
        best[:, 0].numpy(),
        (best[:, 0] - best[:, 1]).numpy(),
    )


def test_greedy_branches_equal_generate_from_the_prompt_and_from_a_later_prefix(case, picture):
    images, question = [picture(101, 57, 4)], "What is shown?"
    inputs = case.torch_inputs(images, question)
    tail = np.asarray(case.policy.processor.tokenize("<think>\nStep 1: What is shown in the picture?")[:LATER])
    assert len(tail) == LATER
    trunk = case.policy.processor.encode(images, question).append(tail)
    prompt = inputs["input_ids"].shape[1]
    limits, prefixes = np.asarray([prompt, prompt + LATER]), np.asarray([0, 1, 0], np.int32)
    request = Request(trunk, limits, prefixes, jax.random.split(jax.random.key(0), 3))
    pack = prefill_shape(1, 128, trunk.patches, case.policy.config.vision)
    shape = EngineShape(trees=1, width=2, branches=3, prefixes=2, pack=pack)
    config = SampleConfig(COUNT, (NEVER,), temperature=0.0, loop_tokens=0)
    [(_, samples)] = sample(case.policy, case.policy.params, [request], shape, config)
    assert samples.lengths.tolist() == [COUNT] * 3
    np.testing.assert_array_equal(samples.tokens[0], samples.tokens[2])  # greedy draws nothing
    for branch, prefix in enumerate((tail[:0], tail)):
        wanted, logprobs, gaps = torch_greedy(case, inputs, prefix)
        # Both read what they wrote, so up to the first near tie they must write the same.
        clear = int(np.argmax(gaps <= GAP)) if (gaps <= GAP).any() else COUNT
        assert clear > COUNT // 2
        assert len(set(wanted.tolist())) > 5
        np.testing.assert_array_equal(samples.tokens[branch, :clear], wanted[:clear])
        np.testing.assert_allclose(samples.logprobs[branch, :clear], logprobs[:clear], atol=1e-4)
