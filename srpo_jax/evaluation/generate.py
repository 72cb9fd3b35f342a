"""Sampling responses to the prompts of a benchmark: image and prompt encoded once, shared by the prompt's samples.

A prompt is a trunk without a path, its samples are branches at its end, so the sampler of exploration does the work. Responses
go to `responses.jsonl` as they come, under a key of everything they depend on: parameters, prompt and image, decoding, sample.
One file may hold those of several policies and decodings; a killed run goes on, and nothing stale is ever taken for a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from srpo_jax import distributed
from srpo_jax.data.images import open_image
from srpo_jax.data.items import Question
from srpo_jax.exploration.engine import EngineShape, Samples
from srpo_jax.exploration.sampler import SampleConfig, branch_keys, record_key
from srpo_jax.exploration.scheduler import Request, prefill_shape, sample
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.files import Store, read_family
from srpo_jax.inputs import Encoded
from srpo_jax.models.fingerprint import input_fingerprint, params_fingerprint
from srpo_jax.models.policy import Policy
from srpo_jax.models.processor import Processor
from srpo_jax.paths import ParsedPath, parse
from srpo_jax.trees import Ladder, bucket

RESPONSES = "responses.jsonl"
DRAW = tuple(field.name for field in dataclasses.fields(SampleConfig) if field.name != "stop_ids")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How responses are sampled.

    Attributes:
      temperature: 0 for greedy; further options of a draw as in `sampler.SampleConfig`.
      samples: responses per prompt.
      max_tokens: token budget of a response; one that does not end within it is truncated.
      batch: prompts that decode together; a finished prompt's place goes to the next.
      prefill: prompts that are prefilled together, per device of data × fsdp.
      trunk: ladder of prompt lengths.
      patches: ladder of vision patches per prompt; None takes the largest of all prompts.
      gather: gather parameters once instead of for every token, see `ExploreConfig`.
      seed: of the random bits; those of a response depend on (seed, record id, sample) alone.

    Raises:
      ValueError: a field out of range, or several samples of greedy decoding, which would be copies.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    loop_tokens: int = 64
    samples: int = 1
    max_tokens: int = 1024
    batch: int = 64
    prefill: int = 8
    trunk: Ladder = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
    patches: Ladder | None = None
    gather: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "batch", "prefill"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        self.sampling(())
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("greedy decoding (temperature=0) gives one response per prompt; set samples=1")

    def decoding(self) -> dict[str, Any]:
        """What shapes a single response, as it stands in stores and reports."""
        return {name: getattr(self, name) for name in (*DRAW, "seed")}

    def sampling(self, stop_ids: tuple[int, ...]) -> SampleConfig:
        """How its responses' tokens are drawn."""
        return SampleConfig(stop_ids=stop_ids, **{name: getattr(self, name) for name in DRAW})


@dataclasses.dataclass(frozen=True)
class Prompt:
    """An encoded prompt.

    Attributes:
      record_id: whose question it is.
      encoded: the chat template with images and question, up to the start of the reply.
      fingerprint: of tokens and pixels, so that a changed record, image or template is noticed.
    """

    record_id: str
    encoded: Encoded
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Response:
    """A sampled turn.

    Attributes:
      record_id: the prompt's record.
      sample: its number among the prompt's samples, from 0.
      tokens: int32[n], end-of-turn included where reached.
      stopped: whether it was reached; False for a response that ran into its budget or was cut as a loop.
      text: the turn as text.
      gap: smallest gap between the best two (perturbed) logits; where it is near 0 another batch size or mesh may draw
        another token. Infinite for imported text.
    """

    record_id: str
    sample: int
    tokens: np.ndarray
    stopped: bool
    text: str
    gap: float = float("inf")

    def parse(self) -> ParsedPath:
        """Path and answer."""
        return parse(self.text, stopped=self.stopped, grammar=GRAMMAR)


def encode_prompts(records: Sequence[Question], processor: Processor) -> list[Prompt]:
    """The records' prompts; worth keeping where several policies of one processor are evaluated.

    Raises:
      ValueError: an image that cannot be read or a prompt longer than the context, naming the record; duplicate ids.
    """
    if len({record.id for record in records}) != len(records):
        raise ValueError("record ids are not unique: responses are kept by id")
    prompts = []
    for record in records:
        try:
            encoded = processor.encode([open_image(image) for image in record.images], record.question)
        except ValueError as error:
            raise ValueError(f"record {record.id!r}: {error}") from error
        prompts.append(Prompt(record.id, encoded, input_fingerprint(encoded)))
    return prompts


def generate(
    policy: Policy,
    params: Mapping[str, Any],
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    folder: str | Path | None = None,
    *,
    progress: bool = True,
) -> list[Response]:
    """Samples `config.samples` responses to every prompt.

    Args:
      policy: whose module and tokenizer to use.
      params: the parameters.
      prompts: from `encode_prompts`.
      config: how to sample.
      folder: where `responses.jsonl` is kept and resumed from; None keeps nothing.
      progress: show a progress bar.

    Returns:
      The responses, prompt by prompt and sample by sample.

    Raises:
      ValueError: prompt and token budget together exceed the model's context, or a prompt exceeds the ladder.
    """
    if not prompts:
        return []
    shape = _shape(policy, prompts, config)
    run = {"params": params_fingerprint(params), **config.decoding()}
    with Store.open(folder, RESPONSES) as store:
        known = _of_run(store.lines, run)
        own, quiet = distributed.mine(prompts), not (progress and distributed.is_lead())
        missing = [prompt for prompt in own if any(key not in known for key in _keys([prompt], config))]
        title = f"generate T={config.temperature:g}"
        with tqdm(total=len(own), initial=len(own) - len(missing), desc=title, unit="prompt", disable=quiet) as bar:
            for number, samples in _sample(policy, params, missing, config, shape):
                for index, key in enumerate(_keys([missing[number]], config)):
                    if key not in known:
                        known[key] = _line(key, Samples(*(x[index] for x in samples)), run, policy.processor)
                        store.append(known[key])
                bar.update()
        if distributed.process_count() > 1:
            known = _of_run(store.share(), run)
    return [_response(known[key]) for key in _keys(prompts, config)]


def _keys(prompts: Sequence[Prompt], config: GenerateConfig) -> list[tuple[str, int, str]]:
    return [(p.record_id, sample, p.fingerprint) for p in prompts for sample in range(config.samples)]


class MissingResponsesError(ValueError):
    """Responses that are not in the store; says how many, and how to get them."""


def require_responses(
    params: Mapping[str, Any], prompts: Sequence[Prompt], config: GenerateConfig, folder: str | Path | None
) -> None:
    """Checks that a folder holds every response that `generate` would give, so that it samples nothing.

    Raises:
      MissingResponsesError: some are missing; names the first.
    """
    run = {"params": params_fingerprint(params), **config.decoding()}
    path = Path(folder or ".") / RESPONSES
    lines = [] if folder is None else read_family(path)
    known = _of_run(lines, run)
    wanted = _keys(prompts, config)
    if missing := [key for key in wanted if key not in known]:
        (name, sample, _), told = missing[0], ", ".join(f"{k}={v}" for k, v in config.decoding().items())
        raise MissingResponsesError(
            f"{path} lacks {len(missing)} of {len(wanted)} responses of these parameters "
            f"({run['params']}) at {told}, such as sample {sample} of {name!r}; run without --score_only to generate them"
        )


def _shape(policy: Policy, prompts: Sequence[Prompt], config: GenerateConfig) -> EngineShape:
    """The engine's sizes, those of all prompts: not of what happens to be missing."""
    context = policy.config.text.max_position_embeddings
    longest = max(prompts, key=lambda p: len(p.encoded.tokens))
    tokens = len(longest.encoded.tokens)
    if tokens + config.max_tokens > context:
        raise ValueError(
            f"record {longest.record_id!r}: a prompt of {tokens} tokens and max_tokens={config.max_tokens} exceed the "
            f"model's context of {context}; lower config.eval.max_tokens, or max_image_tokens of the policy"
        )
    patches = max(p.encoded.patches for p in prompts)
    if patches and config.patches:
        patches = bucket(patches, config.patches, "vision patches of a prompt (patches)")
    room = bucket(tokens, config.trunk, "prompt tokens (trunk)")
    pack = prefill_shape(config.prefill, room, patches, policy.config.vision)
    return EngineShape(config.batch, config.samples, config.samples, 1, pack, gather=config.gather)


def _sample(
    policy: Policy, params, prompts: Sequence[Prompt], config: GenerateConfig, shape: EngineShape
) -> Iterator[tuple[int, Samples]]:
    """The number of a prompt and its samples, as they finish."""
    seed = jax.random.key(config.seed)
    prefixes, numbers = np.zeros(config.samples, np.int32), np.arange(config.samples, dtype=np.int32)
    requests = (
        Request(
            p.encoded,
            np.asarray([len(p.encoded.tokens)], np.int32),
            prefixes,
            branch_keys(record_key(seed, p.record_id), prefixes, numbers),
        )
        for p in prompts
    )
    return sample(policy, params, requests, shape, config.sampling(policy.processor.stop_ids))


def _of_run(lines: Iterable[dict[str, Any]], run: Mapping[str, Any]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """The stored lines, by key, of these parameters and this decoding."""
    return {_key(line): line for line in lines if all(line.get(k) == v for k, v in run.items())}


def _key(line: Mapping[str, Any]) -> tuple[str, int, str]:
    return line["record_id"], line["sample"], line["prompt"]


def _line(key: tuple[str, int, str], one: Samples, run: Mapping[str, Any], processor: Processor) -> dict[str, Any]:
    tokens = one.tokens[: one.lengths].tolist()
    name = dict(zip(("record_id", "sample", "prompt"), key, strict=True))
    told = {"stopped": bool(one.stopped), "gap": float(one.ties), "text": processor.decode(tokens), "tokens": tokens}
    return {**name, **run, **told}


def _response(line: Mapping[str, Any]) -> Response:
    gap = float("inf") if line["gap"] is None else line["gap"]
    tokens = np.asarray(line["tokens"], np.int32)
    return Response(line["record_id"], line["sample"], tokens, line["stopped"], line["text"], gap)
