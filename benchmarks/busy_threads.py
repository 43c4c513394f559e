"""What waiting OpenMP threads cost on a busy machine: a backbone's forward pass with and without OMP_WAIT_POLICY.

    python benchmarks/busy_threads.py [--rounds 5]

Two processes keep two cores busy while a third runs MobileNetV2 (random weights, fp32, batch 4, 256 x 256) with one
thread, with two that spin while they wait (the default), and with two that sleep (what the command line sets). Rounds
are interleaved; medians of wall seconds a batch, and the ratio to one thread.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
VARIANTS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads, spinning": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": ""},
    "2 threads, sleeping": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}
PROGRAM = """
import statistics, time, torch
from fcache.extractor.backbones import load_backbone
backbone = load_backbone("mobilenetv2_100", weights="random:0", input_size=(256, 256), precision="fp32")
images, seconds = torch.zeros(4, 3, 256, 256), []
for _ in range(6):
    started = time.perf_counter()
    backbone.forward(images)
    seconds.append(time.perf_counter() - started)
print(statistics.median(seconds[1:]))
"""


def seconds(variant: dict[str, str]) -> float:
    """Wall seconds of a batch in a fresh process."""
    environment = {k: v for k, v in {**os.environ, **variant}.items() if v}
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=environment, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found: dict[str, dict[str, list[float]]] = {}
    for load in ("idle", "busy"):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 if load == "busy" else 0)]
        try:
            found[load] = {name: [] for name in VARIANTS}
            for _ in range(rounds):
                for name, variant in VARIANTS.items():
                    found[load][name].append(seconds(variant))
        finally:
            for process in busy:
                process.kill()
                process.wait()
    text = (
        f"{rounds} interleaved rounds, {os.cpu_count()} cores, Python {platform.python_version()}, {date.today()}\n\n"
    )
    text += "| | idle: s a batch | of 1 thread | two busy processes beside it: s a batch | of 1 thread |\n"
    text += "|---|---|---|---|---|\n"
    medians = {load: {name: statistics.median(v) for name, v in rows.items()} for load, rows in found.items()}
    for name in VARIANTS:
        cells = [
            f"{medians[load][name]:.3f} | {medians[load][name] / medians[load]['1 thread']:.2f}" for load in medians
        ]
        text += f"| {name} | {' | '.join(cells)} |\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "busy_threads.md").write_text(text)
    (RESULTS / "busy_threads.json").write_text(json.dumps(medians, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
