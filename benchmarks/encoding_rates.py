"""What encodings take and how fast they are: bytes, error, and rates on one core and on a GPU where there is one.

    python benchmarks/encoding_rates.py [--records N] [--out DIR]

Features are made up: smooth random fields (power falls with the square of the frequency) mixed over channels, with
channel deviations over two orders of magnitude, in the level shapes of a Swin-L and of a ViT. Real ones are in
`encoding_quality.py`. Rates are GB/s of what the features would take in fp16, by processor time, from the fastest of
some passes over records one at a time, as the reader decodes them; zstd is apart. Decoded features are compared with
the error that the encoding states before anything is timed. Set OMP_NUM_THREADS=1: one core is what is measured.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs.zstd import Zstd

from fcache.cache_spec import LevelSpec, find_encoding
from fcache.cache_spec.encodings import Encoding

LEVELS = (
    LevelSpec("level-4", "C H W", (192, 128, 128), 4),
    LevelSpec("level-16", "C H W", (768, 32, 32), 16),
    LevelSpec("level-32", "C H W", (1536, 16, 16), 32),
    LevelSpec("vit-tiny", "C H W", (192, 32, 32), 16),
    LevelSpec("vit-large", "C H W", (1024, 32, 32), 16),
)
ENCODINGS = ("fp16", "bf16", "int8", "int4", "rot:0.5", "rot:1", "rot:1.25")
ZSTD = Zstd(level=1)
SECONDS = 0.5
Row = dict[str, Any]


def made_up(level: LevelSpec, records: int) -> np.ndarray:
    """float32 [records, C, H, W]."""
    channels, height, width = level.shape
    rng = np.random.default_rng(level.stride)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    fields = np.fft.rfft2(rng.standard_normal((records, channels, height, width)))
    fields = np.fft.irfft2(fields / (frequency + 1 / height), s=(height, width))
    fields /= fields.std()
    mixing = rng.standard_normal((channels, channels)) / np.sqrt(channels) + np.eye(channels)
    mixed = np.einsum("dc,nchw->ndhw", mixing, fields, optimize=True)
    scale = 10.0 ** rng.uniform(-1, 1, (channels, 1, 1))
    return np.ascontiguousarray(scale * (mixed + rng.standard_normal((channels, 1, 1))), dtype=np.float32)


def fastest(
    act: Callable[[int], object], records: int, seconds: float, clock: Callable[[], float] = time.process_time
) -> float:
    """Seconds of the fastest pass over all records: of the processor, which others may be using at the same time."""
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        started = clock()
        for i in range(records):
            act(i)
        best = min(best, clock() - started)
    return best


def measure(encoding: Encoding, level: LevelSpec, x: np.ndarray, seconds: float) -> Row:
    """One row of the table. Raises AssertionError if what is decoded is not what the encoding promises."""
    tables: Mapping[str, np.ndarray] = {}
    if fit := encoding.fit:
        tables = fit.tables(fit.add(fit.start(level), x, level), level)
    stored = encoding.encode(x, level, tables, np)
    records, raw = len(x), 2 * x.size
    single = [{suffix: part[i : i + 1] for suffix, part in stored.items()} for i in range(records)]
    out = {kind: np.empty(x.shape, kind) for kind in ("float32", "float16")}
    decoded = encoding.decode(stored, level, tables, np)
    error = abs(decoded.astype(np.float64) - x)
    assert (error <= encoding.error(x.astype(np.float64), level, tables, np)).all(), encoding.name
    deviation = x.std(axis=(0, 2, 3), keepdims=True).astype(np.float64)
    codes = [np.ascontiguousarray(record) for record in stored[""]]
    frames = [ZSTD.encode(c) for c in codes]
    sides = sum(part.nbytes for suffix, part in stored.items() if suffix)
    packed = encoding.parts(level)[0].compression == "zstd"

    def decode(kind: str) -> Callable[[int], object]:
        return lambda i: encoding.decode(single[i], level, tables, np, out=out[kind][i : i + 1])

    row: Row = {
        "encoding": encoding.name,
        "level": level.name,
        "channels": level.channels,
        "ratio": raw / ((sum(map(len, frames)) if packed else sum(c.nbytes for c in codes)) + sides),
        "ratio zstd": raw / (sum(map(len, frames)) + sides),
        "error": float(np.sqrt(((error / deviation) ** 2).mean())),
        "encode": raw / 1e9 / fastest(lambda i: encoding.encode(x[i : i + 1], level, tables, np), records, seconds),
        "decode": raw / 1e9 / fastest(decode("float32"), records, seconds),
        "decode to fp16": raw / 1e9 / fastest(decode("float16"), records, seconds),
        "zstd out": raw / 1e9 / fastest(lambda i: ZSTD.decode(frames[i], np.empty_like(codes[i])), records, seconds),
    }
    if torch.cuda.is_available():
        row |= on_gpu(encoding, level, x, stored, tables, seconds)
    return row


def on_gpu(
    encoding: Encoding,
    level: LevelSpec,
    x: np.ndarray,
    stored: Mapping[str, np.ndarray],
    tables: Mapping[str, np.ndarray],
    seconds: float,
) -> Row:
    """Rates of whole batches on the GPU, without the way there."""
    there = {name: torch.from_numpy(t.copy()).cuda() for name, t in tables.items()}
    features, codes = torch.from_numpy(x).cuda(), {k: torch.from_numpy(v.copy()).cuda() for k, v in stored.items()}

    def timed(act: Callable[[], object]) -> float:
        def whole(_: int) -> None:
            act()
            torch.cuda.synchronize()

        whole(0)
        return 2 * x.size / 1e9 / fastest(whole, 1, seconds, time.perf_counter)

    return {
        "encode on gpu": timed(lambda: encoding.encode(features, level, there, torch)),
        "decode on gpu": timed(lambda: encoding.decode(codes, level, there, torch)),
    }


def table(result: dict[str, Any]) -> str:
    """The rows as a table, the rates in GB/s of fp16."""
    rows: list[Row] = result["rows"]
    columns = [k for k in rows[0] if k not in ("encoding", "level")]
    lines = [f"{result['machine']}; GB/s of fp16 output on one core, zstd apart", ""]
    lines += [f"| encoding | level | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for row in rows:
        cells = [f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        lines.append(f"| {row['encoding']} | {row['level']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--levels", nargs="*", choices=[level.name for level in LEVELS])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for level in LEVELS:
        if not options.levels or level.name in options.levels:
            x = made_up(level, options.records)
            rows += [measure(find_encoding(name), level, x, options.seconds) for name in ENCODINGS]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    short = f"{os.cpu_count()}cpu{'_gpu' if gpu else ''}"
    machine = f"{platform.machine()}, {os.cpu_count()} processors{gpu}, numpy {np.__version__}, {date.today():%Y-%m}"
    result = {"machine": machine, "records": options.records, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"encoding_rates_{short}_{date.today():%Y-%m}"
    (options.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
