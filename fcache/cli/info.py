"""`fcache info`: what a cache or a run holds."""

import json
from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="""\b
Examples:
  fcache info ade.fcache
  fcache info runs/linear-seed0
  fcache info ade.fcache --json
"""
)
@click.argument("path", metavar="CACHE|RUN")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON, with full digests and arguments.")
def command(path: str, as_json: bool) -> None:
    """Show what a cache or a run holds: identity, extent, sizes, scores."""
    from fcache.cache_spec import open_cache

    run = Path(path) / "run.json"
    if run.is_file():
        record = json.loads(run.read_bytes())
        click.echo(json.dumps(record, indent=2) if as_json else _run_text(record))
        return
    reader = open_cache(path, allow_partial=True)
    facts = describe(reader)
    click.echo(json.dumps(facts, indent=2) if as_json else _cache_text(facts))


def describe(reader: Any) -> dict[str, Any]:
    """What an open cache holds, as plain data."""
    from fcache.cache_spec import targets_key, to_json

    manifest = reader.manifest
    groups: list[dict[str, Any]] = []
    for group in manifest.groups:
        parts = {part: reader.committed(group, part) for part in manifest.parts()}
        groups.append(
            {
                "group": group.path,
                "split": group.split,
                "role": group.role,
                "canvas": list(group.canvas),
                "samples": len(group.ids),
                "views": group.views,
                "encoding": group.encoding,
                "compression": group.compression,
                "shard_records": group.shard_records,
                "shards": sum(1 for _ in group.shards()),
                "committed": {part: len(commits) for part, commits in parts.items()},
                "bytes": sum(commits.bytes for commits in parts.values()),
                "levels": to_json(group.levels),
            }
        )
    return {
        "cache": reader.url,
        "features": manifest.features.key,
        "targets": targets_key(manifest.targets),
        "random_weights": manifest.random_weights,
        "feature_spec": to_json(manifest.features),
        "target_specs": to_json(manifest.targets),
        "groups": groups,
        "quarantined": {split: reader.quarantined(split) for split in reader.splits},
        "hints": to_json(manifest.hints),
    }


def _cache_text(facts: dict[str, Any]) -> str:
    from fcache.cli.progress import size
    from fcache.cli.tables import fields, table

    spec, backbone = facts["feature_spec"], facts["feature_spec"]["backbone"]
    seed = facts["random_weights"]
    weights = f"RANDOM ({seed})" if seed else f"sha256 {backbone['weights_sha256'][:16]}"
    pairs = [
        ("cache", facts["cache"]),
        ("backbone", f"{backbone['name']}, {backbone['precision']}"),
        ("weights", weights),
        ("features", facts["features"][:16]),
        ("targets", facts["targets"][:16]),
    ]
    pairs += [("", _target(t)) for t in facts["target_specs"]]
    pairs += [(f"{role} views", _cut(spec[role]["views"])) for role in ("training", "evaluation")]
    pairs.append(("seed", str(spec["seed"])))
    pairs += [
        (
            "level",
            f"{level['name']}  {level['dims']} = {' × '.join(map(str, level['shape']))}, stride {level['stride']}",
        )
        for level in facts["groups"][0]["levels"]
    ]
    rows = [
        [
            g["group"],
            str(g["samples"]),
            str(g["views"]),
            f"{g['canvas'][0]}x{g['canvas'][1]}",
            g["encoding"],
            f"{min(g['committed'].values())}/{g['shards']}",
            size(g["bytes"]),
        ]
        for g in facts["groups"]
    ]
    rows.append(["total", "", "", "", "", "", size(sum(g["bytes"] for g in facts["groups"]))])
    text = [fields(pairs), "", table(["group", "samples", "views", "input", "encoding", "shards", "size"], rows)]
    for split, bad in facts["quarantined"].items():
        text += [f"quarantined in {split}: {name}: {reason}" for name, reason in bad.items()]
    return "\n".join(text)


def _target(target: dict[str, Any]) -> str:
    classes = f", {len(target['class_names'])} classes" if target["class_names"] else ""
    return f"{target['kind']} of {target['dataset']}{classes}"


def _cut(cut: dict[str, Any]) -> str:
    """A view recipe's cut on one line: each step's kind, then what it was given."""
    steps = [cut["place"], *cut.get("looks", [])] if "place" in cut else [cut]
    if "clip" in cut:
        steps.insert(0, {"kind": "clip", **cut["clip"]})
    return " | ".join(
        " ".join([str(step.get("kind", "")), _short({k: v for k, v in step.items() if k != "kind"})]) for step in steps
    )


def _short(values: dict[str, Any]) -> str:
    shown = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
    return " ".join(f"{name}={value}" for name, value in shown.items())


def _run_text(record: dict[str, Any]) -> str:
    from fcache.cli.progress import duration, size
    from fcache.cli.tables import fields

    cost, train = record["cost"], record["train"]
    backbone = record["features"]["backbone"]
    defaults = ("heads", "milestones", "gamma", "power", "floor")
    pairs = [
        ("head", f"{record['head']} ({record['label']})"),
        ("status", record["status"] + (f": {record['reason']}" if record["reason"] else "")),
        ("recipe", record["recipe"]),
        ("options", _short(record["options"])),
        ("training", _short({k: v for k, v in train.items() if k not in defaults})),
        ("features", f"{record['features_key'][:16]}  {backbone['name']}, {backbone['precision']}"),
        ("weights", f"RANDOM ({record['random_weights']})" if record["random_weights"] else "not random"),
        ("targets", record["targets_key"][:16]),
        ("device", f"{record['device']}, {record['precision']}"),
        ("parameters", f"{cost['parameters']:,}"),
        ("cost", f"{cost['seconds_per_iteration']:.4f} s/iteration, {duration(cost['seconds'])} in all"),
        ("", f"{cost['data_wait_share']:.1%} waiting for data, {size(cost['peak_memory'])} peak memory"),
    ]
    text = [fields(pairs)]
    for found in record["evaluations"]:
        scores = [(name, f"{value:.4f}") for name, value in found["metrics"].items()]
        text += ["", f"after {found['iteration']} iterations", fields(scores)]
    return "\n".join(text)
