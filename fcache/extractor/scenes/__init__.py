"""Synthetic scenes, described as data: photos of figures of ten classes with every annotation, and clips of motions."""

from fcache.extractor.scenes.cocofiles import write_coco_scenes as write_coco_scenes
from fcache.extractor.scenes.files import write_scenes as write_scenes
from fcache.extractor.scenes.moving import MOTIONS as MOTIONS
from fcache.extractor.scenes.moving import MovingScene as MovingScene
from fcache.extractor.scenes.moving import make_moving_scene as make_moving_scene
from fcache.extractor.scenes.moving import render_frames as render_frames
from fcache.extractor.scenes.moving import write_moving_scenes as write_moving_scenes
from fcache.extractor.scenes.render import Rendered as Rendered
from fcache.extractor.scenes.render import render as render
from fcache.extractor.scenes.scene import CLASSES as CLASSES
from fcache.extractor.scenes.scene import Scene as Scene
from fcache.extractor.scenes.scene import Thing as Thing
from fcache.extractor.scenes.scene import make_scene as make_scene
