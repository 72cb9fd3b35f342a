"""A checkpoint as an agent of the data builder: prompts through the engine that samples branches, a batch at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from srpo_jax.data.builder.agents import SEES, Ask
from srpo_jax.data.images import open_image
from srpo_jax.endpoint import Reply, ReplyStatus
from srpo_jax.exploration.engine import EngineShape
from srpo_jax.exploration.sampler import SampleConfig, record_key
from srpo_jax.exploration.scheduler import Request, prefill_shape, sample
from srpo_jax.inputs import Encoded
from srpo_jax.models.fingerprint import params_fingerprint
from srpo_jax.models.policy import Policy, load_policy
from srpo_jax.trees import PATCHES, Ladder, bucket


@dataclasses.dataclass(frozen=True)
class LocalSettings:
    """An agent from a checkpoint.

    Attributes:
      checkpoint: its folder in Hugging Face's format.
      max_tokens: of a reply.
      temperature: 0 for greedy.
      seed: of the random bits, which else depend on the prompt alone.
      batch: prompts that decode together.
      trunk: ladder of prompt lengths.
      sees: "pixels", or "description" to tell it the manifest's description instead.
      dtype: of the loaded parameters; None keeps the file's.
      quantize: see `models.policy.load_policy`.

    Raises:
      ValueError: a field out of range.
    """

    checkpoint: str
    max_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    batch: int = 8
    trunk: Ladder = (256, 512, 1024, 2048, 4096, 8192)
    sees: str = "pixels"
    dtype: str | None = None
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.max_tokens < 1 or self.temperature < 0:
            raise ValueError("batch and max_tokens must be at least 1, temperature at least 0")
        if self.sees not in SEES:
            raise ValueError(f"sees={self.sees!r}: use one of {', '.join(SEES)}")

    @classmethod
    def of(cls, values: dict[str, Any]) -> LocalSettings:
        """From the fields of a JSON object.

        Raises:
          ValueError: an unknown field, or a value that is refused.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if values.keys() - known:
            raise ValueError(
                f"{', '.join(sorted(values.keys() - known))}: a checkpoint takes {', '.join(sorted(known))}"
            )
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)


class LocalAgent:
    """An `Agent` in this process (see `data.builder.agents`); nothing that it is asked leaves the machine."""

    remote = False

    def __init__(self, settings: LocalSettings, policy: Policy | None = None):
        """`policy` if it is loaded already."""
        self._settings = settings
        self._policy = policy or load_policy(settings.checkpoint, dtype=settings.dtype, quantize=settings.quantize)
        made = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("checkpoint", "batch", "trunk")}
        told = json.dumps([params_fingerprint(self._policy.params), made]).encode()
        self.name = f"local:{Path(settings.checkpoint).name}:{hashlib.sha256(told).hexdigest()[:12]}"
        self.sees = settings.sees

    def cost(self, reply: Reply) -> float:
        """Nothing is paid."""
        return 0.0

    def ask(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        """(index, reply), batch by batch. A prompt that does not fit is `rejected`; one that reaches its budget is `cut`."""
        for start in range(0, len(asks), self._settings.batch):
            fitting: list[tuple[int, Encoded]] = []
            for index in range(start, min(start + self._settings.batch, len(asks))):
                try:
                    fitting.append((index, self._encode(asks[index])))
                except ValueError as error:
                    yield index, Reply(ReplyStatus.REJECTED, str(error), model=self.name)
            yield from self._answer(asks, fitting)

    def _encode(self, ask: Ask) -> Encoded:
        images = [open_image(image) for image in ask.images]
        encoded = self._policy.processor.encode(images, ask.user, ask.system)
        bucket(len(encoded.tokens), self._settings.trunk, "prompt tokens of the agent (trunk)")
        return encoded

    def _answer(self, asks: Sequence[Ask], fitting: Sequence[tuple[int, Encoded]]) -> Iterator[tuple[int, Reply]]:
        if not fitting:
            return
        policy, settings = self._policy, self._settings
        longest = bucket(max(len(e.tokens) for _, e in fitting), settings.trunk, "prompt tokens of the agent (trunk)")
        most = max(e.patches for _, e in fitting)
        patches = bucket(most, PATCHES, "vision patches of the agent's prompt") if most else 0
        pack = prefill_shape(settings.batch, longest, patches, policy.config.vision)
        shape = EngineShape(trees=settings.batch, width=1, branches=1, prefixes=1, pack=pack)
        requests = (
            Request(encoded, np.asarray([len(encoded.tokens)]), np.zeros(1, np.int32), self._key(asks[index])[None])
            for index, encoded in fitting
        )
        how = SampleConfig(settings.max_tokens, policy.processor.stop_ids, settings.temperature)
        for place, drawn in sample(policy, policy.params, requests, shape, how):
            index, encoded = fitting[place]
            written = int(drawn.lengths[0])
            text = policy.processor.decode(drawn.tokens[0, :written].tolist())
            status = ReplyStatus.OK if drawn.stopped[0] else ReplyStatus.CUT
            yield index, Reply(status, text, len(encoded.tokens), written, self.name)

    def _key(self, ask: Ask) -> jax.Array:
        return record_key(jax.random.key(self._settings.seed), f"{ask.name}/{ask.system}/{ask.user}")
