"""What chance decided about one view."""

from dataclasses import dataclass

import numpy as np

from fcache.extractor.views.draws import Step
from fcache.extractor.views.frames import Frame
from fcache.extractor.views.steps import steps_matrix


@dataclass(frozen=True)
class Drawn:
    """All that chance decided about one view; `apply_view` replays it. Plain data: `cache_spec.to_json` takes it."""

    frame: Frame
    steps: tuple[Step, ...]

    @property
    def matrix(self) -> np.ndarray:
        """The map from image points to view points, float64 [2, 3]."""
        moved = steps_matrix(self.steps)
        return self.frame.matrix if moved is None else moved @ np.vstack([self.frame.matrix, [0.0, 0.0, 1.0]])
