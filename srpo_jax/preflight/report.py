"""Compiles a program and reads off the result what it takes: memory by part, time to compile, collectives."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Iterator, Mapping
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
_CONSTANT = re.compile(r"^ *%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_ROUNDS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# What a TPU's compiler makes of collectives: one that runs beside other work is named by every piece of that work; one whose
# parts meet a product as they arrive is a loop of permutations, begun by one before it; a reduce-scatter has a name of its own.
_PIECE, _BEGUN = 'chain_id="', "AsyncCollectiveStart"
_WINDOWED = re.compile(r" while\(.*body=%?\S*windowed_dot_general_body_(ag|rs)")
_SCATTERED = "all-reduce-scatter"
_ALONE = re.compile(r"replica_groups=\{\{\d+\}(?:,\{\d+\})*\}")  # over an axis of one device
_RESULT = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
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
    """How often a compiled program runs each kind of collective, loops included (see `collective_runs`)."""
    total: collections.Counter[str] = collections.Counter()
    for (kind, _), times in collective_runs(hlo).items():
        total[kind] += times
    return {kind: total[kind] for kind in COLLECTIVES}


def collective_runs(hlo: str) -> collections.Counter[tuple[str, tuple[str, ...]]]:
    """How often a compiled program runs each collective, by kind and results ("f32[8,64]"), loops included.

    A loop whose length the data decide (decoding) counts once: its collectives are those of one step. A gather or a
    reduce-scatter that the compiler spread over the product that it belongs to counts as what it is, once; its result is then
    unknown (). Those of one device alone are none.

    Args:
      hlo: text of a compiled module.
    """
    own: dict[str, collections.Counter[tuple[str, tuple[str, ...]]]] = {}
    calls: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)  # callee, and how often a call runs it
    limits = _loop_limits(hlo)
    entry = ""
    for here, is_entry, lines in _computations(hlo):
        entry = here if is_entry else entry
        own[here] = _own_collectives(here, lines)
        for line in lines:
            if _WINDOWED.search(line):
                continue
            condition = found[1] if (found := _CONDITION.search(line)) else ""
            times = int(known[1]) if condition and (known := _ROUNDS.search(line)) else limits.get(condition, 1)
            names = _CALLED.findall(line) + [n for g in _BRANCHES.findall(line) for n in re.findall(r"[\w.\-]+", g)]
            calls[here] += [(name, times) for name in names]
    total: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()

    def walk(name: str, times: int) -> None:
        for what, count in own.get(name, {}).items():
            total[what] += count * times
        for inner, each in calls[name]:
            walk(inner, times * each)

    walk(entry, 1)
    return total


def _computations(hlo: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Name, whether it is the entry, and instructions of every computation of a module."""
    here, is_entry = "", False
    lines: list[str] = []
    for line in [*hlo.splitlines(), "end {"]:
        if (head := _COMPUTATION.match(line)) is not None or line == "end {":
            if here:
                yield here, is_entry, lines
            here, is_entry, lines = head[1] if head else "", line.startswith("ENTRY"), []
        elif " = " in line:
            lines.append(line)


def _own_collectives(name: str, lines: list[str]) -> collections.Counter[tuple[str, tuple[str, ...]]]:
    """The collectives that a computation begins itself."""
    own: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
    begins = any(_BEGUN in line for line in lines)
    spread = [found[1] for line in lines if (found := _WINDOWED.search(line))]
    openings = len(spread)
    for line in lines:
        found = _COLLECTIVE.search(line)
        if found is None or _ALONE.search(line) or (_PIECE in line and not begins):
            continue
        kind = "reduce-scatter" if name.startswith(_SCATTERED) else found[1]
        if kind == "collective-permute" and openings:
            openings -= 1
            continue
        results = _RESULT.findall(line.split(" = ", 1)[1].split(found[0])[0])
        own[kind, tuple(f"{dtype}[{sizes}]" for dtype, sizes in results)] += 1
    own.update(("all-gather" if how == "ag" else "reduce-scatter", ()) for how in spread)
    return own


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
