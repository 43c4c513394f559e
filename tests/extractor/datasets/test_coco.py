"""COCO's layout: classes, crowds, masks of every form, and what is wrong with broken data, by name."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks

from fcache.cache_spec import DataError
from fcache.extractor.coco import decode_mask, read_coco
from fcache.extractor.datasets import Instances, open_split

SIZE = (24, 32)
# A square of 4 x 4 pixels at (2, 3), three times.
POLYGON = [[2, 3, 6, 3, 6, 7, 2, 7]]
SQUARE = np.zeros(SIZE, dtype=np.uint8)
SQUARE[3:7, 2:6] = 1
RUNS = [2 * 24 + 3, 4, 20, 4, 20, 4, 20, 4, 24 * 32 - 127]
TEXT = coco_masks.encode(np.asfortranarray(SQUARE))["counts"].decode()


def annotation(number: int, image: int, **changes: Any) -> dict[str, Any]:
    made = {
        "id": number, "image_id": image, "category_id": 7, "bbox": [2, 3, 4, 4], "area": 16.5, "iscrowd": 0,
        "segmentation": POLYGON,
    }  # fmt: skip
    return {k: v for k, v in (made | changes).items() if v is not ...}


def data() -> dict[str, Any]:
    """Three images: two with objects, one with none; category ids with holes and out of order."""
    return {
        "info": {"description": 'a list [of] {signs}, "quoted"'},
        "licenses": [{"id": 1, "name": "none"}],
        "images": [
            {"id": 40, "file_name": "forty.jpg", "height": 24, "width": 32},
            {"id": 9, "file_name": "naïve.jpg", "height": 24, "width": 32},
            {"id": 11, "file_name": "bare.jpg", "height": 24, "width": 32},
        ],
        "annotations": [
            annotation(5, 40),
            annotation(3, 9, category_id=2, segmentation={"size": [24, 32], "counts": RUNS}, iscrowd=1),
            annotation(8, 40, category_id=90, segmentation={"size": [24, 32], "counts": TEXT}),
            annotation(4, 9),
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 2, "name": "bicycle"}, {"id": 7, "name": "träin"}],
    }


Write = Callable[[Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an annotation file for train, and photos for it; returns the root."""

    def written(content: Any) -> Path:
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "train2017").mkdir(exist_ok=True)
        for name in ("forty.jpg", "naïve.jpg", "bare.jpg"):
            Image.fromarray(np.full((*SIZE, 3), 7, dtype=np.uint8)).save(tmp_path / "train2017" / name)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (tmp_path / "annotations/instances_train2017.json").write_text(text, encoding="utf-8")
        return tmp_path

    return written


def changed(**changes: Any) -> dict[str, Any]:
    """The data with the first annotation (5, of image 40) changed."""
    made = data()
    made["annotations"][0] = annotation(5, 40, **changes)
    return made


def load(root: Path, index: int = 1) -> Instances:
    split = open_split("coco", root, "train")
    return split.load(split.root, split.samples[index]).targets["instances"]


def test_objects_have_classes_in_the_order_of_category_ids(write: Write) -> None:
    root = write(data())
    split = open_split("coco", root, "train")
    (target,) = split.targets
    assert (target.kind, target.class_names) == ("instances", ("bicycle", "träin", "brush"))
    assert target.conversion == {"category_ids": [2, 7, 90], "boxes_of_cut_objects": "round the mask"}
    assert [(s.id, s.path) for s in split.samples] == [
        ("000000000009", "train2017/naïve.jpg"),
        ("000000000040", "train2017/forty.jpg"),
    ]
    nine, forty = load(root, 0), load(root, 1)
    assert (nine.labels.tolist(), nine.ids.tolist(), nine.crowd.tolist()) == ([0, 1], [3, 4], [1, 0])
    assert (forty.labels.tolist(), forty.ids.tolist(), forty.crowd.tolist()) == ([1, 2], [5, 8], [0, 0])
    np.testing.assert_array_equal(forty.boxes, [[2, 3, 6, 7]] * 2)
    for mask in (*nine.masks, *forty.masks):
        np.testing.assert_array_equal(decode_mask(mask, SIZE), SQUARE)
    assert split.image_size(split.root, split.samples[0]) == SIZE


def test_the_record_is_what_the_evaluation_of_coco_needs(write: Write) -> None:
    root = write(changed(area=..., iscrowd=...))
    assert load(root).record == {
        "image": {"id": 40, "height": 24, "width": 32},
        "annotations": [
            {
                "id": i, "image_id": 40, "category_id": c, "bbox": [2, 3, 4, 4], "area": area, "iscrowd": 0,
                "segmentation": {"size": [24, 32], "counts": TEXT},
            }
            for i, c, area in ((5, 7, 16), (8, 90, 16.5))
        ],
    }  # fmt: skip


def test_training_leaves_images_without_objects_out_and_testing_keeps_them(write: Write) -> None:
    made = data()
    root = write(made)
    (root / "annotations/instances_train2017.json").rename(root / "annotations/instances_val2017.json")
    (root / "train2017").rename(root / "val2017")
    split = open_split("coco", root, "val")
    assert [s.id for s in split.samples] == ["000000000009", "000000000011", "000000000040"]
    empty = split.load(split.root, split.samples[1]).targets["instances"]
    assert (empty.boxes.shape, empty.masks, empty.record["annotations"]) == ((0, 4), (), [])
    # An image of crowds only has no object to learn.
    made["annotations"][3]["iscrowd"] = 1
    root = write(made)
    assert [s.id for s in open_split("coco", root, "train").samples] == ["000000000040"]
    (root / "dataset.toml").write_text("keep_empty = true\n")
    assert len(open_split("coco", root, "train").samples) == 3
    (root / "dataset.toml").write_text("keep_emty = true\n")
    with pytest.raises(DataError, match="expected keep_empty"):
        open_split("coco", root, "train")


@pytest.fixture
def with_maps(write: Write) -> Path:
    """The data with a map beside each photo that is trained on: 0, 181, 255 and 17 in quarters."""
    root = write(data())
    (root / "stuffthingmaps/train2017").mkdir(parents=True)
    labels = np.kron([[0, 181], [255, 17]], np.ones((12, 16))).astype(np.uint8)
    for name in ("forty.png", "naïve.png"):
        Image.fromarray(labels).save(root / "stuffthingmaps/train2017" / name)
    return root


def test_maps_of_stuff_and_things_are_a_second_target_where_they_are(with_maps: Path) -> None:
    split = open_split("coco", with_maps, "train")
    instances, semantic = split.targets
    assert (instances.kind, semantic.kind, semantic.ignore) == ("instances", "semantic", 255)
    names = semantic.class_names
    # COCO-Stuff's list less "unlabeled": category ids, less one.
    assert (len(names), names[0], names[90], names[91], names[181]) == (182, "person", "hair brush", "banner", "wood")
    assert (names[17 - 1], names[91 + 5], names[148]) == ("cat", "bush", "road")
    assert len(set(names)) == 182
    loaded = split.load(split.root, split.samples[0]).targets
    assert set(loaded) == {"instances", "semantic"}
    assert loaded["semantic"].dtype == np.uint8
    assert loaded["semantic"].shape == SIZE
    assert loaded["semantic"][::12, ::16].tolist() == [[0, 181], [255, 17]]
    pickle.loads(pickle.dumps(split))
    digests = [s.digest for s in split.samples]
    Image.fromarray(np.zeros(SIZE, dtype=np.uint8)).save(with_maps / "stuffthingmaps/train2017/forty.png")
    changed_digests = [s.digest for s in open_split("coco", with_maps, "train").samples]
    assert [a == b for a, b in zip(digests, changed_digests, strict=True)] == [True, False]


def test_names_of_other_maps_stand_in_dataset_toml(with_maps: Path) -> None:
    (with_maps / "dataset.toml").write_text('stuff_names = ["road", "sky"]\n')
    split = open_split("coco", with_maps, "train")
    assert split.targets[1].class_names == ("road", "sky")
    with pytest.raises(DataError, match=r"the value 17 is no class, expected 0 to 1, or 255.*stuff_names"):
        split.load(split.root, split.samples[0])
    for wrong in ('stuff_names = ["road", "road"]', "stuff_names = []", "stuff_names = [1]", 'stuff_names = "road"'):
        (with_maps / "dataset.toml").write_text(wrong)
        with pytest.raises(DataError, match="stuff_names \\(1 to 255 different texts\\), found stuff_names"):
            open_split("coco", with_maps, "train")


def test_a_map_that_is_missing_or_of_another_size_is_named(with_maps: Path) -> None:
    maps = with_maps / "stuffthingmaps"
    Image.fromarray(np.zeros((24, 30), dtype=np.uint8)).save(maps / "train2017/forty.png")
    split = open_split("coco", with_maps, "train")
    with pytest.raises(DataError, match=r"forty.png: the map has 30x24 pixels, its photo 32x24"):
        split.load(split.root, split.samples[1])
    (maps / "train2017/forty.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 maps are missing, forty.png first; .*only the head htc needs"):
        open_split("coco", with_maps, "train")
    (maps / "train2017").rename(maps / "else")
    with pytest.raises(DataError, match=r"expected maps in stuffthingmaps/train2017 or stuffthingmaps/train, found"):
        open_split("coco", with_maps, "train")


@pytest.mark.parametrize("folder", ["images/train2017", "train", "images/train", "images"])
def test_photos_may_lie_where_people_put_them(write: Write, folder: str) -> None:
    root = write(data())
    (root / folder).parent.mkdir(exist_ok=True)
    (root / "train2017").rename(root / folder)
    split = open_split("coco", root, "train")
    assert split.samples[1].path == f"{folder}/forty.jpg"
    (root / "annotations/instances_train2017.json").rename(root / "annotations/instances_train.json")
    assert open_split("coco", root, "train").samples[0].id == split.samples[0].id
    assert load(root).ids.tolist() == [5, 8]


def test_photos_may_lie_in_folders_inside(write: Write) -> None:
    made = data()
    made["images"][0]["file_name"] = "2017/may/forty.jpg"
    root = write(made)
    (root / "train2017/2017/may").mkdir(parents=True)
    (root / "train2017/forty.jpg").rename(root / "train2017/2017/may/forty.jpg")
    assert load(root).ids.tolist() == [5, 8]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_places_in_the_file_are_bytes_however_it_is_written(write: Write, indent: int | None, mark: str) -> None:
    made = data()
    # Annotations before the images that they belong to.
    made = {k: made[k] for k in ("annotations", "info", "categories", "licenses", "images")}
    root = write(mark + json.dumps(made, ensure_ascii=False, indent=indent))
    assert load(root, 0).ids.tolist() == [3, 4]
    assert load(root, 1).ids.tolist() == [5, 8]


def test_a_split_survives_pickling_and_holds_no_polygon(write: Write) -> None:
    made = data()
    made["annotations"][0]["segmentation"] = [[2.5, 3, 6, 3, 6, 7, 2, 7] * 500]
    made["annotations"][0]["category_id"] = 2
    root = write(made)
    split = open_split("coco", root, "train")
    pickled = pickle.dumps(split)
    assert len(pickled) < 3000
    again = pickle.loads(pickled)
    assert again.samples == split.samples
    assert again.load(again.root, again.samples[1]).targets["instances"].labels.tolist() == [0, 2]


def test_digests_follow_the_photo_and_the_annotations_of_the_image(write: Write) -> None:
    before = open_split("coco", write(data()), "train").samples
    after = open_split("coco", write(changed(bbox=[2, 3, 4, 4.5])), "train").samples
    assert before[0].digest == after[0].digest
    assert before[1].digest != after[1].digest
    assert len(after[1].digest) == 16


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [2, 3, 4]}, r"annotation 5 of image 40 has the bbox \[2, 3, 4\], expected four"),
        ({"bbox": [2, 3, 4, "4"]}, "expected four finite numbers"),
        ({"bbox": [2, 3, float("nan"), 4]}, "expected four finite numbers"),
        ({"bbox": ...}, "has the bbox None"),
        ({"bbox": [2, 3, -4, 4]}, "a bbox of the size -4 x 4"),
        ({"bbox": [2, 3, 40, 4]}, "outside the image of 32x24 pixels"),
        ({"bbox": [2, -5, 4, 4]}, "outside the image of 32x24 pixels"),
        ({"segmentation": [[1, 2, 3, 4]]}, "annotation 5 of image 40 has a polygon of 4 numbers"),
        ({"segmentation": [[2, 3, 600, 3, 6, 7]]}, r"polygon point \(600, 3\) outside"),
        ({"segmentation": []}, "has no segmentation"),
        ({"segmentation": ...}, "has no segmentation"),
        ({"segmentation": {"size": [32, 24], "counts": TEXT}}, "run lengths for the size"),
        ({"segmentation": {"size": [24, 32], "counts": TEXT[:-1]}}, "run lengths that are no text"),
        ({"iscrowd": 2}, "has iscrowd 2"),
        ({"area": -1}, "has the area -1"),
        ({"area": None}, "has the area None"),
    ],
)
def test_a_broken_annotation_is_an_error_of_its_sample(write: Write, changes: dict[str, Any], reason: str) -> None:
    root = write(changed(**changes))
    with pytest.raises(DataError, match=reason) as error:
        load(root)
    assert "instances_train2017.json" in str(error.value)
    assert load(root, 0).ids.tolist() == [3, 4]


def test_boxes_without_area_and_a_fraction_outside_are_data(write: Write) -> None:
    root = write(changed(bbox=[2, -0.4, 0, 25]))
    np.testing.assert_array_equal(load(root).boxes[0], [2, -0.4, 2, 24.6])


def _images(**changes: Any) -> dict[str, Any]:
    made = data()
    made["images"][0] |= changes
    return made


def _without(name: str) -> dict[str, Any]:
    made = data()
    del made[name]
    return made


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the annotation file is empty"),
        ("no json", r"expected \{ at byte 0, found 'no json'"),
        ("[1, 2]", r"expected \{ at byte 0"),
        (json.dumps(data())[:700], "not JSON.* the file may be cut short"),
        (json.dumps(data())[:-1], "the file may be cut short"),
        (json.dumps(data()).replace("24", "2x4", 1), "not JSON"),
        ('{"images": ' + "[" * 100_000, "not JSON"),
        ('{"info": ' + "[" * 100_000, "not JSON"),
        ('{"images": 5}', r"expected \[ at byte 11"),
        (_without("annotations"), "missing: annotations"),
        (_without("categories"), "missing: categories"),
        (data() | {"categories": []}, r"categories that the list of categories lacks: 2, 7, 90 \(annotation 3\)"),
        (changed(category_id=13), r"categories that the list of categories lacks: 13 \(annotation 5\)"),
        (changed(category_id="7"), "annotation 5 without a whole number as 'category_id'"),
        (changed(image_id=77), "annotations of images that the list of images lacks: 77"),
        (changed(id=8), "annotation id 8 occurs twice"),
        (changed(id=8.5), "annotation without a whole number as 'id'"),
        (data() | {"annotations": [5]}, "annotation without a whole number as 'id': 5"),
        (_images(id=9), "image id 9 occurs twice"),
        (_images(height="24"), "image without a whole number as 'height'"),
        (_images(width=0), r"image 40 has height and width \(24, 0\)"),
        (_images(file_name=None), "image 40 has the file_name None"),
        (_images(file_name="../a.jpg"), "outside train2017"),
        (_images(file_name="/etc/a.jpg"), "outside train2017"),
        (_images(file_name="gone.jpg"), r"images of annotations/.*json that train2017 lacks: gone\.jpg \(1 in all\)"),
        (data() | {"categories": [{"id": 2, "name": "a"}, {"id": 2, "name": "b"}]}, "category id 2 occurs twice"),
        (data() | {"categories": [{"id": 2, "name": " "}]}, "category 2 has the name ' '"),
        (data() | {"annotations": []}, "no image has an object"),
        (data() | {"annotations": [], "images": []}, "holds no image"),
    ],
)
def test_a_broken_annotation_file_is_an_error_that_says_where(write: Write, content: Any, reason: str) -> None:
    root = write(content)
    with pytest.raises(DataError, match=reason):
        open_split("coco", root, "train")


def test_missing_folders_and_files_are_errors(tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match="expected annotations/instances_val2017.json or"):
        open_split("coco", tmp_path, "val")
    root = write(data())
    (root / "train2017").rename(root / "photos")
    with pytest.raises(DataError, match="expected the photos in one of the folders train2017, images/train2017"):
        open_split("coco", root, "train")


def test_a_photo_of_another_size_is_an_error(write: Write) -> None:
    root = write(data())
    Image.fromarray(np.zeros((32, 24, 3), dtype=np.uint8)).save(root / "train2017/forty.jpg")
    split = open_split("coco", root, "train")
    for read in (split.load, split.image_size):
        with pytest.raises(DataError, match="the photo has 24x32 pixels as stored, the annotation file says 32x24"):
            read(split.root, split.samples[1])


def test_an_annotation_file_that_changes_meanwhile_is_noticed(write: Write) -> None:
    root = write(data())
    split = open_split("coco", root, "train")
    write(json.dumps(data(), indent=2))
    with pytest.raises(DataError, match="changed since it was opened"):
        split.load(split.root, split.samples[1])


def test_real_annotations_equal_those_of_pycocotools(test_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    root, checked = test_data / "coco", 0
    for name in ("train", "val"):
        coco = COCO(str(root / f"annotations/instances_{name}2017.json"))
        split = open_split("coco", root, name)
        assert split.targets[0].conversion["category_ids"] == sorted(coco.getCatIds())
        for sample in split.samples:
            raw = split.load(split.root, sample)
            assert raw.image.shape[:2] == split.image_size(split.root, sample)
            found = raw.targets["instances"]
            expected = coco.loadAnns(coco.getAnnIds(imgIds=int(sample.id)))
            assert found.ids.tolist() == [a["id"] for a in expected]
            for i, a in enumerate(expected):
                checked += 1
                counts = coco.annToRLE(a)["counts"]
                assert found.masks[i] == (counts.encode() if isinstance(counts, str) else counts)
                assert found.record["annotations"][i]["area"] == a["area"]
                assert found.crowd[i] == a["iscrowd"]
                assert split.targets[0].class_names[found.labels[i]] == coco.cats[a["category_id"]]["name"]
    assert checked > 90
    capsys.readouterr()


def test_an_index_counts_what_belongs_to_an_image(write: Write) -> None:
    root = write(data())
    found = read_coco(root / "annotations/instances_train2017.json")
    assert [(i.id, i.annotations, i.plain) for i in found.images] == [(9, 2, 1), (11, 0, 0), (40, 2, 2)]
    assert found.images[1].annotation_bytes == 0
    assert found.images[2].annotation_bytes == sum(
        len(json.dumps(a, ensure_ascii=False)) for a in data()["annotations"] if a["image_id"] == 40
    )
