"""Reading data: what one core delivers against what an update consumes, and the memory of millions of records.

    python benchmarks/data.py [--pictures=24] [--workers=1,2] [--sizes=10000,1000000] [--json=FILE]

1. Pictures (JPEG, 1,024 × 768) become trunks of the benchmark tree (a prompt of 1,200 tokens, 768 of them the picture, six
   steps of 60, a reply of 60): decoding, geometry (resize, normalise, patches in window order), tokens; seconds on one core.
2. The same through the pipeline of training with that many worker processes, packing included; updates of 8 questions.
3. What a 3B consumes on one H100, from `srpo_jax.flops`: the work of an update, over the operations per second that the chip
   attains, is the least time that a question takes; its inverse is the most questions per second that data must deliver.
4. A process that reads JSON lines by index for 100 updates of 8 text-only questions: seconds to index, memory at its peak.
"""

import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the data's side of a run needs no accelerator

import numpy as np
import PIL.Image
from absl import flags

from srpo_jax import cli, sharding
from srpo_jax.config import policy_path
from srpo_jax.data import scenes
from srpo_jax.data.images import open_image
from srpo_jax.data.loaders import open_records
from srpo_jax.data.rows import JsonLines
from srpo_jax.files import write_json
from srpo_jax.flops import CHIPS, TreeSize, update_flops
from srpo_jax.models.hf import param_shapes, read_config
from srpo_jax.models.processor import Processor
from srpo_jax.models.released import MAX_PIXELS, released_config
from srpo_jax.training.data import BatchConfig, RecordTrees, step_batches
from srpo_jax.trees import PackConfig

PICTURES = flags.DEFINE_integer("pictures", 24, "Different pictures to read.")
WORKERS = flags.DEFINE_list("workers", ["1", "2"], "Numbers of worker processes.")
SIZES = flags.DEFINE_list("sizes", ["10000", "1000000"], "Numbers of text-only records.")
SAVE = flags.DEFINE_string("json", None, "Where to keep the results.")
PROMPT, PATH, PICTURE, BRANCHES = 432 + 768, 420, 768, tuple((1200 + 60 * i, 256) for i in range(6) for _ in range(4))


def processor() -> Processor:
    """The embedded policy's, with the released models' limits of pictures and context."""
    config = read_config(policy_path("embedded"))
    text = dataclasses.replace(config.text, max_position_embeddings=32_768)
    config = dataclasses.replace(config, text=text)
    return Processor.load(policy_path("embedded"), config, max_pixels=MAX_PIXELS, max_image_tokens=PICTURE)


def write_pictures(folder: Path, count: int) -> Path:
    """Records as long as the benchmark tree, each with a smooth random picture, as photographs compress."""
    rng, tool = np.random.default_rng(0), processor()
    tokens = tool.tokenize("The yard shows the track and the lamp is lit over the door. " * 40)
    question, step = (tool.decode(tokens[:n]) for n in (400, 52))
    with open(folder / "pictures.jsonl", "w", encoding="utf-8") as file:
        for i in range(count):
            small = PIL.Image.fromarray(rng.integers(0, 256, (96, 128, 3), np.uint8))
            small.resize((1024, 768), PIL.Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
            row = {"id": f"p{i}", "images": [f"{i}.jpg"], "question": question, "risky": False, "safe_reply": step}
            file.write(json.dumps(row | {"steps": [step] * 6}) + "\n")
    return folder / "pictures.jsonl"


def one_core(path: Path, pack: PackConfig) -> dict:
    """Milliseconds of processor time of a record, in all and by part, and tokens of a trunk."""
    records, tool = open_records(path, "jsonl"), processor()
    trees, images = RecordTrees(records, tool, pack), [open_image(record.images[0]) for record in records]
    told = {"trunk_tokens": trees[0].tokens, "patches": trees[0].trunk.encoded.patches}
    parts = {
        "decode_ms": lambda i: open_image(records[i].images[0]),
        "geometry_ms": lambda i: tool.encode([images[i]], "What?"),
        "all_ms": lambda i: trees[i],
    }
    for name, read in parts.items():
        begin = time.process_time()  # other programs may have the cores
        for i in range(len(records)):
            read(i)
        told[name] = round(1000 * (time.process_time() - begin) / len(records), 2)
    return told


def pipeline(path: Path, pack: PackConfig, workers: int, updates: int = 12) -> float:
    """Questions per second that training's pipeline delivers, after the first updates."""
    trees, batch = RecordTrees(open_records(path, "jsonl"), processor(), pack), BatchConfig(trees=8, workers=workers)
    batches = step_batches(trees, pack, batch, 0, updates + 4)
    for _ in range(4):  # workers start, buffers fill
        next(batches)
    begin = time.perf_counter()
    for _ in range(updates):
        next(batches)
    return round(8 * updates / (time.perf_counter() - begin), 1)


def consumption() -> list[dict]:
    """The least seconds of a question's update and the most questions per second, for a 3B on one H100."""
    config, chip = released_config("3B"), CHIPS["h100"]
    shapes = sharding.flatten(param_shapes(config))
    decoder = {path for path in shapes if not path.startswith("vision/")}
    rows = []
    for name, branches in (("reference path alone (SFT)", ()), ("tree of 24 branches (SRPO)", BRANCHES)):
        tree = TreeSize(trunk=PROMPT + PATH, path=PATH, branches=branches).with_image(PICTURE, config.vision)
        work = update_flops(config, shapes, decoder, tree)
        total = work.model.total + work.recompute.total
        row = {"update": name, "tflop": round(total / 1e12, 1), "least_s": round(total / chip.flops, 4)}
        rows.append(row | {"most_per_s": round(chip.flops / total, 2)})
    return rows


def write_texts(path: Path, count: int) -> None:
    """Text-only records of the embedded world's length, with ids of their own."""
    record = scenes.records("train", 2)[0]
    row = {
        "images": [],
        "question": record.question,
        "risky": False,
        "steps": record.steps,
        "safe_reply": record.safe_reply,
    }
    tail = json.dumps(row)[1:] + "\n"
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, count, 10_000):
            file.write("".join(f'{{"id": "t{i}", {tail}' for i in range(start, min(count, start + 10_000))))


def read_texts(path: Path, queue) -> None:
    """Run in a process of its own: seconds to index, and memory before, after indexing, and at the peak of reading."""

    def now(which: str = "VmRSS") -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))

    pack = PackConfig(trunk=(256,), path=(128,), rows=(16,), row=64, branches=(0,), branch=(1,))
    tool, before = processor(), now()
    begin = time.perf_counter()
    JsonLines(path)
    index = time.perf_counter() - begin
    begin = time.perf_counter()
    records = open_records(path, "jsonl")
    again, opened = time.perf_counter() - begin, now()
    for _ in step_batches(RecordTrees(records, tool, pack), pack, BatchConfig(trees=8), 0, 100):
        pass
    told = {"before_mb": before, "opened_mb": opened, "after_100_updates_mb": now(), "peak_mb": now("VmHWM")}
    queue.put({"index_s": round(index, 2), "open_again_s": round(again, 3)} | {k: round(v) for k, v in told.items()})


def scale(folder: Path, count: int) -> dict:
    path, context = folder / "texts.jsonl", multiprocessing.get_context("spawn")
    write_texts(path, count)
    queue = context.Queue()
    reader = context.Process(target=read_texts, args=(path, queue))
    reader.start()
    told = queue.get()
    reader.join()
    return {"records": count, "file_mb": round(path.stat().st_size / 1e6), **told}


def main(_):
    pack = PackConfig(trunk=(2048,), path=(1024,), rows=(8,), row=256, branches=(0,), branch=(1,), patches=(4096,))
    result: dict = {"benchmark": "data", "cores": os.cpu_count(), "h100_3b": consumption()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = name  # the index of a large file is measured, not found
        path = write_pictures(folder, PICTURES.value)
        result["one_core"] = one_core(path, pack)
        result["pipeline"] = [{"workers": int(n), "per_s": pipeline(path, pack, int(n))} for n in WORKERS.value]
        result["scale"] = [scale(folder, int(n)) for n in SIZES.value]
    result["cores_for_h100"] = {
        row["update"]: round(row["most_per_s"] * result["one_core"]["all_ms"] / 1000, 2) for row in result["h100_3b"]
    }
    if SAVE.value:
        write_json(SAVE.value, result)
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
