"""The same batches of clips from a cache in memory, and from a running backbone."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fcache.cache_spec import BlockSource, StreamConfig, open_cache
from fcache.cli.train_head import decoded_for, training_source
from fcache.extractor import Job, LiveSource, extract, write_moving_scenes
from fcache.extractor.prepare import prepare
from fcache.heads import batch_buffers
from fcache.heads.events import silent
from training.sources import SEED, SPLIT

# As Kinetics-400: its number of classes; the scenes themselves have eight. Frames for 16 of every fourth.
NUM_CLASSES, FRAMES = 400, 64


@dataclass(frozen=True)
class ClipData:
    """`records` training clips of moving scenes for a backbone with random weights; files are made below `work`.

    Clips are those of the view recipe `kinetics400`, 16 frames, with frames of `input_size` (height, width).
    """

    work: Path
    backbone: str
    records: int
    batch: int
    device: str
    precision: str
    input_size: tuple[int, int]

    def job(self, encoding: str) -> Job:
        """The extraction of the records, with the defaults of `fcache extract`."""
        return Job(
            model=self.backbone,
            dataset="kinetics400",
            root=clips(self.work, self.records, self.input_size),
            cache=self.work / f"{self.backbone}-{encoding.replace(':', '-')}.fcache",
            weights="random:0",
            splits=(SPLIT,),
            views=1,
            view_recipe="kinetics400",
            input_size=self.input_size,
            encoding=encoding,
            precision=self.precision,
            device=self.device,
        )

    def cached(self, encoding: str, levels: tuple[str, ...] | None = None) -> BlockSource:
        """The cache in memory, as `fcache train-head` reads it with --resident ram, or device on a GPU."""
        job = self.job(encoding)
        extract(job, report=lambda event: None)
        where = "device" if torch.device(self.device).type == "cuda" else "ram"
        stream = StreamConfig(
            batch_size=self.batch,
            levels=levels,
            kinds=("clip",),
            seed=SEED,
            drop_last=True,
            decode=decoded_for(self.device),
            allocate=batch_buffers(self.device),
        )
        reader = open_cache(job.cache)
        return training_source(reader, SPLIT, stream, follow=False, resident=where, device=self.device, report=silent)

    def live(self) -> LiveSource:
        """The product's live source: every clip is decoded, cut and sent through the backbone."""
        return LiveSource(prepare(self.job("fp32")), SPLIT, self.batch, "shuffled", SEED, drop_last=True)


def clips(work: Path, records: int, size: tuple[int, int]) -> Path:
    """Moving scenes whose list of classes is as long as that of Kinetics-400, written if they are not there yet."""
    root = work / f"clips-{records}"
    if not root.exists():
        write_moving_scenes(root, train=records, val=1, size=size, frames=FRAMES)
    names = (root / "classes.txt").read_text().split()
    if len(names) < NUM_CLASSES:
        more = [f"class-{i}" for i in range(len(names), NUM_CLASSES)]
        (root / "classes.txt").write_text("\n".join([*names, *more]) + "\n")
    return root
