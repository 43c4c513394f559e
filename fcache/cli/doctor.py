"""`fcache doctor`: what is installed, what the machine offers, and one line of remedy for each problem."""

import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from fcache import __version__
from fcache.cli.progress import size


@dataclass(frozen=True)
class Package:
    """A requirement as in pyproject.toml, what it is for, and the extra that holds it ("" for none)."""

    requirement: str
    purpose: str
    extra: str = ""

    @property
    def name(self) -> str:
        """The package's name on the index."""
        return re.split("[>=]", self.requirement)[0]

    @property
    def minimum(self) -> str:
        """The oldest version that works."""
        return re.split("[>=]=", self.requirement)[1].removesuffix(".*").split(",")[0]


# As in pyproject.toml (a test compares them).
PACKAGES = (
    Package("click>=8.2", "the command line"),
    Package("dask>=2025.1", "extraction on a cluster"),
    Package("google-crc32c>=1.5", "checks of shard indexes"),
    Package("numcodecs>=0.16", "compressed arrays"),
    Package("numpy>=2", "arrays"),
    Package("pillow>=11", "reading photos"),
    Package("pycocotools>=2.0.8", "instance masks"),
    Package("safetensors>=0.4.5", "weights"),
    Package("scipy>=1.13", "matching of queries and classes"),
    Package("timm>=1.0.20", "backbones"),
    Package("torch>=2.6", "backbones and heads"),
    Package("torchvision>=0.21", "views"),
    Package("zarr>=3.1,<4", "caches"),
    Package("decord>=0.6", "video", "video"),
    Package("obstore>=0.12", "caches in object stores", "s3"),
    Package("tensorboard>=2.18", "training curves", "tensorboard"),
    Package("dask-cuda>=25.2", "a cluster of GPUs", "dask-cuda"),
)

X86 = ("x86_64", "AMD64")
FREE_BYTES = 20e9
OPEN_FILES = 1024


@dataclass(frozen=True)
class Check:
    """One finding: `state` is "ok", "note" (works without) or "fail"; `remedy` is empty where nothing is to be done."""

    name: str
    state: str
    found: str
    remedy: str = ""


@click.command(
    epilog="""\b
Examples:
  fcache doctor
  fcache doctor --path /data/caches     free space there
  fcache doctor --json
"""
)
@click.option(
    "--path", default=".", show_default=True, help="Folder for caches, whose free space is looked at.", metavar="DIR"
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(path: str, as_json: bool) -> int:
    """Check this machine and say what to do about each problem. Exit status 1 if something must be done."""
    checks = [*packages(), *devices(), *disks(Path(path)), *limits(), *data_root()]
    failed = sum(check.state == "fail" for check in checks)
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], indent=2))
        return int(failed > 0)
    width = max(len(check.name) for check in checks)
    for check in checks:
        click.echo(f"{check.state:4}  {check.name.ljust(width)}  {check.found}")
        if check.remedy:
            click.echo(f"      {' ' * width}  -> {check.remedy}")
    click.echo("all is well" if not failed else f"{failed} to mend: see the lines that begin with fail")
    return int(failed > 0)


def packages() -> Iterator[Check]:
    """fcache's own version, Python's and that of every package, without importing any."""
    yield Check("fcache", "ok", __version__)
    old = sys.version_info < (3, 11)
    yield Check("python", "fail" if old else "ok", platform.python_version(), "install Python 3.11" if old else "")
    for package in PACKAGES:
        remedy = f"for {package.purpose}: pip install '{package.requirement}'"
        missing = "note" if package.extra else "fail"
        try:
            found = importlib.metadata.version(package.name)
        except importlib.metadata.PackageNotFoundError:
            if package.name == "decord" and (sys.platform == "darwin" or platform.machine() not in X86):
                remedy = "there is no wheel for this machine; video needs Linux or Windows on x86-64"
            yield Check(package.name, missing, "not installed", remedy)
            continue
        if _numbers(found) < _numbers(package.minimum):
            yield Check(package.name, missing, f"{found}, older than {package.minimum}", remedy)
        else:
            yield Check(package.name, "ok", found)


def devices() -> Iterator[Check]:
    """Processor cores and what torch can compute on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Check("processor", "ok", f"{platform.machine()}, {cores} cores usable, {size(memory)} of memory")
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken build raises anything: OSError for a library, ImportError, RuntimeError
        reason = " ".join(str(error).split())[:200]
        yield Check("torch", "fail", f"does not import: {reason}", "pip install --force-reinstall torch torchvision")
        return
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            yield Check(f"cuda:{i}", "ok", f"{card.name}, {size(card.total_memory)}")
    elif torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple GPU, for training heads (--device mps)")
    else:
        yield Check(
            "gpu",
            "note",
            f"none that torch {torch.__version__} can use; the CPU does all the work",
            "with an NVIDIA card: compare the driver (nvidia-smi) with the CUDA version of torch; "
            "without one: small models, --precision fp32 and recipes that end in -small",
        )


def disks(path: Path) -> Iterator[Check]:
    """Free space for caches, and whether they can be written."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    low = free < FREE_BYTES
    yield Check(
        "free space",
        "note" if low else "ok",
        f"{size(free)} at {path}",
        "ask `fcache plan` what a cache takes; --path names another disk" if low else "",
    )
    writable = os.access(there, os.W_OK)
    yield Check(
        "writable",
        "ok" if writable else "note",
        f"{path}: {'yes' if writable else 'no'}",
        "" if writable else "reading and training work; extract to another folder with --cache",
    )


def limits() -> Iterator[Check]:
    """The process limits that long runs meet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < OPEN_FILES
    yield Check("open files", "fail" if few else "ok", f"{soft} of {hard}", f"ulimit -n {OPEN_FILES}" if few else "")
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest != resource.RLIM_INFINITY:
        yield Check("file size", "note", f"at most {size(largest)} a file", "ulimit -f unlimited, or --shard-records")
    memory, _ = resource.getrlimit(resource.RLIMIT_AS)
    if memory != resource.RLIM_INFINITY:
        yield Check("address space", "note", f"at most {size(memory)}", "ulimit -v unlimited: caches are mapped")


def data_root() -> Iterator[Check]:
    """Where datasets are looked for."""
    root = os.environ.get("FCACHE_DATA")
    if not root:
        yield Check("FCACHE_DATA", "note", "not set", "name --data-root, or export FCACHE_DATA (one folder a dataset)")
    elif not Path(root).is_dir():
        yield Check("FCACHE_DATA", "fail", f"{root} is no folder", "export FCACHE_DATA as the folder of your datasets")
    else:
        found = sorted(p.name for p in Path(root).iterdir() if p.is_dir())
        yield Check("FCACHE_DATA", "ok", f"{root}: {', '.join(found[:8]) or 'empty'}{', …' if found[8:] else ''}")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading release numbers of a version, "2.15.0+cu132" -> (2, 15, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
