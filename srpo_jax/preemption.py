"""Ending when a scheduler asks for it: SIGTERM, or Ctrl-C.

Nothing that is on the disk is ever lost, so a process may end at any moment; it ends at once, with the code that tells
schedulers to start it again. Where it holds work that is not on the disk yet, it `defers`: the request waits until that work is
saved. A second request is not deferred.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import NoReturn

from absl import logging

from srpo_jax import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)

PATIENCE = 0.2
"""Seconds that the main thread has for a request before the listening thread takes it up."""

_deferring = False
_asked: list[str] = []
_handled = 0


class Preempted(Exception):
    """The process was asked to end, and has saved what it held."""


def install() -> None:
    """Watches for requests until the process ends. To be called once, by the main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in SIGNALS:
        signal.signal(number, _handle)
    # Python runs handlers between two of its own instructions; a compilation or a decode loop is minutes of none. The C handler
    # writes here at once.
    signal.set_wakeup_fd(writer)
    threading.Thread(target=_listen, args=(reader,), name="preemption", daemon=True).start()


def defer(on: bool) -> None:
    """Whether requests have to wait, because this process holds work that is not saved."""
    global _deferring
    _deferring = on


def requested() -> bool:
    """Whether a request waits."""
    return bool(_asked)


def _handle(number: int, _: object) -> None:
    global _handled
    _handled += 1
    name = signal.Signals(number).name
    if not _deferring or _asked:
        _end(name)
    _asked.append(name)
    logging.warning("%s: ending after this update, which is saved first; a second one ends at once", name)


def _listen(reader: int) -> None:
    """Ends the process where the main thread cannot, and need not, take up a request."""
    seen = 0
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number in SIGNALS:
                seen += 1
                time.sleep(PATIENCE)
                if _handled < seen and not _deferring:
                    _end(signal.Signals(number).name)


def _end(name: str) -> NoReturn:
    message = f"ended by {name}; nothing that was saved is lost, the same command goes on from there"
    distributed.fail(message, distributed.RESTART)
