"""Child processes that are killed, starved or watched, forked from a server that has imported everything once."""

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["fcache.extractor", "fcache.heads", "fcache.cli.app", "distributed", "tests.torture.children"]
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of Python that change the file system: which of their arguments are paths, which are folder descriptors.
CHANGES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.utime": ((0, 3),),
    "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),),
}


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status (negative: the signal), what it returned, the traceback if it raised."""

    status: int
    value: Any
    error: str


class Hung(BaseException):
    """A piece of work took too long."""


def run_child(function: Callable[..., Any], *args: Any, seconds: float = 600) -> Ended:
    """Calls `function` in a child process and waits for it; one that takes too long shows its stacks and ends."""
    receive, send = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_call, args=(send, seconds, function, *args))
    process.start()
    send.close()
    value, error = None, "no answer"
    with contextlib.suppress(EOFError):
        value, error = receive.recv()
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, value, error)


def _call(send: Any, seconds: float, function: Callable[..., Any], *args: Any) -> None:
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        send.send((function(*args), ""))
    except BaseException:
        send.send((None, traceback.format_exc(limit=-30)))
        os._exit(1)


def group_is_gone(group: int, *, seconds: float) -> bool:
    """Whether no process of a process group works any more, after a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(of == group and state != "Z" for state, of in _processes()):
            return True
        time.sleep(0.1)
    return False


def _processes() -> Iterator[tuple[str, int]]:
    """State and group of every process. What ended is there as "Z" until the system's first process, whose child it
    became, asks for it: some do so after a minute only.
    """
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name before it may hold spaces and brackets.
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
            yield state, int(group)


def limit_memory(more: int) -> None:
    """Lets this process take at most `more` bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Hung inside if it takes longer."""

    def ring(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    # Again and again: what cleans up after the first may hang, too.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def watch_writes(inside: Path) -> list[str]:
    """From now on every change of a file outside `inside` is told in the list that is returned."""
    found: list[str] = []
    top = os.path.realpath(inside)
    sys.dont_write_bytecode = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)) and args[2] and args[2] & WRITING:
            _tell(found, top, event, os.path.realpath(os.fsdecode(args[0])))
        for argument, folder in CHANGES.get(event, ()):
            if isinstance(args[argument], (str, bytes, os.PathLike)):
                path = os.fsdecode(args[argument])
                if folder is not None and isinstance(args[folder], int) and args[folder] >= 0:
                    path = os.path.join(os.readlink(f"/proc/self/fd/{args[folder]}"), path)
                # These change the entry itself, not what a link there leads to.
                _tell(found, top, event, os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)))

    sys.addaudithook(hook)
    return found


def _tell(found: list[str], top: str, event: str, path: str) -> None:
    if path != top and not path.startswith(f"{top}/") and path not in ("/dev/null", "/dev/tty"):
        found.append(f"{event} {path}")
