"""Work by formula: floating-point operations of update, exploration and evaluation, bytes of a decoding step, and the time
that a chip needs at least.

Everything is counted on *unique* tokens: no padding, every trunk token once per tree, causal attention as the triangle that
it is. Dividing by the time of a step gives a utilisation that padding, recomputation and repeated prefixes cannot flatter.
A multiplication and its addition are two operations; only matrix products count (norms, rotations and softmax are below 2 %
at released sizes). The numbers come from the shapes of the parameters, so adapters are counted like any other matrix.

    tree = TreeSize(trunk=1620, path=420, branches=((1200, 256),) * 4)
    work = update_flops(config, shapes, trained=shapes, tree=tree)
    work.model.total / (seconds * chips * CHIPS["v5e"].flops)        # MFU
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from srpo_jax.models.config import ModelConfig, VisionConfig
from srpo_jax.trees import PackConfig, ReasoningTree, masked_key, masked_tokens


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one accelerator can do at most.

    Attributes:
      flops: bfloat16 operations per second.
      bandwidth: bytes per second between the chip and its memory.
      memory: bytes.
    """

    flops: float
    bandwidth: float
    memory: float


# TPUs: the vendor's figures. H100: the highest that large products and copies were measured to reach (989e12 and 3.35e12 on
# paper), because a bound that no program attains explains nothing.
CHIPS = {
    "v5e": Chip(197e12, 0.82e12, 16 * 2**30),
    "v5p": Chip(459e12, 2.77e12, 95 * 2**30),
    "v6e": Chip(918e12, 1.64e12, 32 * 2**30),
    "h100": Chip(790e12, 3.0e12, 80e9),
}
_KINDS = {"tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5": "v5p", "tpu v5p": "v5p", "tpu v6 lite": "v6e"}
_KINDS |= {"tpu v6e": "v6e", "nvidia h100 80gb hbm3": "h100"}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that `jax.Device.device_kind` names; None for one without known limits (a CPU, say)."""
    return CHIPS.get(_KINDS.get(device_kind.lower(), ""))


@dataclasses.dataclass(frozen=True)
class TreeSize:
    """What a tree's work depends on. A prompt to be answered is a tree without a path, its samples are branches at its end.

    Attributes:
      trunk: tokens of prompt (images included), path and reply.
      path: those of them whose log-probs are wanted: path and reply.
      branches: for each, the trunk tokens that it sees and the number n >= 1 of its own.
      patches: vision patches of all images, without padding.
      window_pairs: pairs of patches within a window, summed over windows.
      image_pairs: pairs of patches within an image, summed over images.
      masked: tokens of the path that are read once more without the prompt.
      key: those whose log-probs are wanted of that reading, the last of which is predicted alone.
    """

    trunk: int
    path: int = 0
    branches: tuple[tuple[int, int], ...] = ()
    patches: int = 0
    window_pairs: int = 0
    image_pairs: int = 0
    masked: int = 0
    key: int = 0

    @staticmethod
    def of(tree: ReasoningTree, vision: VisionConfig, pack: PackConfig | None = None) -> TreeSize:
        """The size of a real tree, for an update that packs like that; images whose features are known take no patches."""
        begin, end = (masked_key(tree.trunk, pack) if pack else None) or (0, 0)
        ends, encoded = tree.trunk.ends, tree.trunk.encoded
        images = np.zeros(0, int)
        if encoded.vision is not None and encoded.features is None:
            images = np.asarray(encoded.vision.images)
        windows = (images.reshape(-1, vision.window_patches) > 0).sum(-1)
        return TreeSize(
            trunk=len(encoded.tokens),
            path=len(tree.trunk.path),
            branches=tuple((ends[b.prefix], len(b.tokens)) for b in tree.branches),
            patches=int(windows.sum()),
            window_pairs=int((windows**2).sum()),
            image_pairs=int((np.bincount(images, minlength=1)[1:] ** 2).sum()),
            masked=masked_tokens(tree.trunk, pack) if pack else 0,
            key=end - begin,
        )

    def with_image(self, tokens: int, vision: VisionConfig) -> TreeSize:
        """This tree with one image of `tokens` language tokens (part of `trunk` already) that fills its windows."""
        patches = tokens * vision.merge_unit
        pairs = patches * min(patches, vision.window_patches)
        return dataclasses.replace(self, patches=patches, window_pairs=pairs, image_pairs=patches**2)


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations by part.

    Attributes:
      decoder: products with the decoder's matrices.
      attention: its scores and weighted sums.
      vision: the vision tower, all of it.
      head: logits.
    """

    decoder: float = 0.0
    attention: float = 0.0
    vision: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        return self.decoder + self.attention + self.vision + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


class UpdateFlops(NamedTuple):
    """Operations of an update.

    Attributes:
      forward: of the loss.
      backward: of its gradient.
      recompute: what is done again in the backward pass to save memory; no part of a model's FLOPs utilisation.
    """

    forward: Flops
    backward: Flops
    recompute: Flops

    @property
    def model(self) -> Flops:
        """Forward and backward: what the gradient costs, however it is computed."""
        return self.forward + self.backward


class Matrices(NamedTuple):
    """Numbers in the matrices that activations are multiplied with: per decoder token, patch, merged feature, and logit row."""

    decoder: int
    patch: int
    feature: int
    head: int


def matrices(shapes: Mapping[str, Any]) -> Matrices:
    """Sizes of the matrices among parameters by path.

    Args:
      shapes: path ("layers/attention/q/kernel") to anything with a `shape`, layers stacked on a leading axis. Tied models
        have no "head": there the embedding is counted as the head that it also is.
    """
    size = {path: int(np.prod(x.shape)) for path, x in shapes.items()}
    stacked = {path for path, x in shapes.items() if len(x.shape) == 3}
    return Matrices(
        decoder=sum(size[p] for p in stacked if p.startswith("layers/")),
        patch=sum(size[p] for p in stacked if p.startswith("vision/blocks/"))
        + size.get("vision/patch_embed/kernel", 0),
        feature=sum(n for p, n in size.items() if p.startswith("vision/merger/") and len(shapes[p].shape) == 2),
        head=size.get("head", size.get("embed", 0)),
    )


def forward_flops(config: ModelConfig, shapes: Mapping[str, Any], tree: TreeSize) -> Flops:
    """One forward pass over a tree, log-probs of path and branches included.

    The last token of a branch is predicted but never read, and its first is predicted by the trunk: n tokens of a branch are
    n - 1 tokens of work and n rows of logits.
    """
    vision = config.vision
    size = matrices(shapes)
    read = tree.trunk + sum(n - 1 for _, n in tree.branches) + tree.masked
    pairs = sum(n * (n + 1) // 2 for n in (tree.trunk, tree.masked))
    pairs += sum((n - 1) * seen + n * (n - 1) // 2 for seen, n in tree.branches)
    full = len([i for i in vision.fullatt_block_indexes if i < vision.depth])
    vision_pairs = full * tree.image_pairs + (vision.depth - full) * tree.window_pairs
    return Flops(
        decoder=2 * size.decoder * read,
        attention=attention_flops(config, pairs),
        vision=2 * (size.patch * tree.patches + size.feature * tree.patches / vision.merge_unit)
        + 4 * vision.hidden_size * vision_pairs,
        head=2 * size.head * (tree.path + sum(n for _, n in tree.branches) + tree.key),
    )


def attention_flops(config: ModelConfig, pairs: float) -> float:
    """Scores and weighted sums of all decoder layers for that many pairs of a query and a key that it sees."""
    text = config.text
    return 4 * text.num_layers * text.num_heads * text.head_dim * pairs


def update_flops(
    config: ModelConfig, shapes: Mapping[str, Any], trained: Collection[str], tree: TreeSize, *, remat: bool = True
) -> UpdateFlops:
    """One tree's share of an update.

    A product costs as much again for each gradient that it needs: that of its weights if they are trained, that of its input
    if anything below is. Frozen parts that nothing trained lies below are not differentiated (the vision tower under LoRA on
    the decoder). The gradient towards the input of the lowest trained layer is counted although it is not needed.

    Args:
      config: of the model.
      shapes: of all parameters by path, adapters included.
      trained: paths of the trained ones.
      tree: its size.
      remat: whether layers are recomputed in the backward pass as a whole; the logits always are.
    """
    forward = forward_flops(config, shapes, tree)
    size, moved = matrices(shapes), matrices({path: shapes[path] for path in trained})
    tied = "head" not in shapes
    head_moves = ("embed" if tied else "head") in trained
    in_vision = any(path.startswith("vision/") for path in trained)
    in_decoder = in_vision or any(path == "embed" or path.startswith("layers/") for path in trained)
    vision_weights = 2 * (moved.patch * tree.patches + moved.feature * tree.patches / config.vision.merge_unit)
    vision_products = 2 * (size.patch * tree.patches + size.feature * tree.patches / config.vision.merge_unit)
    backward = Flops(
        decoder=in_decoder * forward.decoder * (1 + moved.decoder / size.decoder),
        attention=in_decoder * 2 * forward.attention,
        vision=in_vision * (2 * forward.vision - vision_products + vision_weights),
        head=forward.head * ((in_decoder or "norm/scale" in trained) + head_moves),
    )
    again = remat and in_decoder
    recompute = Flops(
        again * forward.decoder, again * forward.attention, remat * in_vision * forward.vision, forward.head
    )
    return UpdateFlops(forward, backward, recompute)


def exploration_flops(config: ModelConfig, shapes: Mapping[str, Any], tree: TreeSize) -> Flops:
    """Sampling the branches of one tree, the trunk prefilled as far as any branch reads it."""
    prefilled = max((seen for seen, _ in tree.branches), default=0)
    return forward_flops(config, shapes, dataclasses.replace(tree, trunk=prefilled, path=0))


def kv_bytes(config: ModelConfig, width: int = 2) -> int:
    """Bytes of keys and values of one token in all layers, `width` bytes each."""
    text = config.text
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * width


def decode_step_bytes(
    config: ModelConfig, shapes: Mapping[str, Any], trunk_tokens: float, own_tokens: float, width: int = 2
) -> float:
    """Bytes that one decoding step must read: decoder and head once, every trunk once per tree, branches' own keys and values.

    Args:
      config: of the model.
      shapes: of its parameters.
      trunk_tokens: summed over the trees that decode.
      own_tokens: tokens so far, summed over the branches that decode.
      width: bytes of a weight and of a key's or value's number.
    """
    size = matrices(shapes)
    return width * (size.decoder + size.head) + kv_bytes(config, width) * (trunk_tokens + own_tokens)


def update_bound(work: UpdateFlops, chip: Chip, chips: int = 1) -> float:
    """Seconds that an update takes at least: model operations alone, at the peak of `chips` chips."""
    return work.model.total / (chip.flops * chips)


def exploration_bound(
    config: ModelConfig,
    shapes: Mapping[str, Any],
    trees: Sequence[TreeSize],
    chip: Chip,
    chips: int = 1,
    width: int = 2,
) -> float:
    """Seconds that sampling the branches of `trees` takes at least, all of them decoding together.

    Prefill is bound by operations; a decoding step by operations or by what it must read, whichever takes longer. A branch
    that has ended costs nothing. `chips` chips hold one copy of the weights between them; where each holds its own, give one
    chip its share of the trees.
    """
    size, peak = matrices(shapes), chip.flops * chips
    whole = [dataclasses.replace(t, branches=tuple((seen, 1) for seen, _ in t.branches)) for t in trees]
    seconds = sum(exploration_flops(config, shapes, tree).total for tree in whole) / peak
    owner = np.asarray([i for i, tree in enumerate(trees) for _ in tree.branches], int)
    seen, lengths = (np.asarray([b[k] for tree in trees for b in tree.branches], int) for k in (0, 1))
    for step in range(1, max(lengths, default=0)):
        here = lengths > step
        trunk = np.zeros(len(trees), int)
        np.maximum.at(trunk, owner[here], seen[here])
        flops = 2 * (size.decoder + size.head) * here.sum() + attention_flops(config, (seen[here] + step).sum())
        moved = decode_step_bytes(config, shapes, trunk.sum(), step * here.sum(), width)
        seconds += max(flops / peak, moved / (chip.bandwidth * chips))
    return float(seconds)
