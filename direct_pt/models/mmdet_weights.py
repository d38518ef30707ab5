"""State dicts of MMDetection and of our detectors: only names differ, and one order of channels in Swin."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from direct_pt.errors import InputError, first_names
from direct_pt.models.backbone import Backbone
from direct_pt.models.detector import BOX_HEADS, RATIOS, Detector, DetectorConfig, build_detector
from direct_pt.models.saved_config import MAX_CLASSES, check_config
from direct_pt.models.weights import bad_values, outline_of
from direct_pt.schema import WrongValue

# (MMDetection's, ours): beginnings of names, `#` is an index. The first that matches counts.
RENAMES = (
    # Swin merges patches at the end of a stage in MMDetection, at the beginning of the next one in timm.
    *((f"backbone.layers.{i}.downsample.", f"backbone.network.layers_{i + 1}.downsample.") for i in range(3)),
    ("backbone.layers.#.", "backbone.network.layers_#."),
    ("backbone.norm#.", "backbone.norms.#."),
    ("backbone.", "backbone.network."),
    ("neck.lateral_convs.#.conv.", "fpn.lateral.#."),
    ("neck.fpn_convs.#.conv.", "fpn.output.#."),
    ("rpn_head.rpn_conv.", "rpn.conv."),
    ("rpn_head.rpn_cls.", "rpn.objectness."),
    ("rpn_head.rpn_reg.", "rpn.deltas."),
    ("bbox_head.cls_convs.#.conv.", "head.class_convs.#."),
    ("bbox_head.reg_convs.#.conv.", "head.box_convs.#."),
    ("bbox_head.retina_cls.", "head.logits."),
    ("bbox_head.retina_reg.", "head.deltas."),
    ("roi_head.mask_head.convs.#.conv.", "roi_head.mask_head.convs.#."),
    ("roi_head.mask_head.upsample.", "roi_head.mask_head.upsample."),
    ("roi_head.mask_head.conv_logits.", "roi_head.mask_head.logits."),
)
BOX_HEAD = (
    ("shared_convs.#.conv.", "convs.#."),
    ("shared_fcs.#.", "fcs.#."),
    ("fc_cls.", "class_logits."),
    ("fc_reg.", "deltas."),
)
# Above are the names of Swin's authors, which the paper's files have. MMDetection's own Swin came later, with these.
LATER_SWIN = (
    *((f"backbone.stages.{i}.downsample.", f"backbone.network.layers_{i + 1}.downsample.") for i in range(3)),
    ("backbone.stages.#.blocks.#.attn.w_msa.", "backbone.network.layers_#.blocks.#.attn."),
    ("backbone.stages.#.blocks.#.ffn.layers.0.0.", "backbone.network.layers_#.blocks.#.mlp.fc1."),
    ("backbone.stages.#.blocks.#.ffn.layers.1.", "backbone.network.layers_#.blocks.#.mlp.fc2."),
    ("backbone.stages.#.", "backbone.network.layers_#."),
    ("backbone.patch_embed.projection.", "backbone.network.patch_embed.proj."),
)
LATER_MERGE = "backbone.stages.#.downsample."  # whose channels are in another order
POSITION_TABLE, POSITION_INDEX = "relative_position_bias_table", "relative_position_index"
COMPUTED_BUFFERS = (POSITION_INDEX, "attn_mask")  # ends of names; these are not loaded
# timm's networks that compute the same as MMDetection's, with weights of the same names.
BACKBONES = re.compile(
    r"(resnet(18|34|50|101|152)|resnext(50_32x4d|101_(32|64)x4d)|swin_(tiny|small|base)_patch4_window7_224)(\..+)?"
)


def renames(model: str) -> list[tuple[str, str]]:
    """The table for one of `detector.MODELS`. MMDetection numbers the box heads of Cascade R-CNN only."""
    if model.startswith("cascade"):
        theirs, ours = "roi_head.bbox_head.#.", "roi_head.box_heads.#."
    else:
        theirs, ours = "roi_head.bbox_head.", "roi_head.box_heads.0."
    return [*RENAMES, *((theirs + their_name, ours + our_name) for their_name, our_name in BOX_HEAD)]


def to_mmdet(name: str, model: str) -> str:
    """MMDetection's name of the weight that our state dict calls `name`. Raises KeyError where there is none."""
    return _rename(name, ((ours, theirs) for theirs, ours in renames(model)))


def from_mmdet(name: str, model: str) -> str:
    """Our name of the weight that MMDetection's state dict calls `name`. Raises KeyError where there is none."""
    return _rename(name, [*LATER_SWIN, *renames(model)])


def detector_from_mmdet(
    state: Mapping[str, Tensor],
    model: str,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    backbone: str | None = None,
    source: str = "the state dict",
) -> Detector:
    """A detector with all weights of MMDetection's. Box head, number of classes and channels are inferred from names
    and shapes.

    Args:
        state: MMDetection's state dict, 2.x or 3.x.
        model: one of `detector.MODELS`.
        class_names: in the order of the class indices; by default "class 0" and so on.
        category_ids: of the classes; by default from 1.
        backbone: a timm name in place of the paper's.
        source: of the state dict, for messages.

    Returns:
        The detector, in training mode.

    Raises:
        InputError: the number of names contradicts the shapes, or a tensor is missing, left over or misshapen.
    """
    if reason := bad_values(state):
        raise InputError(f"{source}: {reason}; give a file of finite weights, each saved whole")
    config = _infer_config(state, model, class_names, category_ids, backbone, source)
    weights = outline_of(config).state_dict()  # compared before memory is taken for it
    is_swin = any(name.endswith(POSITION_TABLE) for name in weights)
    indices = _position_indices(Backbone(config.backbone), "backbone.") if is_swin else {}
    wanted = {**weights, **indices}
    found: dict[str, Tensor] = {}
    left_over, misshapen = [], []
    for name, tensor in state.items():
        try:
            ours = from_mmdet(name, model)
        except KeyError:
            ours = ""
        if ours not in wanted or ours in found:
            if not name.endswith("attn_mask"):
                left_over.append(name)
            continue
        found[ours], expected = tensor, wanted[ours]
        if tensor.shape != expected.shape or tensor.is_floating_point() != expected.is_floating_point():
            misshapen.append(f"{name}: expected {_shape_and_dtype(expected)}, found {_shape_and_dtype(tensor)}")
        elif ours in indices and not torch.equal(tensor.to(expected.dtype), expected):
            misshapen.append(f"{name}: another order of the positions in a window")
        elif _pattern(LATER_MERGE).match(name):
            found[ours] = merge_order(tensor)
    # Early versions of torch did not count batches.
    required = [name for name in weights if not name.endswith("num_batches_tracked")]
    missing = [to_mmdet(name, model) for name in required if name not in found]
    if missing or left_over or misshapen:
        kinds = ((missing, "missing"), (left_over, "left over"), (misshapen, "misshapen"))
        misfits = "; ".join(f"{len(names)} {kind} ({first_names(names)})" for names, kind in kinds if names)
        remedy = "give the --model and --backbone that it is of; other variants have no counterpart here"
        if any(name.startswith("ema_") for name in left_over):
            remedy = "names with ema_ are a second copy of the weights: save the state dict without them"
        raise InputError(f"{source}: its tensors are not those of {model} with {config.backbone}: {misfits}; {remedy}")
    detector = build_detector(model, config=config)
    detector.load_state_dict({**detector.state_dict(), **{name: found[name] for name in weights if name in found}})
    return detector


def mmdet_state_dict(detector: Detector) -> dict[str, Tensor]:
    """A detector's weights (not copied) as MMDetection's state dict, with the names of the paper's files and with the
    buffers that MMDetection expects. Raises InputError where MMDetection has no such detector."""
    config = detector.config
    _check_backbone(config.backbone)
    if config.norm != "batch":
        raise InputError(f"the detector has norm {config.norm!r}; MMDetection has counterparts of norm 'batch' only")
    indices, state = _position_indices(detector), {}
    for name, tensor in detector.state_dict().items():
        state[to_mmdet(name, config.name)] = tensor.cpu().contiguous()
        if name.endswith(POSITION_TABLE):
            index = name.replace(POSITION_TABLE, POSITION_INDEX)
            state[to_mmdet(index, config.name)] = indices[index].cpu().contiguous()
    return state


def merge_order(weight: Tensor) -> Tensor:
    """A weight [..., 4 C] of patch merging, from the order of MMDetection's later Swin to that of Swin's authors.

    Both concatenate the channels of the 4 pixels of a 2x2 patch. MMDetection orders them (C, row, column), as
    `nn.Unfold` does; Swin's authors (column, row, C).
    """
    return weight.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)


def _infer_config(
    state: Mapping[str, Tensor],
    model: str,
    class_names: Sequence[str] | None,
    category_ids: Sequence[int] | None,
    backbone: str | None,
    source: str,
) -> DetectorConfig:
    """The configuration of the detector with this state dict. Where tensors are missing, the paper's: loading reports
    them."""
    config = DetectorConfig.from_paper(model, (), ())
    _check_backbone(backbone or config.backbone)
    if model.startswith("retinanet"):
        anchors_per_cell = 3 * len(RATIOS)  # three scales
        num_classes = _num_rows(state, to_mmdet("head.logits.weight", model)) // anchors_per_cell
    else:
        num_classes = _num_rows(state, to_mmdet("roi_head.box_heads.0.class_logits.weight", model)) - 1
    if num_classes > MAX_CLASSES:
        raise InputError(
            f"{source}: has weights for {num_classes} classes, of {MAX_CLASSES} at most; is it a detector's?"
        )
    names = tuple(class_names) if class_names is not None else tuple(f"class {i}" for i in range(max(1, num_classes)))
    if num_classes > 0 and len(names) != num_classes:
        raise InputError(
            f"{source}: has weights for {num_classes} classes, but there are {len(names)} names: {first_names(names)}; "
            "give the names of these classes, in its meta or, where it has none, with --categories"
        )
    convs, fcs = (
        len({found[1] for name in state if (found := re.search(rf"\.{layers}\.(\d+)\.", name))})
        for layers in ("shared_convs", "shared_fcs")
    )
    config = replace(
        config,
        class_names=names,
        category_ids=tuple(category_ids) if category_ids is not None else tuple(range(1, len(names) + 1)),
        backbone=backbone or config.backbone,
        box_head=next((head for head, layers in BOX_HEADS.items() if layers == (convs, fcs)), config.box_head),
        channels=_num_rows(state, to_mmdet("fpn.lateral.0.weight", model)) or config.channels,
    )
    try:
        check_config(config)
    except WrongValue as error:
        raise InputError(f"{source}: would be read as a detector that cannot be: {error}") from error
    return config


def _num_rows(state: Mapping[str, Tensor], name: str) -> int:
    """The first dimension of a tensor, 0 where it has none or is missing."""
    return state[name].shape[0] if name in state and state[name].ndim else 0


def _check_backbone(name: str) -> None:
    if not BACKBONES.fullmatch(name):
        known = "resnet18 to resnet152, resnext50_32x4d, resnext101_32x4d, swin_tiny_patch4_window7_224 and the like"
        raise InputError(f"backbone {name}: no counterpart in MMDetection is known; there is one of {known}")


def _position_indices(network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Swin's buffers with the table row for each pair of positions in a window. MMDetection saves them."""
    return {prefix + name: buffer for name, buffer in network.named_buffers() if name.endswith(POSITION_INDEX)}


def _shape_and_dtype(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if found := _pattern(old).match(name):
            for index in found.groups():
                new = new.replace("#", index, 1)
            return new + name[found.end() :]
    raise KeyError(f"no counterpart is known of the weight {name}")


def _pattern(beginning: str) -> re.Pattern[str]:
    return re.compile(re.escape(beginning).replace(r"\#", r"(\d+)"))
