"""The same batches from a cache in memory, from a running backbone, and from one batch that stays where it is."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fcache.cache_spec import Block, BlockSource, CodedLevel, SourceInfo, StreamConfig, open_cache
from fcache.cli.train_head import decoded_for, training_source
from fcache.extractor import Job, LiveSource, extract, write_coco_scenes, write_scenes
from fcache.extractor.decoding import Decoded, Decoder, Request
from fcache.extractor.prepare import Prepared, prepare
from fcache.heads import batch_buffers, device_batches
from fcache.heads.events import silent

# By data set its usual photo, its number of classes and what heads learn from; the scenes themselves have ten classes.
PHOTOS = {"ade20k": (512, 683), "coco": (480, 640)}
NUM_CLASSES = {"ade20k": 150, "coco": 80}
KINDS = {"ade20k": "semantic", "coco": "instances"}
SPLIT, SEED = "train", 0


@dataclass(frozen=True)
class Data:
    """`records` training views of made-up scenes for a backbone with random weights; files are made below `work`.

    `input_size` (height, width) is that of the views, `photo` that of the scenes they are cut from.
    """

    work: Path
    backbone: str
    records: int
    batch: int
    device: str
    precision: str = "bf16"
    input_size: tuple[int, int] = (512, 512)
    photo: tuple[int, int] = PHOTOS["ade20k"]
    task: str = "ade20k"

    def job(self, encoding: str) -> Job:
        """The extraction of the records, with the defaults of `fcache extract`."""
        return Job(
            model=self.backbone,
            dataset=self.task,
            root=scenes(self.work, self.records, self.photo, self.task),
            cache=self.work / f"{self.backbone}-{encoding.replace(':', '-')}.fcache",
            weights="random:0",
            splits=(SPLIT,),
            views=1,
            input_size=self.input_size,
            encoding=encoding,
            precision=self.precision,
            device=self.device,
        )

    def stream(self, levels: tuple[str, ...] | None) -> StreamConfig:
        """How `fcache train-head` reads it."""
        return StreamConfig(
            batch_size=self.batch,
            levels=levels,
            kinds=(KINDS[self.task],),
            seed=SEED,
            drop_last=True,
            decode=decoded_for(self.device),
            allocate=batch_buffers(self.device),
        )

    def cached(self, encoding: str, levels: tuple[str, ...] | None = None) -> BlockSource:
        """The cache in memory, as `fcache train-head` reads it with --resident ram, or device on a GPU."""
        job = self.job(encoding)
        extract(job, report=lambda event: None)
        where = "device" if torch.device(self.device).type == "cuda" else "ram"
        reader, stream = open_cache(job.cache), self.stream(levels)
        return training_source(reader, SPLIT, stream, follow=False, resident=where, device=self.device, report=silent)

    def live(self) -> LiveSource:
        """The product's live source: every block is decoded, cut into views and sent through the backbone."""
        return LiveSource(prepare(self.job("fp32")), SPLIT, self.batch, "shuffled", SEED, drop_last=True)


def scenes(work: Path, records: int, photo: tuple[int, int], task: str) -> Path:
    """A data set of scenes with as many class names as the real one has, written if it is not there yet."""
    root, count = work / f"scenes-{records}", NUM_CLASSES[task]
    if root.exists():
        return root
    if task == "ade20k":
        write_scenes(root, train=records, val=1, size=photo)
        names = ", ".join(f'"class {i}"' for i in range(count))
        (root / "dataset.toml").write_text(f"class_names = [{names}]\n")
        return root
    write_coco_scenes(root, train=records, val=1, size=photo)
    for file in (root / "annotations").iterdir():
        data = json.loads(file.read_text())
        listed = {c["id"] for c in data["categories"]}
        more = [i for i in range(1, count + len(listed) + 1) if i not in listed][: count - len(listed)]
        data["categories"] += [{"id": i, "name": f"class {i}"} for i in more]
        file.write_text(json.dumps(data))
    return root


def decoded_once(live: LiveSource) -> LiveSource:
    """The same live source with all views decoded in memory: what is left of its work is the backbone."""
    prepared, decoder = live.prepared, _Decoded(live.prepared)
    parts = {name: getattr(prepared, name) for name in ("job", "wanted", "splits", "backbone", "positions")}
    in_memory: Any = SimpleNamespace(**parts, decoder=decoder)
    return LiveSource(in_memory, live.split, live.batch_size, live.order, live.seed, live.drop_last)


class _Decoded:
    """A decoder that has every record of the training split already."""

    def __init__(self, prepared: Prepared) -> None:
        (group,) = prepared.wanted.split(SPLIT)
        decoder: Decoder = prepared.decoder
        requests = [
            Request(SPLIT, prepared.positions[SPLIT][name], view, group.canvas)
            for view in range(group.views)
            for name in group.ids
        ]
        self._held: dict[Request, Decoded] = {request: decoder[request] for request in requests}

    def __getitem__(self, request: Request) -> Decoded:
        return self._held[request]


@dataclass(frozen=True)
class OneBatch:
    """A `BlockSource` that gives one batch of another for ever, decoded on the device: heads wait for nothing."""

    info: SourceInfo
    block: Block[Any]

    def num_blocks(self, epoch: int) -> int:
        return 1

    def blocks(self, epoch: int, *, start: int = 0, epochs: int | None = 1) -> Iterator[Block[Any]]:
        number = epoch
        while epochs is None or number < epoch + epochs:
            yield self.block
            number += 1


def one_batch(source: BlockSource, device: torch.device) -> OneBatch:
    """The first batch of a source."""
    batch = next(iter(device_batches(source.blocks(0), device)))
    specs = {level.name: level for level in source.info.levels}
    levels: Mapping[str, CodedLevel[Any]] = {
        name: CodedLevel(specs[name], "fp32", {"": x.clone()}, {}) for name, x in batch.features.items()
    }
    targets = {path: x.clone() if isinstance(x, torch.Tensor) else x for path, x in batch.targets.items()}
    return OneBatch(source.info, Block(batch.ids, batch.views, (0,) * len(batch), levels, targets))
