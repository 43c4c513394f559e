"""Results: the machine they were measured on, a Markdown table, and two files."""

import argparse
import importlib.metadata
import json
import multiprocessing.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def arguments(text: str, **defaults: int) -> argparse.Namespace:
    """The options of a benchmark: whole numbers as in `defaults`, the folder to work in and the one for results."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--folder", type=Path, help="where to make the stores (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


@contextmanager
def work_folder(folder: Path | None) -> Iterator[Path]:
    """A new folder in `folder`, removed at the end, with the temporary files that peers leave behind."""
    work = Path(tempfile.mkdtemp(prefix="fcache-benchmark-", dir=folder))
    (work / "temporary").mkdir()
    # Made here if it is not there yet: it is in use until the program ends.
    multiprocessing.util.get_temp_dir()
    before, tempfile.tempdir = tempfile.tempdir, str(work / "temporary")
    try:
        yield work
    finally:
        tempfile.tempdir = before
        shutil.rmtree(work)


def machine(*packages: str) -> dict[str, Any]:
    """What the figures were measured on, with the versions of the packages that are installed."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {}
    for name in ("numpy", "torch", "zarr", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "short": f"{cores}cpu",
        "cpu": model,
        "cores": cores,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "versions": versions,
        "load_average": round(os.getloadavg()[0], 2),
    }


def table(title: str, columns: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]], *, first: str = "") -> str:
    """Rows as Markdown: `columns` maps a heading to a format over a row's values; what a row lacks stays empty."""
    lines = [f"**{title}**", "", f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = []
        for text in columns.values():
            try:
                cells.append(text.format(**row))
            except KeyError:
                cells.append("")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def publish(claim: str, result: Mapping[str, Any], body: str, out: Path, *, m: Mapping[str, Any]) -> None:
    """Prints a result and writes `<claim>_<machine>_<month>.json` and `.md` to `out`."""
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    line = f"{m['cpu']}, {m['cores']} cores, {m['system']}, Python {m['python']}, {versions}; "
    # Where the files lay and went decides nothing that another machine could repeat.
    given, places = sys.argv[1:], ("--folder", "--work", "--out")
    kept = [a for i, a in enumerate(given) if a not in places and (i == 0 or given[i - 1] not in places)]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])
    text = f"{result['what']}\n\n{line}load average {m['load_average']}.\n\n`{command}`\n\n{body}\n"
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{claim}_{m['short']}_{date.today():%Y-%m}"
    full = {**result, "command": command, "machine": m}
    (out / f"{stem}.json").write_text(json.dumps(full, indent=1) + "\n")
    (out / f"{stem}.md").write_text(text)
