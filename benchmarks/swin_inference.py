"""SwinV2 as fcache runs it against plain timm, with the same weights, in interleaved rounds of one process.

    python benchmarks/swin_inference.py [--device cuda] [--only 'swinv2-t*'] [--rounds 5] [--batch 4] [--precision bf16]

Rows are whole backbones (all four stages, random:0), single blocks of SwinV2-G's third stage with the windows of its
papers, of which the attention is timed alone too, and the patch embedding in three layouts. "times timm" above 1
means that fcache is faster. On a CPU it is a ratio of CPU seconds, which other processes disturb less than they do
seconds; on a GPU of seconds. "apart" is the largest relative difference of a level, or of the block's output, from
timm's, which pads before it rolls for that: where windows do not divide a map, plain timm lays its mask wrongly (see
`fcache.extractor.backbones.windows`).

On a GPU there are the larger models and inputs too, images a second, the memory at its peak, and the share that the
multiply-adds of a forward take of what a large bfloat16 product reaches in the same run.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from storage.report import RESULTS, machine, publish, table
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional as F
from training.steps import giga_macs, synchronise

from fcache.extractor.backbones import load_backbone
from fcache.extractor.backbones.architecture import find_architecture
from fcache.extractor.backbones.attention import prepare_attention
from fcache.extractor.backbones.construction import exact_arithmetic
from fcache.extractor.backbones.products import has_bf16_products, round_products
from fcache.extractor.backbones.weights import load_weights
from fcache.extractor.backbones.windows import correct_windows

Row = dict[str, Any]
# Model, input side, window (None: the model's own).
ON_CPU = (
    ("swinv2-t", 256, None),
    ("swinv2-t", 512, None),
    ("swinv2_tiny_window16_256", 512, None),
    ("swinv2_base_window8_256", 256, None),
    ("swinv2_base_window8_256", 512, None),
    ("swinv2-b", 512, None),
)
ON_GPU = (
    *ON_CPU,
    *((model, side, None) for model in ("swinv2-b", "swinv2-l") for side in (640, 1024)),
    ("swinv2-g", 512, None),
    ("swinv2-g", 640, 40),
    ("swinv2-g", 1024, 32),
)
# Maps and windows of SwinV2-G's third stage: pieces of the map of 64 x 64 at 1024, and the whole map at 640.
BLOCKS = (((64, 32), 32, True), ((32, 32), 32, False), ((40, 40), 40, False))
BLOCK_CHANNELS, BLOCK_HEADS = 2048, 64
COLUMNS = {
    "times timm (range)": "{ratio:.2f} ({low:.2f} to {high:.2f})",
    "ours, ms an image": "{ours_ms:.0f}",
    "timm": "{timm_ms:.0f}",
    "apart": "{apart:.1e}",
    "rounds": "{rounds}",
    "images/s": "{images:.1f}",
    "share of a product's rate": "{share:.0%}",
    "peak GiB, ours": "{ours_gib:.1f}",
    "timm's": "{timm_gib:.1f}",
}
LAYOUTS = {
    "channels first, ms": "{first_ms:.1f}",
    "channels last": "{last_ms:.1f}",
    "a linear layer on patches": "{linear_ms:.1f}",
}


@dataclass(frozen=True)
class Settings:
    device: torch.device
    precision: str
    batch: int
    rounds: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def clock(work: Callable[[], Any], settings: Settings) -> float:
    """CPU seconds of some work, or seconds on a GPU."""
    now = time.perf_counter if settings.on_gpu else time.process_time
    synchronise(settings.device)
    started = now()
    work()
    synchronise(settings.device)
    return now() - started


def compared(ours: Callable[[], Any], timms: Callable[[], Any], images: int, settings: Settings) -> Row:
    """Rounds of both after one of each that does not count, in turns."""
    works = {"ours": ours, "timm": timms}
    row: Row = {"rounds": settings.rounds}
    for name, work in works.items():
        if settings.on_gpu:
            torch.cuda.reset_peak_memory_stats(settings.device)
        work()
        if settings.on_gpu:
            row[f"{name}_gib"] = torch.cuda.max_memory_allocated(settings.device) / 2**30
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for r in range(settings.rounds):
        for name in list(works) if r % 2 == 0 else reversed(list(works)):
            seconds[name].append(clock(works[name], settings))
    ratios = [t / o for o, t in zip(seconds["ours"], seconds["timm"], strict=True)]
    row |= {f"{name}_ms": statistics.median(found) / images * 1e3 for name, found in seconds.items()}
    return row | {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "seconds": seconds}


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def as_timm(settings: Settings, work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` under what a backbone runs in."""

    def run() -> Any:
        autocast = torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.precision == "bf16")
        with torch.inference_mode(), exact_arithmetic(), autocast:
            return work()

    return run


def model_row(model: str, side: int, window: int | None, settings: Settings, rate: float) -> Row:
    options: dict[str, Any] = {"precision": settings.precision, "window": window, "device": settings.device}
    backbone = load_backbone(model, weights="random:0", input_size=(side, side), **options)
    architecture = find_architecture(model, window)
    state = load_weights(architecture, "random:0").state
    with settings.device:
        plain: Any = timm.create_model(architecture.name, num_classes=0, img_size=side, **architecture.creation)
    plain.load_state_dict({**plain.state_dict(), **state})
    plain.eval().requires_grad_(False)
    images = torch.randn(settings.batch, 3, side, side, device=settings.device)
    timms = as_timm(settings, lambda: plain.forward_intermediates(images, norm=False, intermediates_only=True))
    row = compared(lambda: backbone.forward(images), timms, settings.batch, settings)
    correct_windows(plain)
    pairs = zip(backbone.forward(images).values(), timms(), strict=True)
    row["apart"] = max(apart(x, y) for x, y in pairs)
    if settings.on_gpu:
        row["images"] = 1e3 / row["ours_ms"]
        row["share"] = giga_macs(backbone.forward, images[:1]) / row["ours_ms"] * 1e12 / rate
    return row


def block_rows(size: tuple[int, int], window: int, shifted: bool, settings: Settings) -> Iterator[tuple[str, Row]]:
    torch.manual_seed(0)
    shift = window // 2 if shifted else 0
    with settings.device:
        timms = SwinTransformerV2Block(BLOCK_CHANNELS, size, BLOCK_HEADS, window_size=window, shift_size=shift)
    for name, parameter in timms.named_parameters():
        # timm starts with norms of zero, and so with a block that does nothing.
        if name.startswith("norm"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif "cpb_mlp" in name:
            nn.init.normal_(parameter, 0, 0.3)
    timms.eval().requires_grad_(False)
    ours = copy.deepcopy(timms)
    with torch.no_grad():
        prepare_attention(nn.Sequential(ours), settings.precision)
        if settings.precision == "bf16" and not has_bf16_products(settings.device):
            round_products(ours)
    x = torch.randn(1, *size, BLOCK_CHANNELS, device=settings.device)
    parts = {"block": (ours, timms), "its attention": (ours._attn, timms._attn)}
    for part, pair in parts.items():
        mine, other = (as_timm(settings, partial(work, x)) for work in pair)
        yield part, compared(mine, other, 1, settings) | {"apart": apart(mine(), other())}


def patch_row(channels: int, settings: Settings) -> Row:
    """The patch embedding of 512 x 512 images: the same numbers in three layouts."""
    images = torch.randn(settings.batch, 3, 512, 512, device=settings.device)
    first = nn.Conv2d(3, channels, 4, 4, device=settings.device).requires_grad_(False)
    last = copy.deepcopy(first).to(memory_format=torch.channels_last)

    def linear() -> Tensor:
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
        return F.linear(patches, first.weight.flatten(1), first.bias)

    works = {
        # Tokens follow, channels last in memory.
        "first": lambda: first(images).permute(0, 2, 3, 1).contiguous(),
        "last": lambda: last(images.to(memory_format=torch.channels_last)).permute(0, 2, 3, 1).contiguous(),
        "linear": linear,
    }
    runs = {name: as_timm(settings, work) for name, work in works.items()}
    expected = runs["first"]()
    assert all(apart(run(), expected) < 1e-2 for run in runs.values())
    found = {name: [clock(run, settings) for _ in range(settings.rounds)] for name, run in runs.items()}
    return {f"{name}_ms": statistics.median(seconds) / settings.batch * 1e3 for name, seconds in found.items()}


def product_rate(settings: Settings) -> float:
    """Operations a second of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device=settings.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * 8192**3 / statistics.median(clock(lambda: a @ b, settings) for _ in range(9))


def measure(
    settings: Settings, only: str, report: Callable[[str, Row], None], done: Mapping[str, Row] = MappingProxyType({})
) -> Mapping[str, Row]:
    """The rows that `only` names, those in `done` as they are, and all others of `done`."""
    rows = dict(done)

    def keep(name: str, row: Row) -> None:
        rows[name] = row
        report(name, row)

    rate = product_rate(settings) if settings.on_gpu else 0.0
    for model, side, window in ON_GPU if settings.on_gpu else ON_CPU:
        name = f"{model}, {side} x {side}{f', window {window}' if window else ''}"
        if fnmatchcase(name, only) and name not in done:
            keep(name, model_row(model, side, window, settings, rate))
    for size, window, shifted in BLOCKS:
        name = f"G, window {window}, map {size[0]} x {size[1]}{', shifted' if shifted else ''}"
        if fnmatchcase(name, only) and f"{name}: its attention" not in done:
            for part, row in block_rows(size, window, shifted, settings):
                keep(f"{name}: {part}", row)
    for channels in (96, 128, 512):
        name = f"patches to {channels} channels"
        if fnmatchcase(name, only) and name not in done:
            keep(name, patch_row(channels, settings))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, help="default: 16 on a GPU, 1 on a CPU")
    parser.add_argument("--rounds", type=int, help="default: 9 on a GPU, 3 on a CPU")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="rows by name: 'swinv2-t*', 'G*', 'patches*'")
    parser.add_argument("--work", type=Path, help="keep rows in this file, one a line, and measure none twice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    settings = Settings(
        device, args.precision, args.batch or (16 if on_gpu else 1), args.rounds or (9 if on_gpu else 3)
    )
    m = machine("timm")
    if on_gpu:
        m["gpu"] = torch.cuda.get_device_name(device)
        m["short"] = "".join(c if c.isalnum() else "-" for c in m["gpu"].lower())
    lines = args.work.read_text().splitlines() if args.work and args.work.exists() else []
    done = {row.pop("row"): row for row in map(json.loads, lines)}

    def report(name: str, row: Row) -> None:
        text = json.dumps({"row": name, **row})
        print(text, file=sys.stderr, flush=True)
        if args.work:
            with args.work.open("a") as file:
                file.write(text + "\n")

    found = measure(settings, args.only, report, done)
    if not found:
        parser.error(f"there is no row {args.only}")
    layouts = {name: row for name, row in found.items() if "first_ms" in row}
    rows = {name: row for name, row in found.items() if name not in layouts}
    body = "\n\n".join(
        table(*part) for part in (("Inference", COLUMNS, rows), ("Patches", LAYOUTS, layouts)) if part[2]
    )
    threads = torch.get_num_threads()
    what = f"SwinV2 in {args.precision} on {device.type}, {threads} threads, {settings.batch} images at once."
    claim = f"swin_inference_{args.precision}"
    publish(claim, {"what": what, "rows": found}, body, args.out, m=m)


if __name__ == "__main__":
    main()
