"""What an extraction reports while it runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExtractionStarted:
    """Records to do in this run, records that are committed already, stored bytes to write."""

    records: int
    done: int
    bytes: int


@dataclass(frozen=True)
class RecordsDone:
    """`records` of `total` of this run have passed the backbone; `seconds` since the start."""

    records: int
    total: int
    seconds: float


@dataclass(frozen=True)
class ShardCommitted:
    """One part of a shard was committed."""

    group: str
    part: str
    shard: int
    bytes: int


@dataclass(frozen=True)
class SampleQuarantined:
    """A sample was left out."""

    sample: str
    reason: str


@dataclass(frozen=True)
class WaitingForOthers:
    """All that is left is claimed by other processes; this many shards."""

    shards: int


@dataclass(frozen=True)
class WaitingForWorkers:
    """The cluster has no workers now; the run goes on when some join it."""


@dataclass(frozen=True)
class WorkerLost:
    """A process of several died or failed; what it was at goes back to the others."""

    worker: str
    reason: str


@dataclass(frozen=True)
class BatchDone:
    """So many more records have passed the backbone: what `RecordsDone` is added up from."""

    records: int


@dataclass(frozen=True)
class TimeSpent:
    """Where a process stood in its work since the last of these: seconds.

    `decoding` and `writing` are those in which the backbone waited for records to come, or for what it had made to be
    taken; `computing` those of the backbone and the encoding.
    """

    decoding: float = 0.0
    computing: float = 0.0
    writing: float = 0.0

    def __add__(self, other: "TimeSpent") -> "TimeSpent":
        return TimeSpent(self.decoding + other.decoding, self.computing + other.computing, self.writing + other.writing)

    @property
    def total(self) -> float:
        """All of it."""
        return self.decoding + self.computing + self.writing


# What a process of an extraction tells the one that leads it.
WorkerEvent = BatchDone | TimeSpent | ShardCommitted | SampleQuarantined | WaitingForOthers
Event = (
    ExtractionStarted
    | RecordsDone
    | ShardCommitted
    | SampleQuarantined
    | WaitingForOthers
    | WaitingForWorkers
    | WorkerLost
)
