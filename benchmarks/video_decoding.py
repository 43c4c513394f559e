"""How fast clips of videos are decoded, and which frames come: our reader beside PyAV in order and decord's own ways.

    python benchmarks/video_decoding.py [--frames 300] [--rounds 5]

Clips are 16 frames, 4 apart, that lie where the training views of `kinetics400` do; videos are made here, 340x256 at 30
frames a second, ten seconds like those of Kinetics. One thread each. CPU seconds are counted, decoding threads
included, so that other work on the machine matters less. A frame is wrong if it is not the one that PyAV's decoding in
order gives under its number.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
from storage.report import arguments, machine, publish, table, work_folder

from fcache.extractor.videos import read_frames
from fcache.extractor.views import draw_frames, find_view_recipe

SIZE = (256, 340)
CUT = find_view_recipe("kinetics400").training
COLUMNS = {
    "clips / CPU second": "{rate:.2f}",
    "CPU ms a clip (range)": "{ms:.0f} ({low:.0f} to {high:.0f})",
    "wrong frames": "{wrong} of {frames}",
}
Reader = Callable[[Path, Sequence[int]], np.ndarray]


def main() -> None:
    args = arguments(__doc__, frames=300, rounds=5)
    m = machine("av", "decord")
    with work_folder(args.folder) as work:
        result = measure(work, args.frames, args.rounds)
    publish("video_decoding", result, table("Decoding of clips", COLUMNS, result["rows"]), args.out, m=m)


def measure(work: Path, frames: int, rounds: int) -> dict:
    """A row for each video and reader."""
    rows = {}
    for name, path in videos(work, frames).items():
        expected = pyav_frames(path, None)
        clips = [clip(view, len(expected)) for view in range(rounds)]
        for reader, read in READERS.items():
            read(path, clips[0])
            seconds, wrong = [], 0
            for numbers in clips:
                started = time.process_time()
                found = read(path, numbers)
                seconds.append(time.process_time() - started)
                wrong += sum(not np.array_equal(a, expected[n]) for a, n in zip(found, numbers, strict=True))
            rows[f"{name}: {reader}"] = {
                "rate": 1 / statistics.median(seconds),
                "ms": 1000 * statistics.median(seconds),
                "low": 1000 * min(seconds),
                "high": 1000 * max(seconds),
                "wrong": wrong,
                "frames": sum(map(len, clips)),
            }
    what = f"16 frames of a video of {SIZE[1]}x{SIZE[0]} pixels and {frames} frames; medians of {rounds} clips."
    return {"what": what, "rows": rows}


def clip(view: int, count: int) -> tuple[int, ...]:
    """The frames of a training view."""
    return draw_frames(CUT, seed=0, sample_id="video", view=view, count=count)


def ours(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """Our reader: all of the video, in order."""
    return read_frames(path, lambda count: numbers).pixels


def pyav_frames(path: Path, numbers: Sequence[int] | None) -> np.ndarray:
    """PyAV in order, until the last frame that is wanted; None: all."""
    kept, last = {}, max(numbers) if numbers is not None else None
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for number, frame in enumerate(file.decode(stream)):
            if numbers is None or number in numbers:
                kept[number] = frame.to_ndarray(format="rgb24")
            if number == last:
                break
    return np.stack([kept[n] for n in (numbers if numbers is not None else sorted(kept))])


def decord_batch(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """decord's get_batch, which seeks."""
    import decord

    return decord.VideoReader(str(path), num_threads=1).get_batch(list(numbers)).asnumpy()


READERS: dict[str, Reader] = {"ours": ours, "PyAV in order": pyav_frames, "decord get_batch": decord_batch}


def videos(work: Path, frames: int) -> dict[str, Path]:
    """Videos by what is special about them."""
    open_groups = "open-gop=1:keyint=12:min-keyint=12:scenecut=0"
    found = {
        "long groups": encoded(work / "long.mp4", frames, {"g": "250", "bf": "3"}),
        "open groups": encoded(work / "open.mp4", frames, {"bf": "3", "x264-params": open_groups}),
    }
    return found | {"edit list": trimmed(found["open groups"], work / "trimmed.mp4")}


def encoded(path: Path, frames: int, options: dict[str, str]) -> Path:
    """Writes a moving texture as H.264."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (SIZE[0] // 8 + 60, SIZE[1] // 8 + 60, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt, stream.options = *SIZE, "yuv420p", options
        for number in range(frames):
            y, x = (int(240 * (1 + wave) / 2) for wave in (np.sin(number / 37), np.cos(number / 23)))
            shown = np.ascontiguousarray(texture[y : y + SIZE[0], x : x + SIZE[1]])
            shown[:8] = np.unpackbits(np.array([number], dtype=">u2").view(np.uint8)).repeat(22)[: SIZE[1], None] * 255
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def trimmed(source: Path, path: Path, seconds: float = 0.5) -> Path:
    """Cuts the beginning off without encoding, as `ffmpeg -ss … -c copy`: an edit list hides the rest of a group."""
    with av.open(str(source)) as file, av.open(str(path), "w") as out:
        stream = file.streams.video[0]
        copied, start = out.add_stream_from_template(stream), int(seconds / stream.time_base)
        file.seek(start, stream=stream, backward=True)
        for packet in file.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copied
                out.mux(packet)
    return path


if __name__ == "__main__":
    main()
