"""A small run of the embedded world that kills itself at a chosen event; run as a script by test_resume.py.

    python killable.py WORKDIR [EVENT NUMBER [DELAY_MS [SIGNAL]]]

EVENT is one of `branches`, `verdicts` (a line appended to that file), `update`, `save`; the kill comes DELAY_MS after the
NUMBER-th of them began, by SIGKILL unless another signal is named.
"""

import os
import signal
import sys
import threading

from absl import logging

import srpo_jax.training.loop as loop
from srpo_jax import config as configs
from srpo_jax import distributed, preemption
from srpo_jax.checkpoint import Checkpointer
from srpo_jax.files import JsonLines
from srpo_jax.training.workdir import open_workdir


def small_config():
    config = configs.default_config()
    config.data.n = 8
    config.explore.update(k=2, max_tokens=100, trees=4, trunk=(144,), patches=(64,))
    config.pack.update(trunk=(144,), path=(112,), patches=(64,), rows=(14,), row=100, branches=(12,), branch=(100,))
    config.batch.update(trees=2, accumulate=2)
    config.optim.update(learning_rate=1e-3, warmup=1)
    config.update(rounds=2, updates=4, checkpoint_every=2)
    return config


def arm(event: str, number: int, delay: float, kind: signal.Signals) -> None:
    """Wraps the functions that mark events."""
    count = 0

    def seen(name: str) -> None:
        nonlocal count
        count += name == event
        if name == event and count == number:
            threading.Timer(delay, os.kill, (os.getpid(), kind)).start() if delay else os.kill(os.getpid(), kind)

    def wrap(owner, method: str, name) -> None:
        inner = getattr(owner, method)

        def outer(*args, **kwargs):
            seen(name(*args))
            return inner(*args, **kwargs)

        setattr(owner, method, outer)

    wrap(JsonLines, "append", lambda self, record: self.path.stem)
    wrap(Checkpointer, "save", lambda *_: "save")
    wrap(loop, "_check_finite", lambda *_: "update")


def main(workdir: str, event: str = "", number: str = "0", delay_ms: str = "0", kind: str = "SIGKILL") -> None:
    logging.set_verbosity(logging.WARNING)
    preemption.install()
    if event:
        arm(event, int(number), float(delay_ms) / 1000, signal.Signals[kind])
    config = small_config()
    open_workdir(workdir, config)
    mesh = configs.build_mesh(config)
    policy = configs.build_policy(config, mesh)
    run = configs.run_config(config)
    try:
        loop.train(policy, configs.build_records(config), configs.build_judge(config), run, workdir, mesh)
    except preemption.Preempted as ended:
        print(ended)
        sys.exit(distributed.RESTART)


if __name__ == "__main__":
    main(*sys.argv[1:])
