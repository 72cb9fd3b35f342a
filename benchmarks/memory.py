"""Memory of released sizes on TPU slices for the tree of the other benchmarks, compiled ahead of time without a TPU.

    python benchmarks/memory.py                          prints what benchmarks/results/memory.json holds
    python benchmarks/memory.py --compile [--case=...]  compiles again; minutes of two cores and up to 6 GB per case

The tree: a prompt of 1,200 tokens (768 of them a picture), six steps of 60, a reply of 60, 24 branches of 256. "text" has no
picture (nor the vision tower in its program); "largest picture" has one of the released processors' max_pixels, 16,384
tokens. One question per chip, remat of whole layers, bfloat16; masters and moments in float32.
"""

import importlib.metadata
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported: the compiler is asked, no TPU looked for

from absl import flags

from srpo_jax import cli
from srpo_jax.files import write_json
from srpo_jax.preflight.advice import changed_config, most_trees
from srpo_jax.preflight.programs import Setting, update_program
from srpo_jax.preflight.report import measure
from srpo_jax.preflight.slices import find_slice
from srpo_jax.recipes import released

# name: checkpoint, what moves, slice, tokens of the picture
UPDATES = {
    "update 3B lora v5e-1 text": ("3B", "lora", "v5e-1", 0),
    "update 3B lora v5e-1": ("3B", "lora", "v5e-1", 768),
    "update 3B lora v5e-1 largest picture": ("3B", "lora", "v5e-1", 16_384),
    "update 3B full v5e-8": ("3B", "full", "v5e-8", 768),
    "update 3B full v5e-8 offload": ("3B", "full", "v5e-8", 768),
    "update 7B full v5e-16": ("7B", "full", "v5e-16", 768),
    "update 7B full v5p-8": ("7B", "full", "v5p-8", 768),
}
EXPLORATIONS = {
    "explore 3B v5e-1": ("3B", "lora", "v5e-1", 768),
    "explore 7B v5e-8": ("7B", "lora", "v5e-8", 768),
    "explore 7B v5p-8": ("7B", "lora", "v5p-8", 768),
}
COMPILE = flags.DEFINE_bool("compile", False, "Compile; needs libtpu (pip install 'srpo_jax[tpu]').")
CASES = flags.DEFINE_multi_enum("case", [*UPDATES, *EXPLORATIONS], [*UPDATES, *EXPLORATIONS], "Which to compile.")
JSON = flags.DEFINE_string("json", str(Path(__file__).parent / "results" / "memory.json"), "Where results are kept.")


def config_of(size: str, kind: str, picture: int, chips: int):
    """The recipe of a size with the benchmark's tree."""
    trunk, row, patches = 432 + (picture or 768) + 420, 256, (4 * picture,)
    config = released(size, kind)
    changes = {"trunk": (trunk,), "path": (420,), "row": row, "rows": (-(-trunk // row) + 24,)}
    changes |= {"branches": (24,), "branch": (256,), "patches": patches}
    fields = {f"pack.{name}": value for name, value in changes.items()}
    fields |= {"explore.trunk": (trunk,), "explore.patches": patches, "explore.max_tokens": 256, "explore.trees": chips}
    fields |= {"batch.trees": chips, "policy.max_image_tokens": picture or 768}
    return changed_config(config, fields)


def compile_case(name: str) -> dict:
    size, kind, place, picture = (UPDATES | EXPLORATIONS)[name]
    where = find_slice(place)
    config = config_of(size, kind, picture, len(where.devices))
    if name.endswith("offload"):  # the optimizer's moments wait in the host's memory
        config = changed_config(config, {"optim.offload": True})
    told = {
        "case": name,
        "chips": len(where.devices),
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "libtpu")},
    }
    if name in EXPLORATIONS:
        return told | {"usable": where.usable, **most_trees(config, where)}
    return told | measure(update_program(Setting.of(config, where.mesh(**config.mesh)), where.chip), where)


def main(_):
    file = Path(JSON.value)
    rows = {row["case"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
    for name in CASES.value if COMPILE.value else ():
        rows[name] = compile_case(name)
        write_json(file, {"benchmark": "memory", "rows": [rows[k] for k in sorted(rows)]})
    print(json.dumps({"benchmark": "memory", "rows": [rows[k] for k in sorted(rows)]}, indent=1))


if __name__ == "__main__":
    cli.run(main)
