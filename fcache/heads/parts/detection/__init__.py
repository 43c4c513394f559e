"""What detectors are made of."""

from fcache.heads.parts.detection.boxes import Stage as Stage
from fcache.heads.parts.detection.detector import DETECTOR_OPTIONS as DETECTOR_OPTIONS
from fcache.heads.parts.detection.detector import Detector as Detector
from fcache.heads.parts.detection.detector import check_detector as check_detector
from fcache.heads.parts.detection.detector import detection_loss as detection_loss
from fcache.heads.parts.detection.detector import detection_metrics as detection_metrics
from fcache.heads.parts.detection.detector import detection_outputs as detection_outputs
from fcache.heads.parts.detection.detector import detector_levels as detector_levels
from fcache.heads.parts.detection.merging import merge_detections as merge_detections
from fcache.heads.parts.detection.regions import Cascade as Cascade
