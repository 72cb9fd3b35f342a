"""The numbers of a guard judge against transformers on the same weights."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from srpo_jax.judges.guard import GuardConfig, guard_judge
from srpo_jax.paths import ParsedPath, Status


@pytest.mark.parametrize("variant", ["untied", "tied"])
def test_p_unsafe_is_that_of_transformers(checkpoint, picture, tmp_path, variant):
    """One prompt with a picture and one without, in one padded batch."""
    made = checkpoint(variant)
    template = tmp_path / "t.jinja"
    template.write_text("{% block user %}{{ question }}|{{ answer }}{% endblock %}")
    records = [
        types.SimpleNamespace(id=n, images=i, question=q)
        for n, i, q in (("a", (picture(90, 60),), "What?"), ("b", (), "Is it?"))
    ]
    path = ParsedPath(Status.OK, (), "shown in the picture")
    config = GuardConfig(str(made.folder), template=str(template), min_mass=0.0, batch=3, trunk=(128,), patches=None)
    judge = guard_judge(config, made.policy)
    ours = judge._answer([judge._encode(record, [(path, None)]) for record in records])
    labels = [made.policy.processor.tokenize(letter)[0] for letter in "ABCD"]
    for record, logprobs in zip(records, ours, strict=True):
        with torch.no_grad():
            logits = made.torch(**made.torch_inputs(list(record.images), f"{record.question}|{path.answer}")).logits[
                0, -1
            ]
        theirs = torch.log_softmax(logits.double(), -1)[labels].numpy()
        np.testing.assert_allclose(logprobs, theirs, atol=1e-4)
        unsafe = float(np.exp(theirs[0]) / np.exp(theirs).sum())
        assert judge(record, path).reason.startswith(f"p(unsafe) {unsafe:.3f}"[:-1])


def test_a_system_turn_is_that_of_the_chat_template(checkpoint):
    processor = checkpoint("untied").policy.processor
    messages = [{"role": "system", "content": "Be strict."}, {"role": "user", "content": "Is it?"}]
    ids = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert processor.encode([], "Is it?", "Be strict.").tokens.tolist() == list(ids)
    assert processor.encode([], "Is it?").tokens.tolist() != list(ids)
