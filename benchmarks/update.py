"""One SRPO update of a whole tree, packed as a comb, against the same update from naive padded pairs.

python benchmarks/update.py [--prompt=1200 --step=60 --branch=256 --k=4] [--width=128 --layers=4 --vocab=2048] [--vision=192]

The naive arm is what a pairwise preference trainer does: every pair is two sequences prompt + prefix + branch, padded to the
longest, each with its own image encode, and the reference path is one more. Both arms use the same module, remat, log-prob
head and loss, and half of the branches at each prefix are favourable. Prints one JSON object; times are medians of interleaved
repetitions of compiled programs, gradients included and optimizer excluded. The loss and the gradients of the two arms are
compared first.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from srpo_jax import losses
from srpo_jax.inputs import Encoded, VisionInputs, batch_inputs
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.logprobs import token_logprobs
from srpo_jax.models.qwen2_5_vl import Qwen2_5_VL
from srpo_jax.models.scoring import tree_logprobs
from srpo_jax.trees import Branch, PackConfig, ReasoningTree, Trunk, pack_trees

SIZES = {
    "prompt": (1200, "tokens of the prompt, image included"),
    "step": (60, "tokens of a reasoning step; there are six"),
    "reply": (60, "tokens of the reference reply"),
    "branch": (256, "tokens of the longest branch"),
    "k": (4, "branches per prefix"),
    "width": (128, "width of decoder and vision tower"),
    "layers": (4, "layers of the decoder"),
    "vocab": (2048, "entries of the vocabulary"),
    "vision": (192, "patches of the image, a multiple of 16; 0 for none"),
    "repeats": (3, "repetitions"),
}
for name, (default, text) in SIZES.items():
    flags.DEFINE_integer(name, default, text)
FLAGS = flags.FLAGS
STEPS, LAMBDA = 6, 0.3


def make_model() -> tuple[nnx.GraphDef, dict]:
    width = FLAGS.width
    section = (width // 32, width // 32, width // 8 - 2 * (width // 32))
    text = TextConfig(FLAGS.vocab, width, 3 * width, FLAGS.layers, 4, 2, width // 4, 1e4, section, 1e-6, True, 8192)
    vision = VisionConfig(2, width, 2 * width, 4, 3, 14, 2, 2, 56, (1,), width)
    graphdef, state = nnx.split(Qwen2_5_VL(ModelConfig(text, vision, 1, 2, 3, 4), nnx.Rngs(0)))
    return graphdef, nnx.to_pure_dict(state)


def make_tree(rng: np.random.Generator) -> ReasoningTree:
    """Branches from prefix i take the remaining share of the longest, as paths that are partly given do."""
    length = FLAGS.prompt + STEPS * FLAGS.step + FLAGS.reply
    slots = np.full(length, -1, np.int32)
    vision = None
    if FLAGS.vision:
        slots[4 : 4 + FLAGS.vision // 4] = np.arange(FLAGS.vision // 4)
        grid = np.stack(np.divmod(np.arange(FLAGS.vision), 14), -1).astype(np.int32)
        patches = rng.normal(size=(FLAGS.vision, 1176)).astype(np.float32)
        vision = VisionInputs(patches, grid, np.ones(FLAGS.vision, np.int32))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, length))
    encoded = Encoded(rng.integers(5, FLAGS.vocab, length).astype(np.int32), positions, slots, vision)
    ends = tuple(FLAGS.prompt + FLAGS.step * i for i in range(STEPS + 1))
    branches = []
    for i in range(STEPS):
        for j in range(FLAGS.k):
            n = max(2, round(FLAGS.branch * (1 - i / (STEPS + 1))) - j)
            tokens = rng.integers(5, FLAGS.vocab, n).astype(np.int32)
            branches.append(Branch(i, tokens, np.zeros(n, np.float32), "ok", j < FLAGS.k // 2))
    return ReasoningTree(Trunk("tree", encoded, ends), tuple(branches))


def packed_arm(graphdef, tree: ReasoningTree):
    """The loss as the library computes it, and the tokens that it executes."""
    row = FLAGS.branch
    lengths = [len(b.tokens) for b in tree.branches]
    total = len(tree.trunk.encoded.tokens)
    ladder = tuple(range(1, 2 * (total + sum(lengths)) // row + 2))
    pack = PackConfig((total,), (total - FLAGS.prompt,), ladder, row, (len(lengths),), (row,))
    batch, counters = pack_trees([tree], pack)

    def loss(params):
        path, branch = tree_logprobs(nnx.merge(graphdef, params), batch, remat="full")
        data = losses.BranchLogprobs(branch, batch.lengths, batch.prefixes, batch.pairs)
        return losses.srpo(path, batch.path_lengths, data, lambda_=LAMBDA)[0][0]

    return jax.jit(jax.value_and_grad(loss)), counters["executed_tokens"]


def naive_arm(graphdef, tree: ReasoningTree):
    """Two sequences per pair and one for the reference path, one after the other so that memory stays small."""
    trunk = tree.trunk
    sides, starts = [], []
    for i in trunk.prefixes:
        here = [b for b in tree.branches if b.prefix == i]
        for plus in (b for b in here if b.verdict):
            for minus in (b for b in here if not b.verdict):
                for branch in (plus, minus):
                    end = trunk.ends[i]
                    head = trunk.encoded.prefix(end)
                    sides.append(head.append(branch.tokens))
                    starts.append(end)
    examples, starts = [*sides, trunk.encoded], np.asarray([*starts, trunk.ends[0]])
    longest = max(len(e.tokens) for e in examples)
    inputs = batch_inputs(examples, longest)
    prefixes = STEPS * (FLAGS.k // 2) * (FLAGS.k - FLAGS.k // 2)

    def loss(params):
        def mean_logprob(args):
            one, start = args
            model = nnx.merge(graphdef, params)
            one = jax.tree.map(lambda x: x[None], one)
            hidden, _ = model.trunk(one, model.encode_images(one.vision, remat="full"), remat="full")
            scores = token_logprobs(hidden[:, :-1], model.output_embedding, one.tokens[:, 1:])[0]
            at = jnp.arange(1, longest)
            scored = (at >= start) & (at < one.lengths[0])
            return jnp.sum(jnp.where(scored, scores, 0)) / jnp.sum(scored)

        m = jax.lax.map(jax.checkpoint(mean_logprob), (inputs, starts))
        odds = losses.log_odds(m[:-1].reshape(prefixes, 2))
        return -m[-1] - LAMBDA * jnp.mean(jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1]))

    return jax.jit(jax.value_and_grad(loss)), len(examples) * longest


def main(_):
    graphdef, params = make_model()
    tree = make_tree(np.random.default_rng(0))
    arms = {"packed": packed_arm(graphdef, tree), "naive": naive_arm(graphdef, tree)}
    results = {name: jax.block_until_ready(run(params)) for name, (run, _) in arms.items()}
    gap = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), results["packed"][1], results["naive"][1])
    norm = jax.tree.map(lambda b: jnp.sum(b**2), results["naive"][1])
    relative = float(jnp.sqrt(sum(jax.tree.leaves(gap)) / sum(jax.tree.leaves(norm))))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(FLAGS.repeats):
        for name, (run, _) in arms.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(params))
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    report = {
        "benchmark": "update",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "sizes": {name: getattr(FLAGS, name) for name in SIZES},
        "executed_tokens": {name: tokens for name, (_, tokens) in arms.items()},
        "seconds": medians,
        "ratio_tokens": arms["naive"][1] / arms["packed"][1],
        "ratio_seconds": medians["naive"] / medians["packed"],
        "gradient_gap": relative,
        "loss": {name: float(value[0]) for name, value in results.items()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    app.run(main)
