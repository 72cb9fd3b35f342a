"""How every script starts: quiet logs, and one clear message for what went wrong."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses flags and calls `main`; ends the process with code 1 and a message where this package refuses something.

    Any other error is a fault of a program and keeps its traceback. `--verbosity=0` shows what libraries log,
    `--verbosity=1` the traceback of a message, too.
    """
    flags.FLAGS["verbosity"].using_default_value = False  # absl would raise it to INFO, and Orbax tells of every file

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except Exception as error:
            if not is_message(error):
                raise
            logging.debug("where it was raised:", exc_info=True)
            lines = [f"{Path(sys.argv[0]).name}: {error}", *getattr(error, "__notes__", [])]
            sys.exit("\n" + "\n".join(lines))  # a progress bar may stand in the line

    app.run(guarded)


def is_message(error: BaseException) -> bool:
    """Whether a `raise` in this package made the error: then its text was written for people."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not Path(frames[-1].filename).is_relative_to(Path(__file__).parent):
        return False
    return linecache.getline(frames[-1].filename, frames[-1].lineno or 0).lstrip().startswith("raise ")
