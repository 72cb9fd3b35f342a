"""From pictures to candidate records through agents that fail in every way; what comes out keeps the promises."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srpo_jax.data.builder import BuildConfig, IntakeConfig, build, read_agents, read_manifest, render
from srpo_jax.data.loaders import load_jsonl
from srpo_jax.data.privacy import count_faces
from srpo_jax.endpoint import EndpointError
from srpo_jax.judges import rules
from srpo_jax.paths import ParsedPath, Status
from tests.data.builder.world import World, scene, write_pictures

REPO = Path(__file__).resolve().parents[3]


def settings(url: str, folder: Path, **given) -> Path:
    values = {
        "model": "world",
        "base_url": url,
        "retries": 4,
        "backoff": 0.01,
        "timeout": 60,
        "concurrency": 8,
        "prices": {"input": 1.0, "output": 2.0, "currency": "EUR"},
    } | given
    file = folder / "agents.json"
    file.write_text(json.dumps({"default": values}))
    return file


def config(**given) -> BuildConfig:
    values = {"name": "Scenes", "contact": "data@example.org", "synthetic": True, "repeats": None, "similarity": 97.0}
    return BuildConfig(**values | given)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A data set of 104 scenes through agents with faults."""
    folder = tmp_path_factory.mktemp("build")
    scenes = [scene(index) for index in range(104)]
    manifest = read_manifest(write_pictures(folder / "pictures", scenes))
    world = World(scenes, faulty=True)
    with world.serve() as url:
        agents = read_agents(str(settings(url, folder)))
        first = build(folder / "pictures", folder / "out", agents, config(), manifest=manifest)
        asked = len(world.requests)
        again = build(folder / "pictures", folder / "out", agents, config(), manifest=manifest)
    return folder / "out", world, first, again, asked


def test_faulty_agents_give_200_accepted_records_that_load(built):
    output, _, first, _, _ = built
    records = load_jsonl(output / "records.jsonl", check_images=True)
    assert len(records) == len(first.records) >= 200
    risky = [record for record in records if record.risky]
    assert 90 <= len(risky) < len(records)
    twins = {record.id: record for record in records}
    assert all(twins[r.twin].twin == r.id and twins[r.twin].risky != r.risky for r in records if r.twin)
    assert all(r.meta["provenance"]["synthetic"] for r in records)
    assert sorted(set(os.listdir(output / "images"))) == sorted({r.images[0].name for r in records})


def test_accepted_records_are_right_by_the_rule_of_the_world(built):
    """Independent of the script: the world's judge finds every safe reply safe and effective, every unsafe one not."""
    output, world, _, _, _ = built
    facts = {
        q: r.meta for s in world.scenes.values() for r in (*s.risky, *s.harmless) for q in [(r.question, r.safe_reply)]
    }
    for record in load_jsonl(output / "records.jsonl"):
        known = dataclasses.replace(record, meta=facts[record.question, record.safe_reply])
        told = rules.judge(known, ParsedPath(Status.OK, (), record.safe_reply))
        assert told.safe and told.effective, record.id
        if record.unsafe_reply:
            assert not rules.judge(known, ParsedPath(Status.OK, (), record.unsafe_reply)).safe


def test_every_fault_is_set_aside_with_a_reason_and_nothing_is_lost(built):
    output, _, first, _, _ = built
    aside = lines(output / "set_aside.jsonl")
    kinds = {line["kind"] for line in aside}
    assert {"declined", "unusable", "guard", "excluded", "duplicate", "sent back"} <= kinds
    assert all(line["reason"] and line["stage"] and line["picture"] for line in aside)
    for row in first.rows:
        assert row.entered == row.passed + sum(row.aside.values()), row
    risky = [row for row in first.rows if row.stage in ("summary", "moderate_record")]
    assert risky[1].entered == risky[0].passed
    table = render(first.rows)
    assert all(row.stage in table for row in first.rows)
    assert json.loads((output / "yield.json").read_text())[0]["stage"] == "intake"


def test_a_second_run_asks_nothing_and_gives_the_same(built):
    _, world, first, again, asked = built
    assert len(world.requests) == asked
    assert again.records == first.records and again.aside == first.aside and again.rows == first.rows


def test_provenance_names_template_version_digest_and_model(built):
    output, _, _, _, _ = built
    folder = REPO / "srpo_jax/data/builder/templates"
    digests = {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.jinja")}
    for record in load_jsonl(output / "records.jsonl"):
        told = record.meta["provenance"]
        names = [stage["stage"] for stage in told["stages"]]
        expected = ["moderate_image", "image_only", "query", "reasoning", "reflection"]
        assert names[:5] == expected and names[-1] == "moderate_record"
        assert all(s["sha256"] == digests[s["template"]] and s["version"] == 1 for s in told["stages"])
        assert {stage["model"] for stage in told["stages"]} == {"world-1"}
        assert told["image"]["licence"] == "CC0-1.0" and len(told["image"]["sha256"]) == 64
        assert ("harmless twin" in record.meta["marks"]) == (not record.risky)
        assert "image-only adjudication" in record.meta["marks"]


def test_text_only_adjudication_shows_no_picture_and_keeps_what_is_safe_alone(built):
    _, world, first, _, _ = built
    alone = [r for r in world.requests if r["stage"] in ("text_answer", "text_judge")]
    assert alone and all(request["pictures"] == 0 for request in alone)
    unsafe = {
        r["text"] for r in world.requests if r["stage"] == "text_answer" and world.text(r["text"]).startswith("Sure")
    }
    assert unsafe and not unsafe & {record.question for record in first.records if record.risky}


def test_an_explicit_picture_is_seen_by_the_moderator_and_by_nobody_else(built):
    output, world, _, _, _ = built
    seen = {}
    for request in world.requests:
        seen.setdefault(request["picture"], []).append(request["stage"])
    out = [picture for picture in world.scenes if world.moderate_image(picture, "", "")["explicit"]]
    assert out and all(set(seen[picture]) == {"moderate_image"} for picture in out)
    assert all(stages[0] == "moderate_image" for picture, stages in seen.items() if picture)
    refused = [line for line in lines(output / "set_aside.jsonl") if line["reason"] == "explicit picture"]
    assert len(refused) == len(out)


def test_records_of_one_picture_lie_in_one_split(built):
    output, _, _, _, _ = built
    splits: dict[str, set[str]] = {}
    for record in load_jsonl(output / "records.jsonl"):
        splits.setdefault(record.images[0].name, set()).add(record.meta["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert {"train", "test"} == set().union(*splits.values())


def test_what_a_guard_refuses_is_nowhere_on_the_disk(built):
    output, _, _, _, _ = built
    assert any(line["reason"] == "weapons of mass destruction" for line in lines(output / "set_aside.jsonl"))
    for file in [*output.glob("*.json*"), *output.glob("work/*"), output / "README.md"]:
        text = file.read_text()
        assert "sarin" not in text.replace("\u200b", "") and "200bin" not in text, file


def test_the_log_tells_prompt_answer_model_tokens_and_cost(built):
    output, _, first, _, _ = built
    log = lines(output / "work/log.jsonl")
    assert len(log) >= sum(row.tries for row in first.rows)
    for line in log[:50]:
        assert line["prompt"] and line["model"] and line["input_tokens"] > 0
        assert line["cost"] == pytest.approx((line["input_tokens"] + 2 * line["output_tokens"]) / 1e6)
    assert (output / "work").stat().st_mode & 0o077 == 0
    assert sum(row.cost for row in first.rows) > 0


def test_the_card_says_what_it_is_for_and_carries_the_canary(built):
    output, _, first, _, _ = built
    card = (output / "README.md").read_text()
    for word in ("Intended", "Prohibited", "Access", "Removal", "data@example.org", "Synthetic", "candidates"):
        assert word in card
    [canary] = {record.meta["canary"] for record in first.records}
    assert canary in card and len(canary.split()[-1]) == 36


def test_killed_in_the_middle_it_goes_on_and_gives_the_same(tmp_path):
    """kill -9 of the real script while agents answer; the resumed run's records are those of one that was never killed."""
    scenes = [scene(index) for index in range(8)]
    manifest = write_pictures(tmp_path / "pictures", scenes)
    world = World(scenes, faulty=True)

    def command(url: str, output: str) -> list[str]:
        agents = settings(url, tmp_path, concurrency=2)
        return [
            sys.executable,
            "scripts/build_ssui.py",
            f"--images={tmp_path / 'pictures'}",
            f"--manifest={manifest}",
            f"--output={tmp_path / output}",
            f"--agents={agents}",
            "--name=Scenes",
            "--contact=x@example.org",
            "--synthetic",
            "--repeats=0",
            "--similarity=97",
        ]

    with world.serve() as url:
        job = subprocess.Popen(command(url, "killed"), cwd=REPO, stdout=subprocess.DEVNULL)
        outcomes = tmp_path / "killed/work/outcomes.jsonl"
        deadline = time.monotonic() + 120
        while not (outcomes.exists() and len(outcomes.read_bytes().splitlines()) > 60):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
        job.wait()
        assert not (tmp_path / "killed/records.jsonl").exists()
        known = len(lines(outcomes)) if outcomes.read_bytes().endswith(b"\n") else 60
        before = len(world.requests)
        subprocess.run(command(url, "killed"), cwd=REPO, check=True, stdout=subprocess.DEVNULL, timeout=200)
        resumed = len(world.requests) - before
        agents = read_agents(str(settings(url, tmp_path)))
        whole = build(
            tmp_path / "pictures",
            tmp_path / "whole",
            agents,
            config(name="Scenes", contact="x@example.org"),
            manifest=read_manifest(manifest),
            faces=count_faces,
        )
        full = len(world.requests) - before - resumed
    assert (tmp_path / "killed/records.jsonl").read_bytes() == (tmp_path / "whole/records.jsonl").read_bytes()
    assert whole.records
    assert resumed <= full - known + 16  # tries under way at the kill are asked again; 429s come once


def test_a_closed_endpoint_ends_the_build_and_the_next_run_goes_on(tmp_path):
    scenes = [scene(index) for index in range(3)]
    manifest = read_manifest(write_pictures(tmp_path / "pictures", scenes))
    world = World(scenes, faulty=False)
    with world.serve() as url:
        agents = read_agents(str(settings(url, tmp_path, retries=0, max_failures=2)))
        world.limit = 12
        with pytest.raises(EndpointError, match="run again"):
            build(tmp_path / "pictures", tmp_path / "out", agents, config(), manifest=manifest)
        world.limit = None
        before = len(world.requests)
        built = build(tmp_path / "pictures", tmp_path / "out", agents, config(), manifest=manifest)
    assert len(built.records) == 12
    assert len(world.requests) - before == sum(row.tries for row in built.rows) - 12


@pytest.mark.parametrize("how", ["limited", "omit", "apart"])
def test_unsafe_replies_are_in_the_record_nowhere_or_apart(how, tmp_path):
    scenes = [scene(0)]
    manifest = read_manifest(write_pictures(tmp_path / "pictures", scenes))
    world = World(scenes, faulty=False)
    with world.serve() as url:
        agents = read_agents(str(settings(url, tmp_path)))
        build(
            tmp_path / "pictures", tmp_path / "out", agents, config(unsafe_replies=how, twins=False), manifest=manifest
        )
    replies = [record.unsafe_reply for record in load_jsonl(tmp_path / "out/records.jsonl")]
    apart = tmp_path / "out/unsafe_replies.jsonl"
    assert all(reply is not None for reply in replies) == (how == "limited")
    assert apart.exists() == (how == "apart")
    if how == "apart":
        assert [line["unsafe_reply"] for line in lines(apart)] == [r.unsafe_reply for r in scenes[0].risky]
        assert apart.stat().st_mode & 0o077 == 0
    if how == "omit":
        asked = [r["text"] for r in world.requests if r["stage"] == "summary"]
        assert asked and not any("unsafe_reply" in text for text in asked)


def test_pictures_leave_the_machine_only_when_told_so(tmp_path):
    write_pictures(tmp_path / "pictures", [scene(0)])
    agents = read_agents("some-model@https://api.example.com/v1")
    with pytest.raises(ValueError, match=r"pictures would leave.*--images_may_leave"):
        build(tmp_path / "pictures", tmp_path / "out", agents, config(intake=IntakeConfig("CC0-1.0", "mine")))
    assert not (tmp_path / "out").exists()
