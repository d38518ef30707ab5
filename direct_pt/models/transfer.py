"""From one detector to another with other classes: what does not depend on the classes is kept, class rows by name."""

from typing import NamedTuple

import torch
from torch import Tensor

from direct_pt.models.detector import Detector


class Transferred(NamedTuple):
    """What was taken over: whole tensors, tensors with rows of classes, and the classes whose rows they are."""

    whole: int
    by_class: int
    classes: list[str]


@torch.no_grad()
def transfer(source: Detector, target: Detector) -> Transferred:
    """Load a detector's weights into one that differs in its classes alone.

    Rows of classes that both have by name are taken over, and the background's; the others stay as they are.
    """
    classes = [name for name in target.config.class_names if name in source.config.class_names]
    old, new = ([one.config.class_names.index(name) for name in classes] for one in (source, target))
    found, whole, by_class = source.state_dict(), 0, 0
    for name, tensor in target.state_dict().items():
        split = class_rows(name, source.config.name)
        if split is None:
            tensor.copy_(found[name])
            whole += 1
            continue
        others, inner = split
        before, after = (
            _by_class(one, len(detector.config.class_names) + others, inner)
            for one, detector in ((found[name], source), (tensor, target))
        )
        after[:, new] = before[:, old]
        if others:
            after[:, -others:] = before[:, -others:]
        by_class += 1
    return Transferred(whole, by_class, classes)


def class_rows(name: str, model: str) -> tuple[int, int] | None:
    """How many rows of a tensor are for no class, after those of the classes, and how many each class has.

    None where a tensor of this name has no rows of classes.
    """
    layer = name.rpartition(".")[0]
    if layer.endswith(".class_logits"):
        return 1, 1  # the background's
    if ".box_heads." in layer and layer.endswith(".deltas") and model != "cascade_rcnn_r50_fpn":
        return 0, 4  # Cascade R-CNN's are the same for all classes
    return (0, 1) if layer in ("roi_head.mask_head.logits", "head.logits") else None


def _by_class(tensor: Tensor, rows: int, inner: int) -> Tensor:
    """A view [anchors or 1, rows, inner, ...] of a tensor."""
    return tensor.view(-1, rows, inner, *tensor.shape[1:])
