"""Launchers and manifests: what a dry run prints is what runs, and the manifests say what the scripts do."""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from srpo_jax import distributed
from srpo_jax.preflight.slices import TOPOLOGIES

ROOT = Path(__file__).resolve().parents[2]
POD = ROOT / "tpu" / "pod.sh"
WHERE = ("--name=srpo", "--zone=us-central1-a")
RUN = ("run", "--", "scripts/train.py", "--workdir=/mnt/srpo/my runs", "--config.pack.rows=(12, 28)", "--it's=$HOME")
CALLS = {
    "copy": ("copy",),
    "install": ("install",),
    "mount": ("mount", "--share=10.0.0.2:/share"),
    "run": RUN,
    "logs": ("logs",),
    "collect": ("collect", "--workdir=/mnt/srpo/run", "--output=here"),
    "delete": ("delete",),
    "create": ("create", "--type=v5e-64", "--spot"),
}
# Writes its arguments, one JSON list per call; says that the slice is there.
FAKE = """#!/usr/bin/env python3
import json, os, sys
if "describe" in sys.argv:
    print("ACTIVE")
else:
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


def pod(*arguments: str, path: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    folders = os.environ["PATH"] if path is None else f"{path}:{os.environ['PATH']}"
    return subprocess.run(
        [POD, *arguments],
        env=os.environ | {"PATH": folders, "TMPDIR": "/tmp"} | env,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture
def tools(tmp_path) -> Path:
    """Stand-ins for everything that the launcher calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcloud", "git", "mkdir"):
        (folder / name).write_text(FAKE)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("name", CALLS)
def test_a_dry_run_prints_exactly_what_would_be_executed(name, tools, tmp_path):
    calls = tmp_path / "calls"
    done = pod(*WHERE, *CALLS[name], path=tools, CALLS=str(calls))
    assert done.returncode == 0, done.stderr
    executed = [json.loads(line) for line in calls.read_text().splitlines()]
    dry = pod("--dry_run", *WHERE, *CALLS[name], path=tools, CALLS="/nowhere/to/write")
    assert dry.returncode == 0, dry.stderr
    assert [shlex.split(line) for line in dry.stdout.splitlines()] == executed
    assert executed


HOST = """#!/bin/sh
echo "$@" >> seen
[ "$(wc -l < seen)" -ge 3 ] && exit 5
exit 75
"""


def test_a_host_runs_the_command_again_as_long_as_it_asks_for_it(tmp_path):
    """The remote command is run here, with a Python that ends twice with code 75 and then with 5."""
    dry = pod("--dry_run", *WHERE, *RUN)
    command = shlex.split(dry.stdout)[-1].removeprefix("--command=")
    python = tmp_path / "srpo_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(HOST)
    python.chmod(0o755)
    subprocess.run(["bash", "-c", f"{command}\nwait"], cwd=tmp_path, check=False, timeout=60)
    seen = (tmp_path / "srpo_jax" / "seen").read_text().splitlines()
    expected = "scripts/train.py --distributed --workdir=/mnt/srpo/my runs --config.pack.rows=(12, 28) --it's=$HOME"
    assert seen == [expected] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--type=v4-8"), "v5e-N"),
        (("create",), "--type is missing"),
        (("launch",), "unknown command 'launch'"),
        (("copy", "install"), "two commands"),
        (("--spott", "create"), "unknown option --spott"),
        (("run",), "run -- SCRIPT"),
        (("mount",), "--share is missing"),
    ],
)
def test_mistakes_are_named_before_anything_runs(arguments, said, tools, tmp_path):
    calls = tmp_path / "calls"
    done = pod(*WHERE, *arguments, path=tools, CALLS=str(calls))
    assert done.returncode == 2
    assert said in done.stderr
    assert not calls.exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["tpu/pod.sh", "docs/slurm.sbatch"])
def test_shell_scripts_pass_shellcheck(script):
    done = subprocess.run(["shellcheck", "--shell=bash", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def manifest() -> dict:
    return yaml.safe_load((ROOT / "tpu" / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads((Path(__file__).parent / "jobset.schema.json").read_text())


def test_the_manifest_is_valid_and_a_misspelt_one_is_not(manifest, schema):
    jsonschema.validate(manifest, schema)
    broken = copy.deepcopy(manifest)
    job = broken["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["podFailurePolicy"]["rules"][0]["onExitCode"] = job["podFailurePolicy"]["rules"][0].pop("onExitCodes")
    with pytest.raises(jsonschema.ValidationError, match="onExitCode"):
        jsonschema.validate(broken, schema)


def test_the_manifest_fits_its_slice_and_the_scripts(manifest):
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod_ = job["template"]["spec"]
    container = pod_["containers"][0]
    topology = pod_["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert TOPOLOGIES[f"v5e-{chips}"] == f"v5e:{topology}"
    assert job["parallelism"] == job["completions"]
    rule = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert rule["values"] == [distributed.RESTART]
    assert rule["containerName"] == container["name"]
    assert f"--config.batch.trees={chips}" in container["args"]
    scripts = [a for a in container["args"] if a.endswith(".py")]
    configs = [a.partition("=")[2].partition(":")[0] for a in container["args"] if a.startswith("--config=")]
    assert all((ROOT / file).is_file() for file in scripts + configs)
    mounts = tuple(mount["mountPath"] + "/" for mount in container["volumeMounts"])
    folders = [a.partition("=")[2] for a in container["args"] if a.partition("=")[2].startswith("/")]
    assert len(folders) == 3
    assert all(folder.startswith(mounts) for folder in folders)
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod_["volumes"]}


def test_slurm_requeues_the_same_code():
    assert f"= {distributed.RESTART} ]; then scontrol requeue" in (ROOT / "docs" / "slurm.sbatch").read_text()


def test_the_image_copies_files_that_there_are():
    lines = (ROOT / "tpu" / "Dockerfile").read_text().splitlines()
    sources = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert sources
    assert all((ROOT / name).exists() for name in sources)
