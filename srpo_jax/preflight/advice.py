"""A change that makes a configuration fit, found by compiling it: nothing is advised that was not tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from srpo_jax.preflight.programs import Program, Setting, explore_programs, programs_of
from srpo_jax.preflight.report import measure
from srpo_jax.preflight.slices import Slice
from srpo_jax.sharding import batch_parts

Change = dict[str, Any]  # configuration field to its new value


def advise(
    config: ml_collections.ConfigDict, where: Slice, row: Mapping[str, Any], tries: int
) -> dict[str, Any] | None:
    """The first of `tries` changes, each added to those before it, under which a program fits.

    Args:
      config: as in a configuration file.
      where: the slice.
      row: `report.measure` of the program that does not fit.
      tries: how many programs to compile at most.

    Returns:
      `changes` (configuration fields) and the new `peak` and `fits`; None where there is nothing to change.
    """
    changed: Change = {}
    best = None
    for change, _ in zip(candidates(config, where, row), range(tries), strict=False):
        changed |= change
        setting = Setting.of(changed_config(config, changed), where.mesh(**changed_config(config, changed).mesh))
        program = next(p for p in programs_of(setting, where.chip) if p.name == row["program"])
        tried = measure(program, where)
        best = {"changes": dict(changed), "peak": tried["peak"], "fits": tried["fits"]}
        if tried["fits"]:
            break
    return best


def candidates(config: ml_collections.ConfigDict, where: Slice, row: Mapping[str, Any]) -> Iterator[Change]:
    """Changes worth trying, the mildest first.

    Where the arrays that a program is given, and what stays beside it, fill the memory already, changes of its temporaries are
    left out.
    """
    section = {"explore": "explore", "evaluate": "eval"}.get(row["program"].partition("_")[0])
    if section and config[section].gather:
        yield {f"{section}.gather": False}
    shrinks = ("temporaries", "outputs", "code", "batch", "keys and values", "engine")
    kept = sum(size for name, size in row["memory"].items() if name not in shrinks)
    parts = where.mesh(**config.mesh).size // max(1, config.mesh.tensor)
    if kept < row["usable"]:
        yield from _less_at_once(config, row["program"], parts)
    evaluates = row["program"].startswith("evaluate")
    if not evaluates and not config.lora.rank:
        yield {"lora.rank": 16, "trainable": None}
    if not evaluates and not config.policy.quantize:
        yield {"policy.quantize": "int8"}
    for tensor in (2, 4, 8):
        if tensor > config.mesh.tensor and len(where.devices) % tensor == 0 and len(where.devices) > tensor:
            yield {"mesh.tensor": tensor}


def _less_at_once(config: ml_collections.ConfigDict, program: str, parts: int) -> Iterator[Change]:
    """Changes that make temporaries and caches smaller and leave the result as it is."""
    if program == "update":
        if config.compute.remat != "full":
            yield {"compute.remat": "full"}
        if config.batch.trees > parts:
            times = config.batch.trees // parts
            yield {"batch.trees": parts, "batch.accumulate": config.batch.accumulate * times}
        if config.compute.logprob_chunk > 256:
            yield {"compute.logprob_chunk": 256}
        return
    section, field = ("explore", "trees") if program.startswith("explore") else ("eval", "batch")
    size = config[section][field]
    while size > parts:
        size = max(parts, size // 2)
        yield {f"{section}.{field}": size}


def changed_config(config: ml_collections.ConfigDict, changes: Change) -> ml_collections.ConfigDict:
    """A copy of `config` with fields changed."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict(changes)
    return copy


def most_trees(config: ml_collections.ConfigDict, where: Slice) -> dict[str, Any]:
    """The largest number of trees per device whose exploration fits, found by compiling.

    Memory grows by the same amount with every tree, so two sizes predict it; what is predicted is compiled, prefill, too, and
    lowered until it fits. No tree at all is an answer.

    Returns:
      `trees` per device, `peak` bytes of their larger program (None without trees), `per_tree` bytes of decoding.
    """
    parts = batch_parts(where.mesh(**config.mesh))

    def programs(trees: int) -> list[Program]:
        changed = changed_config(config, {"explore.trees": trees * parts})
        return explore_programs(Setting.of(changed, where.mesh(**changed.mesh)), where.chip)

    one, two = (measure(programs(trees)[0], where)["peak"] for trees in (1, 2))
    trees = 1 + (where.usable - one) // max(1, two - one) if one <= where.usable else 0
    peak = None
    while trees:
        peak = max(measure(program, where)["peak"] for program in programs(trees))
        if peak <= where.usable:
            break
        trees, peak = trees - 1, None
    return {"trees": trees, "peak": peak, "per_tree": two - one}
