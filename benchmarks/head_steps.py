"""What a cached training step costs beside a live one: waiting for data, and the ratio to running the frozen backbone.

    python benchmarks/head_steps.py [--task coco] [--work DIR] [--device cuda] [--only swinv2-t/linear]

SwinV2-T and -B with random weights on made-up scenes with ADE20K's size and number of classes, views of 512 x 512, and
the heads of the papers at full width; with `--task coco` scenes of COCO's size and classes, views of 1024 x 1024 by
large-scale jitter, and the detectors of the papers. On a CPU views are of 256 x 256, as those of the small recipes. For
every head, in interleaved rounds of one process and with the same learner:

- cached: batches of `fcache extract`'s store kept in memory (`train-head --resident ram`; `device` on a GPU), int8 as
  it is by default and fp16. Waiting is the share of the step that passes before the batch is there, as `train` counts.
- live: the backbone as `fcache extract` runs it (inference mode; bf16 autocast on a GPU; float32 on a CPU, where bf16
  is several times slower unless the processor has instructions for it) on the same views, which lie decoded in memory,
  then the same step of the head. The ratio counts the backbone only, no decoding and no augmentation; what these take
  is in the table of backbones, as the product's live source does them (two threads, nothing ahead).
- on a GPU also a batch that stays there, decoded: what the step takes beyond it is all that data cost, also where the
  GPU waits and not the program.

Peak memory is that of the turns on int8 and of the live ones: allocated by torch on a GPU, resident in the process on a
CPU (Linux). Both include the weights of the backbone and the stores, which lie there all the time; so a training from
a cache alone takes less than is said here.

The bound is (b + 3h) / 3h with multiply-adds of the backbone's (b) and the head's forward pass (h) by FlopCounterMode:
a backward pass is taken as two forward ones; losses, matching, grid samples, elementwise work and the optimizer count
for nothing, so that a measured ratio may lie on either side; of detectors no head's pass is counted whole, since what
they do depends on what they find, so they have no bound. Heads train in float32 on a CPU, under bf16 autocast on a
GPU. A step of a CPU takes seconds: there a batch has 2 photos, fp16 is measured for the first head alone, whose step is
the shortest, and all heads together have one round.

With --work what is done is kept there, and not done again: the script may be stopped and continued, or run row by row
with --only, which takes a backbone, a row (swinv2-t/linear, swinv2-t/backbone) or a pattern ('*/upernet*').
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

# As the command line does, and before torch reads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from storage.report import RESULTS, machine, publish, table, work_folder
from storage.rounds import Row
from training.memory import forget_peak, peak_memory
from training.sources import NUM_CLASSES, PHOTOS, Data, decoded_once, one_batch
from training.steps import Step, giga_macs, head_macs, learner, steps, turn, warm_up

from fcache.cache_spec import BlockSource
from fcache.cache_spec.spec import PRECISIONS
from fcache.extractor import LiveSource
from fcache.extractor.forward import normalised
from fcache.heads import TrainConfig, choose_head, device_batches, needed_levels
from fcache.heads.learner import Learner

BACKBONES = ("swinv2-t", "swinv2-b")
HEADS = {
    "ade20k": (
        "linear",
        "fcn",
        "upernet",
        "upernet:neck=bifpn,layers=5",
        "mask2former:pixel_blocks=1,decoder_blocks=3",
        "mask2former:pixel_blocks=6,decoder_blocks=9",
    ),
    "coco": (
        "maskrcnn",
        "maskrcnn:neck=fpn-residual,layers=4",
        "maskrcnn:neck=bifpn,layers=5",
        "cascade",
        "cascade:neck=bifpn,layers=5",
        "htc-without-semantic",
    ),
}
# "Could Giant Pretrained Image Models Extract Universal Representations?", Tables 7 and 8, COCO, frozen: 5x BiFPN,
# batches of 16 at 1024 x 1024, with the backbone running in every step.
PAPER = {"swinv2-t": "9.74G and 0.44 s", "swinv2-b": "10.38G and 0.50 s"}
ALL, BACKBONE = "all heads in one pass", "backbone"
INT8, FP16, LIVE, STAYS = "int8", "fp16", "live", "one batch"
# The papers' optimizer; nothing here depends on what is learned.
CONFIG = TrainConfig(
    iterations=1_000_000,
    lr=1e-4,
    weight_decay=0.05,
    amp=True,
    checkpoint_every=0,
    heads={"mask2former": {"clip": 0.01}},
)
COLUMNS = {
    "M parameters": "{parameters:.2f}",
    "cached step, ms": "{int8_ms:.0f}",
    "waiting for int8": "{int8_wait:.2%}",
    "fp16": "{fp16_wait:.2%}",
    "beyond a batch that stays, int8": "{int8_beyond:+.1%}",
    "live step, ms": "{live_ms:.0f}",
    "live / cached (range)": "{ratio:.2f} ({low:.2f} to {high:.2f})",
    "bound": "{bound:.2f}",
    "peak memory, cached / live": "{int8_peak:.2f} / {live_peak:.2f} GB",
    "b, GMACs": "{b:.1f}",
    "h, GMACs": "{h:.1f}",
    "rounds": "{rounds}",
}
BACKBONE_COLUMNS = {
    "b, GMACs": "{b:.1f}",
    "bf16, ms a batch": "{bf16_ms:.0f}",
    "fp32": "{fp32_ms:.0f}",
    "as live, with decoding and augmentation": "{decoding_ms:.0f}",
}


@dataclass(frozen=True)
class Settings:
    """How rows are measured: turns of `seconds`, at least `steps` of them, in `rounds` rounds."""

    device: str
    batch: int
    records: int
    rounds: int
    seconds: float
    steps: int
    threads: int
    precision: str
    task: str = "ade20k"
    input_size: tuple[int, int] = (512, 512)
    photo: tuple[int, int] = PHOTOS["ade20k"]
    heads: tuple[str, ...] = HEADS["ade20k"]

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def data(self, backbone: str, work: Path) -> Data:
        """The records of a backbone, in a folder of all that decides them."""
        size = "x".join(map(str, self.input_size))
        folder = work / f"data-{self.task}-{self.device.replace(':', '-')}-{self.precision}-{self.records}-{size}"
        return Data(
            folder,
            backbone,
            self.records,
            self.batch,
            self.device,
            precision=self.precision,
            input_size=self.input_size,
            photo=self.photo,
            task=self.task,
        )


def default_settings(device: str, task: str = "ade20k") -> Settings:
    """A step takes milliseconds on a GPU and seconds on a CPU."""
    threads, on_gpu = torch.get_num_threads(), torch.device(device).type == "cuda"
    side = 256 if not on_gpu else 1024 if task == "coco" else 512
    given = {"task": task, "heads": HEADS[task], "photo": PHOTOS[task], "input_size": (side, side), "threads": threads}
    if on_gpu:
        return Settings(device, batch=16, records=64, rounds=5, seconds=1.0, steps=5, precision="bf16", **given)
    # UPerNet's pooled 1 x 1 map has no batch statistics of one photo.
    return Settings(device, batch=2, records=8, rounds=3, seconds=4.0, steps=1, precision="fp32", **given)


@dataclass(frozen=True)
class Bench:
    """One backbone: its sources and learners, which several rows share; `data` says where its records lie."""

    settings: Settings
    data: Data

    @cached_property
    def device(self) -> torch.device:
        return torch.device(self.settings.device)

    @cached_property
    def live(self) -> LiveSource:
        return decoded_once(self.data.live())

    @cached_property
    def learners(self) -> dict[str, Learner]:
        """Heads by name; one that was trained before needs no warming up."""
        return {}

    def learner(self, head: str) -> Learner:
        if head not in self.learners:
            config = replace(CONFIG, batch_size=self.settings.batch)
            self.learners[head] = learner(choose_head(head, self.live.info, config), self.live, self.device)
        return self.learners[head]

    @cached_property
    def macs(self) -> float:
        """10⁹ multiply-adds of the backbone on one view."""
        backbone = self.live.prepared.backbone
        image = torch.zeros(3, *self.settings.input_size, dtype=torch.uint8)
        return giga_macs(backbone.forward, normalised([image], self.settings.input_size, backbone))

    @cached_property
    def counted(self) -> dict[str, float]:
        return {}

    def head_macs(self, head: str, source: BlockSource) -> float:
        """10⁹ multiply-adds of a head on one view, counted once."""
        if head not in self.counted:
            batch = next(iter(device_batches(source.blocks(0), self.device)))
            self.counted[head] = head_macs(self.learner(head).trained.module, batch)
        return self.counted[head]

    def head_row(self, heads: tuple[str, ...]) -> Row:
        """Steps of one head, or of several in one pass: cached, live, and what they wait for."""
        settings, alone = self.settings, len(heads) == 1
        learners = [self.learner(head) for head in heads]
        levels = needed_levels([x.choice for x in learners], self.live.info.levels)
        sources: dict[str, BlockSource] = {INT8: self.data.cached(INT8, levels)}
        if settings.on_gpu or heads == settings.heads[:1]:
            sources[FP16] = self.data.cached(FP16, levels)
        if settings.on_gpu:
            sources[STAYS] = one_batch(sources[INT8], self.device)
        sources[LIVE] = self.live
        rounds = settings.rounds if settings.on_gpu or alone else 1
        row: Row = {"parameters": sum(x.parameters for x in learners) / 1e6, "b": self.macs}
        if settings.task == "ade20k":
            h = sum(self.head_macs(head, sources[INT8]) for head in heads)
            row |= {"h": h, "bound": (self.macs + 3 * h) / (3 * h)}
        return row | interleaved(sources, learners, rounds, settings, self.device)

    def backbone_row(self) -> Row:
        """The backbone without a head, a batch at a time."""
        sources = {p: decoded_once(replace(self.data, precision=p).live()) for p in PRECISIONS}
        sources["decoding"] = self.data.live()
        streams = {name: self.blocks(source) for name, source in sources.items()}
        count = {name: count_of(warm_up(s, 0.0, self.device), self.settings) for name, s in streams.items()}
        found: dict[str, list[float]] = {name: [] for name in streams}
        for _ in range(self.settings.rounds):
            for name, stream in streams.items():
                found[name].append(turn(stream, count[name], self.device)[0])
        for stream in streams.values():
            stream.close()
        times = {f"{name}_ms": statistics.median(seconds) * 1e3 for name, seconds in found.items()}
        return {"b": self.macs, "seconds": found, **times}

    def blocks(self, source: LiveSource) -> Iterator[Step]:
        """The blocks of a live source, as steps that do nothing."""
        with closing(source.blocks(0, epochs=None)) as blocks:
            for _ in blocks:
                yield 0.0, 0.0, []


def interleaved(
    sources: dict[str, BlockSource], learners: list[Learner], rounds: int, settings: Settings, device: torch.device
) -> Row:
    """Turns of trainings on every source, forwards and backwards through them; the same learners go on in all."""
    streams = {name: steps(source, learners, device) for name, source in sources.items()}
    try:
        fresh = any(x.iteration == 0 for x in learners)
        # The first step makes the optimizer's state and finds out how to compute; it is nobody's.
        step = warm_up(streams[INT8], settings.seconds if settings.on_gpu else 0.0, device) if fresh else 0.0
        count = count_of(step, settings)
        seconds: dict[str, list[float]] = {name: [] for name in streams}
        waits: dict[str, list[float]] = {name: [] for name in streams}
        peaks = dict.fromkeys(streams, 0.0)
        for r in range(rounds):
            for name in list(streams) if r % 2 == 0 else reversed(list(streams)):
                forget_peak(device)
                taken, waited = turn(streams[name], count, device)
                peaks[name] = max(peaks[name], peak_memory(device) / 1e9)
                seconds[name].append(taken)
                waits[name].append(waited)
    finally:
        for stream in streams.values():
            stream.close()
    return summary(seconds, waits, count) | {f"{name}_peak": peak for name, peak in peaks.items()}


def count_of(step: float, settings: Settings) -> int:
    """Steps of a turn, for a step that takes so many seconds (0: nobody knows)."""
    return max(settings.steps, round(settings.seconds / step) if step else 0)


def summary(seconds: dict[str, list[float]], waits: dict[str, list[float]], count: int) -> Row:
    """Medians of rounds; the ratio is that of the steps of one round."""
    ratios = [live / cached for live, cached in zip(seconds[LIVE], seconds[INT8], strict=True)]
    row: Row = {f"{name}_ms": statistics.median(found) * 1e3 for name, found in seconds.items()}
    row |= {f"{name}_wait": statistics.median(waits[name]) for name in (INT8, FP16) if name in waits}
    if STAYS in seconds:
        for name in (INT8, FP16):
            pairs = zip(seconds[name], seconds[STAYS], strict=True)
            row[f"{name}_beyond"] = statistics.median(1 - stays / cached for cached, stays in pairs)
    return {
        **row,
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "rounds": len(ratios),
        "steps": count,
        "seconds": seconds,
        "waits": waits,
    }


def measure(work: Path, settings: Settings, backbones: tuple[str, ...], only: list[str]) -> dict[str, Any]:
    """Rows by backbone and name: those that lie in `work` already, and those that `only` names."""
    rows: dict[str, dict[str, Row]] = {}
    for backbone in backbones:
        bench = Bench(settings, settings.data(backbone, work))
        wanted: dict[str, Callable[[], Row]] = {BACKBONE: bench.backbone_row}
        wanted |= {head: partial(bench.head_row, (head,)) for head in settings.heads}
        wanted[ALL] = partial(bench.head_row, settings.heads)
        for name, make in wanted.items():
            full = f"{backbone}/{name}"
            chosen = not only or any(fnmatchcase(full, p) or fnmatchcase(backbone, p) for p in only)
            if (row := kept(work, full, settings, make if chosen else None)) is not None:
                rows.setdefault(backbone, {})[name] = row
    return {"what": about(settings), "settings": asdict(settings), "rows": rows}


def kept(work: Path, name: str, settings: Settings, make: Callable[[], Row] | None) -> Row | None:
    """A row from its file if it was measured so; else it is made, if there is how, and written."""
    file = work / "rows" / ("".join(c if c.isalnum() else "-" for c in name) + ".json")
    said = json.loads(json.dumps(asdict(settings)))
    if file.exists() and (found := json.loads(file.read_text()))["settings"] == said:
        return found["row"]
    if make is None:
        return None
    print(f"{name} …", flush=True)
    row = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"settings": said, "row": row}))
    return row


def about(settings: Settings) -> str:
    """What was measured, in words."""
    place = torch.cuda.get_device_name(settings.device) if settings.on_gpu else f"the CPU, {settings.threads} threads"
    autocast = settings.on_gpu and torch.cuda.is_bf16_supported()
    size = " x ".join(map(str, settings.input_size))
    said = ", ".join(f"{name} {costs}" for name, costs in PAPER.items())
    paper = f" The paper (Tables 7, 8: live, batch 16, 1024 x 1024, 5x BiFPN, on a GPU): {said}."
    return (
        f"Training steps on {place}: batches of {settings.batch} views of {size}, {NUM_CLASSES[settings.task]} "
        f"classes; backbone in {settings.precision}, heads in {'bf16 autocast' if autocast else 'float32'}. Medians of "
        "interleaved rounds; live runs the backbone on views that lie decoded in memory."
        + (paper if settings.task == "coco" else "")
    )


def tables(result: dict[str, Any]) -> str:
    """A table of the backbones, and one of heads for each."""
    backbones = {name: rows[BACKBONE] for name, rows in result["rows"].items() if BACKBONE in rows}
    found = [table("Backbones, without a head", BACKBONE_COLUMNS, backbones)] if backbones else []
    for name, rows in result["rows"].items():
        heads = {head: row for head, row in rows.items() if head != BACKBONE}
        if heads:
            found.append(table(name, COLUMNS, heads))
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep caches and rows here (default: a temporary folder)")
    parser.add_argument("--task", choices=HEADS, default="ade20k")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="swinv2-b, or swinv2-b/linear")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch", type=int, help="default: 16 on a GPU, 2 on a CPU")
    parser.add_argument("--rounds", type=int, help="default: 5 on a GPU, 3 on a CPU")
    parser.add_argument("--input-size", type=int, metavar="SIDE", help="default: 256; on a GPU 512, coco 1024")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    given = {name: value for name in ("batch", "rounds", "precision") if (value := getattr(args, name)) is not None}
    if args.input_size:
        given["input_size"] = (args.input_size, args.input_size)
    settings = replace(default_settings(args.device, args.task), **given)
    settings = replace(settings, records=max(settings.records, 2 * settings.batch))
    m = machine("timm", "scipy")
    if settings.on_gpu:
        name = torch.cuda.get_device_name(settings.device)
        m["short"], m["gpu"] = "".join(c if c.isalnum() else "-" for c in name.lower()), name
    with nullcontext(args.work) if args.work else work_folder(None) as work:
        result = measure(work, settings, BACKBONES, args.only)
    if not result["rows"]:
        parser.error(f"there is no row {' or '.join(args.only)}")
    publish("head_steps" if args.task == "ade20k" else "detector_steps", result, tables(result), args.out, m=m)


if __name__ == "__main__":
    main()
