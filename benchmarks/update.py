"""One update of a whole tree, packed as a comb, against the same update from padded pairs: our own and those of TRL's trainer.

python benchmarks/update.py [--prompt=1200 --step=60 --branch=256 --k=4] [--width=128 --layers=4 --vocab=2048] [--vision=192]
    [--trl_pairs=4]

Arms, on the same weights, picture and branches, half of which are favourable at each prefix:
  packed         SRPO's loss as the library computes it.
  naive          the same loss as a pairwise preference trainer would: every pair is two sequences prompt + prefix + branch,
                 padded to the longest, each with its own image encode, and the reference path is one more. Same module, remat
                 and log-prob head.
  trl            with --trl_pairs=n, TRL's DPO loss in torch on the same pairs, n at a time, reference log-probs given.
  trl_reference  the same, and its reference model's forward pass.

Losses are compared before anything is timed (of `naive` gradients, too; of TRL with our own DPO loss of the packed tree).
Prints one JSON object; times are medians of interleaved repetitions of loss and gradients, optimizer and compilation excluded.
"""

import importlib.metadata
import json
import math
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from srpo_jax import losses
from srpo_jax.inputs import Encoded, batch_inputs
from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
from srpo_jax.models.geometry import image_slots, lay_out_images, mrope_positions
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
    "trl_pairs": (0, "pairs that TRL's trainer takes at a time; 0 leaves it out"),
    "repeats": (3, "repetitions"),
}
for name, (default, text) in SIZES.items():
    flags.DEFINE_integer(name, default, text)
FLAGS = flags.FLAGS
STEPS, LAMBDA = 6, 0.3


def make_config() -> ModelConfig:
    width = FLAGS.width
    section = (width // 32, width // 32, width // 8 - 2 * (width // 32))
    text = TextConfig(FLAGS.vocab, width, 3 * width, FLAGS.layers, 4, 2, width // 4, 1e4, section, 1e-6, True, 8192)
    vision = VisionConfig(2, width, 2 * width, 4, 3, 14, 2, 2, 56, (1,), width)
    return ModelConfig(text, vision, 1, 2, 3, 4)


def make_model(config: ModelConfig, seed: int) -> tuple[nnx.GraphDef, dict]:
    graphdef, state = nnx.split(Qwen2_5_VL(config, nnx.Rngs(seed)))
    return graphdef, nnx.to_pure_dict(state)


def make_picture(rng: np.random.Generator, config: ModelConfig) -> tuple[np.ndarray, tuple[int, int]]:
    """Patches, unit by unit, and rows and columns of a grid of merge units that fills its windows."""
    units = FLAGS.vision // 4
    rows = max(r for r in range(2, math.isqrt(units) + 1, 2) if units % (2 * r) == 0)
    return rng.normal(size=(FLAGS.vision, config.vision.patch_dim)).astype(np.float32), (rows, units // rows)


def make_tree(rng: np.random.Generator, config: ModelConfig, pictures, grids) -> ReasoningTree:
    """Branches from prefix i take the remaining share of the longest, as paths that are partly given do."""
    length = FLAGS.prompt + STEPS * FLAGS.step + FLAGS.reply
    tokens = rng.integers(5, FLAGS.vocab, length).astype(np.int32)
    tokens[4 : 4 + FLAGS.vision // 4] = config.image_token_id
    vision, places = lay_out_images(pictures, grids, config.vision) if grids else (None, [])
    slots, positions = image_slots(tokens, grids, places, config), mrope_positions(tokens, grids, config)
    encoded = Encoded(tokens, positions, slots, vision)
    ends = tuple(FLAGS.prompt + FLAGS.step * i for i in range(STEPS + 1))
    branches = []
    for i in range(STEPS):
        for j in range(FLAGS.k):
            n = max(2, round(FLAGS.branch * (1 - i / (STEPS + 1))) - j)
            tokens = rng.integers(5, FLAGS.vocab, n).astype(np.int32)
            branches.append(Branch(i, tokens, np.zeros(n, np.float32), "ok", j < FLAGS.k // 2))
    return ReasoningTree(Trunk("tree", encoded, ends), tuple(branches))


def pack(tree: ReasoningTree):
    row = FLAGS.branch
    lengths = [len(b.tokens) for b in tree.branches]
    total = len(tree.trunk.encoded.tokens)
    ladder = tuple(range(1, 2 * (total + sum(lengths)) // row + 2))
    pack = PackConfig((total,), (total - FLAGS.prompt,), ladder, row, (len(lengths),), (row,))
    return pack_trees([tree], pack)


def packed_arm(graphdef, tree: ReasoningTree):
    """The loss as the library computes it, and the tokens that it executes."""
    batch, counters = pack(tree)

    def loss(params):
        path, branch = tree_logprobs(nnx.merge(graphdef, params), batch, remat="full")
        data = losses.BranchLogprobs(branch, batch.lengths, batch.prefixes, batch.pairs)
        return losses.srpo(path, batch.path_lengths, data, lambda_=LAMBDA)[0][0]

    return jax.jit(jax.value_and_grad(loss)), counters["executed_tokens"]


def naive_arm(graphdef, tree: ReasoningTree):
    """Two sequences per pair and one for the reference path, one after the other so that memory stays small."""
    trunk = tree.trunk
    sides, ends = [], []
    for i in trunk.prefixes:
        here = [b for b in tree.branches if b.prefix == i]
        for plus in (b for b in here if b.verdict):
            for minus in (b for b in here if not b.verdict):
                for branch in (plus, minus):
                    end = trunk.ends[i]
                    head = trunk.encoded.prefix(end)
                    sides.append(head.append(branch.tokens))
                    ends.append(end)
    examples, starts = [*sides, trunk.encoded], np.asarray([*ends, trunk.ends[0]])
    longest = max(len(e.tokens) for e in examples)
    inputs = batch_inputs(examples, longest)
    pairs = STEPS * (FLAGS.k // 2) * (FLAGS.k - FLAGS.k // 2)

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
        odds = losses.log_odds(m[:-1].reshape(pairs, 2))
        return -m[-1] - LAMBDA * jnp.mean(jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1]))

    return jax.jit(jax.value_and_grad(loss)), len(examples) * longest


def trl_arms(config: ModelConfig, graphdef, params, tree: ReasoningTree, pictures, grids):
    """TRL's trainer on the pairs, after a check of its loss; the reference model has other weights."""
    import _trl_pairs as trl_pairs

    batch, _ = pack(tree)
    _, reference = make_model(config, 1)
    score = jax.jit(lambda p: tree_logprobs(nnx.merge(graphdef, p), batch)[1])
    ours, theirs = score(params), score(reference)
    data = losses.BranchLogprobs(ours, batch.lengths, batch.prefixes, batch.pairs, reference=theirs)
    wanted = float(losses.dpo(data, beta=trl_pairs.BETA)[0][0])
    sums = np.asarray(theirs[0] * (np.arange(theirs.shape[-1]) < batch.lengths[0][:, None])).sum(-1)
    trainer = trl_pairs.PairTrainer(config, params, reference, FLAGS.trl_pairs)
    parts = trainer.batches(tree, np.argwhere(batch.pairs[0]), sums, pictures, grids)
    found = {f"trl{name}": (lambda given=given: trainer.step(parts, given)) for name, given in trl_pairs.ARMS.items()}
    gaps = {name: abs(run() - wanted) for name, run in found.items()}
    assert max(gaps.values()) < 1e-3, f"TRL's loss is not ours: {gaps}"
    return found, sum(part["input_ids"].numel() for part in parts), {"dpo": wanted, "gap": gaps}


def main(_):
    config, rng = make_config(), np.random.default_rng(0)
    graphdef, params = make_model(config, 0)
    drawn = [make_picture(rng, config)] if FLAGS.vision else []
    pictures, grids = [p for p, _ in drawn], [g for _, g in drawn]
    tree = make_tree(rng, config, pictures, grids)
    arms = {"packed": packed_arm(graphdef, tree), "naive": naive_arm(graphdef, tree)}
    executed = {name: tokens for name, (_, tokens) in arms.items()}
    results = {name: jax.block_until_ready(run(params)) for name, (run, _) in arms.items()}
    gap = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), results["packed"][1], results["naive"][1])
    norm = jax.tree.map(lambda b: jnp.sum(b**2), results["naive"][1])
    relative = float(jnp.sqrt(sum(jax.tree.leaves(gap)) / sum(jax.tree.leaves(norm))))
    runs = {name: (lambda run=run: jax.block_until_ready(run(params))) for name, (run, _) in arms.items()}
    checked = None
    if FLAGS.trl_pairs:
        more, tokens, checked = trl_arms(config, graphdef, params, tree, pictures, grids)
        runs, executed = runs | more, executed | {"trl": tokens, "trl_reference": 2 * tokens}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(FLAGS.repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    others = [name for name in runs if name != "packed"]
    packages = ("jax", "flax", *(("torch", "transformers", "trl") if FLAGS.trl_pairs else ()))
    report = {
        "benchmark": "update",
        "device": f"{jax.devices()[0].device_kind} {platform.machine()}",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "sizes": {name: getattr(FLAGS, name) for name in SIZES},
        "executed_tokens": executed,
        "seconds": medians,
        "ratio_tokens": {name: executed[name] / executed["packed"] for name in others},
        "ratio_seconds": {name: medians[name] / medians["packed"] for name in others},
        "gradient_gap": relative,
        "trl_loss": checked,
        "loss": {name: float(value[0]) for name, value in results.items()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    app.run(main)
