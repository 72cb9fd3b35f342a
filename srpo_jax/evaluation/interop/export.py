"""An evaluation for other tools: a log of Inspect (UK AI Security Institute), and sample lines in the style of lmms-eval.

Both hold every response with its verdicts; what the evaluator could not tell is "N" (no answer) there and null here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srpo_jax.evaluation.comparison import METRICS
from srpo_jax.evaluation.samples import SAMPLES, Sample, samples_name
from srpo_jax.evaluation.statistics import Outcome
from srpo_jax.files import write_json
from srpo_jax.paths import Status

RATES = ("S", "E", "SE", "helpful", "over_refusal", "malformed")
SCORES = ("safe", "effective", "refused", "path_safe", "path_effective")


def write_inspect_log(
    target: str | Path, entry: Mapping[str, Any], samples: Sequence[Sample], folder: str | Path
) -> Path:
    """Writes a log that `inspect view` lists and `inspect_ai.log.read_eval_log` reads (JSON, version 2).

    Pictures are the thumbnails of the samples. A rate stands there as a metric, with its interval beside it.

    Args:
      target: folder of the logs; an earlier log of the same entry is replaced.
      entry: of `results.json`.
      samples: of the entry.
      folder: the evaluation's, for thumbnails.

    Returns:
      The file, whose name begins with the time of writing: Inspect lists no other JSON.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    decoding, name = entry["decoding"], samples_name(entry)
    earlier = list(Path(target).glob(f"*_{name}.json"))
    ids = list(dict.fromkeys(sample.id for sample in samples))
    spec = {
        "eval_id": name,
        "run_id": name,
        "created": now,
        "task": entry.get("task", "srpo_jax"),
        "task_id": name,
        "task_version": 0,
        "dataset": {"name": str(entry.get("benchmark")), "samples": len(ids), "sample_ids": ids},
        "model": str(entry["name"]),
        "model_generate_config": {k: decoding[k] for k in ("temperature", "max_tokens", "seed") if k in decoding},
        "config": {"epochs": decoding.get("samples", 1)},
        "packages": {"srpo_jax": ((entry.get("provenance") or {}).get("versions") or {}).get("srpo_jax", "unknown")},
        "metadata": {"step": entry.get("step"), "provenance": entry.get("provenance")},
    }
    scores = [_rate(entry, rate) for rate in RATES if (entry.get(rate) or {}).get("rate") is not None]
    log = {
        "version": 2,
        "status": "success",
        "eval": spec,
        "plan": {"name": "plan", "steps": [], "config": {}},
        "results": {"total_samples": len(samples), "completed_samples": len(samples), "scores": scores},
        "stats": {"started_at": now, "completed_at": now, "model_usage": {}},
        "samples": [_inspect_sample(sample, entry, Path(folder) / SAMPLES) for sample in samples],
    }
    path = Path(target) / f"{now.replace(':', '-')}_{str(spec['task']).replace('_', '-')}_{name}.json"
    write_json(path, log)
    for other in earlier:
        if other != path:
            other.unlink()
    return path


def _rate(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    metrics = {key: {"name": key, "value": entry[name][key]} for key in ("rate", "low", "high")}
    return {"name": name, "scorer": entry["evaluator"], "metrics": metrics, "metadata": {"prompts": entry[name]["n"]}}


def _inspect_sample(sample: Sample, entry: Mapping[str, Any], home: Path) -> dict[str, Any]:
    pictures = [{"type": "image", "image": _picture(home / name)} for name in sample.images if name is not None]
    ask = {"role": "user", "content": [*pictures, {"type": "text", "text": sample.question}]}
    reply = {"role": "assistant", "content": sample.text, "source": "generate", "model": str(entry["name"])}
    stop = "max_tokens" if sample.status == Status.TRUNCATED else "stop"
    explanation = {"safe": sample.reason, "effective": sample.reason}
    return {
        "id": sample.id,
        "epoch": sample.sample + 1,
        "input": [ask],
        "target": "",
        "messages": [ask, reply],
        "output": {"model": str(entry["name"]), "choices": [{"message": reply, "stop_reason": stop}]},
        "scores": {
            name: {
                "value": _letter(getattr(sample, name)),
                "answer": sample.answer,
                "explanation": explanation.get(name),
            }
            for name in SCORES
        },
        "metadata": {
            "risky": sample.risky,
            "category": sample.category,
            "split": sample.split,
            "cluster": sample.cluster,
            "status": sample.status,
            "missing_images": sum(name is None for name in sample.images),
            "steps": [
                {"number": s.number, "title": s.title, "safe": s.safe, "effective": s.effective, "reason": s.reason}
                for s in sample.steps
            ],
        },
    }


def write_lmms_lines(path: str | Path, samples: Sequence[Sample]) -> None:
    """Writes one JSON line per response with the keys of lmms-eval's sample logs, and one per metric that concerns it.

    Args:
      path: the file, replaced whole.
      samples: of one evaluation.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(sample.id for sample in samples))}
    text = "".join(json.dumps(_line(sample, places[sample.id]), ensure_ascii=False) + "\n" for sample in samples)
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _line(sample: Sample, place: int) -> dict[str, Any]:
    doc = {"id": sample.id, "question": sample.question, "risky": sample.risky, "category": sample.category}
    doc |= {"split": sample.split, "images": list(sample.images)}
    told = {metric.name: metric.outcome(sample) for metric in METRICS if metric.risky == sample.risky}
    return {
        "doc_id": place,
        "doc": doc,
        "target": "",
        "arguments": [[sample.question]],
        "resps": [[sample.text]],
        "filtered_resps": [sample.answer],
        "doc_hash": hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest(),
        "prompt_hash": hashlib.sha256(sample.question.encode()).hexdigest(),
        "sample": sample.sample,
        "status": sample.status,
        **told,
    }


def _letter(outcome: Outcome) -> str:
    """Inspect's letters for yes, no and not told."""
    return "N" if outcome is None else "C" if outcome else "I"


def _picture(path: Path) -> str:
    return "data:image/webp;base64," + base64.b64encode(path.read_bytes()).decode()
