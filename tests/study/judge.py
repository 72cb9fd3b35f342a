"""A judge for the tiny policy of the tests."""

from srpo_jax.judges.verdict import Verdict


def judge(record, path):
    return Verdict(safe="rest" in path.answer, effective="rest" in path.answer, reason="")
