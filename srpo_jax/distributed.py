"""Several processes that work on one job: who is who, waiting for each other, small messages, and ending together.

Arrays that span processes are JAX's own business. Beside them the processes of a job share a folder, and the key-value store of
JAX's coordination service, which process 0 hosts. A thread of each process tells there once a second that it is alive and
looks after the others: where one is lost, the rest say which and end, so that a scheduler can start the job again. (Waiting
inside a collective operation, a process would notice nothing; JAX's own heartbeat aborts without naming anybody.)

With one process every function here does the obvious at no cost. This is the only file that knows JAX's coordination client.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

RESTART = 75
"""Exit code of a process that should be started again: preempted, or left by another process (EX_TEMPFAIL of sysexits.h)."""

BEAT = 1.0
"""Seconds between signs of life."""
LOST = 12.0
"""Seconds without one after which a process counts as lost."""
HEARTBEAT = 20
"""Seconds of JAX's own heartbeat: behind `LOST`, for a process whose watching thread is stuck."""

_FOREVER_MS = 7 * 24 * 3600 * 1000
_KEPT = 64  # messages per name that stay in the store; more than any process can be ahead of another
_barriers = itertools.count()
_watch: _Watch | None = None


def initialize(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Joins a job; to be called before anything touches a device. What is None, JAX finds out (Slurm, Open MPI, TPU pods, GKE).

    Raises:
      ValueError: what is missing could not be found out.
    """
    global _watch
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `preemption`
    try:
        jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"this process cannot join a job: {error} Under Slurm, Open MPI, GKE and on TPU pods --distributed suffices; "
            "elsewhere give --coordinator=HOST:PORT --num_processes=N --process_id=I to every process"
        ) from error
    if process_count() > 1:
        _watch = _Watch()
        _watch.start()


def process_index() -> int:
    """The number of this process in its job, 0 alone."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def process_count() -> int:
    """How many processes the job has."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_lead() -> bool:
    """Whether this process writes what is written once: configuration, metrics, reports."""
    return process_index() == 0


def barrier() -> None:
    """Waits until every process is here; to be called by their main threads alone, in the same order."""
    number = next(_barriers)
    if process_count() > 1:
        _client().wait_at_barrier(f"srpo/barrier/{number}", _FOREVER_MS)


def on_lead(action: Callable[[], T]) -> T | None:
    """Runs `action` in the lead process while the others wait; what it raises ends the job."""
    result = action() if is_lead() else None
    barrier()
    return result


def mine(items: Sequence[T], block: int = 1) -> list[T]:
    """This process's share of `items`: whole blocks in turn, so that a block has the same members whatever the count."""
    first, step = process_index() * block, process_count() * block
    return [item for start in range(first, len(items), step) for item in items[start : start + block]]


def exchange(name: str, number: int, value: Any) -> list[Any]:
    """Every process's `value`, by process. Callable from any thread, with `number` counting the calls of a `name`.

    The message goes from host to host; no device is involved.

    Args:
      name: of the exchange, the same in every process.
      number: of the call; processes may be a few calls apart.
      value: JSON.
    """
    if process_count() == 1:
        return [value]
    client, place = _client(), f"srpo/{name}/{number}"
    client.key_value_set(f"{place}/{process_index():06d}", json.dumps(value))
    client.wait_at_barrier(place, _FOREVER_MS)
    found = [json.loads(text) for _, text in sorted(client.key_value_dir_get(place))]
    client.key_value_delete(f"srpo/{name}/{number - _KEPT}/{process_index():06d}")
    return found


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set in any process: the same answer in all. Called by the main threads, in the same order."""
    if process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def finish() -> None:
    """Waits for the others at the end of a program and leaves the job."""
    global _watch
    if process_count() > 1:
        barrier()
        if _watch is not None:
            _watch.stop()
            _watch = None
    jax.distributed.shutdown()


def fail(message: str, code: int) -> NoReturn:
    """Ends this process and, through their watching threads, the others. Says why in all of them; never returns."""
    if _watch is not None:
        _watch.stop()
        _tell(code, message)
        if is_lead():
            time.sleep(3 * BEAT)  # it hosts the store: the others must have read this
    _exit(message, code)


def wait_for_the_cause() -> None:
    """To be called when a collective operation failed: gives the watching thread time to find out who is lost."""
    if _watch is not None:
        time.sleep(LOST + 3 * BEAT)


def _client() -> Any:
    from jax._src import distributed  # the only way to the store; Orbax takes it, too

    return distributed.global_state.client


def _tell(code: int, message: str) -> None:
    word = json.dumps({"code": code, "message": message})
    _client().key_value_set(f"srpo/failed/{process_index():06d}", word, allow_overwrite=True)


def _exit(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(code)  # an orderly end would wait for the processes that are gone


class _Watch(threading.Thread):
    """Tells that this process is alive, and ends it when another has failed or fallen silent."""

    def __init__(self) -> None:
        super().__init__(name="watch", daemon=True)
        self._stopped = threading.Event()
        self._heard: dict[str, tuple[str, float]] = {}
        self._reached = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        for beat in itertools.count():
            try:
                self._look(beat)
                self._reached = time.monotonic()
            except jax.errors.JaxRuntimeError as error:
                if time.monotonic() - self._reached > LOST and not self._stopped.is_set():
                    _exit(f"process 0, which coordinates the job, cannot be reached ({error}); {_AGAIN}", RESTART)
            if self._stopped.wait(BEAT):
                return

    def _look(self, beat: int) -> None:
        client, now = _client(), time.monotonic()
        client.key_value_set(f"srpo/alive/{process_index():06d}", str(beat), allow_overwrite=True)
        words = client.key_value_dir_get("srpo/failed")
        if words and not self._stopped.is_set():
            name, text = min(words)
            word = json.loads(text)
            _exit(f"process {_number(name)} of the job stopped: {word['message'].strip()}", word["code"])
        for name, found in client.key_value_dir_get("srpo/alive"):
            if self._heard.get(name, ("", 0))[0] != found:
                self._heard[name] = found, now
        silent = [_number(name) for name, (_, when) in self._heard.items() if now - when > LOST]
        if silent and not self._stopped.is_set():
            who = ", ".join(map(str, sorted(silent)))
            _exit(f"process {who} of the job is lost: no sign of life for {LOST:.0f} s; {_AGAIN}", RESTART)


_AGAIN = "start all processes again with the same command, the run goes on from its last checkpoint"


def _number(key: str) -> int:
    return int(key.rsplit("/", 1)[1])
