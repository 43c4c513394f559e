"""Synthetic scenes: textured figures of ten classes, described as data, rendered with every annotation."""

from fcache.extractor.scenes.cocofiles import write_coco_scenes as write_coco_scenes
from fcache.extractor.scenes.files import write_scenes as write_scenes
from fcache.extractor.scenes.render import Rendered as Rendered
from fcache.extractor.scenes.render import render as render
from fcache.extractor.scenes.scene import CLASSES as CLASSES
from fcache.extractor.scenes.scene import Scene as Scene
from fcache.extractor.scenes.scene import Thing as Thing
from fcache.extractor.scenes.scene import make_scene as make_scene
