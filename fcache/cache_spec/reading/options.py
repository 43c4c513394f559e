"""How the files of a cache are read: maps or positional reads, hints ahead of use, checks of digests."""

from dataclasses import dataclass
from pathlib import Path

from fcache.cache_spec.errors import SpecError
from fcache.cache_spec.storage.protocol import Storage

MODES = ("auto", "mmap", "pread")
AHEAD = ("auto", "willneed", "none")
CHECKS = ("none", "digest")
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "glusterfs", "afs")


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; nothing here changes a number.

    `mode`: "mmap" copies out of maps (a file cut short under a map kills the process), "pread" reads by position (a
    file cut short is an error), "auto" maps on local file systems and reads by position on network ones. `ahead`: a
    whole batch is asked for before its first record is read, so that the disk has much to do at once: "willneed"
    always, "none" never, "auto" when a sample of its records is not in memory. `check`: "digest" compares the SHA-256
    of every shard file with its commit when it is first opened, which reads the file whole and takes 0.56 CPU seconds
    a GB (AMD EPYC). On object stores `mode` and `ahead` mean nothing: records are ranges, all of a batch at once.

    Raises SpecError for another value.
    """

    mode: str = "auto"
    ahead: str = "auto"
    check: str = "none"

    def __post_init__(self) -> None:
        fields = (
            ("read mode", self.mode, MODES),
            ("hint ahead of use", self.ahead, AHEAD),
            ("check on read", self.check, CHECKS),
        )
        for what, value, known in fields:
            if value not in known:
                raise SpecError(f"{what} is one of {', '.join(known)}, got {value!r}")


def choose_mode(storage: Storage, mode: str) -> str:
    """What "auto" means at this storage: "mmap", "pread", or "ranges" on an object store, whatever `mode` is."""
    root = storage.path()
    if root is None:
        return "ranges"
    if mode != "auto":
        return mode
    return "pread" if file_system(root).split(".")[0] in NETWORK else "mmap"


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, "" where the system does not tell."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    resolved, best, kind = path.resolve(), -1, ""
    for line in mounts:
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].replace("\\040", " "))
        if (resolved == point or point in resolved.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split()[0]
    return kind
