"""Exported detectors: the same detections without PyTorch, for any number of images of any size."""

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import small_detectors as small
import small_runs as runs
import torch
from PIL import Image

from direct_pt.batch import Batch, Objects, collate
from direct_pt.checkpoint import from_pretrained, load_detector, save_model
from direct_pt.errors import InputError
from direct_pt.images.decoding import read_image
from direct_pt.images.geometry import Geometry, fit
from direct_pt.models.detector import MODELS, Detector
from direct_pt.models.export_check import BOUNDS, check_export, compare, lowest_score
from direct_pt.models.exported import write_onnx, write_program
from direct_pt.models.inference_graph import InferenceGraph
from direct_pt.models.layers import batchnorms
from direct_pt.models.onnx_model import OnnxModel
from direct_pt.onnx_detector import METADATA, Found, OnnxDetector, read_rgb, resize
from direct_pt.transforms import TestPreset

MODULE = Path(__file__).parents[1] / "direct_pt/onnx_detector.py"
SHAPES = ((1, 32, 32), (1, 200, 150), (3, 150, 333), (8, 96, 128))  # images, height, width


def pictures(count: int, height: int, width: int) -> list[np.ndarray]:
    """Smooth noise [height, width, 3] uint8 RGB."""
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (count, 9, 7, 3), dtype=np.uint8)
    return [cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC) for picture in coarse]


def batch_of(images: list[np.ndarray], side: int = 1000) -> Batch:
    """A test batch of images that are not resized, up to `side`."""
    samples = []
    for image in images:
        preset = TestPreset(min(image.shape[:2]), min(side, max(image.shape[:2])))
        samples.append(preset(image, Objects.none(), np.random.default_rng(0)))
    return collate(samples)


def found_by(detector: Detector | OnnxModel, batch: Batch) -> list[Found]:
    """The detections in each image of a batch."""
    with torch.inference_mode():
        everything = detector.eval().detect(batch)
    return everything.arrays(len(batch))


def assert_same(ours: list[Found], theirs: list[Found], lowest: float) -> None:
    """Within the bounds of float32, and something was found."""
    differences = compare(list(zip(ours, theirs, strict=True)), lowest)
    assert sum(len(found.scores) for found in ours) > 0
    for name, most in vars(BOUNDS["fp32"]).items():
        assert vars(differences)[name] <= most, differences


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds each detector's file, once it was made."""
    return tmp_path_factory.mktemp("exports")


def exported(folder: Path, name: str) -> tuple[Detector, Path]:
    """A small detector with thresholds and a history, and its file."""
    detector, path = small.small_detector(name), folder / f"{name}.onnx"
    detector.score_threshold, detector.class_thresholds = 0.25, tuple(0.1 + 0.05 * n for n in range(small.CLASSES))
    detector.history = [{"stage": "pretrain", "steps": 7}]
    if not path.exists():
        write_onnx(detector, path)
    return detector, path


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == small.RETINANET else pytest.mark.slow) for name in MODELS],
)
def test_the_same_detections(name: str, exports: Path) -> None:
    """For batches of 1, 3 and 8 images of other sizes, with one file; and for one batch of several sizes."""
    detector, path = exported(exports, name)
    model = OnnxModel(path, threads=1)
    lowest = lowest_score(detector) + 0.001
    for shape in SHAPES:
        batch = batch_of(pictures(*shape))
        assert_same(found_by(detector, batch), found_by(model, batch), lowest)
    mixed = batch_of([image for shape in SHAPES[1:3] for image in pictures(*shape)])
    assert_same(found_by(detector, mixed), found_by(model, mixed), lowest)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(200, 150), (800, 1333)])
def test_full_sizes(size: tuple[int, int], exports: Path) -> None:
    for name in (small.RETINANET, small.MASK):
        detector, path = exported(exports, name)
        batch = batch_of(pictures(1, *size), side=2000)
        assert_same(found_by(detector, batch), found_by(OnnxModel(path), batch), lowest_score(detector) + 0.001)


def test_nothing_found(exports: Path, tmp_path: Path) -> None:
    """Where nothing reaches the lowest score, all outputs are empty."""
    model = onnx.load(exported(exports, small.RETINANET)[1])
    (bias,) = [value for value in model.graph.initializer if value.name.endswith("detector.head.logits.bias")]
    values = np.full_like(onnx.numpy_helper.to_array(bias), -30)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    assert_blind(model, tmp_path / "blind.onnx")


@pytest.mark.slow
def test_no_masks_found(exports: Path, tmp_path: Path) -> None:
    """The same, where masks are read for no box."""
    model = onnx.load(exported(exports, small.MASK)[1])
    (node,) = [node for node in model.graph.node if any(name.endswith("class_logits.weight") for name in node.input)]
    assert node.op_type == "Gemm" and len(node.input) == 2  # its bias of zeros was left out
    values = np.array([*[0] * small.CLASSES, 30], np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "blind"))
    node.input.append("blind")
    assert_blind(model, tmp_path / "blind.onnx")


def assert_blind(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, path)
    found = OnnxDetector(path).detect(pictures(2, 96, 128))
    assert [len(one.scores) for one in found] == [0, 0] and found[0].boxes.shape == (0, 4)
    assert found[0].masks is None or found[0].masks.shape[0] == 0


def photographs(demo: Path, count: int) -> list[np.ndarray]:
    """Of the demo set, enlarged: where noise gives scores that are all nearly equal, rounding would decide."""
    paths = sorted((demo / "images").iterdir())[:count]
    return [cv2.resize(read_image(path), (200, 150), interpolation=cv2.INTER_LINEAR) for path in paths]


def decided(name: str = small.FASTER, backbone: str | None = None, norm: str = "batch") -> Detector:
    """A detector whose scores differ clearly: none are equal, at 1, as its BatchNorm has seen images."""
    detector = small.two_stage(small.small_detector(name, backbone=backbone, proposals=1000, norm=norm))
    for layer in batchnorms(detector):
        layer.momentum = 1.0
    with torch.no_grad():
        detector.train().features(batch_of(pictures(4, 150, 200)))
    with torch.no_grad():
        detector.rpn.objectness.weight.mul_(0.05)
        detector.roi_head.box_heads[0].get_submodule("class_logits").get_parameter("weight").mul_(3)
    return detector


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "norm"), [("resnet50", "group"), ("convnext_atto", "batch")])
def test_other_backbones_and_norms(backbone: str, norm: str, demo: Path, tmp_path: Path) -> None:
    detector = decided(backbone=backbone, norm=norm)
    write_onnx(detector, tmp_path / "model.onnx")
    batch = batch_of(photographs(demo, 2))
    lowest = lowest_score(detector) + 0.001
    assert_same(found_by(detector, batch), found_by(OnnxModel(tmp_path / "model.onnx"), batch), lowest)


@pytest.mark.slow
def test_float16(exports: Path, demo: Path, tmp_path: Path) -> None:
    """Half the size, nearly the same detections."""
    detector = decided(small.MASK)
    write_onnx(detector, tmp_path / "half.onnx", half=True)
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * exported(exports, small.MASK)[1].stat().st_size
    check_export(detector.eval(), tmp_path / "half.onnx", "onnx", "fp16", photographs(demo, 4))


@pytest.mark.slow
def test_exported_program(tmp_path: Path) -> None:
    """PyTorch's format, loaded by a process that knows torch and torchvision alone."""
    name = small.MASK
    detector, path = small.small_detector(name), tmp_path / "model.pt2"
    write_program(detector, path)
    batch = batch_of(pictures(2, 150, 200))
    torch.save((batch.images.permute(0, 2, 3, 1).contiguous(), batch.sizes), tmp_path / "inputs.pt")
    program = (
        "import sys, json, torch, torchvision\n"
        "sys.modules['direct_pt'] = None\n"
        "files = {'direct_pt': ''}\n"
        "module = torch.export.load(sys.argv[1] + '/model.pt2', extra_files=files).module()\n"
        "assert json.loads(files['direct_pt'])['detector']['name'] == sys.argv[2]\n"
        "torch.save(module(*torch.load(sys.argv[1] + '/inputs.pt')), sys.argv[1] + '/outputs.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path), name], check=True, env=runs.ENVIRONMENT, timeout=300)
    image, *values = torch.load(tmp_path / "outputs.pt")
    theirs = [Found(*(value[image == place].numpy() for value in values)) for place in range(2)]
    assert_same(found_by(detector, batch), theirs, lowest_score(detector) + 0.001)


def test_the_graph_is_the_detector() -> None:
    """Before any exporter."""
    for name in (small.RETINANET, small.MASK):
        detector = small.small_detector(name).eval()
        batch = batch_of(pictures(2, 150, 200))
        with torch.inference_mode():
            image, *values = InferenceGraph(small.small_detector(name).eval())(
                batch.images.permute(0, 2, 3, 1), batch.sizes
            )
        theirs = [Found(*(value[image == place].numpy() for value in values)) for place in range(2)]
        assert_same(found_by(detector, batch), theirs, lowest_score(detector) + 0.001)


# What the file says about itself, and the module that reads it


def test_without_torch(exports: Path, tmp_path: Path) -> None:
    """A copy of the module, where neither this project nor PyTorch can be imported, predicts as `predict` does."""
    detector, path = exported(exports, small.RETINANET)
    shutil.copy(MODULE, tmp_path / "onnx_detector.py")
    Image.fromarray(pictures(1, 150, 200)[0]).save(tmp_path / "photo.png")
    program = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'direct_pt', 'PIL', 'timm'): sys.modules[name] = None\n"
        "import numpy as np\n"
        "from onnx_detector import OnnxDetector\n"
        "result = OnnxDetector(sys.argv[1]).predict('photo.png', score_threshold=0.06)[0]\n"
        "np.savez('result.npz', **{name: np.array(value) for name, value in result.items()})\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    subprocess.run(command, check=True, cwd=tmp_path, env=runs.ENVIRONMENT, timeout=300)
    found = dict(np.load(tmp_path / "result.npz"))
    expected = detector.predict(tmp_path / "photo.png", score_threshold=0.06)[0]
    assert set(found) == set(expected) and len(expected["scores"]) > 3
    assert found["labels"].tolist() == expected["labels"] and found["category_ids"].tolist() == expected["category_ids"]
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=0.01)
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)


def test_the_module_as_a_program(exports: Path, tmp_path: Path) -> None:
    """Lines of JSON; bad input ends in one line."""
    _, path = exported(exports, small.RETINANET)
    Image.fromarray(pictures(1, 150, 200)[0]).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no image")

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(MODULE), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=runs.ENVIRONMENT, timeout=300)

    done = call(path, tmp_path / "photo.png")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert len(row["boxes"]) == len(row["scores"]) == len(row["labels"])
    done = call(path, tmp_path / "text.png", tmp_path / "photo.png")  # the others are looked at
    assert json.loads(done.stdout) == row
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "text.png" in done.stderr
    for arguments in ((path, tmp_path / "text.png"), (path, tmp_path / "none.png"), (MODULE, MODULE), (path,)):
        done = call(*arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_facts(exports: Path, tmp_path: Path) -> None:
    """Classes, ids, sizes, thresholds and training are in the file; nothing of this machine is."""
    detector, path = exported(exports, small.RETINANET)
    runtime, model = OnnxDetector(path), load_detector(path).detector
    for one in (runtime, model):
        assert one.score_threshold == 0.25 and tuple(one.class_thresholds) == detector.class_thresholds
        assert one.id2label == detector.id2label
    assert runtime.category_ids == list(detector.config.category_ids)
    assert model.config == detector.config and model.history == detector.history
    assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()
    with pytest.raises(InputError, match="exported"):
        model.save_pretrained(tmp_path / "saved")


def test_module_and_package_read_images_alike(tmp_path: Path) -> None:
    """The same pixels from the same files, and the same resizing."""
    rng = np.random.default_rng(0)
    color = cv2.resize(rng.integers(0, 256, (8, 6, 3), dtype=np.uint8), (60, 80), interpolation=cv2.INTER_CUBIC)
    opacity = np.linspace(0, 255, 80 * 60).reshape(80, 60).astype(np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(color).save(tmp_path / "a.png")
    Image.fromarray(color).save(tmp_path / "b.jpg", quality=90)
    Image.fromarray(color).save(tmp_path / "c.jpg", quality=90, exif=turned)
    Image.fromarray(color[..., 0]).save(tmp_path / "d.png")
    Image.fromarray(np.dstack([color, opacity])).save(tmp_path / "e.png")
    Image.fromarray(color[..., 0].astype(np.uint16) * 257).save(tmp_path / "f.png")
    Image.fromarray(color).save(tmp_path / "g.bmp")
    Image.fromarray(color).quantize(16).save(tmp_path / "h.png")
    for path in sorted(tmp_path.iterdir()):
        ours, theirs = read_rgb(path), read_image(path)
        assert ours.shape == theirs.shape, path
        # JPEG decoders differ by a level or two where they enlarge the colour channels.
        assert np.abs(ours.astype(int) - theirs).max() <= (1 if path.suffix != ".jpg" else 12), path
    Image.fromarray(np.dstack([color, opacity])).save(tmp_path / "turned.png", exif=turned)
    with pytest.raises(ValueError, match="transparent"):
        read_rgb(tmp_path / "turned.png")
    header = (tmp_path / "a.png").read_bytes()
    chunk = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + header[24:29]
    (tmp_path / "huge.png").write_bytes(header[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + header[33:])
    with pytest.raises(ValueError, match=r"huge\.png: OpenCV cannot read it"):
        read_rgb(tmp_path / "huge.png")
    for size in ((80, 60), (33, 200), (500, 400)):
        image = cv2.resize(color, size[::-1])
        resized = fit(size, 64, 100)
        assert (resize(image, 64, 100) == Geometry(size, resized, (0, 0), resized).image(image)).all()


def test_batches(exports: Path) -> None:
    """`predict` for several images at once gives what it gives one by one; wrong arguments are named."""
    _, path = exported(exports, small.RETINANET)
    detector = OnnxDetector(path)
    images = [*pictures(2, 150, 200), *pictures(1, 100, 100), *pictures(1, 150, 200)]
    single, batched = (detector.predict(images, 0.05, batch_size=size) for size in (1, 3))
    assert len(single) == 4 and sum(len(one["scores"]) for one in single) > 10
    for one, other in zip(single, batched, strict=True):
        assert one["labels"] == other["labels"]
        np.testing.assert_allclose(one["boxes"], other["boxes"], atol=0.01)
    for wrong, word in (({"batch_size": 0}, "batch_size"), ({"score_threshold": 2}, "score_threshold")):
        with pytest.raises(ValueError, match=word):
            detector.predict(images, **wrong)  # type: ignore[arg-type]
    for image in (images[0].astype(float), images[0][..., :2], np.zeros((0, 5, 3), np.uint8), 5):
        with pytest.raises(ValueError, match="images"):
            detector.predict([image])
    detector.facts["history"] = [{"tiles": {"size": 64, "overlap": 0.2}}]
    with pytest.warns(UserWarning, match="trained on tiles of 64 pixels"):
        detector.predict(images[0])
    model = load_detector(path).detector
    model.history = detector.facts["history"]  # the same file, by the project's own interface, looks at tiles
    tiled, whole = (model.predict(images[0], 0.05, tiles=tiles)[0]["scores"] for tiles in (None, 0))
    assert len(tiled) != len(whole)
    with pytest.raises(InputError, match="exported"):
        model.push_to_hub("user/name", token="none")  # before anything is asked of the hub


# The scripts


@pytest.mark.slow
def test_scripts_take_it(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    """export.py compares with the detector; evaluate.py and predict.py give the same for the file as for its run."""
    eager = runs.make_eager(pretrained, tmp_path / "eager")
    file = tmp_path / "eager/model.onnx"
    runs.load_script("export").main([str(eager), "--images", str(demo / "images")])
    sizes = ("--short-side", runs.SIZE, "--long-side", 128, *runs.MACHINE)
    for kind, checkpoint in (("run", eager), ("file", file)):
        flags = ("--checkpoint", checkpoint, "--data", demo, *sizes)
        runs.call_script("evaluate", *flags, "--output-dir", tmp_path / f"measured-{kind}")
        flags = ("--checkpoint", checkpoint, demo / "images", *runs.MACHINE, "--score-threshold", 0.1)
        runs.call_script("predict", *flags, "--output-dir", tmp_path / f"found-{kind}")
    for name in ("measured", "found"):
        ours, theirs = (runs.read_json(tmp_path / f"{name}-{kind}/predictions.json") for kind in ("run", "file"))
        assert abs(len(ours) - len(theirs)) <= 0.01 * len(ours) and len(ours) > 100
        scores = [sorted(row["score"] for row in rows)[-100:] for rows in (ours, theirs)]
        np.testing.assert_allclose(*scores, atol=1e-4)
    ours, theirs = (runs.read_json(tmp_path / f"measured-{kind}/metrics.json")["bbox"] for kind in ("run", "file"))
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.slow
def test_images_of_the_run(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run knows where its images lie; where it does not, they must be named."""
    export = runs.load_script("export")
    export.main([str(pretrained), "--output", str(tmp_path / "model.onnx")])
    assert "4 images" in capsys.readouterr().out and (tmp_path / "model.onnx").exists()
    (tmp_path / "foreign.onnx").write_bytes(b"mine")
    with pytest.raises(InputError, match="name another file"):
        export.main([str(pretrained), "--output", str(tmp_path / "foreign.onnx")])
    assert (tmp_path / "foreign.onnx").read_bytes() == b"mine"
    content = foreign(tmp_path / "foreign.onnx", **{"about": METADATA}).read_bytes()
    with pytest.raises(InputError, match="name another file"):
        export.main([str(pretrained), "--output", str(tmp_path / "foreign.onnx")])
    assert (tmp_path / "foreign.onnx").read_bytes() == content
    assert export.is_own(tmp_path / "model.onnx")
    save_model(tmp_path / "model", from_pretrained(pretrained), [])
    with pytest.raises(InputError, match="--images"):
        export.main([str(tmp_path / "model")])


@pytest.mark.slow
def test_a_wrong_export_is_not_written(
    pretrained: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison finds a file that computes something else, names the output, and leaves nothing behind."""
    eager = runs.make_eager(pretrained, tmp_path / "eager")
    export = runs.load_script("export")

    def write_another(detector: Detector, path: Path, half: bool) -> None:
        with torch.no_grad():
            small.two_stage(detector).roi_head.box_heads[0].get_submodule("deltas").get_parameter("bias")[:4] += 0.4
            write_onnx(detector, path, half)
            small.two_stage(detector).roi_head.box_heads[0].get_submodule("deltas").get_parameter("bias")[:4] -= 0.4

    monkeypatch.setattr(export, "write_onnx", write_another)
    before = sorted(path.name for path in eager.iterdir())
    with pytest.raises(InputError, match=r"boxes differ|counterpart"):
        export.main([str(eager), "--images", str(demo / "images")])
    assert sorted(path.name for path in eager.iterdir()) == before


def foreign(path: Path, opset: int = 18, **metadata: str) -> Path:
    """An ONNX file of another kind."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "other", [value], [other])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    onnx.helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("kind", ["text", "foreign", "future", "opset", "damaged", "absent", "folder", "incomplete"])
def test_bad_files(kind: str, exports: Path, tmp_path: Path) -> None:
    """One sentence that names the file."""
    path = tmp_path / "model.onnx"
    facts = json.dumps({"format": 99, "version": "9.9"})
    match kind:
        case "text":
            path.write_text("not a model")
        case "foreign":
            foreign(path)
        case "future":
            foreign(path, **{METADATA: facts})
        case "incomplete":
            foreign(path, **{METADATA: json.dumps({"format": 1})})
        case "opset":
            foreign(path, opset=999)
        case "damaged":
            content = exported(exports, small.RETINANET)[1].read_bytes()
            path.write_bytes(content[: len(content) // 2])
        case "folder":
            path.mkdir()
    with pytest.raises(InputError, match=r"model\.onnx") as error:
        load_detector(path)
    assert "\n" not in str(error.value)


def test_own_programs_are_known(tmp_path: Path) -> None:
    """By what they say about themselves: another project's are not replaced."""
    program = torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),))
    for name, is_own in ((METADATA, True), ("other", False)):
        torch.export.save(program, tmp_path / f"{name}.pt2", extra_files={name: "{}"})
        assert runs.load_script("export").is_own(tmp_path / f"{name}.pt2") == is_own


def test_bad_arguments(pretrained: Path, demo: Path, exports: Path, tmp_path: Path) -> None:
    _, path = exported(exports, small.RETINANET)
    export = runs.load_script("export")
    wrong = (
        ([str(pretrained), "--output", str(tmp_path / "model.bin")], r"\.onnx"),
        ([str(pretrained), "--output", str(tmp_path / "none/model.onnx")], "folder"),
        ([str(pretrained), "--images", str(tmp_path / "none")], "no such image"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(path)], "no model"),
    )
    for arguments, word in wrong:
        with pytest.raises(InputError, match=word):
            export.main(arguments)
    with pytest.raises(InputError, match="--provider"):
        runs.call_script("predict", "--checkpoint", pretrained, "--provider", "CPUExecutionProvider", demo / "images")
    for flags in (("--device", "cuda"), ("--mixed-precision", "bf16")):  # onnxruntime knows neither
        with pytest.raises(InputError, match=f"{flags[0]} {flags[1]}: is not for exported detectors"):
            runs.call_script("predict", "--checkpoint", "model.onnx", *flags, demo / "images")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(InputError, match="CUDAExecutionProvider"):
            load_detector(path, provider="CUDAExecutionProvider")
    with pytest.raises(InputError, match="--output-dir"):
        runs.call_script("evaluate", "--checkpoint", path, "--data", demo)
