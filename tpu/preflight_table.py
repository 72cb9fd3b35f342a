"""The table of docs/scaling.md: the recipes of Qwen2.5-VL-3B and 7B on TPU slices, compiled without any TPU.

    python tpu/preflight_table.py [--sizes=3B,7B] [--slices=v5e-8,...] [--programs=update,...] [--markdown]

Each chip gets one question per update, parameters are split over all chips. Rows are kept in `--json` as they come; a row is
compiled again only if the program, as it is lowered, or the compiler has changed since, so the command may be interrupted. A
program takes minutes of two cores and some 2 GB. `--markdown` prints the table of what is there and compiles
nothing.
"""

import hashlib
import importlib.metadata
import itertools
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported: the compiler is asked, no TPU looked for

from absl import flags

from srpo_jax import cli
from srpo_jax.files import write_json
from srpo_jax.preflight.programs import Setting, programs_of
from srpo_jax.preflight.report import GIB, measure
from srpo_jax.preflight.slices import find_slice
from srpo_jax.recipes import released

SLICES = "v5e-8,v5e-16,v5e-64,v5p-8,v5p-64,v6e-8,v6e-64"
SIZES = flags.DEFINE_list("sizes", ["3B", "7B"], "Released checkpoints.")
WHERE = flags.DEFINE_list("slices", SLICES.split(","), "Slices.")
KINDS = flags.DEFINE_list("kinds", ["lora", "full"], "What the update moves; the other programs are those of 'lora'.")
NAMES = ["update", "explore", "explore_prefill", "evaluate", "evaluate_prefill"]
PROGRAMS = flags.DEFINE_list("programs", NAMES, "Which programs, in this order.")
JSON = flags.DEFINE_string("json", "benchmarks/results/preflight.json", "Where rows are kept.")
MARKDOWN = flags.DEFINE_bool("markdown", False, "Print the table and stop.")


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def setting_of(size: str, kind: str, where) -> Setting:
    config = released(size, kind)
    chips = len(where.devices)
    config.batch.trees = config.explore.trees = config.eval.batch = chips
    return Setting.of(config, where.mesh(**config.mesh))


def key(row: dict) -> tuple[str, ...]:
    return tuple(row[name] for name in ("size", "slice", "kind", "program"))


def compile_row(size: str, kind: str, name: str, where, known: dict) -> dict:
    """The row of one program: the one that is known if the program is still the same, else a fresh one."""
    program = next(p for p in programs_of(setting_of(size, kind, where), where.chip) if p.name == name)
    lowered = program.lower()
    same = {"lowered": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16], **versions()}
    old = known.get((size, where.name, kind, name), {})
    if all(old.get(field) == value for field, value in same.items()):
        return old
    row = {
        "size": size,
        "slice": where.name,
        "kind": kind,
        "chips": len(where.devices),
        **measure(program, where),
        **same,
    }
    print(
        f"{size} {kind} {name} on {where.name}: {row['peak'] / GIB:.2f} GiB, {row['compile_seconds']:.0f} s", flush=True
    )
    return row


def markdown(rows: list[dict]) -> str:
    lines = [
        "| model | slice | chips | moves | program | GiB per chip | of | fits | collectives | bound, s |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        counts = row["collectives"]
        told = "" if counts is None else ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        cells = [row["size"], row["slice"], row["chips"], row["kind"], row["program"], f"{row['peak'] / GIB:.1f}"]
        cells += [f"{row['usable'] / GIB:.1f}", "yes" if row["fits"] else "**no**", told, f"{row['bound_seconds']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(_):
    file = Path(JSON.value)
    rows = {key(row): row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
    if not MARKDOWN.value:
        for program, size, name in itertools.product(PROGRAMS.value, SIZES.value, WHERE.value):
            for kind in KINDS.value if program == "update" else ["lora"]:
                row = compile_row(size, kind, program, find_slice(name), rows)
                rows[key(row)] = row
                write_json(file, {"benchmark": "preflight", "rows": [rows[k] for k in sorted(rows)]})
    print(markdown([rows[k] for k in sorted(rows)]))


if __name__ == "__main__":
    cli.run(main)
