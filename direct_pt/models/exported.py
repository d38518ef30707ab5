"""Detectors as files that other programs run: ONNX, and PyTorch's format of exported programs."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import onnx
import onnx.compose
import onnx.parser
import torch
from onnxscript import opset18 as op
from torch import Tensor
from torch.export import Dim, ExportedProgram

from direct_pt.errors import InputError
from direct_pt.models.detector import Detector
from direct_pt.models.inference_graph import EMPTY, NMS, InferenceGraph, nms
from direct_pt.onnx_detector import FORMAT, METADATA
from direct_pt.transforms import SIZE_DIVISOR
from direct_pt.version import __version__

OUTPUTS = ("image", "boxes", "scores", "labels", "masks")  # the last of mask detectors
EXAMPLE = (3, 224, 320, 3)  # no two sides alike, so that none is taken for another
PADDED = "padded"
# Before the detector's graph, in ONNX's own notation: images are padded to multiples of 32 pixels.
PADDING = f"""
<ir_version: 8, opset_import: ["": 18]>
padding (uint8[batch, height, width, 3] images) => (uint8[batch, padded_height, padded_width, 3] {PADDED})
{{
    sides = Shape <start = 1, end = 3> (images)
    negative = Neg (sides)
    divisor = Constant <value = int64[1] {{{SIZE_DIVISOR}}}> ()
    ends = Mod (negative, divisor)
    zero = Constant <value = int64[1] {{0}}> ()
    starts = Constant <value = int64[5] {{0, 0, 0, 0, 0}}> ()
    pads = Concat <axis = 0> (starts, ends, zero)
    {PADDED} = Pad (images, pads)
}}
"""


def facts_of(detector: Detector) -> dict[str, Any]:
    """What an exported file says about itself."""
    thresholds = {"all": float(detector.score_threshold), "per_class": [float(x) for x in detector.class_thresholds]}
    return {
        "format": FORMAT,
        "version": __version__,
        "detector": detector.config.to_dict(),
        "thresholds": thresholds,
        "history": detector.history,
    }


def export_program(detector: Detector, suppress: NMS = nms, half: bool = False) -> ExportedProgram:
    """The detector's `InferenceGraph` for any number of images, with sides that are any multiples of 32.

    Raises:
        InputError: its backbone computes in a way that no graph can hold.
    """
    graph = InferenceGraph(deepcopy(detector).cpu().eval().requires_grad_(False), suppress, half)
    images = torch.randint(0, 256, EXAMPLE, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([EXAMPLE[1:3]]).repeat(len(images), 1)
    batch, rows, columns = Dim("batch"), Dim("rows"), Dim("columns")
    shapes = {"images": {0: batch, 1: SIZE_DIVISOR * rows, 2: SIZE_DIVISOR * columns}, "sizes": {0: batch}}
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(graph, (images, sizes), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises nearly any
        reason = " ".join(str(error).split())
        raise InputError(
            f"{detector.config.name} with {detector.config.backbone}: torch.export cannot hold it in one graph for "
            f"images of all sizes ({reason:.200}); use a backbone such as resnet50 or convnext_tiny"
        ) from error


def write_program(detector: Detector, path: Path, half: bool = False) -> None:
    """Write a file that `torch.export.load` reads, where torch and torchvision are installed.

    Its module takes images and sizes as `InferenceGraph` does; the file's extra content "direct_pt" is JSON.

    Raises:
        InputError: see `export_program`.
        OSError: it cannot be written.
    """
    program = export_program(detector, half=half)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA: json.dumps(facts_of(detector))})


def write_onnx(detector: Detector, path: Path, half: bool = False) -> None:
    """Write a file that onnxruntime, `OnnxDetector` in particular, reads: opset 18, for images of any size.

    Raises:
        InputError: see `export_program`.
        OSError: it cannot be written.
    """
    program = export_program(detector, torch.ops.direct_pt.nms, half)
    remove_assertions(program)
    with quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=18,
            input_names=[PADDED, "sizes"],
            output_names=list(OUTPUTS[: 4 + detector.has_masks]),
            custom_translation_table={torch.ops.direct_pt.nms.default: nms_in_onnx},
            verbose=False,
        )
    assert converted is not None
    core = converted.model_proto
    del core.graph.value_info[:]  # sizes of what is in between, in terms that only torch.export knows
    for node in core.graph.node:
        del node.metadata_props[:]  # where this package lies on this machine
        node.doc_string = ""
    padding = onnx.parser.parse_model(PADDING)
    padding.ir_version = core.ir_version
    model = onnx.compose.merge_models(padding, core, io_map=[(PADDED, PADDED)])
    describe_values(model.graph)
    onnx.helper.set_model_props(model, {METADATA: json.dumps(facts_of(detector))})
    model.producer_name, model.producer_version = "Direct-PT", __version__
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


@torch.library.custom_op("direct_pt::nms", mutates_args=())
def nms_for_onnx(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """`inference_graph.nms` as one operator, which becomes `nms_in_onnx`."""
    return nms(boxes, scores, threshold)


@nms_for_onnx.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(scores)


def nms_in_onnx(boxes: Any, scores: Any, threshold: float) -> Any:
    """The same in ONNX's operators."""
    opset: Any = op  # whose types onnxscript does not state as mypy reads them
    iou, lowest, empty = (opset.Constant(value_floats=[value]) for value in (threshold, EMPTY / 2, EMPTY))
    slots = opset.Shape(scores, start=2)
    kept = opset.NonMaxSuppression(boxes, scores, slots, iou, lowest)
    return opset.ScatterND(opset.Expand(empty, opset.Shape(scores)), kept, opset.GatherND(scores, kept))


def remove_assertions(program: ExportedProgram) -> None:
    """Remove what `torch.export` asserts about sizes; ONNX has no operator for it."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if "assert" in str(node.target) or "sym_constrain" in str(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def describe_values(graph: onnx.GraphProto) -> None:
    """Name the sizes of the inputs and outputs."""
    for value in (*graph.input, *graph.output):
        name, *others = value.type.tensor_type.shape.dim
        name.dim_param = "batch" if value.name in ("images", "sizes") else "detections"
        for dimension in others:
            if dimension.dim_param not in ("", "height", "width"):
                dimension.ClearField("dim_param")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside it the exporters' notes, which concern their developers, are not shown."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
