"""`fcache plan`: what an extraction costs, before anything is written."""

import json
from typing import TYPE_CHECKING, Any

import click

from fcache.cli.job import job_options, parse_job

if TYPE_CHECKING:
    from fcache.extractor import Plan

NO_SPACE = 6


@click.command(
    epilog="""\b
Examples:
  fcache plan --model swinv2-t --dataset ade20k --data-root ADEChallengeData2016 --views 4
  fcache plan --model swinv2-b --dataset ade20k --levels 16,32 --encoding fp16 --json
  fcache plan --model swinv2-g --dataset ade20k --num-devices 8 --price-per-hour 2.50

\b
Exit status: 6 if the cache would not fit on its disk.
"""
)
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--no-time", is_flag=True, help="Skip the timed batch and the measurement of the disk: sizes only.")
@click.option(
    "--num-devices",
    type=click.IntRange(min=1),
    help="Plan for so many devices like the one here; by default as many as --devices names.",
    metavar="N",
)
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="What one device costs an hour.", metavar="PRICE")
def command(as_json: bool, no_time: bool, num_devices: int | None, price_per_hour: float | None, **options: Any) -> int:
    """Say what an extraction costs: records, bytes, files, time, money and free space, and from when on it pays.

    Writes nothing into a cache: one batch is timed, and the disk with a file that is removed at once.
    """
    from dataclasses import asdict

    from fcache.extractor import parse_devices, plan

    devices = num_devices or (len(parse_devices(options["devices"])) if options["devices"] else 1)
    found = plan(parse_job(options), measure=not no_time, devices=devices)
    if as_json:
        totals: dict[str, Any] = {"records": found.records, "bytes": found.bytes, "fits": found.fits}
        totals |= {"pending_records": found.pending_records, "pending_bytes": found.pending_bytes}
        if price_per_hour is not None:
            totals["price"] = price(found, price_per_hour)
        click.echo(json.dumps(asdict(found) | totals, indent=2, default=str))
    else:
        click.echo(show_plan(found, price_per_hour))
    return 0 if found.fits else NO_SPACE


def price(plan: "Plan", per_hour: float) -> float | None:
    """What the devices of an extraction cost, None if its time was not measured."""
    return None if plan.costs is None else plan.costs.extraction / 3600 * plan.devices * per_hour


def show_plan(plan: "Plan", per_hour: float | None = None) -> str:
    """A plan in words and a table of its splits; `per_hour` is the price of one device."""
    from fcache.cli.progress import duration, size
    from fcache.cli.tables import fields, table

    rows = [
        [
            s.name,
            str(s.samples),
            str(s.views),
            str(s.records),
            str(s.pending_records),
            str(s.shards),
            _canvases(s.canvases),
            size(s.bytes),
        ]
        for s in plan.splits
    ]
    free = "" if plan.free_bytes is None else f"; {size(plan.free_bytes)} are free"
    each = sum(plan.level_bytes.values())
    pairs = [
        ("cache", f"{plan.cache}, features {plan.features[:16]}"),
        ("a record", f"{size(each)}: " + ", ".join(f"{k} {size(v)}" for k, v in plan.level_bytes.items())),
        ("to write", f"{size(plan.pending_bytes)} of {size(plan.bytes)}{free}"),
    ]
    if plan.random_weights:
        pairs.append(("weights", f"RANDOM ({plan.random_weights}): heads trained on them say little"))
    if plan.costs is not None:
        rate = plan.pending_records / plan.costs.extraction
        on = "on this device" if plan.devices == 1 else f"on {plan.devices} devices like this one"
        limit = f"{plan.costs.limit} sets the pace"
        pairs.append(("time", f"{duration(plan.costs.extraction)} at {rate:.3g} records/s {on}; {limit}"))
    if per_hour is not None and (paid := price(plan, per_hour)) is not None:
        pairs.append(("price", f"{paid:.2f} for {plan.devices} x {per_hour:g} an hour"))
    if pays := break_even(plan):
        pairs.append(("break-even", pays))
    text = fields(pairs) + "\n\n"
    text += table(["split", "samples", "views", "records", "to do", "shards", "input", "size"], rows)
    if fp16 := plan.encodings.get("fp16"):
        costs = [
            [name, size(each), f"{fp16 / each:.1f}", size(each * plan.records)] if each else [name, "overflow", "", ""]
            for name, each in plan.encodings.items()
        ]
        text += "\n\n" + table(["encoding", "a record", "x smaller than fp16", "all records"], costs)
    if plan.view_bytes:
        planned = max(s.views for s in plan.splits)
        counts = [
            [f"{count}{' (planned)' if count == planned else ''}", size(total)]
            for count, total in plan.view_bytes.items()
        ]
        text += "\n\n" + table(["training views", "features"], counts)
        if "semantic" in plan.targets:
            text += (
                "\nOn CamVid, in 30 epochs, heads scored best with 4 or 8 views; one view cost 3 to 5 points of mIoU."
            )
    return text if plan.fits else text + "\n\nIt does not fit: fewer --levels, --views or samples (--subset)."


def break_even(plan: "Plan") -> str:
    """From when on the cache pays, in words; "" if that was not measured."""
    from fcache.cli.progress import duration

    if plan.costs is None or plan.costs.live_pass == 0:
        return ""
    found = plan.costs
    live = f"one pass over the training samples takes {_seconds(found.live_pass)} with the backbone"
    if found.cached_pass is None:
        return f"not known, as the disk was not measured; {live}"
    read = f"{_seconds(found.cached_pass)} from this disk"
    if found.passes is None:
        return (
            f"never here: {live}, {read}; cache fewer --levels, in a smaller --encoding or on a faster disk, or train "
            "with the backbone"
        )
    saved = 100 * (found.live_pass - found.cached_pass) - found.extraction
    more = f"; 100 passes end {duration(saved)} sooner" if saved > 0 else ""
    return f"from {found.passes} passes on (heads trained one by one x epochs): {live}, {read}{more}"


def _seconds(seconds: float) -> str:
    from fcache.cli.progress import duration

    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def _canvases(sizes: tuple[tuple[int, int], ...]) -> str:
    shown = f"{sizes[0][0]}x{sizes[0][1]}"
    return shown if len(sizes) == 1 else f"{shown} and {len(sizes) - 1} more"
