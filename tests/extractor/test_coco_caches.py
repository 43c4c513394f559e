"""Caches of objects: everything that evaluation and training need is in them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fcache.cache_spec import DataError, StreamConfig, open_cache, open_source, subset_ids
from fcache.cache_spec.targets import unpack_masks
from fcache.extractor import Job, SampleQuarantined, extract, plan
from fcache.extractor.coco import mask_area
from fcache.extractor.datasets import open_split
from fcache.extractor.prepare import prepare

MakeJob = Callable[..., Job]


@pytest.fixture
def make_coco(make_job: MakeJob, coco_scenes: Path) -> MakeJob:
    def made(**changes: object) -> Job:
        return make_job(**({"dataset": "coco", "root": coco_scenes, "view_recipe": "coco-small"} | changes))

    return made


def test_a_cache_holds_the_annotations_of_its_test_images(make_coco: MakeJob, coco_scenes: Path) -> None:
    job = make_coco()
    extract(job, report=lambda e: None)
    source = open_source(open_cache(job.cache), "val", StreamConfig(batch_size=2, kinds=("instances",)))
    truths = [json.loads(t.tobytes()) for b in source.blocks(0) for t in b.targets["instances/truth"]]
    official = json.loads((coco_scenes / "annotations/instances_val2017.json").read_text())
    assert sorted(t["image"]["id"] for t in truths) == [i["id"] for i in official["images"]]
    found = sorted((a for t in truths for a in t["annotations"]), key=lambda a: a["id"])
    assert found == official["annotations"]
    target = source.info.target("instances")
    names = dict(zip(target.conversion["category_ids"], target.class_names, strict=True))
    assert names == {c["id"]: c["name"] for c in official["categories"]}


def test_views_smaller_than_the_canvas_go_through_the_whole_path(make_coco: MakeJob) -> None:
    job = make_coco(views=6)
    extract(job, report=lambda e: None)
    source = open_source(open_cache(job.cache), "train", StreamConfig(batch_size=4, kinds=("instances",)))
    smaller = boxes = 0
    for epoch in range(6):
        for block in source.blocks(epoch):
            t = block.targets
            for i, view in enumerate(block.views):
                assert view.canvas == (64, 64)
                smaller += min(view.valid) < 64
                boxes += len(t["instances/boxes"][i])
                height, width = view.valid
                assert (t["instances/boxes"][i] <= [width, height, width, height]).all()
                counts = unpack_masks(t["instances/rle"][i], t["instances/rle_ends"][i])
                areas = [mask_area(c, view.canvas) for c in counts]
                assert areas == t["instances/area"][i].tolist()
    assert smaller > 10
    assert boxes > 50


def test_a_broken_annotation_quarantines_its_image_only(make_coco: MakeJob, coco_scenes: Path, tmp_path: Path) -> None:
    root = tmp_path / "broken"
    shutil.copytree(coco_scenes, root)
    file = root / "annotations/instances_train2017.json"
    data = json.loads(file.read_text())
    data["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    file.write_text(json.dumps(data))
    events = []
    result = extract(make_coco(root=root), report=events.append)
    (name,) = {e.sample for e in events if isinstance(e, SampleQuarantined)}
    assert name == f"{data['annotations'][0]['image_id']:012d}"
    assert list(result.quarantined) == [name]
    with pytest.raises(DataError, match="a polygon of 4 numbers"):
        extract(make_coco(root=root, cache=tmp_path / "other", on_error="fail"), report=lambda e: None)


def test_limits_hold_whatever_is_drawn_and_leave_room_for_more(make_coco: MakeJob) -> None:
    groups = prepare(make_coco(views=3)).wanted.groups
    assert {g.role: set(g.limits) for g in groups} == {
        "training": {"instances", "instances_rle_bytes"},
        "evaluation": {"instances", "instances_rle_bytes", "instances_truth_bytes"},
    }
    for group in groups:
        assert group.limits["instances"] == 128
        assert all(n & (n - 1) == 0 for n in group.limits.values())
    job = make_coco(limit=2)
    extract(job, report=lambda e: None)
    extract(make_coco(), report=lambda e: None)
    assert sum(len(g.ids) for g in open_cache(job.cache).manifest.groups) == 13


def test_a_share_of_the_images_is_a_fixed_list_of_ids(make_coco: MakeJob, coco_scenes: Path) -> None:
    ids = [s.id for s in open_split("coco", coco_scenes, "train").samples]
    (group,) = (g for g in prepare(make_coco(subset=0.5)).wanted.groups if g.role == "training")
    assert list(group.ids) == [i for i in ids if i in set(subset_ids(ids, 0.5))]
    assert 0 < len(group.ids) < len(ids)


def test_a_plan_says_what_an_extraction_writes(make_coco: MakeJob) -> None:
    job = make_coco()
    found = plan(job, measure=False)
    extract(job, report=lambda e: None)
    assert found.pending_records == found.records == 2 * 8 + 5
    again = plan(job, measure=False)
    assert (again.pending_records, again.bytes) == (0, found.bytes)
    written = sum(p.stat().st_size for p in Path(job.cache).rglob("level-*/c.*"))
    assert abs(written - found.bytes) < 0.1 * found.bytes
    assert np.isfinite(found.bytes)
