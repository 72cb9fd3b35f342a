"""Files that survive kills: atomic JSON, JSON lines repaired and cut back, full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srpo_jax.files import JsonLines, LockedError, claim, lock_folder, read_jsonl, write_json


@pytest.fixture
def small_disk():
    """Limits the size of files this process may write, which fails like a full disk does: in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_json_is_replaced_whole(tmp_path, small_disk):
    file = tmp_path / "results.json"
    write_json(file, {"a": 1, "rate": float("nan"), "nested": [float("inf"), "λ"]})
    before = file.read_text(encoding="utf-8")
    assert json.loads(before) == {"a": 1, "rate": None, "nested": [None, "λ"]}
    small_disk(4096)
    with pytest.raises(OSError, match="free disk space"):
        write_json(file, "x" * 10_000)
    assert file.read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [file]


def test_lines_are_whole_on_a_full_disk(tmp_path, small_disk):
    file = tmp_path / "log.jsonl"
    small_disk(100)
    with JsonLines(file) as lines:
        lines.append({"text": "a" * 60})
        with pytest.raises(OSError, match="free disk space"):
            lines.append({"text": "b" * 60})
        lines.append({"c": 1})
    assert list(read_jsonl(file)) == [{"text": "a" * 60}, {"c": 1}]


@settings(max_examples=30)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers()), max_size=5), st.data())
def test_any_cut_of_a_file_is_repaired(tmp_path_factory, records, data):
    file = tmp_path_factory.mktemp("jsonl") / "log.jsonl"
    with JsonLines(file) as lines:
        for record in records:
            lines.append(record)
    content = file.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    file.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    assert list(read_jsonl(file)) == records[:whole]
    with JsonLines(file) as lines:
        for record in records[whole:]:
            lines.append(record)
    assert file.read_bytes() == content


def test_a_long_half_line_is_removed(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    JsonLines(file).close()
    assert file.read_bytes() == b'{"a": 1}\n'


def test_a_file_of_lines_has_one_writer(tmp_path):
    file = tmp_path / "log.jsonl"
    with JsonLines(file) as lines:
        lines.append({"a": 1})
        with pytest.raises(LockedError, match=r"log\.jsonl is being written"):
            JsonLines(file)
        assert list(read_jsonl(file)) == [{"a": 1}]  # readers need no lock
    JsonLines(file).close()


def test_a_folder_that_was_made_anew_is_locked_anew(tmp_path):
    for _ in range(2):
        folder = tmp_path / "run"
        folder.mkdir()
        lock_folder(folder)
        lock_folder(folder)
        assert f"pid {os.getpid()} " in (folder / ".lock").read_text()
        (folder / ".lock").unlink()
        folder.rmdir()


def test_a_claim_is_held_by_one_and_let_go_at_the_end(tmp_path):
    work = tmp_path / "claims" / "seed 0"
    with claim(work) as mine:
        assert mine
        with claim(work) as theirs:
            assert not theirs
    with claim(work, wait=True) as mine:
        assert mine


def test_cut_keeps_the_leading_records(tmp_path):
    with JsonLines(tmp_path / "log.jsonl") as lines:
        for step in (1, 2, 3, 1):
            lines.append({"step": step})
        assert lines.cut(lambda record: record["step"] <= 2) == 2
        lines.append({"step": 9})
    assert [r["step"] for r in read_jsonl(tmp_path / "log.jsonl")] == [1, 2, 9]


@pytest.mark.parametrize(("line", "message"), [("{oops}", "not valid JSON"), ("[1]", "object is expected, not list")])
def test_a_corrupt_line_is_named(tmp_path, line, message):
    file = tmp_path / "log.jsonl"
    file.write_text('{"a": 1}\n' + line + '\n{"b": 2}\n')
    with pytest.raises(ValueError, match=f"log.jsonl, line 2: .*{message}"):
        list(read_jsonl(file))
    with JsonLines(file) as lines, pytest.raises(ValueError, match="line 2"):
        lines.cut(lambda record: True)


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    file = tmp_path / "log.jsonl"
    code = (
        "import sys; from srpo_jax.files import JsonLines\n"
        "lines = JsonLines(sys.argv[1]); i = 0\n"
        "while True: lines.append({'i': i, 'pad': 'p' * 3000}); i += 1\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(file)])
    try:
        deadline = time.monotonic() + 60
        while (not file.exists() or os.path.getsize(file) < 100_000) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with JsonLines(file) as lines:
        lines.append({"i": "next"})
    numbers = [record["i"] for record in read_jsonl(file)]
    assert len(numbers) > 30
    assert numbers == [*range(len(numbers) - 1), "next"]
