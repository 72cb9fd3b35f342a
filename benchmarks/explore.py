"""Exploring whole trees with the engine, against the same branches from prefixes that are prefilled apart.

python benchmarks/explore.py [--prompt=1200 --step=60 --branch=256 --k=4 --trees=4] [--torch_trees=1] [--dtype=float32]

Arms, on the same weights (random, the embedded policy's sizes) and pictures, at temperature 1:
  engine   `exploration.scheduler.sample`: image and trunk once per tree, KV shared, places refilled.
  apart    our own naive sampler: every prefix is encoded and prefilled apart, its keys and values copied for each of its
           branches, and a batch waits for its longest branch. The same programs decode, with one branch per copy.
  torch    `transformers` generate in torch: every prefix a prompt with its picture, `num_return_sequences=k`.
  paged    `transformers` continuous batching, prompts of the same length without picture (it takes none); null where this
           machine cannot run it, with the reason.

A random subset of the vocabulary ends a turn, so lengths are geometric (mean `branch` * 0.4, cut at `branch`). The engine and
`apart` must draw the same tokens, and torch must give the same logits, before anything is timed. Prints one JSON object; times
are medians of interleaved repetitions after a first, untimed one; `paged` keeps threads running and comes last.
"""

import dataclasses
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from absl import app, flags
from flax import nnx

from srpo_jax.config import ASSETS
from srpo_jax.exploration import engine, scheduler
from srpo_jax.exploration.engine import EngineShape
from srpo_jax.exploration.sampler import SampleConfig, branch_keys, record_key
from srpo_jax.exploration.scheduler import Request, prefill_shape
from srpo_jax.inputs import Encoded, batch_inputs
from srpo_jax.models.decoding import CombCache, KVCache
from srpo_jax.models.policy import Policy, forward, init_policy, load_policy
from srpo_jax.models.saving import save_params

SIZES = {
    "prompt": (1200, "tokens of the prompt, image included"),
    "step": (60, "tokens of a reasoning step; there are six"),
    "branch": (256, "most tokens of a branch"),
    "k": (4, "branches per prefix"),
    "trees": (4, "trees to explore"),
    "together": (4, "trees that decode together"),
    "width": (12, "branches of a tree that decode together in the engine"),
    "torch_trees": (1, "of them in torch; 0 leaves torch out"),
    "pixels": (336, "side of the picture"),
    "repeats": (3, "repetitions"),
}
for name, (default, text) in SIZES.items():
    flags.DEFINE_integer(name, default, text)
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of our arms' parameters; torch runs beside float32 alone"
)
FLAGS = flags.FLAGS
STEPS = 6


def make_policy() -> Policy:
    base = load_policy(ASSETS / "base_policy", max_pixels=FLAGS.pixels**2, max_image_tokens=4096)
    policy = init_policy(base.config, base.processor, 0)
    return dataclasses.replace(policy, params=jax.tree.map(lambda x: x.astype(FLAGS.dtype), policy.params))


def make_picture(rng: np.random.Generator) -> PIL.Image.Image:
    return PIL.Image.fromarray(rng.integers(0, 255, (FLAGS.pixels, FLAGS.pixels, 3), np.uint8))


def make_trunks(policy: Policy, pictures) -> list[tuple[Encoded, np.ndarray]]:
    """Trunks with their prefix lengths."""
    rng, trunks = np.random.default_rng(1), []
    for picture in pictures:
        prompt = policy.processor.encode([picture], "What?")
        missing = FLAGS.prompt - len(prompt.tokens)
        assert missing >= 0, f"the picture alone takes {len(prompt.tokens)} tokens; raise --prompt or lower --pixels"
        plain = rng.integers(100, 250, missing + STEPS * FLAGS.step)  # ordinary tokens of the embedded vocabulary
        limits = FLAGS.prompt + FLAGS.step * np.arange(STEPS)
        trunks.append((prompt.append(plain), limits.astype(np.int32)))
    return trunks


def requests_of(trunks) -> list[Request]:
    prefixes = np.repeat(np.arange(STEPS, dtype=np.int32), FLAGS.k)
    numbers = np.arange(len(prefixes), dtype=np.int32) % FLAGS.k
    keys = [branch_keys(record_key(jax.random.key(0), str(i)), prefixes, numbers) for i in range(len(trunks))]
    return [Request(trunk, limits, prefixes, key) for (trunk, limits), key in zip(trunks, keys, strict=True)]


def engine_arm(policy: Policy, requests: list[Request], how: SampleConfig):
    longest, most = int(requests[0].limits[-1]), requests[0].trunk.patches
    branches = STEPS * FLAGS.k
    pack = prefill_shape(1, longest, most, policy.config.vision)
    shape = EngineShape(FLAGS.together, FLAGS.width, branches, STEPS, pack)

    def run() -> list[engine.Samples]:
        found = dict(scheduler.sample(policy, policy.params, requests, shape, how))
        return [found[i] for i in range(len(requests))]

    return run


def apart_arm(policy: Policy, requests: list[Request], how: SampleConfig):
    """As many branches decode together as in the engine's places; a batch is a number of whole trees."""
    branches, k = STEPS * FLAGS.k, FLAGS.k
    each = max(1, FLAGS.together * FLAGS.width // branches)
    if FLAGS.trees % each:
        raise app.UsageError(f"--trees={FLAGS.trees}: a multiple of the {each} that the naive arm decodes together")
    longest, most = int(requests[0].limits[-1]), requests[0].trunk.patches
    one = EngineShape(each * branches, 1, 1, 1, prefill_shape(1, longest, most, policy.config.vision))

    @jax.jit
    def start(params, inputs, limits, starts, keys):
        model = nnx.merge(policy.graphdef, params)
        empty = engine.empty_state(model, one, how)
        hidden, (keys_, values) = model.trunk(inputs, model.encode_images(inputs.vision), keep_kv=True)
        openings = jnp.take_along_axis(hidden, limits[:, None, None] - 1, axis=1)
        copy = lambda x, axis=0: jnp.repeat(x, k, axis)  # noqa: E731
        trees = empty.trees._replace(
            openings=copy(openings),
            limits=copy(limits[:, None]),
            starts=copy(starts[:, None]),
            keys=keys[:, None],
            counts=jnp.ones_like(empty.trees.counts),
        )
        keys_, values = (copy(x, 1).astype(empty.cache.trunk.keys.dtype) for x in (keys_, values))
        trunk = KVCache.of(keys_, values, int8=False)
        return empty._replace(trees=trees, cache=CombCache(trunk, empty.cache.own))

    def run() -> list[engine.Samples]:
        out = []
        for first in range(0, len(requests), each):
            batch = requests[first : first + each]
            prefixes = [r.trunk.prefix(int(n)) for r in batch for n in r.limits]
            inputs = batch_inputs(prefixes, longest, most)
            starts = np.asarray([p.next_position for p in prefixes], np.int32)
            keys = jax.random.key_data(jnp.concatenate([r.keys for r in batch]))
            state = start(policy.params, inputs, inputs.lengths, starts, keys)
            idle = np.zeros(one.trees, np.float32)
            state, _ = engine.decode(policy.graphdef, policy.params, state, idle, how, None, how.max_tokens)
            drawn = jax.tree.map(lambda x: np.asarray(x).reshape(each, branches, *x.shape[2:]), state.samples)
            out += [engine.Samples(*(x[i] for x in drawn)) for i in range(each)]
        return out

    return run


def torch_model(policy: Policy, folder: str):
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    save_params(folder, policy.config, policy.params)
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def torch_inputs(policy: Policy, trunk: Encoded, limit: int, pixels) -> dict:
    import torch

    tokens = torch.tensor(trunk.tokens[:limit], dtype=torch.long)[None]
    images = policy.processor.image_processor(images=[pixels], return_tensors="pt")
    kinds = (tokens == policy.config.image_token_id).long()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": kinds, **images}


def torch_arm(policy: Policy, model, requests: list[Request], pictures, how: SampleConfig):
    import torch

    def run() -> int:
        tokens = 0
        for request, picture in zip(requests[: FLAGS.torch_trees], pictures, strict=False):
            for limit in request.limits:
                inputs = torch_inputs(policy, request.trunk, int(limit), picture)
                with torch.no_grad():
                    out = model.generate(
                        **inputs,
                        do_sample=True,
                        top_k=0,
                        max_new_tokens=how.max_tokens,
                        num_return_sequences=FLAGS.k,
                        eos_token_id=list(how.stop_ids),
                        pad_token_id=how.stop_ids[0],
                    )
                tokens += int(out[:, int(limit) :].numel())
        return tokens

    return run


def check_same(first, second) -> dict[str, float]:
    """Tokens agree up to the first near tie of a branch; how many branches agree to the end."""
    whole = 0
    for a, b in zip(first, second, strict=True):
        for m in range(len(a.lengths)):
            n = min(a.lengths[m], b.lengths[m])
            same = np.array_equal(a.tokens[m, :n], b.tokens[m, :n]) and a.lengths[m] == b.lengths[m]
            assert same or a.ties[m] < 1e-3, "the arms draw different tokens without a near tie"
            whole += same
    return {"branches_equal": whole / sum(len(a.lengths) for a in first)}


def paged_arm(model, how: SampleConfig, trees: int):
    """Continuous batching over text prompts of the trunks' prefix lengths."""
    from transformers import GenerationConfig

    rng = np.random.default_rng(1)
    lengths = np.tile(np.repeat(FLAGS.prompt + FLAGS.step * np.arange(STEPS), FLAGS.k), trees)
    prompts = [rng.integers(100, 250, n).tolist() for n in lengths]
    options = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=how.max_tokens, eos_token_id=list(how.stop_ids), pad_token_id=0
    )

    def run() -> int:
        found = model.generate_batch(inputs=prompts, generation_config=options, persistent_manager=True)
        if len(found) != len(prompts):
            raise RuntimeError(f"{len(found)} of {len(prompts)} requests came back")
        return sum(len(one.generated_tokens) for one in found.values())

    return run


def seconds(run) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def time_paged(model, how: SampleConfig, report: dict[str, Any]) -> dict[str, list[float]]:
    """Times of continuous batching; none where this machine cannot run it, with the reason in the report."""
    paged = paged_arm(model, how, FLAGS.torch_trees)
    try:
        paged()
        return repeat({"paged": paged})
    except Exception as error:  # whatever a machine lacks
        report["paged"] = f"{type(error).__name__}: {error}"[:300]
        return {}


def repeat(arms) -> dict[str, list[float]]:
    """Times of the arms, one after the other, again and again."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(FLAGS.repeats):
        for name, run in arms.items():
            times[name].append(seconds(run))
    return times


def main(_):
    if FLAGS.torch_trees and FLAGS.dtype != "float32":
        raise app.UsageError(f"--dtype={FLAGS.dtype}: the arms in torch run in float32; add --torch_trees=0")
    policy, rng = make_policy(), np.random.default_rng(0)
    pictures = [make_picture(rng) for _ in range(FLAGS.trees)]
    trunks = make_trunks(policy, pictures)
    vocab = policy.config.text.vocab_size
    stops = np.random.default_rng(2).choice(vocab, max(1, round(vocab / (0.4 * FLAGS.branch))), replace=False)
    how = SampleConfig(FLAGS.branch, tuple(int(i) for i in stops), loop_tokens=0)
    requests = requests_of(trunks)
    arms = {"engine": engine_arm(policy, requests, how), "apart": apart_arm(policy, requests, how)}
    samples = arms["engine"]()
    report: dict[str, Any] = {"check": check_same(samples, arms["apart"]())}
    counts = dict.fromkeys(arms, FLAGS.trees) | dict.fromkeys(("torch", "paged"), FLAGS.torch_trees)
    report["mean_length"] = float(np.mean(np.concatenate([s.lengths for s in samples])))
    if FLAGS.torch_trees:
        model = checked_torch_model(policy, requests, pictures, report)
        arms["torch"] = torch_arm(policy, model, requests, pictures, how)
        arms["torch"]()
    times = repeat(arms)
    if FLAGS.torch_trees:  # at the end: the threads of continuous batching never rest
        times |= time_paged(model, how, report)
    each = STEPS * FLAGS.k
    rates = {name: counts[name] * each / statistics.median(t) for name, t in times.items()}
    report["branches_per_second"] = {name: rates.get(name) for name in ("engine", "apart", "torch", "paged")}
    report["ratio"] = {f"engine/{name}": rates["engine"] / rate for name, rate in rates.items() if name != "engine"}
    report["device"] = f"{jax.devices()[0].device_kind} {platform.machine()}"
    report["sizes"] = {name: getattr(FLAGS, name) for name in SIZES} | {
        "parameters": sum(x.size for x in jax.tree.leaves(policy.params)),
        "dtype": FLAGS.dtype,
    }
    report["versions"] = {name: version(name) for name in ("jax", "flax", "numpy")}
    if FLAGS.torch_trees:
        report["versions"] |= {name: version(name) for name in ("torch", "transformers")}
    print(json.dumps(report, indent=1))


def checked_torch_model(policy: Policy, requests, pictures, report: dict[str, Any]):
    """The policy in torch, after a check of its logits, whose largest difference goes into the report."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = torch_model(policy, folder)
    limit = int(requests[0].limits[0])
    with torch.no_grad():
        theirs = model(**torch_inputs(policy, requests[0].trunk, limit, pictures[0])).logits[0, -1].numpy()
    ours = forward(policy, policy.params, batch_inputs([requests[0].trunk.prefix(limit)], limit))[0, -1]
    report["check"]["logits"] = float(np.abs(np.asarray(ours) - theirs).max())
    assert report["check"]["logits"] < 1e-3, "torch computes another model"
    return model


if __name__ == "__main__":
    app.run(main)
