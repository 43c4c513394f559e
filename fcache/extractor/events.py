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
class DataNoted:
    """Something about the data that a user should know."""

    text: str


Event = DataNoted | ExtractionStarted | RecordsDone | ShardCommitted | SampleQuarantined | WaitingForOthers
