"""How long every `--help` takes as a whole process, beside an empty Python process in the same run.

    python benchmarks/help_time.py [--rounds 9]

Rounds are interleaved; medians in seconds, and the ratio to the empty process. The target is 0.3 s on two cores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from fcache.cli.app import COMMANDS

RESULTS = Path(__file__).parent / "results"


def seconds(*arguments: str) -> float:
    """Wall time of a Python process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    lines = {"empty process": ("-c", "pass"), "fcache": ("-m", "fcache.cli", "--help")}
    lines |= {f"fcache {name}": ("-m", "fcache.cli", name, "--help") for name in COMMANDS}
    times: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(rounds):
        for name, arguments in lines.items():
            times[name].append(seconds(*arguments))
    medians = {name: statistics.median(values) for name, values in times.items()}
    empty = medians["empty process"]
    text = (
        f"{rounds} interleaved rounds, {os.cpu_count()} cores, Python {platform.python_version()}, {date.today()}\n\n"
    )
    text += "| `--help` of | s | times an empty process |\n|---|---|---|\n"
    text += "".join(f"| {name} | {s:.3f} | {s / empty:.1f} |\n" for name, s in medians.items())
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "help_time.md").write_text(text)
    (RESULTS / "help_time.json").write_text(json.dumps({"rounds": rounds, "medians": medians}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
