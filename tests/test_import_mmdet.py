"""MMDetection's checkpoints in and out: every tensor in its place to the bit, or one message and nothing written."""

from direct_pt.program.run import run_program
import io
import json
import pickle
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import golden
import numpy as np
import pytest
import small_runs as runs
import torch
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn
from torch.nn import functional as F

from direct_pt.checkpoint import from_pretrained, read_history, save_model
from direct_pt.errors import InputError
from direct_pt.models.detector import MODELS, Detector, DetectorConfig, build_detector
from direct_pt.models.mmdet_weights import detector_from_mmdet, merge_order, mmdet_state_dict
from direct_pt.models.saved_config import config_from_json

NAMES = ("cat", "dog", "traffic light")
IDS = (1, 2, 3)  # that classes get where nothing says otherwise
KEYS = {  # keys_<key>.json are the names and shapes of MMDetection's detector <value>
    "retinanet": "retinanet_r50_fpn",
    "faster_rcnn": "faster_rcnn_r50_fpn",
    "cascade_rcnn": "cascade_rcnn_r50_fpn",
    "mask_rcnn": "mask_rcnn_r50_fpn",
    "mask_rcnn_swin": "mask_rcnn_swin_t_fpn",
}
SMALL = ("--model", "retinanet_r50_fpn", "--backbone", "resnet18")
PYTORCH_STYLE = """
model = dict(
    pretrained='torchvision://resnet50',
    backbone=dict(type='ResNet', depth=50, style='pytorch'),
    bbox_head=dict(bbox_coder=dict(target_means=[.0, .0, .0, .0], target_stds=[0.1, 0.1, 0.2, 0.2])))
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
data_preprocessor = dict(
    mean=[
        123.675,
        116.280,
        103.53,
    ], bgr_to_rgb=True)
"""
CAFFE_STYLE = {
    "backbone=dict(type='ResNet', depth=50, style='caffe')": "style='caffe'",
    'backbone={"style": "caffe"}': 'style": "caffe"',
    "img_norm_cfg = dict(to_rgb = False)": "to_rgb = False",
    "data_preprocessor=dict(bgr_to_rgb=False)": "bgr_to_rgb=False",
    "init_cfg=dict(checkpoint='open-mmlab://detectron2/resnet50_caffe')": "open-mmlab://detectron2/resnet50_caffe",
    "pretrained='open-mmlab://resnet50_caffe_bgr'": "open-mmlab://resnet50_caffe_bgr",
    "dict(mean=[103.530, 116.280, 123.675],\n std=[58.395, 57.12, 57.375])": "mean=[103.530, 116.280, 123.675]",
    "dict(mean=[123.675, 116.28, 103.53],\n std=[1.0, 1.0, 1.0])": "std=[1.0, 1.0, 1.0]",
}


def small_detector(
    model: str = "retinanet_r50_fpn", box_head: str = "4conv1fc", backbone: str = "resnet18", num_classes: int = 3
) -> Detector:
    """A detector of 32 channels, no two of whose tensors are equal."""
    names = (*NAMES, *(f"more {i}" for i in range(num_classes - 3)))[:num_classes]
    ids = tuple(range(1, num_classes + 1))
    config = DetectorConfig(model, names, ids, backbone, box_head=box_head, channels=32)
    detector = build_detector(model, config=config)
    generator = torch.Generator().manual_seed(0)
    for count, tensor in enumerate(detector.state_dict().values()):
        noise = torch.rand(tensor.shape, generator=generator) - 0.5
        tensor.copy_(tensor + 0.01 * noise if tensor.is_floating_point() else torch.tensor(1000 + count))
    return detector.eval()


def small_state(model: str = "retinanet_r50_fpn", **options: Any) -> dict[str, Tensor]:
    """The same as MMDetection's state dict."""
    return mmdet_state_dict(small_detector(model, **options))


@pytest.fixture(scope="module")
def detector() -> Detector:
    """A RetinaNet. Tests must leave it as it is."""
    return small_detector()


@pytest.fixture(scope="module")
def state(detector: Detector) -> dict[str, Tensor]:
    """Its weights as MMDetection's state dict."""
    return mmdet_state_dict(detector)


@pytest.fixture
def write(tmp_path: Path, state: dict[str, Tensor]) -> Callable[..., Path]:
    """A checkpoint file of MMDetection 2.x with the given keys beside or in place of the usual ones."""

    def write(**content: Any) -> Path:
        torch.save({"meta": {"CLASSES": NAMES}, "state_dict": state, **content}, tmp_path / "theirs.pth")
        return tmp_path / "theirs.pth"

    return write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Where an import goes."""
    return tmp_path / "run"


def take(path: Path, run: Path, *flags: object) -> DetectorConfig:
    """Import a file. The configuration of the model that comes out."""
    runs.call_script("import_mmdet", path, "--output-dir", run, *(flags or SMALL))
    return config_from_json(runs.read_json(run / "model/config.json")["detector"])


def refused(*flags: object) -> str:
    """The one line that the script ends with, in this process, at exit status 2."""
    with redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as end:
        run_program(lambda: runs.call_script("import_mmdet", *flags))
    assert end.value.code == 2, errors.getvalue()
    (line,) = errors.getvalue().splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def not_taken(path: Path, run: Path, *flags: object) -> str:
    """The same, of an import, which must leave nothing behind."""
    line = refused(path, "--output-dir", run, *(flags or SMALL))
    assert not run.exists()
    return line


def assert_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """To the bit, and in the same layout in memory."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].is_contiguous(), name
        assert torch.equal(actual[name], tensor), name


# In and out again


@pytest.mark.parametrize(
    ("model", "box_head"),
    [
        ("retinanet_r50_fpn", "4conv1fc"),
        ("faster_rcnn_r50_fpn", "4conv1fc"),
        ("faster_rcnn_r50_fpn", "2fc"),
        ("cascade_rcnn_r50_fpn", "2fc"),
        ("mask_rcnn_r50_fpn", "2fc"),
    ],
)
def test_round_trips(model: str, box_head: str, tmp_path: Path) -> None:
    detector, flags = small_detector(model, box_head), ("--model", model, "--backbone", "resnet18")
    first, second, runs_made = tmp_path / "1.pth", tmp_path / "2.pth", (tmp_path / "once", tmp_path / "twice")
    state = mmdet_state_dict(detector)
    torch.save({"meta": {"CLASSES": NAMES}, "state_dict": state}, first)

    assert take(first, runs_made[0], *flags) == detector.config
    runs.call_script("import_mmdet", runs_made[0], "--export", second)
    assert take(second, runs_made[1], *flags) == detector.config

    for run in runs_made:
        assert_equal(runs.weights(run), detector.state_dict())
    exported = torch.load(second, weights_only=True)
    assert exported["meta"] == {"CLASSES": NAMES, "dataset_meta": {"classes": NAMES}}
    assert_equal(exported["state_dict"], state)
    assert list(exported["state_dict"]) == list(state)


def test_names_of_a_small_detector() -> None:
    """What the other tests build on. The whole lists are checked where the reference is at hand."""
    expected = {
        "backbone.conv1.weight": [64, 3, 7, 7],
        "backbone.layer2.0.downsample.1.running_var": [128],
        "backbone.layer4.1.bn2.num_batches_tracked": [],
        "neck.lateral_convs.3.conv.weight": [32, 512, 1, 1],
        "neck.fpn_convs.0.conv.bias": [32],
        "rpn_head.rpn_conv.weight": [32, 32, 3, 3],
        "rpn_head.rpn_cls.bias": [3],
        "rpn_head.rpn_reg.weight": [12, 32, 1, 1],
        "roi_head.bbox_head.shared_fcs.1.weight": [1024, 1024],
        "roi_head.bbox_head.fc_cls.weight": [4, 1024],
        "roi_head.bbox_head.fc_reg.bias": [12],
        "roi_head.mask_head.convs.3.conv.weight": [32, 32, 3, 3],
        "roi_head.mask_head.upsample.weight": [32, 32, 2, 2],
        "roi_head.mask_head.conv_logits.bias": [3],
    }
    shapes = {name: list(tensor.shape) for name, tensor in small_state("mask_rcnn_r50_fpn", box_head="2fc").items()}
    assert {name: shapes.get(name) for name in expected} == expected


def position_index(side: int = 7) -> Tensor:
    """By its definition: the row of its table for each pair of positions in a window, out of their distances."""
    y, x = np.divmod(np.arange(side**2), side)
    rows = (y[:, None] - y + side - 1) * (2 * side - 1) + x[:, None] - x + side - 1
    return torch.from_numpy(rows)


@pytest.mark.parametrize("name", KEYS)
def test_whole_state_dicts(name: str) -> None:
    """Of the paper's detectors, by MMDetection's own lists of names and shapes."""
    path = golden.FOLDER / f"keys_{name}.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {golden.FOLDER} (DIRECT_PT_GOLDEN names another folder)")
    generator = torch.Generator().manual_seed(0)
    theirs: dict[str, Tensor] = {}
    for count, (key, shape) in enumerate(json.loads(path.read_text()).items()):
        if key.endswith("relative_position_index"):
            theirs[key] = position_index()
        elif key.endswith("num_batches_tracked"):
            theirs[key] = torch.tensor(count)
        else:
            theirs[key] = torch.rand(shape, generator=generator)
    detector = detector_from_mmdet(theirs, KEYS[name])
    expected = DetectorConfig.from_paper(KEYS[name], tuple(f"class {i}" for i in range(80)), tuple(range(1, 81)))
    assert detector.config == expected
    assert_equal(mmdet_state_dict(detector), theirs)


def test_imported_detector_finds_the_same(tmp_path: Path, run: Path) -> None:
    detector = small_detector("mask_rcnn_r50_fpn", "2fc")
    with torch.no_grad():
        detector.roi_head.box_heads[0].class_logits.bias[-1] -= 10  # so that it finds a lot
    torch.save(mmdet_state_dict(detector), tmp_path / "theirs.pth")
    take(tmp_path / "theirs.pth", run, "--model", "mask_rcnn_r50_fpn", "--backbone", "resnet18")
    imported = from_pretrained(run)
    small_images = {"short_side": 96, "long_side": 128}
    for one in (detector, imported):
        one.config = replace(one.config, **small_images)
    image = np.random.default_rng(0).integers(256, size=(96, 120, 3), dtype=np.uint8)
    (expected,), (found,) = (
        detector.predict([image], score_threshold=0.05),
        imported.predict([image], score_threshold=0.05),
    )
    assert len(expected["boxes"]) > 10
    assert found["labels"] == [name.replace(name, f"class {NAMES.index(name)}") for name in expected["labels"]]
    for part in ("boxes", "scores", "masks"):
        assert np.array_equal(found[part], expected[part])


# Swin


def later_swin(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same detector as MMDetection's own Swin names it and lays it out."""
    names = (
        (r"^backbone\.layers\.", "backbone.stages."),
        (r"^backbone\.patch_embed\.proj\.", "backbone.patch_embed.projection."),
        (r"\.attn\.", ".attn.w_msa."),
        (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
        (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    )
    later = {}
    for name, tensor in theirs.items():
        if re.search(r"layers\.\d\.downsample", name):
            channels = tensor.shape[-1] // 4
            columns = [
                (row + 2 * column) * channels + channel
                for channel in range(channels)
                for row in (0, 1)
                for column in (0, 1)
            ]
            tensor = tensor[..., columns]
        for old, new in names:
            name = re.sub(old, new, name)
        later[name] = tensor
    return later


@pytest.fixture(scope="module")
def swin() -> dict[str, Tensor]:
    return small_state("mask_rcnn_swin_t_fpn", backbone="swin_tiny_patch4_window7_224")


def test_both_namings_of_swin(swin: dict[str, Tensor]) -> None:
    later = later_swin(swin)
    expected = {  # of the two, these are the later one's
        "backbone.patch_embed.projection.weight": [96, 3, 4, 4],
        "backbone.stages.0.blocks.1.attn.w_msa.relative_position_bias_table": [169, 3],
        "backbone.stages.2.blocks.5.ffn.layers.0.0.weight": [1536, 384],
        "backbone.stages.3.blocks.0.ffn.layers.1.bias": [768],
        "backbone.stages.0.downsample.reduction.weight": [192, 384],
        "backbone.stages.2.downsample.norm.weight": [1536],
    }
    assert {name: list(later[name].shape) for name in expected} == expected
    merge = "backbone.layers.0.downsample.reduction.weight"
    assert not torch.equal(later["backbone.stages.0.downsample.reduction.weight"], swin[merge])
    del later["backbone.stages.1.blocks.0.attn.w_msa.relative_position_index"]  # is no weight
    imported = detector_from_mmdet(later, "mask_rcnn_swin_t_fpn")
    assert_equal(mmdet_state_dict(imported), swin)


def test_merge_order() -> None:
    """Patches merged with `nn.Unfold`, and with timm's layer after a change of the order."""
    torch.manual_seed(0)
    maps, norm, reduction = torch.randn(2, 5, 6, 8), nn.LayerNorm(20), nn.Linear(20, 10, bias=False)
    with torch.no_grad():
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        expected = reduction(norm(F.unfold(maps, 2, stride=2).transpose(1, 2))).unflatten(1, (3, 4))
        merging = PatchMerging(5, 10)
        results = []
        for change in (merge_order, lambda weight: weight):
            merging.norm.weight.copy_(change(norm.weight))
            merging.norm.bias.copy_(change(norm.bias))
            merging.reduction.weight.copy_(change(reduction.weight))
            results.append(merging(maps.permute(0, 2, 3, 1)))
    assert torch.allclose(results[0], expected, atol=1e-5)
    assert not torch.allclose(results[1], expected, atol=1e-1)


def test_buffers_of_swin(
    swin: dict[str, Tensor], tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = "backbone.layers.0.blocks.1.attn.relative_position_index"
    assert torch.equal(swin[index], position_index())
    mask = {"backbone.layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    torch.save({**swin, **mask}, tmp_path / "theirs.pth")
    take(tmp_path / "theirs.pth", run, "--model", "mask_rcnn_swin_t_fpn")
    printed = capsys.readouterr().out
    weights = len(swin) - 12
    assert f"{weights} of {weights} tensors imported: mask_rcnn_swin_t_fpn, swin_tiny_patch4_window7_224" in printed
    assert "left out: 13 buffers that are computed here (attn_mask, relative_position_index)" in printed


def test_position_index_that_is_another(swin: dict[str, Tensor]) -> None:
    indices = [name for name in swin if name.endswith("relative_position_index")]
    others = {indices[0]: swin[indices[0]].T.contiguous(), indices[1]: torch.zeros(64, 64, dtype=torch.int64)}
    with pytest.raises(InputError, match=rf"2 misshapen \({re.escape(indices[0])}: another order .*\[64, 64\] int64\)"):
        detector_from_mmdet({**swin, **others}, "mask_rcnn_swin_t_fpn")


# What a file may look like


def test_what_is_printed_and_kept(write: Callable[..., Path], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(optimizer={"lr": 0.02}, message_hub={})
    config = take(path, run)
    total = len(torch.load(path)["state_dict"])
    assert capsys.readouterr().out.splitlines() == [
        f"{total} of {total} tensors imported: retinanet_r50_fpn, resnet18, 32 channels",
        "ignored: optimizer, message_hub",
        "3 classes, ids 1 to 3: cat, dog, traffic light",
        f"written: {run / 'model'}",
    ]
    assert (config.short_side, config.long_side, config.norm) == (800, 1333, "batch")
    assert read_history(run) == [{"stage": "import", "file": "theirs.pth", "model": "retinanet_r50_fpn"}]
    assert sorted(file.name for file in run.rglob("*")) == ["config.json", "model", "model.safetensors"]


@pytest.mark.parametrize("kind", ["bare", "module", "ordered", "before zip", "half", "uncounted"])
def test_kinds_of_files(kind: str, detector: Detector, state: dict[str, Tensor], tmp_path: Path, run: Path) -> None:
    content: Any = {"state_dict": state}
    expected = dict(detector.state_dict())
    match kind:
        case "bare":
            content = state
        case "module":
            content = {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
        case "ordered":
            ordered = OrderedDict(state)
            ordered._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as modules give it
            content = {"state_dict": ordered}
        case "half":
            content = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
            expected = {name: t.half().float() if t.is_floating_point() else t for name, t in expected.items()}
        case "uncounted":
            content = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
            expected |= {name: torch.tensor(0) for name in expected if name.endswith("num_batches_tracked")}
    torch.save(content, tmp_path / "theirs.pth", _use_new_zipfile_serialization=kind != "before zip")
    config = take(tmp_path / "theirs.pth", run)
    assert (config.class_names, config.category_ids) == (("class 0", "class 1", "class 2"), IDS)
    assert_equal(runs.weights(run), expected)


def test_class_names(write: Callable[..., Path], tmp_path: Path) -> None:
    """Of either version of MMDetection, where the newer place counts first."""
    script, path = runs.load_script("import_mmdet"), tmp_path / "theirs.pth"
    for meta, expected in (
        ({"CLASSES": list(NAMES)}, NAMES),
        ({"CLASSES": ("balloon")}, ("balloon",)),  # the comma forgotten
        ({"dataset_meta": {"CLASSES": NAMES}}, NAMES),
        ({"dataset_meta": {"classes": NAMES, "palette": [(1, 2, 3)]}, "CLASSES": ("a", "b", "c")}, NAMES),
        ({"CLASSES": None, "dataset_meta": None}, None),
        ({"dataset_meta": {"classes": ()}}, None),
        ({}, None),
    ):
        assert script.read_class_names(meta, path) == expected
    newer = {"dataset_meta": {"classes": NAMES}, "cfg": PYTORCH_STYLE}
    for number, meta in enumerate(({"CLASSES": NAMES, "config": PYTORCH_STYLE}, newer)):
        config = take(write(meta=meta), tmp_path / str(number))
        assert (config.class_names, config.category_ids) == (NAMES, IDS)


def test_coco_as_the_reference_lists_it() -> None:
    path = golden.FOLDER / "coco_eval/instances_20.json"
    if not path.is_file():
        pytest.skip(f"no coco_eval/{path.name} in {golden.FOLDER} (DIRECT_PT_GOLDEN names another folder)")
    script, categories = runs.load_script("import_mmdet"), runs.read_json(path)["categories"]
    assert list(script.COCO_NAMES) == [category["name"] for category in categories]
    assert list(script.COCO_IDS) == [category["id"] for category in categories]


def test_coco(write: Callable[..., Path], tmp_path: Path) -> None:
    script = runs.load_script("import_mmdet")
    names, state = script.COCO_NAMES, small_state(num_classes=80)
    ids = tuple(number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
    by_id = dict(zip(ids, names, strict=True))
    assert {number: by_id[number] for number in (1, 13, 27, 44, 62, 90)} == {
        1: "person", 13: "stop sign", 27: "backpack", 44: "bottle", 62: "chair", 90: "toothbrush",
    }  # fmt: skip
    swapped = (names[1], names[0], *names[2:])
    once_spelt = tuple(name.replace(" ", "_") for name in names)
    for number, (given, expected) in enumerate(
        (
            (once_spelt, (names, ids)),
            (swapped, (swapped, tuple(range(1, 81)))),
            (None, (tuple(f"class {i}" for i in range(80)), tuple(range(1, 81)))),
        )
    ):
        config = take(write(meta={"CLASSES": given}, state_dict=state), tmp_path / str(number))
        assert (config.class_names, config.category_ids) == expected


def test_categories(write: Callable[..., Path], tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "instances.json"

    def categories(*pairs: tuple[str, object]) -> tuple[object, ...]:
        file.write_text(json.dumps({"categories": [{"name": name, "id": number} for name, number in pairs]}))
        return (*SMALL, "--categories", file)

    path = write()
    flags = categories(("cat", 17), ("dog", 18), ("traffic light", 90))
    assert take(path, tmp_path / "named", *flags).category_ids == (17, 18, 90)
    unnamed = take(write(meta={}), tmp_path / "unnamed", *flags)
    assert (unnamed.class_names, unnamed.category_ids) == (NAMES, (17, 18, 90))
    assert "do not ascend" not in capsys.readouterr().out
    flags = categories(("cat", 5), ("dog", 4), ("traffic light", 6))
    assert take(path, tmp_path / "falling", *flags).category_ids == (5, 4, 6)
    assert "their ids do not ascend" in capsys.readouterr().out

    path = write()
    line = not_taken(path, run, *categories(("cat", 1), ("cow", 2), ("traffic light", 3)))
    assert line.startswith(
        f"--categories {file}: its 3 classes are not the 3 of the checkpoint, they differ in cow, dog;"
    )
    line = not_taken(path, run, *categories(("cat", 1), ("dog", 2)))
    assert "its 2 classes are not the 3 of the checkpoint, they differ in traffic light;" in line
    line = not_taken(path, run, *categories(("dog", 1), ("cat", 2), ("traffic light", 3)))
    assert "in another order, so which is which is uncertain" in line and "take the names out" in line
    for wrong in (("dog", 5), ("cow", 2), ("cow", "4"), ("cow", True)):
        line = not_taken(path, run, *categories(("cat", 3), ("dog", 2), wrong))
        assert line == f"--categories {file}: names and ids must be unique, and ids whole numbers"
    for content in ("{", "[]", '{"categories": [1]}', "{}"):
        file.write_text(content)
        line = not_taken(path, run, *SMALL, "--categories", file)
        assert line.startswith(f"--categories {file}: cannot be read as a COCO file with 'categories'")


# What is refused


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w').write('code was run')",)


def test_code_in_a_file_is_not_run(
    write: Callable[..., Path], tmp_path: Path, run: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """As a user sees it, and in files of all kinds."""
    trace = tmp_path / "trace"
    path = write(meta=Evil(trace))
    process = runs.start_script("import_mmdet", path, *SMALL, "--output-dir", run)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, printed) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"error: {path}: holds an object of type ") and "code in a file is not run" in line
    assert not run.exists() and not trace.exists()

    torch.save({"state_dict": {"a": Evil(trace)}}, path, _use_new_zipfile_serialization=False)
    assert "code in a file is not run" in not_taken(path, run)
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(Evil(trace), protocol))
        assert not_taken(path, run).startswith(f"{path}: ")
    assert not trace.exists()
    assert not recwarn, "more than the one line"
    pickle.loads(path.read_bytes())
    assert trace.exists(), "the file was harmless"


def test_objects_of_mmengine(write: Callable[..., Path], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints as its runner leaves them hold more than weights."""
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kind = type("HistoryBuffer", (), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], "HistoryBuffer", kind, raising=False)
    for value, shown in ((kind(), "mmengine.logging.history_buffer.HistoryBuffer"), (np.float64(1), "numpy.")):
        line = not_taken(write(message_hub={"loss": value}), run)
        assert f"holds an object of type {shown}" in line
        assert "if you trust where it comes from" in line and "weights_only=False" in line and "torch.save(" in line


def test_the_remedy_for_them(
    write: Callable[..., Path], tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(message_hub={"loss": np.float64(1)}, meta={"CLASSES": NAMES, "seed": np.int64(1), "config": "x = 1"})
    line = not_taken(path, run)
    remedy = line.partition("what wrote it: ")[2].replace("FILE", repr(str(path)))
    monkeypatch.chdir(tmp_path)
    exec(remedy, {"torch": torch})
    assert take(tmp_path / "clean.pth", run).class_names == NAMES


def test_no_checkpoint_at_all(write: Callable[..., Path], state: dict[str, Tensor], tmp_path: Path, run: Path) -> None:
    path = tmp_path / "absent.pth"
    assert not_taken(path, run) == f"{path}: no such file"
    assert (
        not_taken(tmp_path, run) == f"{tmp_path}: is a folder; to write a RUN as a checkpoint, give --export FILE.pth"
    )
    for zipped in (True, False):
        torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for size in (0, 10, 1000, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert not_taken(path, run).startswith(f"{path}: is damaged or no checkpoint of torch ("), size
    for garbage in (b"hello\n", b'{"a": 1}', bytes(range(255, 0, -1)), b"\x80\x02}q\x00.", b"\x80\x02h\x00."):
        path.write_bytes(garbage)
        assert not_taken(path, run).startswith(f"{path}: is damaged or no checkpoint of torch ("), garbage
    for content, shown in (
        ({"model": {"a": torch.zeros(1)}, "epoch": 1}, "model, epoch"),
        ({"state_dict": {"a": 1}}, "state_dict"),
        ({"state_dict": [torch.zeros(1)], "a": 1, "b": 1, "c": 1}, "state_dict, a, b, ..."),
        ({}, "nothing"),
        (torch.zeros(1), "a Tensor"),
    ):
        torch.save(content, path)
        expected = f"{path}: holds no state dict, alone or under 'state_dict', but {shown}"
        assert not_taken(path, run) == expected


def test_tensors_that_do_not_fit(write: Callable[..., Path], state: dict[str, Tensor], run: Path) -> None:
    changed = dict(state)
    for name in ("backbone.conv1.weight", "bbox_head.retina_reg.bias"):
        del changed[name]
    changed |= {f"backbone.layer5.{i}.weight": torch.zeros(1) for i in range(4)}
    changed["fpn.lateral.1.bias"] = changed.pop("neck.lateral_convs.1.conv.bias")  # a name of ours is none of theirs
    changed["backbone.bn1.weight"] = torch.zeros(65)
    changed["backbone.bn1.bias"] = torch.zeros(64, dtype=torch.int64)
    line = not_taken(write(state_dict=changed), run)
    assert "its tensors are not those of retinanet_r50_fpn with resnet18: " in line
    assert "3 missing (backbone.conv1.weight, neck.lateral_convs.1.conv.bias, bbox_head.retina_reg.bias)" in line
    assert "5 left over (backbone.layer5.0.weight, backbone.layer5.1.weight, backbone.layer5.2.weight, ...)" in line
    shapes = "expected [64] float32, found [65] float32, backbone.bn1.bias: expected [64] float32, found [64] int64"
    assert f"2 misshapen (backbone.bn1.weight: {shapes})" in line
    assert "give the --model and --backbone that it is of" in line


def test_one_tensor_twice(swin: dict[str, Tensor]) -> None:
    """Under both names of Swin: which one counts is uncertain."""
    twice = {**swin, "backbone.patch_embed.projection.bias": swin["backbone.patch_embed.proj.bias"]}
    with pytest.raises(InputError, match=r"1 left over \(backbone.patch_embed.projection.bias\)"):
        detector_from_mmdet(twice, "mask_rcnn_swin_t_fpn")


def test_averaged_copies(write: Callable[..., Path], state: dict[str, Tensor], run: Path) -> None:
    copies = {f"ema_{name.replace('.', '_')}": tensor for name, tensor in state.items()}
    line = not_taken(write(state_dict={**state, **copies}), run)
    assert f"{len(state)} left over (ema_" in line and "save the state dict without them" in line


def test_another_detector(write: Callable[..., Path], tmp_path: Path, run: Path) -> None:
    path = write()
    line = not_taken(path, run, "--model", "yolo")
    assert line.startswith("--model yolo: no such detector; choose one of retinanet_r50_fpn")
    line = not_taken(path, run, "--model", "faster_rcnn_r50_fpn", "--backbone", "resnet18")
    assert "missing (neck.lateral_convs.3.conv.weight, " in line and "left over (" in line
    line = not_taken(path, run, "--model", "retinanet_r50_fpn", "--backbone", "resnet34")
    assert "with resnet34: " in line and "missing (backbone.layer1.2.conv1.weight, " in line and "left" not in line
    line = not_taken(path, run, "--model", "retinanet_r50_fpn", "--backbone", "convnext_tiny")
    assert line.startswith("backbone convnext_tiny: no counterpart in MMDetection is known")
    torch.save(small_state("faster_rcnn_r50_fpn"), path)
    line = not_taken(path, run, "--model", "cascade_rcnn_r50_fpn", "--backbone", "resnet18")
    assert "missing (roi_head.bbox_head.0." in line and "left over (roi_head.bbox_head." in line


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("a", "b"), "has weights for 3 classes, but there are 2 names: a, b; give the names of these classes"),
        ("abc", "has weights for 3 classes, but there are 1 names: abc;"),
        ((1, 2, 3), "the class names in its meta are no strings"),
        (7, "the class names in its meta are no strings"),
    ],
)
def test_names_that_contradict(classes: object, message: str, write: Callable[..., Path], run: Path) -> None:
    assert message in not_taken(write(meta={"CLASSES": classes}), run)


@pytest.mark.parametrize("key", ["config", "cfg"])
@pytest.mark.parametrize("text", CAFFE_STYLE)
def test_caffe_style(key: str, text: str, write: Callable[..., Path], run: Path) -> None:
    path = write(meta={key: f"{PYTORCH_STYLE}\nmodel = dict({text})"})
    line = not_taken(path, run)
    assert line.startswith(f"{path}: was trained with {CAFFE_STYLE[text]}: such weights expect")
    assert "BGR" in line and "'pytorch' style" in line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda bias: bias * float("nan"), "has 36 of 36 values that are not finite"),
        (lambda bias: torch.zeros(1).expand(36), "has the shape [36], and fewer values than that"),
        (lambda bias: bias.to_sparse(), "is no plain tensor"),
    ],
)
def test_weights_that_are_none(
    change: Callable[[Tensor], Tensor], reason: str, write: Callable[..., Path], state: dict[str, Tensor], run: Path
) -> None:
    name = "bbox_head.retina_reg.bias"
    path = write(state_dict={**state, name: change(state[name])})
    assert not_taken(path, run).startswith(f"{path}: {name} {reason}; ")


def test_a_file_that_asks_for_much(write: Callable[..., Path], state: dict[str, Tensor], run: Path) -> None:
    """A file of a few megabytes whose shapes say 10^8 classes, or a million channels: nothing of that size is made."""
    for name, value, reason in (
        (
            "bbox_head.retina_cls.weight",
            torch.zeros(1, 1, 1, 1).expand(9 * 10**8, 32, 3, 3),
            "and fewer values than that",
        ),
        ("bbox_head.retina_cls.weight", torch.zeros(9 * 10**8, 0), "has weights for 100000000 classes"),
        ("bbox_head.retina_cls.weight", torch.zeros(9 * 10**5, 0), "has weights for 100000 classes, but there are 3"),
        ("neck.lateral_convs.0.conv.weight", torch.zeros(10**6, 1), "detector.channels is 1000000"),
        ("neck.lateral_convs.0.conv.weight", torch.zeros(16_384, 1), "misshapen ("),
    ):
        path = write(state_dict={**state, name: value})
        began = time.monotonic()
        assert reason in not_taken(path, run), name
        assert time.monotonic() - began < 20


@pytest.mark.parametrize("names", [("cat", "cat", "dog"), ("cat", "", "dog"), ("cat", "\ud800", "dog")])
def test_class_names_that_cannot_be_read_back(names: tuple[str, ...], write: Callable[..., Path], run: Path) -> None:
    assert "detector.class_names" in not_taken(write(meta={"CLASSES": names}), run)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 10**6,
        "mean=(" * 10**5,
        "to_rgb " * 10**5,
        "std = [" * 10**5,
        "open-mmlab://" * 10**5,
        "mean" + " " * 10**6,
    ],
)
def test_a_long_text_of_a_configuration(text: str, write: Callable[..., Path], run: Path) -> None:
    """Its search takes a time that follows its length."""
    began = time.monotonic()
    script = runs.load_script("import_mmdet")
    script.INCOMPATIBLE.search(script.config_text({"config": text, "cfg": text}))
    assert time.monotonic() - began < 5


def test_a_configuration_nested_deeply() -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    assert runs.load_script("import_mmdet").config_text({"config": nested}) == ""


def test_where_it_goes(write: Callable[..., Path], tmp_path: Path, run: Path) -> None:
    path = write()
    take(path, run)
    before = runs.weights(run)
    for holds_one in (run, run / "model"):
        line = refused(path, *SMALL, "--output-dir", holds_one)
        assert line == f"--output-dir {holds_one}: holds a run already; choose another folder"
    assert_equal(runs.weights(run), before)
    assert refused(path, *SMALL, "--output-dir", path) == f"--output-dir {path}: is a file"
    assert refused(path, *SMALL).startswith("--output-dir is missing")
    assert refused(path, "--output-dir", tmp_path / "new").startswith("--model is missing: one of retinanet")
    (tmp_path / "empty").mkdir()
    take(path, tmp_path / "empty")


# Out


def test_export_that_is_refused(tmp_path: Path, run: Path) -> None:
    file, config = tmp_path / "file.pth", small_detector().config
    for changed, message in (
        (replace(config, norm="group"), "the detector has norm 'group'"),
        (replace(config, backbone="resnet18d"), "backbone resnet18d: no counterpart in MMDetection is known"),
    ):
        save_model(run / "model", build_detector(config.name, config=changed), [])
        assert refused(run, "--export", file).startswith(message)
    assert "holds no model" in refused(tmp_path, "--export", file)
    assert not file.exists()
    save_model(run / "model", build_detector(config.name, config=config), [])
    file.write_text("mine")
    assert refused(run, "--export", file) == f"--export {file}: is there already; choose another name"
    assert file.read_text() == "mine"
    assert "--export takes a RUN and no other flag" in refused(run, *SMALL, "--export", tmp_path / "new.pth")


def test_export_is_whole_or_not_there(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(run / "model", small_detector(), [])

    def full_disk(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match=r"--export .*file.pth: cannot be written \(no space left\)"):
        runs.call_script("import_mmdet", run, "--export", tmp_path / "out/file.pth")
    assert list((tmp_path / "out").iterdir()) == []


def test_every_detector_has_its_list() -> None:
    assert set(KEYS.values()) == set(MODELS)
