"""Backbones: one adaptor for every timm model with intermediate features."""

from fcache.extractor.backbones.architecture import LAST as LAST
from fcache.extractor.backbones.architecture import SHORT_NAMES as SHORT_NAMES
from fcache.extractor.backbones.backbone import Backbone as Backbone
from fcache.extractor.backbones.backbone import load_backbone as load_backbone
from fcache.extractor.backbones.clips import of_clips as of_clips
from fcache.extractor.backbones.fingerprint import fingerprint as fingerprint
