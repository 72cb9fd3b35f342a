"""Reasoning trees on the host: a `Trunk` (prompt, reference path, reference reply) and `Branch`es that leave it at the ends
of its steps. Token ids are the record; text is never tokenised again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from srpo_jax.inputs import Encoded


@dataclasses.dataclass(frozen=True)
class Trunk:
    """Prompt, reference path and reference reply of one record, tokenised segment by segment.

    Attributes:
      record_id: the record that it was made from.
      encoded: the whole trunk, image included.
      ends: `e_0 .. e_S`, the number of trunk tokens in each prefix; `e_0` is the end of the generation prompt.
      unsafe_reply: tokens of the reply segment with the record's unsafe reply, if it has one.
      risky: whether granting the request would do harm; None if the record does not say.
    """

    record_id: str
    encoded: Encoded
    ends: tuple[int, ...]
    unsafe_reply: np.ndarray | None = None
    risky: bool | None = None

    @property
    def prefixes(self) -> range:
        """The proper prefixes 0 .. S-1, from which branches start."""
        return range(len(self.ends) - 1)

    @property
    def path(self) -> np.ndarray:
        """int32[r]: the tokens of reference path and reply."""
        return self.encoded.tokens[self.ends[0] :]

    def step(self, number: int) -> tuple[int, int] | None:
        """Where step `number`, counted from 1, begins and ends among the trunk's tokens; None if the path has no such step."""
        return self.ends[number - 1 : number + 1] if number in range(1, len(self.ends)) else None  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Branch:
    """One continuation of a prefix.

    Attributes:
      prefix: index i of the prefix it continues.
      tokens: int32[n], n >= 1, up to and including end-of-turn where the model reached it.
      logprobs: float32[n] under the raw policy (temperature 1, no truncation) that sampled it.
      status: status of the parsed path, prefix and branch together (`paths.Status`), or "judge_failed".
      verdict: True favourable, False unfavourable, None unknown.
      reason: the judge's reason, for people.
      on_policy: False for substitutes that no policy sampled.
      refused: whether the judge says that the answer declines the request; None if it does not say.
      step: tokens of its first own step; None until a loss of single steps asks (`training.annotate`).
      reference: float32[n] under the reference model; None until a loss that needs one asks (`training.annotate`).
      count: how many identical samples it stands for; 0 for what was not sampled.
      age: rounds since it was sampled.
    """

    prefix: int
    tokens: np.ndarray
    logprobs: np.ndarray
    status: str
    verdict: bool | None
    reason: str = ""
    on_policy: bool = True
    refused: bool | None = None
    step: int | None = None
    reference: np.ndarray | None = None
    count: int = 1
    age: int = 0


@dataclasses.dataclass(frozen=True)
class ReasoningTree:
    """A trunk and the branches explored from it."""

    trunk: Trunk
    branches: tuple[Branch, ...]

    @property
    def tokens(self) -> int:
        """Tokens of trunk and branches, each once."""
        return len(self.trunk.encoded.tokens) + sum(len(b.tokens) for b in self.branches)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dict; floats survive exactly. The image stays with the record."""
        return {
            "record_id": self.trunk.record_id,
            "tokens": self.trunk.encoded.tokens.tolist(),
            "ends": list(self.trunk.ends),
            "branches": [
                {
                    "prefix": b.prefix,
                    "tokens": b.tokens.tolist(),
                    "logprobs": [float(x) for x in b.logprobs],
                    "status": b.status,
                    "verdict": b.verdict,
                    "reason": b.reason,
                }
                for b in self.branches
            ],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any], trunk: Trunk) -> ReasoningTree:
        """Inverse of `to_json`, given the trunk made from the same record.

        Raises:
          ValueError: the stored tokens are not those of `trunk`: the record, the grammar or the tokenizer has changed.
        """
        if data["tokens"] != trunk.encoded.tokens.tolist() or tuple(data["ends"]) != trunk.ends:
            raise ValueError(
                f"stored tree of record {data['record_id']!r} has another trunk than the record now gives: the record, "
                "the path grammar or the tokenizer changed; explore again into a new work directory"
            )
        branches = tuple(
            Branch(
                prefix=b["prefix"],
                tokens=np.asarray(b["tokens"], np.int32),
                logprobs=np.asarray(b["logprobs"], np.float32),
                status=b["status"],
                verdict=b["verdict"],
                reason=b["reason"],
            )
            for b in data["branches"]
        )
        return ReasoningTree(trunk, branches)
