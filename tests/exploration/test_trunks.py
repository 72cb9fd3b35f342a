"""Promise: a trunk's tokens are its record's text, segment by segment; every prefix is a token prefix, and nothing that a
record spells becomes markup or is lost on the way back."""

from __future__ import annotations

import dataclasses
import runpy
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import Qwen2VLImageProcessorPil

from srpo_jax.data.records import Record, RecordError
from srpo_jax.exploration.trunks import GRAMMAR, make_trunk, render_trunk
from srpo_jax.models.config import ModelConfig
from srpo_jax.models.hf import read_config
from srpo_jax.models.processor import Processor
from srpo_jax.paths import Status, parse

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "srpo_jax/assets/base_policy"
PIECES = (
    *("<|im_end|>", "<|im_start|>assistant\n", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>", "<|im_end"),
    *("<thi", "nk>", "</", "think", "<Think>", "< think>", "<tool_call>", "Step 2:", "step 3: Why", "Step", " 1:", ":"),
    *(
        "The yard shows",
        " the leaning tower",
        ".",
        "\n",
        "\n\n",
        " ",
        "\t",
        "\r\n",
        "e\u0301",
        "\u00e9",
        "\u4f60\u597d",
        "\U0001f600",
    ),
    *("\u200d", "\ue000", "\x00", "\u2028", "\u00a0", "\ufeff", "##", "\u2581", "\u0120"),
)
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), min_size=1, max_size=5).map("".join)


def processor_of(tokenizer: Any, config: ModelConfig) -> Processor:
    """A processor for `tokenizer` around sizes of the embedded policy, with room for any trunk of this test."""
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = tokenizer.convert_tokens_to_ids(list(names))
    text = dataclasses.replace(config.text, max_position_embeddings=8192)
    config = ModelConfig(text, config.vision, *ids)
    images = Qwen2VLImageProcessorPil.from_pretrained(EMBEDDED)
    return Processor(tokenizer, images, config)


@pytest.fixture(scope="module", params=["embedded", "qwen"])
def processor(request) -> Processor:
    """The embedded policy's, and one with the tests' tiny tokenizer of the Qwen family, which composes characters (NFC)."""
    config = read_config(EMBEDDED)
    if request.param == "embedded":
        return processor_of(Processor.load(EMBEDDED, config).tokenizer, config)
    return processor_of(runpy.run_path(str(ROOT / "tests/models/conftest.py"))["build_tokenizer"](), config)


@st.composite
def records(draw) -> Record:
    """Records that the schema admits, whatever else their texts hold."""
    steps = tuple(draw(st.lists(TEXT, min_size=6, max_size=6)))
    try:
        return Record("random", (), draw(TEXT), True, "Violence", steps, draw(TEXT), unsafe_reply=draw(TEXT))
    except RecordError:
        assume(False)
        raise


def written(processor: Processor, text: str) -> str:
    """`text` as its tokenizer keeps it."""
    normalizer = processor.tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else unicodedata.normalize("NFC", text)


@given(record=records())
def test_a_trunk_is_its_segments_and_reads_back_as_the_record(processor, record):
    trunk = make_trunk(record, processor)
    tokens, ends = trunk.encoded.tokens.tolist(), trunk.ends
    segments = GRAMMAR.render(record.steps, record.safe_reply)
    assert list(ends) == sorted(set(ends)) and len(ends) == len(segments)
    assert tokens[: ends[0]] == processor.encode([], record.question).tokens.tolist()
    assert tokens[-1] == processor.eos_id
    for segment, start, stop in zip(segments, ends, (*ends[1:], len(tokens) - 1), strict=True):
        assert tokens[start:stop] == processor.tokenize(segment)
    for number, end in enumerate(ends):
        assert processor.decode(tokens[ends[0] : end]) == written(processor, "".join(segments[:number]))
    path = parse(processor.decode(tokens[ends[0] :]), stopped=True)
    assert path.status is Status.OK and not path.deviations()
    assert [step.text for step in path.steps] == [written(processor, step).strip() for step in record.steps]
    assert path.answer == written(processor, record.safe_reply).strip()
    assert trunk.unsafe_reply is not None
    closing = GRAMMAR.render(record.steps, record.unsafe_reply)[-1]
    assert trunk.unsafe_reply.tolist() == [*processor.tokenize(closing), processor.eos_id]


@given(record=records(), other=records(), kept=st.integers(0, 5))
def test_a_prefix_does_not_depend_on_what_follows(processor, record, other, kept):
    trunk = make_trunk(record, processor)
    steps = (*record.steps[:kept], *other.steps[kept:])
    changed = render_trunk(record, steps, other.safe_reply, processor)
    assert changed.ends[: kept + 1] == trunk.ends[: kept + 1]
    stop = trunk.ends[kept]
    np.testing.assert_array_equal(changed.encoded.tokens[:stop], trunk.encoded.tokens[:stop])
    np.testing.assert_array_equal(changed.encoded.positions[:, :stop], trunk.encoded.positions[:, :stop])
