"""Ctrl-C and SIGTERM: the first asks long work to stop at a safe point, the second stops it at once."""

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_on_signals() -> Generator[Callable[[], bool]]:
    """Give a function that says whether SIGINT or SIGTERM has come; a second one raises KeyboardInterrupt.

    The former handlers are back in place afterwards.
    """
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # Not `print`: the signal may have come in the midst of a write to the same buffer.
        os.write(2, b"\nstopping after the current batch; once more stops at once\n")

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
