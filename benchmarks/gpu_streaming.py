"""Streaming to a GPU: first whether every number arrives, then how fast.

    python benchmarks/gpu_streaming.py [--records 192] [--rounds 5]

Correctness: batches on the GPU equal those on the CPU bit for bit, for every encoding (those that multiply matrices:
within rounding), streamed and resident; and no buffer is filled again before it is copied, with copies that start late
and a caller that works late, for several numbers of threads, from pinned and from pageable buffers. As a control the
same is done by a loop that does not wait: the number of wrong batches there says how sharp the check is.

Rates: batches of 16 int8 pyramids of SwinV2-T at 512 x 512, decoded on the GPU, in interleaved rounds: without work on
the GPU, and with work that takes as long; copied in line, and ahead on a stream of their own; from pinned and pageable
buffers; and kept on the GPU. Without a CUDA device it says so and ends with 0.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcache.cache_spec import (
    BackboneSpec,
    Block,
    CacheSource,
    CodedLevel,
    FeatureSpec,
    Group,
    LevelSpec,
    Manifest,
    SplitRecipe,
    StreamConfig,
    View,
    encoding_names,
    find_encoding,
    index_arrays,
    open_cache,
    open_source,
    open_writer,
)
from fcache.heads import Batch, ResidentSource, batch_buffers, device_batches, to_batch

BATCH = 16
SMALL = (LevelSpec("level-4", "C H W", (24, 32, 32), 4), LevelSpec("pooled", "C", (37,), 32))
LARGE = (
    LevelSpec("level-4", "C H W", (96, 128, 128), 4),
    LevelSpec("level-8", "C H W", (192, 64, 64), 8),
    LevelSpec("level-16", "C H W", (384, 32, 32), 16),
    LevelSpec("level-32", "C H W", (768, 16, 16), 32),
)
# GPU cycles that a copy, or the caller's work, is held up: some milliseconds.
LATE = 10_000_000
Batches = Callable[[int], Iterator[Batch]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to make the caches (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_streaming: no CUDA device, nothing was checked or measured")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    work = Path(tempfile.mkdtemp(prefix="fcache-gpu-", dir=args.folder))
    try:
        found: dict[str, object] = {"equal": check_encodings(work, device), "overwritten": check_buffers(work, device)}
        found["rates"] = measure(work, device, args.records, args.rounds)
    finally:
        shutil.rmtree(work)
    found["machine"] = {
        "gpu": torch.cuda.get_device_name(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    print(json.dumps(found, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device).lower())
    (args.out / f"gpu_streaming_{name}_{date.today():%Y-%m}.json").write_text(json.dumps(found, indent=1) + "\n")


def make_cache(root: Path, levels: tuple[LevelSpec, ...], encoding: str, records: int) -> None:
    """A cache of one training split without targets."""
    rng = np.random.default_rng(0)
    recipe = SplitRecipe({"kind": "plain"}, encoding)
    backbone = BackboneSpec("random", {}, "0" * 64, (0.5,) * 3, (0.5,) * 3, "fp32", tuple(x.free() for x in levels))
    ids = tuple(f"sample-{i}" for i in range(records))
    group = Group("train", "train", "training", (512, 512), levels, encoding, 32, BATCH, ids, ids, 1, ())
    writer = open_writer(root, Manifest(FeatureSpec(backbone, recipe, recipe, seed=0), (), (group,)))
    view = View((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (512, 512), (512, 512), (512, 512))
    encode = find_encoding(encoding).encode
    for shard in writer.pending():
        shard_writer = writer.write(shard)
        for position in range(shard.count):
            arrays = index_arrays([view], [shard.sample + position], [0])
            for level in levels:
                x = rng.standard_normal((1, *level.shape), dtype=np.float32)
                arrays |= {level.name + suffix: codes for suffix, codes in encode(x, level, {}, np).items()}
            shard_writer.append([position], arrays)
        shard_writer.commit(facts={}, fingerprint={})
    writer.finish()


def open_train(root: Path, device: torch.device, *, threads: int = 2, pinned: bool = True) -> CacheSource:
    """The cache's split, with buffers for a device or ordinary ones."""
    allocate = batch_buffers(device) if pinned else np.empty
    return open_source(open_cache(root), "train", StreamConfig(BATCH, threads=threads, seed=1, allocate=allocate))


def expected_batches(root: Path, epochs: int) -> list[dict[str, Tensor]]:
    """What all batches of some epochs hold, decoded on the CPU."""
    source, cpu = open_train(root, torch.device("cpu")), torch.device("cpu")
    batches = (to_batch(block, cpu) for epoch in range(epochs) for block in source.blocks(epoch))
    return [{name: x.clone() for name, x in batch.features.items()} for batch in batches]


def check_encodings(work: Path, device: torch.device) -> dict[str, str]:
    """Compares every encoding on the device with the CPU. Ends the program if a number is not equal."""
    found: dict[str, str] = {}
    for encoding in encoding_names():
        if find_encoding(encoding).fit is not None:
            found[encoding] = check_fitted(encoding, device)
            continue
        root = work / encoding
        make_cache(root, SMALL, encoding, 5 * BATCH + 3)
        expected = expected_batches(root, 2)
        streamed, resident = open_train(root, device), ResidentSource(open_train(root, device), device)
        for name, source in (("streamed", streamed), ("resident", resident)):
            batches = (b for epoch in range(2) for b in device_batches(source.blocks(epoch), device))
            wrong = wrong_batches(({k: x.cpu() for k, x in b.features.items()} for b in batches), expected)
            if wrong:
                sys.exit(f"{encoding}, {name}: {wrong} of {len(expected)} batches differ from those on the CPU")
        found[encoding] = "bit for bit, streamed and resident"
    return found


def check_fitted(encoding: str, device: torch.device) -> str:
    """A fitted encoding multiplies matrices, which a GPU sums in another order: equal within rounding."""
    code, worst = find_encoding(encoding), 0.0
    for level in SMALL:
        assert code.fit is not None
        x = np.random.default_rng(0).standard_normal((64, *level.shape), dtype=np.float32)
        tables = code.fit.tables(code.fit.add(code.fit.start(level), x, level), level)
        coded = CodedLevel(level, encoding, code.encode(x, level, tables, np), tables)
        block = Block(("a",) * 64, (), (), {level.name: coded}, {})
        one, other = (to_batch(block, d).features[level.name].cpu() for d in (torch.device("cpu"), device))
        worst = max(worst, float((one - other).abs().max() / one.abs().max()))
    if worst > 1e-5:
        sys.exit(f"{encoding}: differs from the CPU by {worst:.2g} of the largest feature")
    return f"within {worst:.2g} of the largest feature"


def wrong_batches(found: Iterator[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> int:
    """How many batches are not, bit for bit, what they should be."""
    return sum(
        any(not torch.equal(one[k].view(torch.int32), other[k].view(torch.int32)) for k in other)
        for one, other in zip(found, expected, strict=True)
    )


def check_buffers(work: Path, device: torch.device) -> dict[str, str]:
    """Counts batches that were overwritten on their way. Ends the program if one was, without waiting excepted."""
    root, epochs, found = work / "buffers", 3, dict[str, str]()
    make_cache(root, SMALL, "int8", 40 * BATCH)
    expected = expected_batches(root, epochs)
    for threads in (1, 2, 4):
        for pinned in (True, False):
            for copies, late in (("at once", 0), ("late", LATE)):
                source = open_train(root, device, threads=threads, pinned=pinned)
                name = f"{threads} threads, {'pinned' if pinned else 'pageable'}, copies {copies}"
                blocks = partial(delayed, source, late, device)
                wrong = wrong_batches(kept(blocks, device_batches, epochs, device), expected)
                if wrong:
                    sys.exit(f"{name}: {wrong} of {len(expected)} batches were overwritten on their way")
                found[name] = f"0 of {len(expected)}"
    blocks = partial(delayed, open_train(root, device), LATE, device)
    wrong = wrong_batches(kept(blocks, without_waiting, epochs, device), expected)
    found["control: late copies that nobody waits for"] = f"{wrong} of {len(expected)}"
    return found


def delayed(source: CacheSource, cycles: int, device: torch.device, epoch: int) -> Iterator[Block[np.ndarray]]:
    """A source's blocks; what is copied of each has to wait, for `device_batches` asks for blocks on its stream."""
    for block in source.blocks(epoch):
        sleep(cycles, device)
        yield block


def kept(blocks: Callable[[int], Iterator[Block]], copy: Callable, epochs: int, device: torch.device) -> Iterator:
    """All batches, read by a caller that works late and keeps nothing of a batch but the results of that work."""
    results: list[dict[str, Tensor]] = []
    for epoch in range(epochs):
        for batch in copy(blocks(epoch), device):
            sleep(LATE, device)
            results.append({name: x.clone() for name, x in batch.features.items()})
            del batch
    synchronise(device)
    return ({name: x.cpu() for name, x in result.items()} for result in results)


def without_waiting(blocks: Iterator[Block], device: torch.device) -> Iterator[Batch]:
    """The control: copies on a stream of their own, buffers given back at once."""
    side = torch.cuda.Stream(device)
    while True:
        with torch.cuda.stream(side):
            block = next(blocks, None)
            if block is None:
                return
            batch = to_batch(block, device)
        torch.cuda.current_stream(device).wait_stream(side)
        for x in batch.features.values():
            x.record_stream(torch.cuda.current_stream(device))
        yield batch


def sleep(cycles: int, device: torch.device) -> None:
    """Holds up what follows on the current stream of a GPU."""
    if cycles and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda._sleep(cycles)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(work: Path, device: torch.device, records: int, rounds: int) -> dict[str, dict[str, float]]:
    """GB of stored codes a second for every variant, medians of interleaved rounds, and the ratio to in-line copies."""
    root = work / "rates"
    records = max(BATCH, records // BATCH * BATCH)
    make_cache(root, LARGE, "int8", records)
    size = sum(int(np.prod(level.shape)) for level in LARGE) * records / 1e9
    pinned, pageable = open_train(root, device), open_train(root, device, pinned=False)
    resident = ResidentSource(open_train(root, device), device)
    variants: dict[str, Batches] = {
        "pinned, in line": partial(in_line, pinned, device),
        "pinned, ahead": lambda epoch: device_batches(pinned.blocks(epoch), device),
        "pageable, ahead": lambda epoch: device_batches(pageable.blocks(epoch), device),
        "resident": lambda epoch: device_batches(resident.blocks(epoch), device),
    }
    matrix = torch.randn(4096, 4096, device=device)
    products = 0
    rows: dict[str, dict[str, float]] = {}
    for load in ("no work", "work as long as the copy"):
        times: dict[str, list[float]] = {name: [] for name in variants}
        for r in range(rounds + 1):
            for name, batches in variants.items():
                spent = timed(batches, r, matrix, products, device)
                # The first round fills caches and allocators.
                times[name] += [spent] if r else []
        base = statistics.median(times["pinned, in line"])
        for name, found in times.items():
            middle = statistics.median(found)
            rows[f"{load}: {name}"] = {"gb_per_s": size / middle, "seconds": middle, "of_in_line": middle / base}
        if load == "no work":
            products = products_in(base / (records // BATCH), matrix, device)
    work_alone = timed(lambda epoch: iter([None] * (records // BATCH)), 0, matrix, products, device)
    rows["work alone"] = {"seconds": work_alone, "of_in_line": work_alone / base}
    return rows


def in_line(source: CacheSource, device: torch.device, epoch: int) -> Iterator[Batch]:
    """What a loop without a stream of its own does: copy, decode, work, wait."""
    for block in source.blocks(epoch):
        yield to_batch(block, device)
        synchronise(device)


def timed(batches: Callable, epoch: int, matrix: Tensor, products: int, device: torch.device) -> float:
    """Seconds for an epoch whose every batch is followed by that many products of a matrix."""
    synchronise(device)
    started = time.perf_counter()
    for _ in batches(epoch):
        for _ in range(products):
            torch.mm(matrix, matrix)
        # As a training step, which looks at its loss.
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    synchronise(device)
    return time.perf_counter() - started


def products_in(seconds: float, matrix: Tensor, device: torch.device) -> int:
    """How many products of a matrix take that long."""
    one = timed(lambda epoch: iter(range(10)), 0, matrix, 10, device) / 100
    return max(1, round(seconds / one))


if __name__ == "__main__":
    main()
