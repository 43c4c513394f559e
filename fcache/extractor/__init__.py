"""Images in, cache out: datasets, views, frozen backbones and the engines that run them."""

from fcache.extractor.datasets import dataset_names as dataset_names
from fcache.extractor.datasets import find_dataset as find_dataset
from fcache.extractor.engine import ExtractResult as ExtractResult
from fcache.extractor.engine import Stopped as Stopped
from fcache.extractor.engine import extract as extract
from fcache.extractor.events import Event as Event
from fcache.extractor.events import ExtractionStarted as ExtractionStarted
from fcache.extractor.events import RecordsDone as RecordsDone
from fcache.extractor.events import SampleQuarantined as SampleQuarantined
from fcache.extractor.events import ShardCommitted as ShardCommitted
from fcache.extractor.events import WaitingForOthers as WaitingForOthers
from fcache.extractor.job import Job as Job
from fcache.extractor.live import LiveSource as LiveSource
from fcache.extractor.live import Photo as Photo
from fcache.extractor.live import PhotoReader as PhotoReader
from fcache.extractor.live import open_live as open_live
from fcache.extractor.live import open_photos as open_photos
from fcache.extractor.plan import Plan as Plan
from fcache.extractor.plan import SplitPlan as SplitPlan
from fcache.extractor.plan import plan as plan
from fcache.extractor.repairing import find_quarantined as find_quarantined
from fcache.extractor.repairing import repair as repair
from fcache.extractor.scenes import write_scenes as write_scenes
