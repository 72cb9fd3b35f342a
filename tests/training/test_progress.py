"""Promises of what a run tells of its speed: every number of an update, and only those that are known."""

from __future__ import annotations

import jax
import pytest

from srpo_jax import flops, observe
from srpo_jax.training import progress
from srpo_jax.training.progress import Profile, Progress, measured
from srpo_jax.training.workdir import NoLog


def test_rates_are_of_data_and_update_and_mfu_of_all_devices(monkeypatch):
    name = next(iter(flops.CHIPS))
    monkeypatch.setattr(progress, "chip_of", lambda kind: flops.CHIPS[name])
    monkeypatch.setattr(observe, "peak_memory", lambda: 3 * 2**30)
    spans = {"data": 1.0, "update": 3.0, "save": 9.0, "decode_places": 80, "decoded_tokens": 60}
    told = measured(spans, 15.0, {"tokens": 400, "flops": 2e12})
    assert told["tokens_per_second"] == 100 and told["flops_per_second"] == 5e11
    assert told["mfu"] == pytest.approx(5e11 / flops.CHIPS[name].flops / jax.device_count())
    assert told["occupancy"] == 0.75 and told["peak_memory"] == 3 * 2**30
    assert not {"decode_places", "decoded_tokens"} & told.keys()


def test_what_is_not_known_is_not_told():
    told = measured({}, 1.0, {"tokens": 1, "flops": 1})
    assert told.keys() == {"data", "update", "seconds", "tokens_per_second", "flops_per_second"}


def test_one_line_tells_an_update(capsys, monkeypatch):
    monkeypatch.setattr(observe, "peak_memory", lambda: 3 * 2**30)
    lines = []
    log = NoLog()
    monkeypatch.setattr(log, "write_times", lambda step, values: lines.append((step, values)), raising=False)
    one = Progress(log, stop=9)
    for name, seconds in (("update", 0.5), ("compilations", 2), ("compile", 1.0)):
        observe.count(name, seconds)
    one.step(
        4, {"loss": 1.5, "reference_loss": 1.25, "contrastive_loss": 0.5, "pairs": 3.0}, {"tokens": 1000, "flops": 1}
    )
    said = capsys.readouterr().err
    for part in ("update 4/9", "loss 1.5000 (reference 1.2500, contrastive 0.5000)", "2,000 tokens/s", "peak 3.0 GiB"):
        assert part in said
    assert "2 compilations 1 s" in said and lines[0][0] == 4


def test_a_trace_is_written_of_the_wanted_update_alone(tmp_path):
    profile = Profile(2, tmp_path / "profile")
    for step in (1, 2):
        assert not (tmp_path / "profile").exists()
        with profile.at(step):
            jax.numpy.ones(3).block_until_ready()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
