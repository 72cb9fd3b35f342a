"""What a user sees of a script: little, and one message where something is refused."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from srpo_jax.cli import is_message
from srpo_jax.data.loaders import LoadError, load_jsonl
from srpo_jax.paths import Grammar
from srpo_jax.trees import bucket

SCRIPT = """
from absl import logging
from srpo_jax import cli
from srpo_jax.trees import bucket

def main(_):
    logging.info("library noise")
    logging.warning("worth knowing")
    print("the table")
    {line}

cli.run(main)
"""


def run(tmp_path, line, *flags):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(line=line))
    return subprocess.run([sys.executable, file, *flags], capture_output=True, text=True, check=False)


def test_what_the_package_refuses_is_one_message(tmp_path):
    done = run(tmp_path, "bucket(3, (2,), \"record 'r': rows\")")
    assert done.returncode == 1 and done.stdout == "the table\n"
    assert "\nscript.py: record 'r': rows: 3 exceeds the largest bucket 2" in done.stderr
    assert "worth knowing" in done.stderr
    assert "Traceback" not in done.stderr and "library noise" not in done.stderr


def test_more_is_shown_on_request(tmp_path):
    done = run(tmp_path, "bucket(3, (2,), 'rows')", "--verbosity=1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "library noise" in done.stderr


def test_a_fault_of_a_program_keeps_its_traceback(tmp_path):
    done = run(tmp_path, "[][1]")
    assert done.returncode == 1 and "Traceback" in done.stderr and "IndexError" in done.stderr


def test_only_what_a_raise_of_the_package_says_is_a_message(tmp_path):
    with pytest.raises(LoadError) as loading:
        load_jsonl(write(tmp_path / "a.jsonl", "{"))
    with pytest.raises(ValueError) as ladder:
        bucket(3, (2,), "rows")
    with pytest.raises(TypeError) as bug:
        Grammar().render(None, "")  # inside the package, but no `raise`
    with pytest.raises(ValueError) as elsewhere:
        raise ValueError("a judge's")
    assert is_message(loading.value) and is_message(ladder.value)
    assert not is_message(bug.value) and not is_message(elsewhere.value) and not is_message(ValueError("never raised"))


def write(path, text):
    path.write_text(text)
    return path


def test_a_configuration_is_read_without_touching_a_device():
    """A process joins its job after its flags are parsed, and before JAX knows its devices."""
    code = "from srpo_jax.config import default_config; default_config()"
    code += f"; import jax; jax.distributed.initialize('localhost:{free_port()}', 1, 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
