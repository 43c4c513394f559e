"""Engines: who does the work of an extraction. Each is one function over the same extraction of one shard."""

from collections.abc import Callable

from fcache.extractor.events import Event, WorkerEvent
from fcache.extractor.job import Job

# Extracts what a job lacks. Events may come from several threads. Raises Stopped when the last argument turned true.
Engine = Callable[[Job, Callable[[Event | WorkerEvent], None], Callable[[], bool]], None]
