"""COCO's annotation files: an index of what belongs to which image, and masks as run lengths."""

from fcache.extractor.coco.index import CocoFile as CocoFile
from fcache.extractor.coco.index import CocoImage as CocoImage
from fcache.extractor.coco.index import read_coco as read_coco
from fcache.extractor.coco.masks import decode_mask as decode_mask
from fcache.extractor.coco.masks import encode_part as encode_part
from fcache.extractor.coco.masks import mask_area as mask_area
from fcache.extractor.coco.masks import mask_box as mask_box
from fcache.extractor.coco.masks import most_bytes as most_bytes
from fcache.extractor.coco.masks import segmentation_rle as segmentation_rle
from fcache.extractor.coco.records import Bounds as Bounds
from fcache.extractor.coco.records import read_annotations as read_annotations
from fcache.extractor.coco.records import truth_record as truth_record
from fcache.extractor.coco.stuff import STUFF_NAMES as STUFF_NAMES
from fcache.extractor.coco.stuff import load_stuff as load_stuff
from fcache.extractor.coco.stuff import stuff_maps as stuff_maps
