"""COCO's evaluation of boxes and masks."""

from fcache.heads.coco.metric import detection_metric as detection_metric
