"""COCO's scores: pycocotools' numbers, whatever the objects and detections are."""

import contextlib
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fcache.cache_spec import DataError
from fcache.heads.coco import detection_metric
from fcache.heads.detections import Detections
from fcache.heads.metrics import score, stack_states

SIZES = ("small", "medium", "large")
NAMES = (
    *("ap", "ap50", "ap75", *(f"ap/{size}" for size in SIZES)),
    *("ar/1", "ar/10", "ar/100", *(f"ar/{size}" for size in SIZES)),
)


@dataclass(frozen=True)
class Case:
    """Annotations and results in COCO's form."""

    annotations: dict[str, Any]
    boxes: list[dict[str, Any]]
    masks: list[dict[str, Any]]

    def states(self, results: list[dict[str, Any]], limit: int) -> list[dict[str, np.ndarray]]:
        """Our states of all images in the order of their ids."""
        categories = sorted(c["id"] for c in self.annotations["categories"])
        metric = detection_metric(categories, detections=limit)
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = self.annotations
            coco.createIndex()
        found = defaultdict(list)
        for result in results:
            found[result["image_id"]].append(result)
        states = []
        for image in sorted(self.annotations["images"], key=lambda i: i["id"]):
            annotations = []
            for a in coco.imgToAnns[image["id"]]:
                rle = coco.annToRLE(a)
                counts = rle["counts"] if isinstance(rle["counts"], str) else rle["counts"].decode()
                annotations.append({**a, "segmentation": {"size": rle["size"], "counts": counts}})
            record = {"image": image, "annotations": annotations}
            truth = np.frombuffer(json.dumps(record).encode(), np.uint8)
            said = detections_of(found[image["id"]], categories, (image["height"], image["width"]))
            states.append(metric.observe(said, {"instances/truth": torch.from_numpy(truth.copy())}))
        return states

    def scored(self, results: list[dict[str, Any]], limit: int = 150):
        metric = detection_metric(sorted(c["id"] for c in self.annotations["categories"]), detections=limit)
        return score(metric, stack_states(self.states(results, limit)))

    def reference(self, results: list[dict[str, Any]], kind: str) -> COCOeval:
        """pycocotools' own evaluation. Of results with a box it would take the box's area as that of the mask."""
        if kind == "segm":
            results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = json.loads(json.dumps(self.annotations))
            truth.createIndex()
            found = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), kind)
            found.evaluate()
            found.accumulate()
            found.summarize()
        return found


def detections_of(results: list[dict[str, Any]], categories: list[int], size: tuple[int, int]) -> Detections:
    """Results of one image; boxes without a mask get an empty one, masks without a box theirs."""
    boxes, masks = [], []
    for r in results:
        mask = r.get("segmentation") or coco_masks.encode(np.zeros(size, np.uint8, order="F"))
        counts = mask["counts"]
        masks.append(counts.encode() if isinstance(counts, str) else counts)
        boxes.append(r.get("bbox", [0, 0, 1, 1]))
    xywh = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    return Detections(
        boxes=torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
        scores=torch.tensor([r["score"] for r in results], dtype=torch.float64),
        labels=torch.tensor([categories.index(r["category_id"]) for r in results], dtype=torch.int64),
        masks=tuple(masks),
        size=size,
    )


@pytest.fixture(scope="module")
def published(test_data) -> Case:
    folder = test_data / "known_answers" / "cocoapi"
    annotations = json.loads((folder / "instances_val2014_100.json").read_text())
    boxes, masks = (
        json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text()) for kind in ("bbox", "segm")
    )
    return Case(annotations, boxes, masks)


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_numbers_that_the_coco_api_publishes(published, test_data, kind):
    text = (test_data / "known_answers" / "cocoapi" / "val2014_fake_eval_res.txt").read_text()
    section = text.split("type=")[1:][{"mask": 0, "box": 1}[kind]]
    expected = [float(line.rsplit("=", 1)[1]) for line in section.splitlines() if "@[" in line]
    results = published.boxes if kind == "box" else published.masks
    found = published.scored(results)
    assert len(expected) == 12
    assert [round(found.values[f"{kind}_{name}"], 3) for name in NAMES] == expected
    reference = published.reference(results, {"box": "bbox", "mask": "segm"}[kind])
    assert [found.values[f"{kind}_{name}"] for name in NAMES] == list(reference.stats)


def test_the_truth_as_detections_has_ap_1(published):
    results = [
        {**a, "score": 0.9, "segmentation": rle}
        for a, rle in zip(published.annotations["annotations"], _encoded(published), strict=True)
        if not a["iscrowd"]
    ]
    found = published.scored(results)
    for kind in ("box", "mask"):
        for name in NAMES:
            if name not in ("ar/1", "ar/10"):
                assert found.values[f"{kind}_{name}"] == pytest.approx(1.0, abs=1e-12)
        present = found.per_class[f"{kind}_ap"]
        assert np.isnan(present).any()
        np.testing.assert_allclose(present[~np.isnan(present)], 1.0, atol=1e-12)


def _encoded(case: Case) -> list[dict[str, Any]]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = case.annotations
        coco.createIndex()
    return [coco.annToRLE(a) for a in case.annotations["annotations"]]


def random_case(seed: int, *, images: int = 6, size: int = 128) -> Case:
    """Objects and detections of three classes, with crowds, equal scores, equal overlaps, and images without either."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        boxes = [_box(rng, size) for _ in range(rng.integers(0, 7))]
        for box in boxes:
            rle = _ellipse(box, size)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.choice([3, 7, 20])),
                    "bbox": box,
                    "area": float(coco_masks.area(rle)) * float(rng.choice([1.0, 10.0])),
                    "iscrowd": int(rng.random() < 0.2),
                    "segmentation": rle,
                }
            )
        for _ in range(rng.integers(0, 12)):
            near = boxes and rng.random() < 0.7
            box = [v + float(rng.integers(-2, 3)) for v in boxes[rng.integers(len(boxes))]] if near else _box(rng, size)
            box[2:] = [max(1.0, v) for v in box[2:]]
            results.append(
                {
                    "image_id": image,
                    "category_id": int(rng.choice([3, 7, 20])),
                    "bbox": box,
                    "score": float(rng.integers(1, 9)) / 8,
                    "segmentation": _ellipse(box, size),
                }
            )
    given = {
        "images": [{"id": i, "height": size, "width": size} for i in range(1, images + 1)],
        "categories": [{"id": k} for k in (3, 7, 11, 20)],
        "annotations": annotations,
    }
    return Case(given, results, results)


def _box(rng: np.random.Generator, size: int) -> list[float]:
    width, height = (float(v) for v in rng.integers(4, size * 3 // 4, 2))
    return [float(rng.integers(0, int(size - width))), float(rng.integers(0, int(size - height))), width, height]


def _ellipse(box: list[float], size: int) -> dict[str, Any]:
    y, x = np.mgrid[:size, :size] + 0.5
    inside = ((x - box[0]) / box[2] * 2 - 1) ** 2 + ((y - box[1]) / box[3] * 2 - 1) ** 2 <= 1
    rle = coco_masks.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.mark.parametrize("seed", range(12))
def test_scores_are_those_of_pycocotools(seed: int):
    case = random_case(seed)
    found = case.scored(case.boxes)
    for kind, their_kind in (("box", "bbox"), ("mask", "segm")):
        reference = case.reference(case.boxes, their_kind)
        expected = {f"{kind}_{n}": v for n, v in zip(NAMES, reference.stats, strict=True) if v > -1}
        assert {n: v for n, v in found.values.items() if n.startswith(kind)} == expected
        precision = reference.eval["precision"][..., 0, 2]
        of_class = [np.mean(p) if p.min() > -1 else np.nan for p in np.moveaxis(precision, -1, 0)]
        np.testing.assert_allclose(found.per_class[f"{kind}_ap"], of_class, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_an_image_that_counts_twice_scores_as_two(seed: int):
    case = random_case(seed)
    metric = detection_metric([3, 7, 11, 20], detections=20)
    states = case.states(case.boxes, 20)
    weights = np.array([2, 0, 1, 3, 0, 1])
    repeated = [s for s, w in zip(states, weights, strict=True) for _ in range(w)]
    once, weighted = score(metric, stack_states(repeated)), metric.reduce(stack_states(states), weights)
    assert dict(weighted.values) == pytest.approx(dict(once.values), abs=1e-12)
    assert metric.primary_of(stack_states(states))(weights) == weighted.values["box_ap"]


def test_more_than_a_hundred_detections_of_a_class_are_cut_as_pycocotools_cuts_them():
    case = random_case(3, images=2)
    rng = np.random.default_rng(0)
    many = [
        {**case.boxes[0], "category_id": 3, "image_id": 1, "bbox": _box(rng, 128), "score": float(rng.random())}
        for _ in range(130)
    ]
    for r in many:
        r["segmentation"] = _ellipse(r["bbox"], 128)
    found = case.scored(case.boxes + many, limit=200)
    assert [found.values.get(f"box_{n}", -1.0) for n in NAMES] == list(case.reference(case.boxes + many, "bbox").stats)


def test_without_objects_there_is_nothing_to_score():
    case = random_case(0, images=1)
    case.annotations["annotations"].clear()
    with pytest.raises(DataError, match="no object"):
        case.scored(case.boxes)


def test_truth_of_another_size_or_category_is_refused():
    case = random_case(1, images=1)
    size = case.annotations["images"][0]
    of_others = Case({**case.annotations, "categories": [{"id": 99}]}, [], [])
    with pytest.raises(DataError, match="category"):
        of_others.scored([])
    said = detections_of([], [3], (size["height"], size["width"] + 1))
    record = {"image": size, "annotations": []}
    truth = torch.from_numpy(np.frombuffer(json.dumps(record).encode(), np.uint8).copy())
    with pytest.raises(DataError, match="re-extract"):
        detection_metric([3], detections=5).observe(said, {"instances/truth": truth})
