"""The detectors, by name: what each is made of stands in `build_detector`."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from direct_pt.batch import Batch, Detections, Objects, collate
from direct_pt.data.transforms import TestPreset
from direct_pt.errors import InputError
from direct_pt.models.anchors import Anchors
from direct_pt.models.backbone import Backbone, batchnorms, replace_batchnorm
from direct_pt.models.fpn import FPN
from direct_pt.models.matching import Matching, Sampling
from direct_pt.models.roi_heads import BoxHead, RoIHead
from direct_pt.models.rpn import RPN, ProposalCounts

MODELS = ("faster_rcnn_r50_fpn",)
PIXEL_MEAN = (123.675, 116.28, 103.53)  # ImageNet's, RGB
PIXEL_STD = (58.395, 57.12, 57.375)
STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that a detector is built from, and what its class indices mean. Saved beside its weights.

    Attributes:
        name: one of `MODELS`.
        class_names: in the order of the class indices.
        category_ids: the data set's own id of each class; predictions carry these.
        backbone: a timm name.
        norm: "batch", or "group" where batches are too small for BatchNorm.
        channels: of the pyramid and the heads.
        proposals: an image, that leave the RPN; in training twice as many a level enter its NMS, in testing as many.
        rois_per_image: sampled for the second stage's loss.
        short_side: test images are resized to fit into (long_side, short_side), in pixels.
        long_side: see above.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    backbone: str = "resnet50"
    norm: str = "batch"
    channels: int = 256
    proposals: int = 1000
    rois_per_image: int = 512
    short_side: int = 800
    long_side: int = 1333

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DetectorConfig":
        """From JSON. Raises TypeError for unknown or missing keys."""
        lists = {key: tuple(values[key]) for key in ("class_names", "category_ids")}
        return cls(**{**values, **lists})

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Detector(nn.Module):
    """Images to losses (`forward`) or detections (`detect`, `predict`). Two stages: proposals, then RoIs.

    Attributes:
        config: what it was built from.
    """

    def __init__(self, config: DetectorConfig, backbone: Backbone, fpn: FPN, rpn: RPN, roi_head: RoIHead) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.fpn = fpn
        self.rpn = rpn
        self.roi_head = roi_head
        self.batchnorm_frozen = False
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch, one scalar each, to be summed."""
        features = self.features(batch)
        logits, deltas = self.rpn(features)
        proposals = self.rpn.proposals(features, logits, deltas, batch)
        return {
            **self.rpn.losses(features, logits, deltas, batch),
            **self.roi_head.losses(features, proposals, batch),
        }

    @torch.no_grad()
    def detect(self, batch: Batch) -> Detections:
        """What the detector finds, in the original images' frames. Call it in eval mode."""
        features = self.features(batch)
        logits, deltas = self.rpn(features)
        return self.roi_head.detect(features, self.rpn.proposals(features, logits, deltas, batch), batch)

    def features(self, batch: Batch) -> list[Tensor]:
        """The pyramid, [B, C, h, w] a level."""
        return self.fpn(self.backbone(self.normalize(batch)))

    def normalize(self, batch: Batch) -> Tensor:
        """Pixels less the mean over the deviation, and zero in the padding. Floating-point images come back as is."""
        if batch.images.is_floating_point():
            return batch.images
        images = (batch.images - self.pixel_mean) / self.pixel_std
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device)[None, :] < batch.sizes[:, :1]
        columns = torch.arange(width, device=images.device)[None, :] < batch.sizes[:, 1:]
        return images * (rows[:, None, :, None] & columns[:, None, None, :])

    def predict(self, images: list[np.ndarray], score_threshold: float = 0.05) -> list[dict[str, Any]]:
        """Detections in whole images.

        Args:
            images: [h, w, 3] uint8 RGB arrays of any sizes.
            score_threshold: of what is returned.

        Returns:
            For each image a dictionary: "boxes" [n, 4] in its pixels, "scores" [n], "labels" (class names) and
            "category_ids" (the data set's own), best first.
        """
        preset = TestPreset(self.config.short_side, self.config.long_side)
        device = self.pixel_mean.device
        was_training = self.training
        self.eval()
        results = []
        for image in images:
            found = self.detect(
                collate([preset(Image.fromarray(image), Objects.none(), np.random.default_rng(0))]).to(device)
            ).to("cpu")
            found = found.above(score_threshold)
            labels = found.labels.tolist()
            results.append(
                {
                    "boxes": found.boxes.numpy(),
                    "scores": found.scores.numpy(),
                    "labels": [self.config.class_names[label] for label in labels],
                    "category_ids": [self.config.category_ids[label] for label in labels],
                }
            )
        self.train(was_training)
        return results

    def freeze_for_finetuning(self) -> None:
        """BatchNorm everywhere with fixed statistics and affine, stem and first stage fixed (the recipe's stage 2)."""
        self.batchnorm_frozen = True
        for layer in batchnorms(self):
            layer.requires_grad_(False)
        for module in self.backbone.stem_and_first_stage():
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Detector":
        """As in torch, but frozen BatchNorm layers keep their statistics."""
        super().train(mode)
        if self.batchnorm_frozen:
            for layer in batchnorms(self):
                layer.eval()
        return self


def build_detector(
    name: str, num_classes: int | None = None, backbone: str | None = None, config: DetectorConfig | None = None
) -> Detector:
    """A detector with random weights.

    Args:
        name: one of `MODELS`.
        num_classes: without a background class; or give `config`.
        backbone: a timm name in place of ResNet-50.
        config: everything at once; the other arguments are not needed then.

    Raises:
        InputError: the name, or the backbone's, is unknown.
    """
    if name not in MODELS:
        raise InputError(f"--model {name}: no such detector; choose one of {', '.join(MODELS)}")
    if config is None:
        if num_classes is None:
            raise InputError("build_detector needs num_classes or config")
        names = tuple(f"class {index}" for index in range(num_classes))
        config = DetectorConfig(name, names, tuple(range(1, num_classes + 1)), backbone or "resnet50")

    body = Backbone(config.backbone)
    fpn = FPN(body.channels, config.channels)
    rpn = RPN(
        config.channels,
        Anchors(STRIDES, scales=(8.0,), ratios=(0.5, 1.0, 2.0)),
        Matching(positive=0.7, negative=0.3, low_quality=0.3),
        Sampling(per_image=256, positive_share=0.5),
        train_counts=ProposalCounts(before_nms=2 * config.proposals, after_nms=config.proposals),
        test_counts=ProposalCounts(before_nms=config.proposals, after_nms=config.proposals),
    )
    roi_head = RoIHead(
        BoxHead(config.channels, len(config.class_names), num_convs=4, num_fcs=1),
        strides=list(STRIDES[:4]),
        matching=Matching(positive=0.5, negative=0.5),
        sampling=Sampling(per_image=config.rois_per_image, positive_share=0.25),
    )
    detector = Detector(config, body, fpn, rpn, roi_head)
    if config.norm == "group":
        replace_batchnorm(detector)
    return detector
