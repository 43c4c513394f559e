"""The engine of this process alone. Several commands on one cache share its shards."""

from collections.abc import Callable

from fcache.extractor.events import Event, ExtractionStarted, WorkerEvent
from fcache.extractor.extraction import Extraction, open_extraction, share
from fcache.extractor.job import Job
from fcache.extractor.work import Task, tasks_of


def local(job: Job, report: Callable[[Event | WorkerEvent], None], should_stop: Callable[[], bool]) -> None:
    """Extracts in this process, on the job's device."""
    with open_extraction(job) as extraction:
        report(started(extraction, tasks_of(extraction.writer, extraction.prepared)))
        share(extraction, report=report, should_stop=should_stop)


def started(extraction: Extraction, tasks: list[Task]) -> ExtractionStarted:
    """What there is to do."""
    plan = extraction.plan
    records = sum(len(t.requests) for t in tasks)
    return ExtractionStarted(records, plan.records - plan.pending_records, plan.pending_bytes)
