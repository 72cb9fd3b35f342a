"""From a record to the canonical trunk: segments tokenised one by one and concatenated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from srpo_jax.data.images import open_image
from srpo_jax.data.records import Record
from srpo_jax.data.sft import SftRecord
from srpo_jax.models.processor import Processor
from srpo_jax.paths import Grammar
from srpo_jax.trees import Trunk

GRAMMAR = Grammar()


def make_trunk(record: Record | SftRecord, processor: Processor, grammar: Grammar = GRAMMAR) -> Trunk:
    """The record's prompt, path and safe reply as one token sequence whose steps end at `ends`.

    Args:
      record: with a reference path, written as `grammar` says, or with free reasoning or none, which has a grammar of its own.
      processor: of the policy.
      grammar: a style of `paths.STYLES`, or another.

    Raises:
      ValueError: an image that cannot be read, or a trunk longer than the model's context; names the record.
    """
    if isinstance(record, SftRecord):
        return _trunk(record, record.segments, processor)
    return render_trunk(record, grammar.bodies(record.steps), record.safe_reply, processor, grammar)


def render_trunk(
    record: Record, steps: Sequence[str], reply: str, processor: Processor, grammar: Grammar = GRAMMAR
) -> Trunk:
    """As `make_trunk`, with other steps and reply than the record's own."""
    trunk = _trunk(record, grammar.render(steps, reply), processor)
    if record.unsafe_reply is None:
        return trunk
    closing = grammar.render(steps, record.unsafe_reply)[-1]
    unsafe = np.asarray([*processor.tokenize(closing), processor.eos_id], np.int32)
    return dataclasses.replace(trunk, unsafe_reply=unsafe)


def _trunk(record: Record | SftRecord, segments: Sequence[str], processor: Processor) -> Trunk:
    try:
        encoded = processor.encode([open_image(image) for image in record.images], record.question)
    except ValueError as error:
        raise ValueError(f"record {record.id!r}: {error}") from error
    ends = [len(encoded.tokens)]
    *path, last = [processor.tokenize(text) for text in segments]
    for segment in path:
        encoded = encoded.append(segment)
        ends.append(len(encoded.tokens))
    encoded = encoded.append([*last, processor.eos_id])
    context = processor.config.text.max_position_embeddings
    if len(encoded.tokens) > context:
        raise ValueError(
            f"record {record.id!r}: prompt, path and reply take {len(encoded.tokens)} tokens, the model's context is "
            f"{context}; shorten the record or lower max_image_tokens"
        )
    return Trunk(record.id, encoded, tuple(ends), risky=record.risky)
