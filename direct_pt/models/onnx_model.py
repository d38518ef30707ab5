"""An exported detector where a detector is expected: onnxruntime computes, all else is as for the others."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from direct_pt.batch import Batch, Detections
from direct_pt.errors import InputError
from direct_pt.models.api import DetectorAPI
from direct_pt.models.saved_config import config_from_json
from direct_pt.onnx_detector import PROVIDERS, OnnxDetector


class OnnxModel(DetectorAPI):
    """A file that `scripts/export.py` wrote.

    Args:
        path: of the file.
        providers: see `OnnxDetector`.
        threads: see `OnnxDetector`.

    Raises:
        InputError: see `OnnxDetector`.
    """

    def __init__(self, path: Path, providers: Sequence[str] = PROVIDERS, threads: int | None = None) -> None:
        try:
            runtime = OnnxDetector(path, providers, threads)
            config = config_from_json(runtime.facts["detector"])
        except (ValueError, KeyError) as error:
            raise InputError(str(error)) from error
        super().__init__(config)
        self.runtime = runtime
        self.has_masks = runtime.has_masks
        self.history = runtime.facts["history"]
        self.score_threshold, self.class_thresholds = runtime.score_threshold, tuple(runtime.class_thresholds)

    def _check_saved(self) -> None:
        """Raise InputError: there are no weights to train on."""
        raise InputError("save_pretrained: this detector was exported; save the one that it was exported from")

    @property
    def device(self) -> torch.device:
        """Where batches must lie: onnxruntime takes them from the CPU."""
        return torch.device("cpu")

    def detect(self, batch: Batch) -> Detections:
        """The detections of a batch, in the original images' frames."""
        images = np.ascontiguousarray(batch.images.cpu().permute(0, 2, 3, 1).numpy())
        found = self.runtime.run(images, batch.sizes.cpu().numpy())
        image = torch.from_numpy(found.image)
        boxes = torch.from_numpy(found.found.boxes) / batch.scales.cpu().repeat(1, 2)[image]
        masks = None if found.found.masks is None else torch.from_numpy(found.found.masks)
        scores, labels = torch.from_numpy(found.found.scores), torch.from_numpy(found.found.labels)
        return Detections(image, boxes, scores, labels, masks)
