"""The five detectors: what they have in common, and what each is built from (`build_detector`)."""

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from direct_pt.batch import Batch, Detections
from direct_pt.errors import InputError
from direct_pt.models.anchors import Anchors
from direct_pt.models.api import DetectorAPI
from direct_pt.models.backbone import Backbone
from direct_pt.models.config import BOX_HEADS, MODELS, DetectorConfig
from direct_pt.models.fpn import FPN
from direct_pt.models.layers import batchnorms, use_groupnorm
from direct_pt.models.masks import MaskHead
from direct_pt.models.matching import Matching, Sampling
from direct_pt.models.retinanet import RetinaHead
from direct_pt.models.roi_align import FINEST_SCALE
from direct_pt.models.roi_heads import BoxHead, Refinement, RoIHead
from direct_pt.models.rpn import RPN, ProposalCounts

# What stage 2 leaves as it is.
FREEZES = {
    "paper": "BatchNorm, stem and first stage frozen",
    "norm": "BatchNorm frozen",
    "none": "nothing frozen",
}
PIXEL_MEAN = (123.675, 116.28, 103.53)  # ImageNet's, RGB
PIXEL_STD = (58.395, 57.12, 57.375)
STRIDES = (4, 8, 16, 32, 64, 128)  # P2..P7
RATIOS = (0.5, 1.0, 2.0)  # of anchors
RPN_SCALE, RETINA_SCALE = 8.0, 4.0  # the paper's `anchor_scale`


class Detector(DetectorAPI, ABC):
    """Images to losses (`forward`) or to detections (`detect`, and `predict` of its base class).

    Both kinds of detector, `TwoStage` and `RetinaNet`, share backbone and pyramid; each adds its heads.

    Attributes:
        frozen: what does not train, one of FREEZES.
    """

    def __init__(self, config: DetectorConfig, backbone: Backbone, fpn: FPN) -> None:
        super().__init__(config)
        self.backbone = backbone
        self.fpn = fpn
        self.frozen = "none"
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch, one scalar each, to be summed."""
        return self.losses(self.features(batch), batch)

    @torch.no_grad()
    def detect(self, batch: Batch) -> Detections:
        """The detections of a batch, in the original images' frames. Call it in eval mode."""
        return self.detections(self.features(batch), batch)

    @abstractmethod
    def losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The losses, from a batch's pyramid `features`."""

    @abstractmethod
    def detections(self, features: list[Tensor], batch: Batch) -> Detections:
        """The detections, from a batch's pyramid `features`."""

    def loss_weight(self, batch: Batch) -> Tensor | None:
        """The weight of a micro-batch's losses among those of a step, or None where all weigh the same."""
        return None

    def features(self, batch: Batch) -> list[Tensor]:
        """The pyramid, [B, C, h, w] per level."""
        return self.fpn(self.backbone(self.normalize(batch)))

    def normalize(self, batch: Batch) -> Tensor:
        """`normalized` images. Floating-point images are returned unchanged."""
        if batch.images.is_floating_point():
            return batch.images
        return normalized(batch.images, batch.sizes, self.pixel_mean, self.pixel_std)

    def freeze_for_finetuning(self, kind: str = "paper") -> None:
        """Freeze what stage 2 does not train, one of FREEZES.

        Networks without BatchNorm, such as Swin, train whole.
        """
        self.frozen = kind
        for layer in batchnorms(self) if kind != "none" else ():
            layer.requires_grad_(False)
        for parameter in self.backbone.stem_and_first_stage() if kind == "paper" else ():
            parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Detector":
        """As in torch, but frozen BatchNorm layers keep their statistics."""
        super().train(mode)
        if self.frozen != "none":
            for layer in batchnorms(self):
                layer.eval()
        return self


class TwoStage(Detector):
    """Faster, Cascade and Mask R-CNN: the RPN proposes boxes, the RoI head classifies and refines them."""

    def __init__(self, config: DetectorConfig, backbone: Backbone, fpn: FPN, rpn: RPN, roi_head: RoIHead) -> None:
        super().__init__(config, backbone, fpn)
        self.rpn = rpn
        self.roi_head = roi_head
        self.has_masks = roi_head.mask_head is not None

    def losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The losses of the RPN and the RoI head."""
        logits, deltas = self.rpn(features)
        proposals = self.rpn.proposals(features, logits, deltas, batch)
        return {
            **self.rpn.losses(features, logits, deltas, batch),
            **self.roi_head.losses(features, proposals, batch),
        }

    def detections(self, features: list[Tensor], batch: Batch) -> Detections:
        """The RoI head's detections, from the RPN's proposals."""
        logits, deltas = self.rpn(features)
        proposals = self.rpn.proposals(features, logits, deltas, batch)
        return self.roi_head.detect(features, proposals, batch)


class RetinaNet(Detector):
    """One stage: the head classifies and refines every anchor."""

    def __init__(self, config: DetectorConfig, backbone: Backbone, fpn: FPN, head: RetinaHead) -> None:
        super().__init__(config, backbone, fpn)
        self.head = head

    def losses(self, features: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """The head's losses."""
        return self.head.losses(features, batch)

    def detections(self, features: list[Tensor], batch: Batch) -> Detections:
        """The head's detections."""
        return self.head.detect(features, batch)

    def loss_weight(self, batch: Batch) -> Tensor:
        """The number of positive anchors, by which the losses are divided."""
        return self.head.loss_weight(batch)


def normalized(images: Tensor, sizes: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(pixels - mean) / deviation of `images` [B, 3, H, W], and zero outside of `sizes` [B, 2] (h, w)."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)[None, :] < sizes[:, :1]
    columns = torch.arange(width, device=images.device)[None, :] < sizes[:, 1:]
    return (images - mean) / deviation * (rows[:, None, :, None] & columns[:, None, None, :])


def build_detector(
    name: str, num_classes: int | None = None, backbone: str | None = None, config: DetectorConfig | None = None
) -> Detector:
    """A detector with random weights.

    Args:
        name: one of `MODELS`.
        num_classes: without a background class; not needed with `config`.
        backbone: a timm name in place of the paper's; not needed with `config`.
        config: of the detector, in place of the paper's.

    Raises:
        InputError: `name` or the backbone's name is unknown.
    """
    if name not in MODELS:
        raise InputError(f"{name}: no such detector; choose one of {', '.join(MODELS)}")
    if config is None:
        if num_classes is None:
            raise InputError("build_detector needs num_classes or config")
        names = tuple(f"class {index}" for index in range(num_classes))
        config = DetectorConfig.from_paper(name, names, tuple(range(1, num_classes + 1)))
        config = replace(config, backbone=backbone or config.backbone)
    network, channels, num_classes = Backbone(config.backbone), config.channels, len(config.class_names)

    detector: Detector
    match name:  # the order in which parts are built decides which random weights a seed gives them
        case "retinanet_r50_fpn":
            detector = RetinaNet(
                config,
                network,
                FPN(network.channels[1:], channels, convolved_levels=2),
                RetinaHead(
                    channels,
                    num_classes,
                    anchors_of(config),
                    Matching(positive=0.5, negative=0.4, low_quality=0.0),
                ),
            )
        case "cascade_rcnn_r50_fpn":
            detector = TwoStage(
                config,
                network,
                FPN(network.channels, channels),
                _rpn(config, train_proposals=2 * config.proposals, beta=1 / 9, inside_only=True),
                _roi_head(
                    config,
                    [
                        Refinement(Matching(0.5, 0.5), stds=(0.1, 0.1, 0.2, 0.2), weight=1.0),
                        Refinement(Matching(0.6, 0.6), stds=(0.05, 0.05, 0.1, 0.1), weight=0.5),
                        Refinement(Matching(0.7, 0.7), stds=(0.033, 0.033, 0.067, 0.067), weight=0.25),
                    ],
                    class_agnostic=True,
                    beta=1.0,
                ),
            )
        case "faster_rcnn_r50_fpn":
            roi_head = _roi_head(config, [Refinement(Matching(0.5, 0.5))])
            detector = TwoStage(config, network, FPN(network.channels, channels), _rpn(config), roi_head)
        case "mask_rcnn_r50_fpn" | "mask_rcnn_swin_t_fpn":
            refinement = Refinement(Matching(0.5, 0.5, low_quality=0.5))
            roi_head = _roi_head(config, [refinement], mask_head=MaskHead(channels, num_classes))
            detector = TwoStage(config, network, FPN(network.channels, channels), _rpn(config), roi_head)
    if config.norm == "group":
        use_groupnorm(detector)
    return detector


def anchors_of(config: DetectorConfig) -> Anchors:
    """The anchors of a detector: three sizes an octave of RetinaNet, one of the others."""
    if config.name == "retinanet_r50_fpn":
        scale = config.anchor_scale or RETINA_SCALE
        return Anchors(STRIDES[1:], (scale, scale * 2 ** (1 / 3), scale * 2 ** (2 / 3)), RATIOS)
    return Anchors(STRIDES[:5], (config.anchor_scale or RPN_SCALE,), RATIOS)


def _rpn(
    config: DetectorConfig, train_proposals: int | None = None, beta: float = 0.0, inside_only: bool = False
) -> RPN:
    """The paper's RPN. `train_proposals` per image leave it in training, as many as in testing if None."""
    return RPN(
        config.channels,
        anchors_of(config),
        Matching(positive=0.7, negative=0.3, low_quality=0.3),
        Sampling(per_image=256, positive_share=0.5),
        train_counts=ProposalCounts(2 * config.proposals, train_proposals or config.proposals),
        test_counts=ProposalCounts(config.proposals, config.proposals),
        beta=beta,
        inside_only=inside_only,
    )


def _roi_head(
    config: DetectorConfig,
    refinements: list[Refinement],
    class_agnostic: bool = False,
    beta: float = 0.0,
    mask_head: MaskHead | None = None,
) -> RoIHead:
    """A second stage with a box head for each of `refinements`."""
    convs, fcs = BOX_HEADS[config.box_head]
    num_classes = len(config.class_names)
    return RoIHead(
        [BoxHead(config.channels, num_classes, convs, fcs, class_agnostic) for _ in refinements],
        refinements,
        strides=list(STRIDES[:4]),
        finest_scale=FINEST_SCALE * (config.anchor_scale or RPN_SCALE) / RPN_SCALE,
        sampling=Sampling(per_image=config.rois_per_image, positive_share=0.25),
        mask_head=mask_head,
        beta=beta,
    )
