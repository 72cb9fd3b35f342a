"""All benchmarks by name, the suites made of them, and their table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from srpo_jax.evaluation.benchmarks import (
    bsa,
    figstep,
    jailbreakv,
    mis,
    mm_safetybench,
    mmsafeaware,
    mssbench,
    msts,
    siuo,
    spa_vl,
    strongreject,
    vlguard,
    vlsbench,
    xstest,
)
from srpo_jax.evaluation.benchmarks.benchmark import Benchmark
from srpo_jax.evaluation.benchmarks.source import BenchmarkError

RSBENCH = "rsbench"
"""The RSBench protocol over records of one's own; its data is unpublished, so it is no `Benchmark` with files."""

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        bsa.BENCHMARK,
        siuo.GENERATION,
        siuo.CHOICE_FORM,
        mssbench.BENCHMARK,
        vlsbench.BENCHMARK,
        mmsafeaware.BENCHMARK,
        spa_vl.BENCHMARK,
        mis.BENCHMARK,
        msts.BENCHMARK,
        figstep.BENCHMARK,
        figstep.TINY,
        mm_safetybench.BENCHMARK,
        vlguard.BENCHMARK,
        jailbreakv.BENCHMARK,
        jailbreakv.MINI,
        strongreject.BENCHMARK,
        xstest.BENCHMARK,
    )
}
SUITES = {
    "think_in_safety": ("figstep", "mm_safetybench", "jailbreakv_mini", "siuo", "mssbench", "vlsbench", "spa_vl"),
}
"""Names that stand for several benchmarks.

`think_in_safety` follows the design of Think in Safety (arXiv 2505.06538): sets of jailbreak robustness and of safety
awareness; thinking, answer and both scored apart. Which five sets and which judge prompt the paper used was not found, so
the choice of sets is ours.
"""


def resolve(names: Iterable[str]) -> list[str]:
    """Names with suites written out, each once, in order.

    Raises:
      BenchmarkError: an unknown name; lists those that there are.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in SUITES and name not in BENCHMARKS and name != RSBENCH:
            known = ", ".join([RSBENCH, *BENCHMARKS, *SUITES])
            raise BenchmarkError(f"unknown benchmark {name!r}; there are {known} (see --list)")
        found |= dict.fromkeys(SUITES.get(name, (name,)))
    return list(found)


def listing() -> str:
    """The table of `--list`, in Markdown: a row for each benchmark, then its judge and caveats."""
    return "\n".join(_listing()) + "\n"


def _listing() -> Iterator[str]:
    yield "| name | n | what | licence | published metric | status |"
    yield "|---|---|---|---|---|---|"
    yield (
        f"| {RSBENCH} | yours | reasoning path: the RSBench protocol over records in the SSUI schema (RSBench's own data is "
        "unpublished) | yours | S, E, S&E of answer, path and step | protocol |"
    )
    for one in BENCHMARKS.values():
        status = "verified" if one.verified else "**unverified**"
        parts = f" ({', '.join(f'{n:,} {s}' for s, n in one.counts.items())})" if len(one.counts) > 1 else ""
        yield (
            f"| {one.name} | {one.n:,}{parts} | {one.family}: {one.title} | {one.licence} | {one.metric} | {status} |"
        )
    for one in BENCHMARKS.values():
        yield f"\n**{one.name}**: {one.origin}; files: {', '.join(one.files)}. Judge: {one.judge}."
        yield from (f"- {caveat}" for caveat in one.caveats)
    for suite, names in SUITES.items():
        yield f"\n**{suite}** (suite): {', '.join(names)}."
