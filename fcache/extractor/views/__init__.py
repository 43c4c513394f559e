"""Views: seeded, recorded and replayable cuts of images, with the same geometry for pixels and targets."""

from fcache.extractor.views.frames import CentreCrop as CentreCrop
from fcache.extractor.views.frames import Fit as Fit
from fcache.extractor.views.frames import Frame as Frame
from fcache.extractor.views.frames import KeepRatio as KeepRatio
from fcache.extractor.views.frames import ResizedCrop as ResizedCrop
from fcache.extractor.views.frames import ScaleCrop as ScaleCrop
from fcache.extractor.views.looks import ColourJitter as ColourJitter
from fcache.extractor.views.looks import Erasing as Erasing
from fcache.extractor.views.looks import PhotometricDistortion as PhotometricDistortion
from fcache.extractor.views.looks import RandAugment as RandAugment
from fcache.extractor.views.recipes import Cut as Cut
from fcache.extractor.views.recipes import ViewRecipe as ViewRecipe
from fcache.extractor.views.recipes import canvas as canvas
from fcache.extractor.views.recipes import cut_from_json as cut_from_json
from fcache.extractor.views.recipes import default_recipe as default_recipe
from fcache.extractor.views.recipes import find_view_recipe as find_view_recipe
from fcache.extractor.views.recipes import view_recipe_names as view_recipe_names
from fcache.extractor.views.recipes import with_input_size as with_input_size
from fcache.extractor.views.viewed import Drawn as Drawn
from fcache.extractor.views.viewed import ViewedSample as ViewedSample
from fcache.extractor.views.viewed import apply_view as apply_view
from fcache.extractor.views.viewed import cut_view as cut_view
from fcache.extractor.views.viewed import draw_view as draw_view
from fcache.extractor.views.viewed import truth_bytes_limit as truth_bytes_limit
