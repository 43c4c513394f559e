"""Caches of clips: what is stored is what the backbone says of the frames that were chosen."""

from collections.abc import Callable

from fcache.cache_spec import StreamConfig, open_cache, open_source
from fcache.extractor import (
    Job,
    extract,
)

MakeJob = Callable[..., Job]
REAL = {
    "mobilenetv2_100": "mobilenetv2_100.tv_int8_dequant.safetensors",
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
}


def extracted(job: Job) -> list[object]:
    events: list[object] = []
    extract(job, report=events.append)
    return events


def blocks(job: Job, split: str, epoch: int = 0) -> dict[str, object]:
    """Blocks of one record each, by sample."""
    source = open_source(open_cache(job.cache), split, StreamConfig(batch_size=1, order="sequential"))
    return {block.ids[0]: block for block in source.blocks(epoch)}
