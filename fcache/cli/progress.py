"""Progress on stderr: one line that is rewritten on a terminal, a plain line now and then elsewhere."""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

LIVE_SECONDS = 0.1
PLAIN_SECONDS = 10.0


class Progress:
    """The line that says how far a command is.

    `show` replaces the line (as often as the stream's kind allows), `note` adds a line that stays; `clear` takes the
    line away for what is printed elsewhere. Use as a context manager: leaving it ends the live line, so that what
    follows starts on a new one. Threads may share one.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._live = self._stream.isatty()
        self._interval = LIVE_SECONDS if self._live else PLAIN_SECONDS
        self._due = clock() if self._live else clock() + PLAIN_SECONDS
        self._pending = ""
        self._width = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def show(self, text: str) -> None:
        """Say `text` if the last line is old enough: 0.1 s on a terminal, 10 s elsewhere."""
        with self._lock:
            self._pending = text
            now = self._clock()
            if now < self._due:
                return
            self._due = now + self._interval
            self._put(text)

    def note(self, text: str) -> None:
        """Say `text` at once, on a line that stays."""
        with self._lock:
            self._clear()
            self._stream.write(text + "\n")
            self._stream.flush()
            self._pending = ""

    def clear(self) -> None:
        """Take the live line away, so that a result can be printed on the same terminal."""
        with self._lock:
            self._clear()
            self._stream.flush()

    def close(self) -> None:
        """Put the last text of `show` and end its line."""
        with self._lock:
            if self._live and self._pending:
                self._put(self._pending)
            if self._live and self._width:
                self._stream.write("\n")
                self._stream.flush()
            self._pending = ""
            self._width = 0

    def _clear(self) -> None:
        if self._live and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0

    def _put(self, text: str) -> None:
        self._pending = ""
        if self._live:
            # A line wider than the terminal would wrap and leave its upper half behind.
            text = text[: shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def rate(done: int, total: int, seconds: float, what: str) -> str:
    """ "120/480 records  25 %  12.5 records/s  29 s left" after `seconds` of work."""
    text = f"{done}/{total} {what}  {100 * done // max(1, total)} %"
    if done == 0 or seconds <= 0:
        return text
    speed = done / seconds
    return f"{text}  {speed:.3g} {what}/s  {duration((total - done) / speed)} left"


def duration(seconds: float) -> str:
    """`seconds` for people: "8 s", "3 min 20 s", "2 h 05 min", "3 d 4 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 2 * 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(num_bytes: float) -> str:
    """`num_bytes` for people, in powers of ten as disks are sold: "512 B", "3.1 MB", "1.24 TB"."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
