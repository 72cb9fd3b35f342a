"""Evaluation of a Qwen2.5-VL checkpoint: records by the RSBench protocol, published benchmarks, or both.

    python scripts/evaluate.py --config=configs/rsbench.py --workdir=runs/eval --checkpoint=/models/mine \\
        --judge=my_judge:EVALUATOR --config.eval.path=/data/held_out.jsonl
    python scripts/evaluate.py --config=configs/rsbench.py --workdir=runs/eval --checkpoint=/models/mine \\
        --judge=my_judge:EVALUATOR --benchmarks=siuo,figstep,xstest --data_root=/data/benchmarks

`--list` shows the benchmarks; docs/benchmarks.md tells layouts and caveats, docs/evaluation.md the metrics. RSBench's data is
unpublished: the protocol runs over records of yours in the SSUI schema (docs/data.md).

Decoding and budget are one for all: two arms are comparable under the same `eval` section, and `--baseline` refuses any other.
`--config.eval.plain=True` reads turns without tags as answers, for checkpoints that do not reason in tags.

No numbers are expected here: they depend on checkpoint, data and judge.
"""

from srpo_jax.config import default_config


def get_config():
    config = default_config()
    config.policy.max_image_tokens = 768
    config.policy.dtype = "bfloat16"
    config.data.name = "jsonl"
    config.eval.update(benchmarks=("rsbench",), temperatures=(0.0,), max_tokens=1024, batch=16)
    config.eval.update(trunk=(1024, 1536, 2048, 4096), patches=(4096, 8192))
    return config
