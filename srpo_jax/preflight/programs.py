"""The programs of a configuration, made by the code that a run uses, from shapes instead of arrays.

Every program is taken at its largest shapes, the last step of each ladder: what fits there fits everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from srpo_jax import config as configs
from srpo_jax import flops, sharding
from srpo_jax.evaluation.config import decodings
from srpo_jax.exploration import engine
from srpo_jax.exploration.engine import EngineShape
from srpo_jax.exploration.sampler import SampleConfig
from srpo_jax.exploration.scheduler import TICKS, prefill_shape, program_shapes
from srpo_jax.exploration.trunks import GRAMMAR
from srpo_jax.flops import Chip, TreeSize
from srpo_jax.inputs import MERGE, Encoded, Features, PrefillShape, VisionInputs
from srpo_jax.models.config import ModelConfig
from srpo_jax.models.geometry import empty_vision
from srpo_jax.models.hf import param_shapes
from srpo_jax.models.lora import LoraConfig, init_adapters
from srpo_jax.models.policy import graph_definition
from srpo_jax.models.quantize import compute_params, is_quantisable, round_to_int8, scale_path
from srpo_jax.models.released import MAX_PIXELS, config_of
from srpo_jax.training.loop import RunConfig
from srpo_jax.training.state import TrainState, abstract_state
from srpo_jax.training.step import check_image_cache, make_update
from srpo_jax.trees import Branch, PackConfig, ReasoningTree, Trunk, masked_tokens, pack_trees

STEPS = len(GRAMMAR.titles)
END_OF_TURN = 151_645  # any id will do for a program's shape
FEATURE_PIXELS = 28 * 28


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a run.

    Attributes:
      name: "update", "explore" or "evaluate" (decoding), "explore_prefill" or "evaluate_prefill".
      lower: lowers it for the mesh, from shapes.
      arguments: bytes per device of its arguments, by part.
      resident: bytes per device of what stays in memory beside it, by part.
      within: bytes per device of known parts of its temporaries, by formula.
      flops: operations of one run of it on unique tokens, all devices together.
      bound: seconds that one run takes at least.
      shapes: what it was compiled for, for people.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    arguments: Mapping[str, int]
    resident: Mapping[str, int]
    within: Mapping[str, int]
    flops: float
    bound: float
    shapes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A configuration on a mesh, in shapes.

    Attributes:
      config: as in a configuration file.
      run: its typed form.
      model: sizes of the policy.
      mesh: what it runs on.
      params: shapes of the policy's parameters as they are loaded, with their shardings.
      state: shapes and shardings of the training state.
    """

    config: ml_collections.ConfigDict
    run: RunConfig
    model: ModelConfig
    mesh: jax.sharding.Mesh
    params: dict[str, Any]
    state: TrainState

    @staticmethod
    def of(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Setting:
        """Raises what a run would raise before it starts: ConfigError, FileNotFoundError, ValueError."""
        run = configs.run_config(config)
        configs.check_batch(run, mesh)
        model = config_of(configs.policy_path(config.policy.path))
        params = abstract_params(config, model, mesh)
        how: dict[str, Any] = {"own": run.loss.parameters(model.text.hidden_size), "offload": run.optim.offload}
        state = abstract_state(params, run.optim.make(), run.trainable, mesh, **how)
        check_image_cache(state, run.compute)
        return Setting(config, run, model, mesh, params, state)

    def snapshot(self) -> dict[str, Any]:
        """What explores: the parameters as the update computes with them."""
        params = self.state.all_params()
        cast = jax.eval_shape(lambda p: compute_params(p, self.run.compute.dtype), params)
        return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding), cast, params)


def abstract_params(config: ml_collections.ConfigDict, model: ModelConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Shapes, dtypes and shardings of what `config.build_policy` loads: the base, quantised or not, and its adapters."""
    flat = sharding.flatten(param_shapes(model, jnp.dtype(config.policy.dtype or "bfloat16")))  # as the released files
    if config.policy.quantize:
        kernels = {path: jax.eval_shape(round_to_int8, x) for path, x in flat.items() if is_quantisable(path)}
        flat |= {path: values for path, (values, _) in kernels.items()}
        flat |= {scale_path(path): scale for path, (_, scale) in kernels.items()}
    lora = LoraConfig(**config.lora)
    if lora.rank:
        flat |= jax.eval_shape(lambda: init_adapters(sharding.unflatten(flat), lora, 0))
    shapes = sharding.unflatten(flat)
    return _placed(shapes, sharding.param_shardings(shapes, mesh))


def programs_of(setting: Setting, chip: Chip) -> list[Program]:
    """The programs of a run: update, exploration (unless `rounds=0`) and evaluation."""
    explore = explore_programs(setting, chip) if setting.run.rounds else []
    return [update_program(setting, chip), *explore, *evaluate_programs(setting, chip)]


def update_program(setting: Setting, chip: Chip) -> Program:
    """The update of `batch.trees` questions, `batch.accumulate` times."""
    run, state = setting.run, setting.state
    patches = _patches(run.pack, setting)
    tree, nothing = _tree(setting, run.pack, patches), _nothing(setting)
    if isinstance(nothing, Features):
        tree = _with_features(tree, nothing)
    parts = sharding.batch_parts(setting.mesh)
    packed, _ = pack_trees([tree] * (run.batch.trees // parts), _largest(run.pack, patches))
    where = sharding.batch_sharding(setting.mesh, axis=1)
    batches = _batched(packed, (run.batch.accumulate, parts), where)
    graphdef = graph_definition(setting.model, setting.params)
    how = {"offload": run.optim.offload}
    update = make_update(graphdef, run.optim.make(), run.loss, run.compute, setting.mesh, state, **how)
    size = TreeSize.of(tree, setting.model.vision, run.pack)
    size = size if isinstance(nothing, Features) else _with_image(size, patches, setting.model)
    shapes = {**state.params, **state.frozen}
    work = flops.update_flops(setting.model, shapes, state.params, size, remat=run.compute.remat == "full")
    trees = run.batch.trees * run.batch.accumulate
    return Program(
        name="update",
        lower=lambda: update.lower(state, batches),
        arguments={
            "parameters": bytes_of(state.params),
            "frozen": bytes_of(state.frozen),
            "optimizer": bytes_of(state.opt_state),
            "batch": bytes_of(batches),
        },
        resident={"initial policy": _kept(setting)},
        within={"gradients": bytes_of(state.params)},
        flops=trees * work.model.total,
        bound=trees * flops.update_bound(work, chip, setting.mesh.size),
        shapes={
            "trees": run.batch.trees,
            "accumulate": run.batch.accumulate,
            "trunk": size.trunk,
            "patches": patches,
            "rows": f"{max(run.pack.rows)} × {run.pack.row}",
        },
    )


def explore_programs(setting: Setting, chip: Chip) -> list[Program]:
    """Exploration with a snapshot of the policy, while the training state waits."""
    how = setting.run.explore
    prefixes = STEPS if how.prefixes is None else len(how.prefixes)
    branches = prefixes * how.k
    pack = _pack(setting, how.prefill, max(how.trunk), _patches(how, setting))
    width = min(how.width or branches, branches)
    shape = EngineShape(how.trees, width, branches, prefixes, pack, how.int8_cache, how.gather)
    waiting = {
        "training state": bytes_of(setting.state.params) + bytes_of(setting.state.opt_state),
        "initial policy": _kept(setting),
    }
    return _sampling_programs(
        "explore", setting, setting.snapshot(), shape, how.sampling((END_OF_TURN,)), waiting, chip
    )


def evaluate_programs(setting: Setting, chip: Chip) -> list[Program]:
    """Evaluation of a policy in the dtype that it is loaded in, at the temperature that takes most samples."""
    how = max(decodings(setting.config.eval), key=lambda d: (d.samples, d.temperature))
    pack = _pack(setting, how.prefill, max(how.trunk), _patches(how, setting))
    shape = EngineShape(how.batch, how.samples, how.samples, 1, pack, gather=how.gather)
    return _sampling_programs("evaluate", setting, setting.params, shape, how.sampling((END_OF_TURN,)), {}, chip)


def _pack(setting: Setting, sequences: int, trunk: int, patches: int) -> PrefillShape:
    """Prefill of trunks that are all of the largest size."""
    return prefill_shape(sequences, trunk, patches, setting.model.vision)


def _sampling_programs(
    name: str,
    setting: Setting,
    params: Any,
    shape: EngineShape,
    how: SampleConfig,
    resident: Mapping[str, int],
    chip: Chip,
) -> list[Program]:
    """The programs of the engine, as `exploration.scheduler.sample` calls them: decoding, which bears the work, prefill."""
    model, mesh = setting.model, setting.mesh
    graphdef = graph_definition(model, params)
    if shape.gather:
        whole = _placed(params, sharding.gathered_shardings(params, mesh))
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True)
        split = [x for x, y in pairs if not x.sharding.is_equivalent_to(y.sharding, x.ndim)]
        params, resident = whole, {**resident, "split parameters": bytes_of(split)}
    nothing = _nothing(setting) if name == "explore" else empty_vision(model.vision)
    state, packed = program_shapes(graphdef, params, shape, how, nothing, mesh)
    appetite = jax.ShapeDtypeStruct((shape.trees,), jnp.float32, sharding=sharding.batch_sharding(mesh))
    one = TreeSize(shape.pack.longest, 0, ((shape.pack.longest, how.max_tokens),) * shape.branches)
    tree = _with_image(one, shape.pack.most_patches, model)
    prompt = TreeSize(shape.pack.longest, 0, ())
    if not isinstance(nothing, Features):
        prompt = _with_image(prompt, shape.pack.most_patches, model)
    shapes, width = sharding.flatten(params), params["embed"].dtype.itemsize
    cache = {"keys and values": bytes_of(state.cache), "engine": bytes_of(state) - bytes_of(state.cache)}
    trunks = shape.pack.sequences * sharding.batch_parts(mesh)
    prefilled = trunks * flops.forward_flops(model, shapes, prompt).total
    return [
        Program(
            name=name,
            lower=lambda: engine.decode.lower(graphdef, params, state, appetite, how, mesh, TICKS),
            arguments={"parameters": bytes_of(params), **cache},
            resident=resident,
            within={},
            flops=shape.trees * flops.exploration_flops(model, shapes, tree).total,
            bound=flops.exploration_bound(model, shapes, [tree] * shape.trees, chip, mesh.size, width),
            shapes={
                "trees": shape.trees,
                "trunk": shape.pack.longest,
                "branches": f"{shape.width} of {shape.branches}",
                "tokens": how.max_tokens,
            },
        ),
        Program(
            name=f"{name}_prefill",
            lower=lambda: engine.prefill.lower(graphdef, params, state, *packed, mesh),
            arguments={"parameters": bytes_of(params), **cache, "batch": bytes_of(packed)},
            resident=resident,
            within={},
            flops=prefilled,
            bound=prefilled / (chip.flops * mesh.size),
            shapes={"trunks": trunks, "trunk": shape.pack.longest, "patches": shape.pack.most_patches},
        ),
    ]


def bytes_of(tree: Any) -> int:
    """Bytes per device of arrays in shapes; what has no sharding lies on every device as a whole."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
        total += int(np.prod(shape)) * np.dtype(x.dtype).itemsize
    return total


def _kept(setting: Setting) -> int:
    """The loaded policy stays beside the training state; frozen parameters are shared with it."""
    flat = sharding.flatten(setting.params)
    return bytes_of({path: flat[path] for path in setting.state.params if path in flat})


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _batched(part: Any, lead: tuple[int, ...], where: Any = None) -> Any:
    """Shapes of arrays whose leading axis is repeated `lead[-1]` times, with the other axes of `lead` before it."""

    def batch(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead[:-1], lead[-1] * x.shape[0], *x.shape[1:]), x.dtype, sharding=where)

    return jax.tree.map(batch, part)


def _largest(pack: PackConfig, patches: int) -> PackConfig:
    ladders = {name: getattr(pack, name)[-1:] for name in ("trunk", "path", "rows", "branches", "branch")}
    return dataclasses.replace(pack, patches=(patches,), **ladders)


def _with_image(tree: TreeSize, patches: int, model: ModelConfig) -> TreeSize:
    return tree.with_image(patches // model.vision.merge_unit, model.vision)


def _patches(section: Any, setting: Setting) -> int:
    """The most patches that a ladder lets through; without one, those of the largest square picture."""
    if section.patches:
        return max(section.patches)
    policy = setting.config.policy
    side = int((policy.max_pixels or MAX_PIXELS) ** 0.5) // 28
    tokens = min(side**2, policy.max_image_tokens or side**2)
    windows = -(-tokens // setting.model.vision.window_units**2)
    return windows * setting.model.vision.window_patches


def _encoded(model: ModelConfig, tokens: int, patches: int) -> Encoded:
    """An example of that size; its content is never read. Packing pads one window of patches to the rest."""
    vision = None
    if patches:
        count = model.vision.window_patches
        vision = VisionInputs(
            patches=np.zeros((count, model.vision.patch_dim), np.float32),
            positions=np.zeros((count, 2), np.int32),
            images=np.ones(count, np.int32),
        )
    positions = np.zeros((3, tokens), np.int32)
    return Encoded(np.zeros(tokens, np.int32), positions, np.full(tokens, -1, np.int32), vision)


def _with_features(tree: ReasoningTree, nothing: Features) -> ReasoningTree:
    """The tree with features of its images, whatever they are."""
    encoded = tree.trunk.encoded
    values = np.zeros((encoded.patches // MERGE, nothing.values.shape[-1]), nothing.values.dtype)
    known = dataclasses.replace(encoded, features=values)
    return dataclasses.replace(tree, trunk=dataclasses.replace(tree.trunk, encoded=known))


def _nothing(setting: Setting) -> VisionInputs | Features:
    """What exploration and update read of no image: patches, or features where the run keeps them."""
    if not setting.run.compute.image_cache:
        return empty_vision(setting.model.vision)
    return Features(np.zeros((0, setting.model.text.hidden_size), jnp.dtype(setting.run.compute.dtype)))


def _tree(setting: Setting, pack: PackConfig, patches: int) -> ReasoningTree:
    """A tree that fills the largest shapes: the longest trunk, and equal branches that take the other rows."""
    trunk, path = max(pack.trunk), max(pack.path)
    ends = tuple(np.linspace(trunk - path, trunk - path // 8, STEPS + 1).astype(int).tolist())
    bare = Trunk("preflight", _encoded(setting.model, trunk, patches), ends)
    taken = -(-trunk // pack.row) + -(-masked_tokens(bare, pack) // pack.row)
    count, room = max(pack.branches), max(pack.rows) - taken
    length = min(max(pack.branch), pack.row // -(-count // room) + 1) if count else 0
    nothing = np.zeros(length, np.float32)
    branches = tuple(  # of different tokens: equal branches of a prefix would be merged
        Branch(i % STEPS, np.full(length, i, np.int32), nothing, "ok", bool(i % 2)) for i in range(count)
    )
    return ReasoningTree(bare, branches)
