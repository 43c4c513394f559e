from pathlib import Path

import numpy as np
import pytest
from videobuilder import TURNS, cut_in_front, number_of, reference_frames, with_matrix, write_video

from fcache.cache_spec import DataError, SpecError
from fcache.extractor import videos
from fcache.extractor.videos import read_frames, video_size

COUNT = 40
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0"}


def _irregular() -> list[int]:
    return np.cumsum(np.random.default_rng(0).integers(10, 120, COUNT)).tolist()


# Name of the file and how it is written. Readers that seek get those marked * wrong, without a word.
CLIPS = {
    "b-frames.mp4": {"b_frames": 3},
    "open-gop.mp4": {"b_frames": 3, "options": OPEN_GOP},  # *
    "open-gop.mkv": {"b_frames": 3, "options": OPEN_GOP},
    "irregular.mp4": {"times": _irregular()},
    "irregular.mkv": {"times": _irregular()},
    "odd.mp4": {"size": (49, 97), "pixels": "yuv444p"},
    "fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "index-first.mov": {"container": {"movflags": "faststart"}},
    "b-frames.avi": {"codec": "mpeg4"},  # *
    "h264.avi": {},
    "jpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p", "b_frames": 0},
    "vp9.webm": {"codec": "libvpx-vp9", "b_frames": 0, "options": {"deadline": "realtime", "cpu-used": "8"}},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "log-level=none"}},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, how in CLIPS.items():
        write_video(folder / name, **{"count": COUNT, **how})
    cut_in_front(folder / "b-frames.mp4", folder / "edit-list.mp4", 0.6)
    cut_in_front(folder / "open-gop.mp4", folder / "edit-list-open-gop.mp4", 0.6)
    for degrees, rows in TURNS.items():
        with_matrix(folder / "b-frames.mp4", folder / f"turned-{degrees}.mp4", rows)
    return folder


def _all(path: Path) -> np.ndarray:
    return read_frames(path, range).pixels


@pytest.mark.parametrize(
    "name", [*CLIPS, "edit-list.mp4", "edit-list-open-gop.mp4", *(f"turned-{degrees}.mp4" for degrees in TURNS)]
)
def test_frames_are_those_of_a_sequential_decode(clips: Path, name: str) -> None:
    expected = reference_frames(clips / name)
    assert np.array_equal(_all(clips / name), expected)
    chosen = read_frames(clips / name, lambda count: [count - 1, 3, 17, 3, 0])
    assert chosen.count == len(expected)
    assert chosen.numbers == (len(expected) - 1, 3, 17, 3, 0)
    assert np.array_equal(chosen.pixels, expected[list(chosen.numbers)])


def test_frames_show_the_numbers_that_were_painted(clips: Path) -> None:
    for name in CLIPS:
        assert [number_of(f) for f in _all(clips / name)] == list(range(COUNT)), name
    # An edit list hides what lies between the key frame before it and the cut.
    assert [number_of(f) for f in _all(clips / "edit-list.mp4")] == list(range(15, COUNT))


def test_odd_sizes_with_halved_colour_differ_from_the_reference_in_colour_only(tmp_path: Path) -> None:
    options = {"deadline": "realtime", "cpu-used": "8"}
    path = write_video(tmp_path / "odd.webm", "libvpx-vp9", size=(49, 97), count=12, b_frames=0, options=options)
    frames, expected = _all(path), reference_frames(path)
    assert [number_of(f) for f in frames] == list(range(12))
    # decord's FFmpeg is older than PyAV's: they place halved colour of odd sizes half a pixel apart.
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs((frames.astype(float) - expected) @ luma).mean() < 2


def test_sizes_are_those_of_the_upright_picture(clips: Path) -> None:
    sizes = {degrees: video_size(clips / f"turned-{degrees}.mp4") for degrees in TURNS}
    assert sizes == {90: (96, 48), 180: (48, 96), 270: (96, 48)}


@pytest.mark.parametrize("rows", [(-1, 0, 0, 1), (1, 1, -1, 1)])
def test_mirrored_and_slanted_videos_are_refused(clips: Path, tmp_path: Path, rows: tuple[int, int, int, int]) -> None:
    path = with_matrix(clips / "b-frames.mp4", tmp_path / "shown.mp4", rows)
    with pytest.raises(DataError, match="mirrored, or turned by no multiple of 90"):
        _all(path)


@pytest.mark.parametrize("name", ["b-frames.mp4", "index-first.mov", "fragments.mp4", "open-gop.mkv", "jpeg.avi"])
def test_a_file_cut_short_is_refused_with_where_it_ends(clips: Path, tmp_path: Path, name: str) -> None:
    data = (clips / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(
        DataError, match=rf"{name}: cut short: .* ends at byte \d+, there are \d+; fetch the file again"
    ):
        _all(path)


def test_a_damaged_frame_spoils_the_video_wherever_it_lies(clips: Path, tmp_path: Path) -> None:
    data = bytearray((clips / "index-first.mov").read_bytes())
    data[-400:-200] = bytes(200)
    path = tmp_path / "damaged.mov"
    path.write_bytes(data)
    for _ in range(5):
        with pytest.raises(DataError, match=r"damaged, not all of its frames can be decoded \(Error sending packet\)"):
            read_frames(path, lambda count: [0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"G@\x11\x10" * 50, "found one that begins with 47 40 11 10"),
        (b"a text that is no video", "found one that begins with"),
        (b"\x00\x00\x00\x14ftypisom" + bytes(8), "it has no box 'moov'"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        _all(path)


def test_a_transport_stream_is_refused_whose_first_frames_decord_would_skip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an MP4, MOV, Matroska, WebM or AVI file"):
        _all(write_video(tmp_path / "clip.ts"))


def test_a_codec_that_decord_lacks_is_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", "libsvtav1", count=8, b_frames=0, size=(64, 96))
    with pytest.raises(DataError, match="no video that decord can decode"):
        _all(path)


def test_a_file_that_cannot_be_read_is_no_bad_sample(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _all(tmp_path / "absent.mp4")


def test_without_decord_one_error_says_so(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    with pytest.raises(SpecError, match="videos are decoded by decord, which cannot be imported"):
        videos.check_decoder()


def test_only_the_frames_that_are_named_are_kept(tmp_path: Path) -> None:
    import resource

    path = write_video(tmp_path / "long.mp4", count=250, size=(720, 1280), options={"preset": "ultrafast"}, b_frames=0)
    read_frames(path, lambda count: [0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = read_frames(path, lambda count: [0, count // 2])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert read.count == 250
    # Its frames together take 690 MB; decord decodes some ahead of us. ru_maxrss counts kilobytes.
    assert grown < 250_000
