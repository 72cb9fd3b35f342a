"""Compiles a program and reads off the result what it takes: memory by part, time to compile, collectives."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Mapping
from typing import Any

from srpo_jax.preflight.programs import Program
from srpo_jax.preflight.slices import Slice

GIB = 2**30
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WANTED = re.compile(r"Used ([0-9.]+)([KMG]) of ([0-9.]+)([KMG]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": GIB}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
# An asynchronous collective is two instructions, of which the start counts.
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONSTANT = re.compile(r"^ *%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_COUNTS_TO = re.compile(r"^ *ROOT .* compare\(.*%([\w.\-]+)\), direction=LT")


def measure(program: Program, where: Slice) -> dict[str, Any]:
    """Compiles `program` and reports it as a JSON object; sizes are bytes per device.

    `peak` is what the program needs at once: its arguments, outputs that take no argument's place, temporaries and code, beside
    what stays resident. Where it does not fit, the compiler tells what it would use, and the parts that only a compiled
    program has are absent.
    """
    begin = time.perf_counter()
    row: dict[str, Any] = {"program": program.name, "shapes": dict(program.shapes)}
    resident = sum(program.resident.values())
    try:
        compiled = program.lower().compile()
    except Exception as error:
        wanted = _WANTED.search(str(error))
        if wanted is None:
            raise
        peak = int(float(wanted[1]) * _UNITS[wanted[2]])
        memory = {**program.arguments, **{f"resident: {k}": v for k, v in program.resident.items()}}
        row["collectives"] = None
    else:
        told: Any = compiled.memory_analysis()
        memory = _parts(program, told)
        peak = sum(
            (
                told.argument_size_in_bytes,
                told.output_size_in_bytes - told.alias_size_in_bytes,
                told.temp_size_in_bytes,
                told.generated_code_size_in_bytes,
            )
        )
        row["collectives"] = collectives(compiled.as_text() or "")
    row["compile_seconds"] = round(time.perf_counter() - begin, 1)
    row["memory"] = {name: int(size) for name, size in memory.items()}
    row["within_temporaries"] = dict(program.within)
    row["peak"], row["usable"] = peak + resident, where.usable
    row["fits"] = peak + resident <= where.usable
    row["flops"], row["bound_seconds"] = program.flops, program.bound
    return row


def _parts(program: Program, told: Any) -> dict[str, int]:
    """Memory by part; `padding` is what the compiler's layouts add to the arguments."""
    return {
        **program.arguments,
        "padding": told.argument_size_in_bytes - sum(program.arguments.values()),
        "temporaries": told.temp_size_in_bytes,
        "outputs": told.output_size_in_bytes - told.alias_size_in_bytes,
        "code": told.generated_code_size_in_bytes,
        **{f"resident: {name}": size for name, size in program.resident.items()},
    }


def collectives(hlo: str) -> dict[str, int]:
    """How often a compiled program runs each kind of collective, loops included.

    A loop whose length the data decide (decoding) counts once: its collectives are those of one step.

    Args:
      hlo: text of a compiled module.
    """
    own: dict[str, collections.Counter[str]] = {}
    calls: dict[str, list[tuple[str, str]]] = collections.defaultdict(
        list
    )  # callee, and the condition if it is a loop's body
    limits = _loop_limits(hlo)
    entry = here = ""
    for line in hlo.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            here = head[1]
            own[here] = collections.Counter()
            entry = here if line.startswith("ENTRY") else entry
        elif here and " = " in line:
            if (kind := _COLLECTIVE.search(line)) is not None:
                own[here][kind[1]] += 1
            condition = found[1] if (found := _CONDITION.search(line)) else ""
            names = _CALLED.findall(line) + [n for g in _BRANCHES.findall(line) for n in re.findall(r"[\w.\-]+", g)]
            calls[here] += [(name, condition) for name in names]
    total: collections.Counter[str] = collections.Counter()

    def walk(name: str, times: int) -> None:
        for kind, count in own.get(name, {}).items():
            total[kind] += count * times
        for inner, condition in calls[name]:
            walk(inner, times * limits.get(condition, 1))

    walk(entry, 1)
    return {kind: total[kind] for kind in COLLECTIVES}


def _loop_limits(hlo: str) -> dict[str, int]:
    """The numbers of rounds of loops that count up to a constant, by the name of their condition."""
    limits: dict[str, int] = {}
    constants: dict[str, int] = {}
    here = ""
    for line in hlo.splitlines():
        if (head := _COMPUTATION.match(line)) is not None:
            here, constants = head[1], {}
        elif (found := _CONSTANT.match(line)) is not None:
            constants[found[1]] = int(found[2])
        elif (found := _COUNTS_TO.match(line)) is not None and found[1] in constants:
            limits[here] = constants[found[1]]
    return limits


def table(rows: list[Mapping[str, Any]]) -> str:
    """Rows of `measure` for people."""
    lines = []
    for row in rows:
        verdict = "fits" if row["fits"] else "DOES NOT FIT"
        lines.append(
            f"{row['program']}: {row['peak'] / GIB:.2f} of {row['usable'] / GIB:.2f} GiB per device, {verdict} "
            f"(compiled in {row['compile_seconds']:.0f} s)"
        )
        lines.append("  shapes       " + ", ".join(f"{k} {v}" for k, v in row["shapes"].items()))
        lines += [f"  {size / GIB:8.3f} GiB  {name}" for name, size in row["memory"].items() if size > 2**20]
        for name, size in row["within_temporaries"].items():
            lines.append(f"  {size / GIB:8.3f} GiB  {name}, within temporaries, by formula")
        if row["collectives"] is not None:
            counts = ", ".join(f"{n} {kind}" for kind, n in row["collectives"].items() if n) or "none"
            lines.append(f"  collectives  {counts}")
        lines.append(f"  work         {row['flops'] / 1e12:.1f} TFLOP, at least {row['bound_seconds']:.3f} s")
    return "\n".join(lines)
