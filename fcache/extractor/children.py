"""Child processes: forked from a server that imported everything once, and never from this process.

A fork of a process with threads or a GPU is not sound, and a new interpreter for each child would import torch as many
times as there are decoders and devices.
"""

import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any


def child_context() -> ForkServerContext:
    """The context in which decoders and extraction processes are started."""
    context = multiprocessing.get_context("forkserver")
    # Without effect once the server runs.
    context.set_forkserver_preload(["fcache.extractor"])
    return context


def pipe_of(context: ForkServerContext) -> tuple[Connection, Connection]:
    """Both ends of a pipe; the child's is to be closed here once the child has started."""
    ends: Any = context.Pipe()
    return ends
