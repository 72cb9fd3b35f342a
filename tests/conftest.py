"""Set-up that every test relies on; runs before JAX is imported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The suite runs on the CPU also where an accelerator or libtpu is installed, and never asks a hub for anything.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiled programs are shared between the test processes and from run to run.
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import numpy as np  # noqa: E402  (after the environment is set)
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

if TYPE_CHECKING:
    from srpo_jax.models.policy import Policy

# A first call may compile or wait for a busy disk; the deadline of hypothesis would take that for a failure.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


LONGEST_FIRST = (
    "training/test_resume.py",
    "test_distributed.py",
    "test_scripts.py",
    "training/test_loop.py",
    "training/test_adapters.py",
    "evaluation/test_script.py",
    "models/test_parity.py",
    "training/test_exactness.py",
    "exploration/test_engine.py",
    "study/test_study.py",
)
"""Files that end last if they begin last, while the other test processes have nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright; tests are skipped where either is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test-all]'")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH")
    switches = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage"
    )
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=path, args=switches.split())
        yield made
        made.close()


@pytest.fixture(scope="session")
def tiny_policy() -> Policy:
    """A random Qwen2.5-VL of 30,000 parameters with the embedded world's tokenizer.

    Its head leans towards the tags of a path, the end of the turn and a few words, so that what it samples has every
    status: answers, open paths, doubled tags, truncation.
    """
    import jax
    import jax.numpy as jnp
    from transformers import Qwen2VLImageProcessorPil

    from srpo_jax.data import scenes
    from srpo_jax.models.config import ModelConfig, TextConfig, VisionConfig
    from srpo_jax.models.policy import init_policy
    from srpo_jax.models.processor import Processor

    tokenizer = scenes.build_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    text = TextConfig(512, 16, 24, 2, 4, 2, 4, 1e4, (1, 1, 0), 1e-6, False, 512)
    vision = VisionConfig(2, 16, 16, 2, 3, 14, 2, 2, 56, (1,), 16)
    config = ModelConfig(text, vision, *ids)
    images = Qwen2VLImageProcessorPil(
        patch_size=14, temporal_patch_size=2, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 56
    )
    policy = init_policy(config, Processor(tokenizer, images, config), 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape) + (x.ndim == 1), policy.params)
    # What came last, as three features of the input: anything, a closing tag, a word. The head leans on them.
    pieces = ("<think>\n", "</think>\n", " bridge", " bake", " rest")
    opening, closing, *words = (tokenizer.convert_tokens_to_ids(tokenizer.tokenize(piece))[0] for piece in pieces)
    params["embed"][:, :3] = 4.0, 0.0, 0.0
    params["embed"][closing, 1] = params["embed"][words, 2] = 4.0
    params["head"][:, :3] = -2.0, 0.0, 0.0
    params["head"][opening, :3] = 0.2, -0.5, 0.0
    params["head"][closing, :3] = 1.0, -1.2, -0.7
    params["head"][words, :3] = 0.8, 0.2, 0.0
    params["head"][tokenizer.eos_token_id, :3] = 0.3, -0.5, 0.6
    policy.params.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
    return policy
