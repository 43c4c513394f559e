"""Moving scenes: only the order of frames tells the class, and the files are what decoders read."""

import hashlib
from dataclasses import replace
from pathlib import Path

import av
import decord
import numpy as np
import pytest

from fcache.cache_spec import SpecError
from fcache.extractor.scenes import MOTIONS, MovingScene, make_moving_scene, render_frames, write_moving_scenes
from fcache.extractor.scenes.avi import avi_bytes

SIZE = (48, 64)
OPPOSITE = {"left": "right", "up": "down", "clockwise": "counter-clockwise", "growing": "shrinking"}


def render_frame(scene: MovingScene, number: int) -> np.ndarray:
    return list(render_frames(scene, number + 1))[-1]


def files(root: Path) -> dict[str, str]:
    found = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_the_first_frame_does_not_depend_on_the_motion_and_later_ones_do() -> None:
    for index in range(4):
        scenes = [make_moving_scene(0, index, motion, size=SIZE) for motion in MOTIONS]
        first, later = ([render_frame(scene, n) for scene in scenes] for n in (0, 3))
        assert all(np.array_equal(frame, first[0]) for frame in first)
        assert len({frame.tobytes() for frame in later}) == len(MOTIONS)
    assert not np.array_equal(first[0], render_frame(make_moving_scene(1, 3, "left", size=SIZE), 0))


@pytest.mark.parametrize(("motion", "opposite"), OPPOSITE.items())
def test_a_clip_seen_backwards_is_one_of_the_opposite_motion(motion: str, opposite: str) -> None:
    scene, other = (make_moving_scene(5, 0, m, size=SIZE) for m in (motion, opposite))
    last = scene.after(7)
    backwards = replace(other, place=last.place, scale=last.scale)
    for number in range(8):
        forth, back = render_frame(scene, number), render_frame(backwards, 7 - number)
        # Ways are added up in another order: single pixels may round otherwise.
        assert np.abs(forth.astype(int) - back).max() <= 1


@pytest.mark.parametrize("motion", MOTIONS)
def test_places_and_sizes_stay_even_whatever_the_motion(motion: str) -> None:
    later = [make_moving_scene(0, i, motion, size=SIZE).after(9) for i in range(3000)]
    x, y = np.array([s.place for s in later]).T
    # The share of a uniform disc within a radius is its square; directions are even, and so are sizes.
    radius = np.sort(np.hypot(x, y)) ** 2
    direction = np.sort(np.arctan2(y, x) / (2 * np.pi) % 1)
    even = (np.arange(3000) + 0.5) / 3000
    for found in (radius, direction, np.sort([s.scale for s in later])):
        # Kolmogorov's bound of one in a thousand.
        assert np.abs(found - even).max() < 1.95 / np.sqrt(3000)


def test_what_passes_an_end_begins_anew_at_the_other() -> None:
    scene = replace(make_moving_scene(0, 0, "right", size=SIZE), place=(0.5, 0.6), velocity=0.2)
    # The chord at 0.6 goes from -0.8 to 0.8, a step is 0.32.
    assert scene.after(1).place == pytest.approx((-0.78, 0.6))
    assert scene.after(5).place == pytest.approx((0.5, 0.6))
    growing = replace(make_moving_scene(0, 0, "growing", size=SIZE), scale=0.9, velocity=0.2)
    assert growing.after(1).scale == pytest.approx(0.1)


def test_a_motion_goes_where_its_name_says() -> None:
    def seen(motion: str, number: int) -> tuple[float, float, float]:
        """Column, row and area of the figure, which starts right of the middle."""
        scene = make_moving_scene(0, 1, motion, size=(96, 96))
        scene = replace(scene, place=(0.5, 0.0), scale=0.3)
        # The same ground, with the figure far outside.
        ground = replace(scene, place=(9.0, 9.0), velocity=0.0)
        frames = (render_frame(s, number).astype(int) for s in (scene, ground))
        rows, columns = np.nonzero(np.abs(np.subtract(*frames)).sum(-1) > 30)
        return float(columns.mean()), float(rows.mean()), float(len(rows))

    before = seen("left", 0)
    assert before[:2] == pytest.approx((48 + 0.5 * 0.34 * 96, 48), abs=2)
    assert seen("left", 3)[0] < before[0] - 5 < before[0] + 5 < seen("right", 3)[0]
    assert seen("up", 3)[1] < before[1] - 5 < before[1] + 5 < seen("down", 3)[1]
    assert seen("shrinking", 3)[2] < before[2] < seen("growing", 3)[2]
    # From the right, clockwise is down first, and then left.
    assert seen("clockwise", 3)[1] > before[1] + 5 > before[1] - 5 > seen("counter-clockwise", 3)[1]
    assert seen("clockwise", 10)[0] < 44
    assert seen("counter-clockwise", 10)[0] < 44


def test_clips_are_read_as_they_were_drawn_in_order_and_every_frame_is_a_key_frame(tmp_path: Path) -> None:
    write_moving_scenes(tmp_path / "a", train=9, val=2, size=SIZE, frames=7, seed=3)
    for split, number, motion in (("train", 8, "left"), ("train", 5, "counter-clockwise"), ("val", 1, "right")):
        path = tmp_path / "a" / split / motion / f"{number:06d}.avi"
        scene = make_moving_scene(3, number if split == "train" else -1 - number, motion, size=SIZE)
        drawn = np.stack(list(render_frames(scene, 7)))
        reader = decord.VideoReader(str(path))
        assert (len(reader), reader.get_key_indices()) == (7, list(range(7)))
        found = np.stack([reader[i].asnumpy() for i in range(7)])
        assert np.abs(found.astype(int) - drawn).mean() < 6, "JPEG changes a frame a little"
        with av.open(str(path)) as container:
            assert float(container.streams.video[0].average_rate) == 10
            again = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        np.testing.assert_array_equal(again, found)


def test_a_data_set_names_its_classes_and_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    for name, train in (("a", 9), ("b", 9), ("c", 10)):
        write_moving_scenes(tmp_path / name, train=train, val=2, size=SIZE, frames=3)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert {k: v for k, v in c.items() if k in a and k != "train.csv"} == {
        k: v for k, v in a.items() if k != "train.csv"
    }
    names = (tmp_path / "a" / "classes.txt").read_text().split("\n")
    assert names == [*MOTIONS, ""]
    for split, count in (("train", 9), ("val", 2)):
        lines = (tmp_path / "a" / f"{split}.csv").read_text().splitlines()
        assert len(lines) == count
        for line in lines:
            path, label = line.split(" ")
            assert path.split("/")[:2] == [split, names[int(label)]]
            assert path in a
    with pytest.raises(SpecError, match="expected a new or empty folder"):
        write_moving_scenes(tmp_path / "a", train=1, val=1)
    with pytest.raises(SpecError, match="at least one frame"):
        write_moving_scenes(tmp_path / "d", train=1, val=1, frames=0)


def test_riff_sizes_are_those_of_the_file_also_of_frames_with_odd_numbers_of_bytes() -> None:
    data = avi_bytes([b"abc", b"de", b"f"], size=(8, 8), rate=25)
    assert data[:4] == b"RIFF"
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    movie, index = data.index(b"movi"), data.index(b"idx1")
    assert int.from_bytes(data[index + 4 : index + 8], "little") == len(data) - index - 8 == 3 * 16
    for i, frame in enumerate((b"abc", b"de", b"f")):
        entry = data[index + 8 + 16 * i :][:16]
        place, size = (int.from_bytes(entry[k : k + 4], "little") for k in (8, 12))
        assert data[movie + place :][: 8 + size] == b"00dc" + size.to_bytes(4, "little") + frame
    with pytest.raises(SpecError, match="at least one frame"):
        avi_bytes([], size=(8, 8), rate=25)
