"""What a piece of work costs in a process of its own: seconds, and the memory at its peak."""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.002


@dataclass(frozen=True)
class Usage:
    """Memory of a process in bytes: anonymous before the work and at its peak, and all of it at its peak.

    `anonymous` is what the process itself allocated; `total` adds the pages of mapped files, which the system takes
    back when it needs them. Peaks are sampled every 2 ms from outside.
    """

    before: int
    anonymous: int
    total: int

    @property
    def growth(self) -> int:
        """Anonymous bytes at the peak beyond those before."""
        return self.anonymous - self.before


def in_new_process(work: Callable[..., Any], *arguments: Any) -> tuple[Any, Usage]:
    """What `work(*arguments)` returns in a new process, and its memory; imports are done before it is measured."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        ours.recv()
        before, total = _resident(process.pid)
        peak = before
        ours.send("go")
        while not ours.poll(SAMPLE_SECONDS):
            anonymous, whole = _resident(process.pid)
            peak, total = max(peak, anonymous), max(total, whole)
        return ours.recv(), Usage(before, peak, total)
    except EOFError:
        raise SystemExit(f"{getattr(work, '__name__', work)} failed in its process") from None
    finally:
        process.join()


def _child(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send("ready")
    pipe.recv()
    found = work(*arguments)
    # The last sample is of a process that still holds what it made.
    time.sleep(3 * SAMPLE_SECONDS)
    pipe.send(found)


def _resident(pid: int | None) -> tuple[int, int]:
    """Anonymous and total resident bytes."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(int(fields.get(name, "0").split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
