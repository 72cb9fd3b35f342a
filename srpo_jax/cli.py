"""How every script starts: quiet logs, the other processes of the job, and one clear message for what went wrong."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from srpo_jax import distributed, preemption, runtime

DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of a job; under Slurm, Open MPI, GKE and on TPU pods JAX finds them by itself.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    os.environ.get("SRPO_COORDINATOR"),
    "host:port of process 0 where JAX does not find it; joins the job.",
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", os.environ.get("SRPO_NUM_PROCESSES"), "Processes of the job, with --coordinator."
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", os.environ.get("SRPO_PROCESS_ID"), "Which of them this one is, from 0, with --coordinator."
)
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", False, "GPU: the same bits in every run on the same hardware, by slower kernels."
)
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder or bucket where compiled programs are kept, so that a restart does not compile again.",
)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses flags, joins the job, calls `main`; ends with code 1 and a message where this package refuses something.

    Asked to end (SIGTERM, Ctrl-C), it ends with code 75, `distributed.RESTART`: start it again.

    Any other error is a fault of a program and keeps its traceback. `--verbosity=0` shows what libraries log,
    `--verbosity=1` the traceback of a message, too. In a job of several processes an error of one ends all.
    """
    flags.FLAGS["verbosity"].using_default_value = False  # absl would raise it to INFO, and Orbax tells of every file

    def guarded(argv: Sequence[str]) -> None:
        preemption.install()
        try:
            runtime.configure(deterministic=DETERMINISTIC.value, cache=COMPILATION_CACHE.value)
            if DISTRIBUTED.value or COORDINATOR.value:
                distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
            main(argv)
            distributed.finish()
        except preemption.Preempted as ended:
            say(ended)
            distributed.finish()
            sys.exit(distributed.RESTART)
        except Exception as error:
            if isinstance(error, jax.errors.JaxRuntimeError):
                distributed.wait_for_the_cause()
            if is_message(error):
                logging.debug("where it was raised:", exc_info=True)
                lines = [f"{Path(sys.argv[0]).name}: {error}", *getattr(error, "__notes__", [])]
                _end("\n" + "\n".join(lines))  # a progress bar may stand in the line
            if distributed.process_count() == 1:
                raise
            distributed.fail(traceback.format_exc(), 1)

    app.run(guarded)


def say(*what: object) -> None:
    """Prints what a job says once, whatever its number of processes."""
    if distributed.is_lead():
        print(*what, flush=True)


def _end(message: str) -> None:
    if distributed.process_count() > 1:
        distributed.fail(message, 1)
    sys.exit(message)


def is_message(error: BaseException) -> bool:
    """Whether a `raise` in this package made the error: then its text was written for people."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not Path(frames[-1].filename).is_relative_to(Path(__file__).parent):
        return False
    return linecache.getline(frames[-1].filename, frames[-1].lineno or 0).lstrip().startswith("raise ")
