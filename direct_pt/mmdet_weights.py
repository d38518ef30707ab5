"""Names of weights: MMDetection's and ours. Shapes and the order of values inside each weight are the same in both."""

import re
from collections.abc import Iterable

# (MMDetection's, ours), the first that fits counts. A line stands for every name that begins so; `#` is an index.
RENAMES = (
    ("backbone.", "backbone.network."),
    ("neck.lateral_convs.#.conv.", "fpn.lateral.#."),
    ("neck.fpn_convs.#.conv.", "fpn.output.#."),
    ("rpn_head.rpn_conv.", "rpn.conv."),
    ("rpn_head.rpn_cls.", "rpn.objectness."),
    ("rpn_head.rpn_reg.", "rpn.deltas."),
    ("roi_head.bbox_head.shared_convs.#.conv.", "roi_head.box_head.convs.#."),
    ("roi_head.bbox_head.shared_fcs.#.", "roi_head.box_head.fcs.#."),
    ("roi_head.bbox_head.fc_cls.", "roi_head.box_head.class_logits."),
    ("roi_head.bbox_head.fc_reg.", "roi_head.box_head.deltas."),
)


def to_mmdet(name: str) -> str:
    """MMDetection's name of the weight that our state dict calls `name`. Raises KeyError where there is none."""
    return _rename(name, ((ours, theirs) for theirs, ours in RENAMES))


def from_mmdet(name: str) -> str:
    """Our name of the weight that MMDetection's state dict calls `name`. Raises KeyError where there is none."""
    return _rename(name, RENAMES)


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        found = re.match(re.escape(old).replace(r"\#", r"(\d+)"), name)
        if found:
            for index in found.groups():
                new = new.replace("#", index, 1)
            return new + name[found.end() :]
    raise KeyError(f"no counterpart is known of the weight {name}")
