"""What a cached training step of the heads on clips costs beside a live one, on a frozen backbone.

    python benchmarks/clip_steps.py [--work DIR] [--device cuda] [--only swinv2-b/global]

As head_steps.py, on clips: SwinV2-T and -B with random weights, 16 frames of 224 x 224, and the heads of Table 4 of
"Could Giant Pretrained Image Models Extract Universal Representations?" with 400 classes, each of which reads the last
level only. In interleaved rounds of one process and with the same learner:

- cached: batches of `fcache extract`'s store kept in memory (`train-head --resident ram`; `device` on a GPU), int8.
  Waiting is the share of the step that passes before the batch is there, as `train` counts.
- live: the backbone as `fcache extract` runs it on the same clips, which lie decoded in memory, then the same step of
  the head. Decoding and augmentation, which a cache saves too, are not counted.

The bound is (b + 3h) / 3h with multiply-adds of the forward passes of the backbone (b) and of the head (h); for the
linear head it means nothing. A live step of a CPU takes minutes: there a batch is one clip.

With --work what is done is kept there, and not done again: the script may be stopped and continued, or run row by row
with --only, which takes a backbone, a row (swinv2-t/linear) or a pattern ('*/global').
"""

import argparse
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

# As the command line does, and before torch reads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from head_steps import CONFIG, INT8, LIVE, Settings, interleaved, kept
from storage.report import RESULTS, machine, publish, table, work_folder
from storage.rounds import Row
from training.clips import ClipData
from training.sources import decoded_once
from training.steps import giga_macs, head_macs, learner

from fcache.cache_spec import BlockSource
from fcache.extractor import LiveSource
from fcache.extractor.forward import normalised
from fcache.heads import choose_head, device_batches, needed_levels

BACKBONES = ("swinv2-t", "swinv2-b")
HEADS = ("linear", "temporal", "global")
COLUMNS = {
    "M parameters": "{parameters:.2f}",
    "cached step, ms": "{int8_ms:.0f}",
    "waiting": "{int8_wait:.2%}",
    "live step, ms": "{live_ms:.0f}",
    "live / cached (range)": "{ratio:.2f} ({low:.2f} to {high:.2f})",
    "bound": "{bound:.2f}",
    "b, GMACs": "{b:.1f}",
    "h, GMACs": "{h:.2f}",
    "rounds": "{rounds}",
}


def default_settings(device: str) -> Settings:
    """A step takes milliseconds on a GPU and many seconds on a CPU."""
    size, threads = (224, 224), torch.get_num_threads()
    if torch.device(device).type == "cuda":
        return Settings(
            device, batch=16, records=32, rounds=5, seconds=1.0, steps=5, threads=threads, precision="bf16",
            input_size=size, heads=HEADS,
        )  # fmt: skip
    return Settings(
        device, batch=1, records=2, rounds=2, seconds=0.0, steps=1, threads=threads, precision="bf16",
        input_size=size, heads=HEADS,
    )  # fmt: skip


@dataclass(frozen=True)
class ClipBench:
    """One backbone: its sources, which several rows share; `data` says where its records lie."""

    settings: Settings
    data: ClipData

    @cached_property
    def live(self) -> LiveSource:
        return decoded_once(self.data.live())

    @cached_property
    def macs(self) -> float:
        """10⁹ multiply-adds of the backbone on one clip."""
        backbone, frames = self.live.prepared.backbone, self.live.info.levels[0].shape[0]
        clip = torch.zeros(frames, 3, *self.settings.input_size, dtype=torch.uint8)
        return giga_macs(backbone.forward, normalised([clip], self.settings.input_size, backbone))

    def head_row(self, head: str) -> Row:
        """Steps of a head, cached and live, and what they wait for."""
        device = torch.device(self.settings.device)
        choice = choose_head(head, self.live.info, replace(CONFIG, batch_size=self.settings.batch))
        learners = [learner(choice, self.live, device)]
        cached = self.data.cached(INT8, needed_levels([choice], self.live.info.levels))
        sources: dict[str, BlockSource] = {INT8: cached, LIVE: self.live}
        h = head_macs(learners[0].trained.module, next(iter(device_batches(cached.blocks(0), device))))
        return {
            "parameters": sum(x.parameters for x in learners) / 1e6,
            "b": self.macs,
            "h": h,
            "bound": (self.macs + 3 * h) / (3 * h),
            **interleaved(sources, learners, self.settings.rounds, self.settings, device),
        }


def measure(work: Path, settings: Settings, backbones: tuple[str, ...], only: list[str]) -> dict[str, Any]:
    """Rows by backbone and head: those that lie in `work` already, and those that `only` names."""
    rows: dict[str, dict[str, Row]] = {}
    for backbone in backbones:
        size = "x".join(map(str, settings.input_size))
        folder = work / f"clips-{settings.device.replace(':', '-')}-{settings.records}-{size}"
        data = ClipData(
            folder, backbone, settings.records, settings.batch, settings.device, settings.precision, settings.input_size
        )
        bench = ClipBench(settings, data)
        for head in settings.heads:
            full = f"{backbone}/{head}"
            chosen = not only or any(fnmatchcase(full, p) or fnmatchcase(backbone, p) for p in only)
            make: Callable[[], Row] | None = partial(bench.head_row, head) if chosen else None
            if (row := kept(work, f"clips-{full}", settings, make)) is not None:
                rows.setdefault(backbone, {})[head] = row
    place = torch.cuda.get_device_name(settings.device) if settings.on_gpu else f"the CPU, {settings.threads} threads"
    heads = "bf16 autocast" if settings.on_gpu and torch.cuda.is_bf16_supported() else "float32"
    what = (
        f"Training steps on {place}: batches of {settings.batch} clips, 400 classes; backbone in {settings.precision}, "
        f"heads in {heads}. Medians of interleaved rounds; live runs the backbone on clips that lie decoded in memory."
    )
    return {"what": what, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep caches and rows here (default: a temporary folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="swinv2-b, or swinv2-b/linear")
    parser.add_argument("--batch", type=int, help="default: 16 on a GPU, 1 on a CPU")
    parser.add_argument("--rounds", type=int, help="default: 5 on a GPU, 2 on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    given = {name: value for name in ("batch", "rounds") if (value := getattr(args, name)) is not None}
    settings = replace(default_settings(args.device), **given)
    settings = replace(settings, records=max(settings.records, 2 * settings.batch))
    m = machine("timm")
    if settings.on_gpu:
        name = torch.cuda.get_device_name(settings.device)
        m["short"], m["gpu"] = "".join(c if c.isalnum() else "-" for c in name.lower()), name
    with nullcontext(args.work) if args.work else work_folder(None) as work:
        result = measure(work, settings, BACKBONES, args.only)
    if not result["rows"]:
        parser.error(f"there is no row {' or '.join(args.only)}")
    found = [table(name, COLUMNS, rows, first="head") for name, rows in result["rows"].items()]
    publish("clip_steps", result, "\n\n".join(found), args.out, m=m)


if __name__ == "__main__":
    main()
