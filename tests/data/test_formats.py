"""Every format gives the same records; conversions survive kills, hold one shard and say what they leave out."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from srpo_jax.data import scenes
from srpo_jax.data.formats import convert
from srpo_jax.data.images import open_image
from srpo_jax.data.loaders import LoadError, load_records, open_records
from srpo_jax.data.rows import JsonLines, guess_format
from srpo_jax.data.sft import SftRecord

ROOT = Path(__file__).resolve().parents[2]
OPENED = {"jsonl": ("data.jsonl", "jsonl"), "parquet": ("", "datasets"), "arrayrecord": ("", "arrayrecord")}


@pytest.fixture(scope="module")
def world():
    """Records with pictures in memory, meta of many shapes, text-only and multi-picture ones."""
    records = scenes.records("train", 10)
    metas = [{"review": {"status": "accepted"}, "n": 1.5, "list": [1, None], "text": "ü\u2028\n"}, {"other": True}, {}]
    records = [dataclasses.replace(r, meta=metas[i % 3]) for i, r in enumerate(records)]
    records[0] = dataclasses.replace(records[0], images=())
    records[1] = dataclasses.replace(records[1], images=records[1].images + records[2].images)
    return records


def converted(records, to: str, out: Path, schema: str = "ssui", **options):
    convert(len(records), lambda i: [records[i]], to, out, schema=schema, origin={"source": "world"}, **options)
    name, form = OPENED[to]
    return open_records(out / name, form, schema=schema)


def told(record) -> dict:
    """Everything that a record says, its pictures as pixels."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return fields | {"images": [np.asarray(open_image(image)).tolist() for image in record.images]}


@pytest.mark.parametrize("to", OPENED)
def test_all_formats_give_the_same_records(world, to, tmp_path):
    found = converted(world, to, tmp_path / "out", shard=4)
    assert len(found) == len(world)
    assert [told(record) for record in found] == [told(record) for record in world]
    assert told(found[7]) == told(world[7]) and told(found[-1]) == told(world[-1])  # random access
    assert [r.id for r in found[2:9:3]] == [r.id for r in world[2:9:3]]
    assert told(pickle.loads(pickle.dumps(found))[3]) == told(world[3])  # as worker processes get it
    assert [r.id for r in load_records(found, check_images=True)] == [r.id for r in world]
    with pytest.raises(IndexError):
        found[len(world)]


@pytest.mark.parametrize("to", OPENED)
def test_supervised_records_in_all_formats(world, to, tmp_path):
    records = [
        SftRecord("a", world[2].images, "What is this?", "A place.", "I look.", True, "x", {"source": [1]}),
        SftRecord("b", (), "Hello", "Hi."),
    ]
    found = converted(records, to, tmp_path / "out", "sft")
    assert [told(record) for record in found] == [told(record) for record in records]


def test_one_format_turns_into_the_next(world, tmp_path):
    found = world
    for to in ("parquet", "jsonl", "arrayrecord", "parquet"):
        found = converted(found, to, tmp_path / f"{to}{found is world}", shard=3)
    assert [told(record) for record in found] == [told(record) for record in world]


def test_array_records_are_written_and_read_without_tensorflow(world, tmp_path):
    converted(world, "arrayrecord", tmp_path / "out", shard=4)
    program = (
        "import sys, tensorflow_datasets as tfds\n"
        "source = tfds.builder_from_directory(sys.argv[1]).as_data_source('train')\n"
        "print(len(source), len(source[1]['images']), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10", "2", "False"]


def test_the_format_of_a_source_is_seen(world, tmp_path):
    converted(world[:2], "arrayrecord", tmp_path / "ar")
    converted(world[:2], "parquet", tmp_path / "pq")
    names = {"x.jsonl": "jsonl", "x.json": "json", "owner/name": "datasets", "ar": "arrayrecord", "pq": "datasets"}
    assert {name: guess_format(tmp_path / name) for name in names} == names


def test_broken_rows_stop_a_conversion_above_the_threshold(world, tmp_path):
    def read(index):
        if index in (3, 6):
            raise LoadError("world", [f"row {index}: broken"])
        return [world[index]]

    options = {"schema": "ssui", "origin": {"source": "world"}, "shard": 2}
    with pytest.raises(LoadError, match="row 6: broken"):
        convert(10, read, "jsonl", tmp_path / "one", max_broken=1, **options)
    report = convert(10, read, "jsonl", tmp_path / "two", max_broken=2, **options)
    assert (report["records"], report["broken"], report["left_out"]) == (8, 2, ["row 3: broken", "row 6: broken"])
    assert json.loads((tmp_path / "two" / "conversion.json").read_text()) == report
    kept = [r.id for i, r in enumerate(world) if i not in (3, 6)]
    assert [r.id for r in open_records(tmp_path / "two" / "data.jsonl", "jsonl")] == kept


def test_a_broken_picture_is_a_fault_of_its_row(world, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    broken = dataclasses.replace(world[2], images=(tmp_path / "cut.png",))
    with pytest.raises(LoadError, match=r"row 1: .*cut.png: "):
        converted([world[0], broken], "parquet", tmp_path / "out")


def test_another_conversion_is_not_continued(world, tmp_path):
    converted(world, "jsonl", tmp_path / "out", shard=4)
    converted(world, "jsonl", tmp_path / "out", shard=4)  # done already
    with pytest.raises(ValueError, match="holds another conversion: shard is 5, there 4"):
        converted(world, "jsonl", tmp_path / "out", shard=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty"):
        converted(world, "jsonl", tmp_path / "mine")


SLOW = """
import sys, time
from srpo_jax.data import formats, scenes
records = scenes.records("train", 24)
def read(index):
    time.sleep(float(sys.argv[3]))
    return [records[index]]
formats.convert(24, read, sys.argv[1], sys.argv[2], schema="ssui", origin={"source": "w"}, shard=3)
"""


@pytest.mark.parametrize("to", OPENED)
def test_a_killed_conversion_goes_on_and_ends_the_same(to, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out, whole = tmp_path / "killed", tmp_path / "whole"
    running = subprocess.Popen([sys.executable, "-c", SLOW, to, out, "0.2"], env=env)
    deadline = time.monotonic() + 300
    while len(list(out.glob(".parts/0*.json"))) < 3 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    done = {file.name: file.stat().st_mtime_ns for file in out.glob(".parts/0*.json")}
    assert 3 <= len(done) < 8
    records = scenes.records("train", 24)
    read: list[int] = []
    origin = {"source": "w"}
    report = convert(24, lambda i: (read.append(i), [records[i]])[1], to, out, schema="ssui", origin=origin, shard=3)
    assert len(read) == 24 - 3 * len(done)  # finished shards are not read again
    assert report == convert(24, lambda i: [records[i]], to, whole, schema="ssui", origin=origin, shard=3)
    name, form = OPENED[to]
    found, expected = (open_records(folder / name, form) for folder in (out, whole))
    assert [told(record) for record in found] == [told(record) for record in expected]
    assert not list(out.rglob("*.partial")) and not (out / ".parts").exists()


def test_lines_are_found_wherever_they_begin(tmp_path, monkeypatch):
    """The index in small chunks, with blank lines, without a last line end, kept in a file of its own, equals the plain one."""
    monkeypatch.setattr("srpo_jax.data.rows._CHUNK", 7)
    monkeypatch.setattr("srpo_jax.data.rows._LARGE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 0}\n\n  \n{"a": 1}\r\n \t\n{"a": "' + b"x" * 40 + b'"}\n[3]\n\n{"a": 4}')
    rows = JsonLines(path)
    expected = ["line 1", "line 4", "line 6", "line 7", "line 9"]
    assert [row.place for row in rows] == expected
    assert [row.values for row in rows] == [{"a": 0}, {"a": 1}, {"a": "x" * 40}, [3], {"a": 4}]
    assert [row.place for row in pickle.loads(pickle.dumps(rows))] == expected
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    path.write_bytes(b'{"a": 9}\n')  # another size: indexed anew
    assert [row.values for row in JsonLines(path)] == [{"a": 9}]
    (tmp_path / "empty.jsonl").touch()
    assert len(JsonLines(tmp_path / "empty.jsonl")) == 0


def test_a_picture_is_stored_once_and_with_its_extension(world, tmp_path):
    PIL.Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "a.jpeg")
    twice = [dataclasses.replace(world[i], images=(tmp_path / "a.jpeg",)) for i in (2, 3)]
    converted(twice, "jsonl", tmp_path / "out")
    [stored] = (tmp_path / "out" / "images").iterdir()
    assert stored.suffix == ".jpeg" and stored.read_bytes() == (tmp_path / "a.jpeg").read_bytes()


def test_the_command_keeps_the_bytes_of_pictures(world, tmp_path):
    PIL.Image.new("RGB", (40, 30), (9, 90, 9)).save(tmp_path / "a.jpeg", quality=50)
    records = [dataclasses.replace(world[2], images=(tmp_path / "a.jpeg",))]
    converted(records, "parquet", tmp_path / "pq")
    command = [
        sys.executable,
        "scripts/convert_data.py",
        f"--source={tmp_path}/pq",
        "--to=jsonl",
        f"--out={tmp_path}/out",
    ]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    [stored] = (tmp_path / "out" / "images").iterdir()
    assert stored.read_bytes() == (tmp_path / "a.jpeg").read_bytes()
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["conversion.json", "data.jsonl", "images"]
