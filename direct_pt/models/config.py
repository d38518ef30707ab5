"""What a detector is built from, and what its class indices mean."""

from dataclasses import asdict, dataclass
from typing import Any

from direct_pt.errors import InputError

# The paper's five detectors, and the backbone of each.
MODELS = {
    "retinanet_r50_fpn": "resnet50",
    "faster_rcnn_r50_fpn": "resnet50",
    "cascade_rcnn_r50_fpn": "resnet50",
    "mask_rcnn_r50_fpn": "resnet50",
    "mask_rcnn_swin_t_fpn": "swin_tiny_patch4_window7_224",
}
BOX_HEADS = {"4conv1fc": (4, 1), "2fc": (0, 2)}  # convolutions and fully connected layers


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that a detector is built from, and the meaning of its class indices. Saved beside its weights.

    Attributes:
        name: one of `MODELS`.
        class_names: in the order of the class indices.
        category_ids: the data set's own id of each class; predictions carry these.
        backbone: a timm name.
        norm: "batch" for the backbone's own, or "group" where batches are too small for BatchNorm: GroupNorm instead,
            and also after the convolutions of pyramid and heads.
        box_head: one of `BOX_HEADS`.
        channels: of the pyramid and the heads.
        proposals: per image, after NMS. Candidates per level before NMS: twice as many in training, as many in testing.
        rois_per_image: how many RoIs are sampled for the second stage's loss.
        anchor_scale: side of a level's smallest anchors at ratio 1, in strides; None for the paper's, see `anchors_of`.
        short_side: test images are resized to fit into (long_side, short_side), in pixels.
        long_side: see above.
    """

    name: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    backbone: str
    norm: str = "batch"
    box_head: str = "4conv1fc"
    channels: int = 256
    proposals: int = 1000
    rois_per_image: int = 512
    anchor_scale: float | None = None
    short_side: int = 800
    long_side: int = 1333

    @classmethod
    def from_paper(cls, name: str, class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> "DetectorConfig":
        """The paper's configuration of detector `name`. Raises InputError for an unknown name."""
        if name not in MODELS:
            raise InputError(f"--model {name}: no such detector; choose one of {', '.join(MODELS)}")
        box_head = "2fc" if name == "cascade_rcnn_r50_fpn" else "4conv1fc"
        return cls(name, class_names, category_ids, MODELS[name], box_head=box_head)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `saved_config.config_from_json` reads it back."""
        return asdict(self)
