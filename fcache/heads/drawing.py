"""Pictures and lists of detections."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from fcache.cache_spec import DataError, TargetSpec
from fcache.heads.detections import Detections, decode_masks
from fcache.heads.predict import default_palette, legend_font, with_legend


def draw_detections(
    image: np.ndarray, found: Detections, spec: TargetSpec, *, min_score: float = 0.5, opacity: float = 0.5
) -> np.ndarray:
    """An image, uint8 [H, W, 3], with the boxes and masks of detections, their scores, and a legend at the right.

    Detections below `min_score` are left out; the better one is drawn over the worse. The legend lists the classes that
    occur, with their numbers. Returns uint8 [max(H, legend), W + legend, 3]. Raises DataError if the sizes differ.
    """
    if image.shape[:2] != found.size:
        raise DataError(f"the image is {image.shape[:2]}, its detections are of {found.size}")
    colours = np.asarray(spec.palette or default_palette(len(spec.class_names)), dtype=np.float32)
    shown = [i for i in range(len(found)) if float(found.scores[i]) >= min_score][::-1]
    drawn = image.astype(np.float32)
    for i in shown:
        # One at a time: a hundred masks of a large photo would take gigabytes.
        inside = decode_masks([found.masks[i]], found.size)[0].astype(bool)
        drawn[inside] = (1 - opacity) * drawn[inside] + opacity * colours[int(found.labels[i])]
    picture = Image.fromarray(np.round(drawn).astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), legend_font(found.size)
    for i in shown:
        colour = tuple(int(c) for c in colours[int(found.labels[i])])
        x0, y0, x1, y1 = found.boxes[i].tolist()
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=max(1, picture.height // 300))
        text = f"{spec.class_names[int(found.labels[i])]} {float(found.scores[i]):.2f}"
        left, top, right, bottom = draw.textbbox((x0 + 2, y0 + 1), text, font=font)
        draw.rectangle((left - 2, top - 1, right + 2, bottom + 1), fill=colour)
        # Black on light colours, white on dark ones.
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
        draw.text((x0 + 2, y0 + 1), text, fill="black" if light else "white", font=font)
    counts = Counter(int(found.labels[i]) for i in shown)
    lines = [(tuple(map(int, colours[k])), f"{spec.class_names[k]}  {n}") for k, n in counts.most_common()]
    return with_legend(np.asarray(picture), lines)


def detections_json(found: Detections, spec: TargetSpec) -> list[Mapping[str, Any]]:
    """Detections as COCO's results have them: one object each, best first, with the name of its class.

    `bbox` is x, y, width, height in pixels of the image; `segmentation` a compressed RLE. `category_id` is that of the
    dataset, or the number of the class from 1 on where it has none.
    """
    ids: Sequence[Any] = spec.conversion.get("category_ids", range(1, len(spec.class_names) + 1))
    size = list(found.size)
    return [
        {
            "category_id": int(ids[int(label)]),
            "class": spec.class_names[int(label)],
            "score": round(float(score), 6),
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "segmentation": {"size": size, "counts": mask.decode()},
        }
        for label, score, (x0, y0, x1, y1), mask in zip(
            found.labels, found.scores, found.boxes.tolist(), found.masks, strict=True
        )
    ]
