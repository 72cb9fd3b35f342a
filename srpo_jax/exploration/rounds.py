"""The folder of a round of exploration: what its branches depend on, and trees from its lines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from srpo_jax.exploration.adaptive import with_branches
from srpo_jax.files import write_json
from srpo_jax.models.fingerprint import input_fingerprint, params_fingerprint
from srpo_jax.trees import ReasoningTree, Trunk

ROUND_FILE = "round.json"


def origin_of(params, trunks: Sequence[Trunk], config: Any, key: jax.Array, round_: int) -> dict[str, Any]:
    """All that the branches of a round depend on, as JSON gives it back; `favourable` of the `ExploreConfig` is applied
    afterwards."""
    settings = {f"explore.{name}": value for name, value in dataclasses.asdict(config).items() if name != "favourable"}
    records = {trunk.record_id: _trunk_fingerprint(trunk) for trunk in trunks}
    origin = {"round": round_, "key": np.ravel(jax.random.key_data(key)).tolist(), **settings, "records": records}
    if params is not None:
        origin["parameters"] = params_fingerprint(params)
    return json.loads(json.dumps(origin))


def _trunk_fingerprint(trunk: Trunk) -> str:
    return hashlib.sha256(f"{input_fingerprint(trunk.encoded)} {trunk.ends}".encode()).hexdigest()[:16]


def claim(file: Path, origin: dict[str, Any], empty: bool) -> None:
    """Writes what a round depends on before its first tree; ValueError where what is there depends on something else."""
    if empty:
        write_json(file, origin)
        return
    if not file.exists():
        raise ValueError(f"{file.parent} has no {file.name}, which tells what was explored; use another work directory")
    found = json.loads(file.read_text(encoding="utf-8"))
    theirs, ours = found.pop("records"), origin.pop("records")
    lines = [f"{name} is {origin[name]}, there {found.get(name)}" for name in origin if origin[name] != found.get(name)]
    if others := sorted(theirs.keys() ^ ours.keys()):
        lines.append(f"it holds trees of other records ({len(others)} differ: {', '.join(others[:3])})")
    if changed := sorted(name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]):
        names = f"{len(changed)} records ({', '.join(changed[:3])})"
        lines.append(f"{names} give another trunk now: question, image, path, grammar or tokenizer changed")
    if lines:
        raise ValueError(
            f"{file.parent} was explored from something else: {'; '.join(lines)}; use another work directory"
        )


def read_trees(trees: Sequence[ReasoningTree], lines: Iterable[Mapping[str, Any]]) -> list[ReasoningTree]:
    """The trees with the branches that are stored of them, each wave after those before it, whoever wrote which."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["record_id"], []).append(line)
    grown = []
    for tree in trees:
        for line in sorted(found.get(tree.trunk.record_id, ()), key=lambda line: line.get("after", 0)):
            tree = with_branches(tree, ReasoningTree.from_json(line, tree.trunk).branches)
        grown.append(tree)
    return grown
