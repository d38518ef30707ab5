"""What `Detector.predict` takes: one picture in many forms gives the same detections, what is ambiguous is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as runs
import torch
from PIL import Image
from small_detectors import small_detector

from direct_pt.checkpoint import save_model
from direct_pt.errors import InputError
from direct_pt.images.decoding import as_rgb, read_image
from direct_pt.models.detector import Detector

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(256, size=(6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(256, size=(6, 9), dtype=np.uint8)


@pytest.fixture
def detector() -> Detector:
    return small_detector().eval()


@pytest.fixture
def photo(demo: Path) -> Path:
    return min((demo / "images").glob("val_*.jpg"))


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and len(other["scores"]) > 3
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_one_picture_in_many_forms(detector: Detector, photo: Path) -> None:
    """Equal to the bit. One image in place of a list gives a list of one result."""
    pixels = read_image(photo)
    expected = detector.predict([pixels], score_threshold=0.05)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    forms = {
        "path": photo,
        "text": str(photo),
        "PIL": Image.open(photo),
        "array": pixels,
        "strided": np.ascontiguousarray(pixels[:, ::-1])[:, ::-1],
        "[3, h, w]": pixels.transpose(2, 0, 1),
        "float": pixels / 255,
        "float32": (pixels / 255).astype(np.float32),
        "uint16": pixels.astype(np.uint16) * 257,
        "RGBA": np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
        "tensor": tensor,
        "tensor [h, w, 3]": torch.from_numpy(pixels.copy()),
        "float tensor": (tensor / 255).requires_grad_(),
        "batch": tensor[None],
        "batch of arrays": pixels[None],
    }
    for name, image in forms.items():
        assert_same(detector.predict(image, score_threshold=0.05), expected), name
    assert_same(detector.predict(tuple(forms.values())[:13], score_threshold=0.05), expected * 13)
    assert_same(detector.predict((image for image in (photo, pixels)), score_threshold=0.05), expected * 2)


def test_the_same_as_the_script_finds(detector: Detector, photo: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", detector, [])
    runs.call_script(
        "predict", photo, "--checkpoint", tmp_path, "--output-dir", tmp_path / "found", "--score-threshold", 0.05,
        *runs.MACHINE,
    )  # fmt: skip
    rows = json.loads((tmp_path / "found/predictions.json").read_text())
    detector.to(memory_format=torch.channels_last)  # as the script does: else the last digits differ
    for image in (photo, Image.open(photo), read_image(photo)):
        (found,) = detector.predict(image, score_threshold=0.05)
        assert [row["score"] for row in rows] == found["scores"].tolist() and len(rows) > 3
        assert [row["bbox"][:2] for row in rows] == found["boxes"][:, :2].astype(np.float64).tolist()
        assert [row["category_name"] for row in rows] == found["labels"]


def test_other_images_change_nothing(detector: Detector, photo: Path, tmp_path: Path) -> None:
    """Images of several shapes, computed three at once, give what each gives alone; rows are in their order."""
    save_model(tmp_path / "model", detector, [])
    pixels = Image.open(photo)
    for number, size in enumerate([(96, 64), (64, 96), (90, 60), (64, 64), (60, 90), (96, 64), (64, 96), (30, 90)]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        pixels.resize(size).save(tmp_path / f"photos/{number}.png")
    flags = (*runs.MACHINE, "--score-threshold", 0.05, "--micro-batch-size", 3, "--output-dir", tmp_path / "found")
    runs.call_script("predict", tmp_path / "photos", "--checkpoint", tmp_path, *flags)
    rows = json.loads((tmp_path / "found/predictions.json").read_text())
    assert [row["image_id"] for row in rows] == sorted(row["image_id"] for row in rows)
    for number, path in enumerate(sorted((tmp_path / "photos").iterdir()), start=1):
        (found,) = detector.predict(path, score_threshold=0.05)
        own = [row for row in rows if row["image_id"] == number]
        assert len(own) == len(found["scores"]) > 3
        np.testing.assert_allclose([row["score"] for row in own], found["scores"], atol=1e-5)


def test_folders_are_searched_as_training_data_are(
    detector: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clutter is no photograph; what is left out is said."""
    save_model(tmp_path / "model", detector, [])
    photos = tmp_path / "photos"
    for name in ("a.jpg", "deep/b.png", "@eaDir/a.jpg", ".ipynb_checkpoints/c.jpg", "._a.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOURS).save(photos / name)
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(COLOURS).save(tmp_path / "elsewhere/d.jpg")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("e.HEIC", "f.cr2"):
        (photos / name).write_bytes(b"no picture")
    flags = ("--checkpoint", tmp_path, "--output-dir", photos / "found", "--score-threshold", 0, *runs.MACHINE)
    for _ in range(2):
        runs.call_script("predict", photos, *flags)
        rows = json.loads((photos / "found/predictions.json").read_text())
        expected = {str(photos / name) for name in ("a.jpg", "deep/b.png", "linked/d.jpg")}
        assert {row["file_name"] for row in rows} == expected
        printed = capsys.readouterr().out
        for kind, count in {"folders": 2, "hidden images": 1, "images of other formats": 2}.items():
            assert re.search(rf"{kind} left out, such as {photos}/.*: {count}$", printed, re.MULTILINE)
        assert "3 images, 0 unreadable" in printed
    for path in ("a.jpg", "deep/b.png", "linked/d.jpg"):
        (photos / path).unlink()
    shutil.rmtree(photos / "found")
    with pytest.raises(InputError, match=r"no image files there .*images of other formats left out, such as .*: 2"):
        runs.call_script("predict", photos, *flags)


def test_pixels() -> None:
    """Each form's value, by hand."""
    grey = np.repeat(GREY[:, :, None], 3, axis=2)
    for image in (GREY, GREY[:, :, None], GREY[None], torch.from_numpy(GREY)[None], torch.from_numpy(GREY)):
        np.testing.assert_array_equal(as_rgb(image, "a"), grey)
    np.testing.assert_array_equal(as_rgb(GREY.astype(">u2") * 257, "a"), grey)
    np.testing.assert_array_equal(as_rgb(np.array([[0, 128, 65535]], np.uint16), "a")[0, :, 0], [0, 0, 255])
    for dtype in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(as_rgb(np.array([[0, 0.5, 1]], dtype), "a")[0, :, 0], [0, 128, 255])
    np.testing.assert_array_equal(
        as_rgb(torch.tensor([[0, 0.5, 1]], dtype=torch.bfloat16), "a")[0, :, 0], [0, 128, 255]
    )
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 128, 255)
    assert as_rgb(rgba, "a")[0].tolist() == [[0, 0, 0], [100, 0, 0], [200, 0, 0]]
    np.testing.assert_array_equal(
        as_rgb(np.tile(rgba, (5, 2, 1)).transpose(2, 0, 1), "a"), np.tile(as_rgb(rgba, "a"), (5, 2, 1))
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "I", "F", "I;16"])
def test_pil_modes_are_read_as_from_a_file(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(GREY.astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(COLOURS).convert(mode)
    path = tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr", "F", "I", "I;16") else "image.png")
    image.save(path)
    np.testing.assert_array_equal(as_rgb(image, "a"), read_image(path))


def test_orientation(tmp_path: Path) -> None:
    """A path comes upright; a PIL image stays as it is, as the boxes are in its pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    assert as_rgb(tmp_path / "a.png", "a").shape == (9, 6, 3)
    np.testing.assert_array_equal(as_rgb(Image.open(tmp_path / "a.png"), "a"), COLOURS)


WIDE = np.zeros((8, 9, 3), np.float32)
REFUSED: tuple[tuple[Any, str], ...] = (
    (WIDE + 200, "float32 array [8, 9, 3]: has values from 200 to 200, where floats count from 0 to 1; give values"),
    (WIDE - 2, "has values from -2 to -2, where floats count from 0 to 1; undo its normalisation, or clip it"),
    (WIDE + 1000, "undo its normalisation, or clip it"),
    (WIDE + np.nan, "contains NaN"),
    (WIDE + np.inf, "has values from inf to inf"),
    (torch.zeros(3, 8, 9) + 255, "torch.float32 tensor [3, 8, 9]: has values from 255 to 255"),
    (WIDE.astype(np.int64), "int64 array [8, 9, 3]: give values from 0 to 255 as .astype(np.uint8)"),
    (WIDE.astype(np.int8), ".astype(np.uint8)"),
    (WIDE.astype(complex), ".astype(np.uint8)"),
    (WIDE.astype(object), ".astype(np.uint8)"),
    (WIDE[:, :, 0] > 0, "bool array [8, 9]: is a mask"),
    (torch.zeros(3, 8, 3), "torch.float32 tensor [3, 8, 3]: may be [C, h, w] or [h, w, C]"),
    (torch.zeros(1, 8, 3), "may be [C, h, w] or [h, w, C]"),
    (np.zeros((8, 9, 2), np.uint8), "uint8 array [8, 9, 2]: is no image; its shape must be [h, w]"),
    (np.zeros((1, 8, 9, 3), np.uint8), "uint8 array [1, 8, 9, 3]: is no image"),
    (np.zeros((0, 9, 3), np.uint8), "uint8 array [0, 9, 3]: has no pixels"),
    (torch.zeros(3, 0, 9), "has no pixels"),
    (torch.zeros(3, 8, 9).to_sparse(), "give a dense tensor"),
    (torch.zeros(3, 8, 9, device="meta"), "without values; give a dense tensor"),
    (torch.quantize_per_tensor(torch.zeros(3, 8, 9), 0.1, 0, torch.quint8), "give a dense tensor"),
    (Image.new("RGB", (0, 5)), "has no pixels (0x5)"),
    ([[1, 2], [3, 4]], "is a list, not an image; give a file's path, a PIL image, or an array"),
    (None, "is a NoneType, not an image"),
    ("absent.jpg", "absent.jpg: cannot be read as an image (No such file or directory)"),
    ("x" * 300, "cannot be read as an image (File name too long)"),
)


@pytest.mark.parametrize(("image", "text"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_refused_with_the_place_in_the_list(image: Any, text: str, detector: Detector) -> None:
    """And the detector is left in the mode that it was in."""
    detector.train()
    with pytest.raises(InputError) as error:
        detector.predict([COLOURS, image])
    message = str(error.value)
    assert message.startswith("images[1]: ") and text in message and "\n" not in message
    assert detector.training


def test_refused_alone(detector: Detector) -> None:
    for image, text in (
        (WIDE - 2, "values from -2"),
        (None, "NoneType"),
        (np.array(3), "is no image"),
        (5, "is a int"),
        ("absent.jpg", "absent.jpg"),
    ):
        with pytest.raises(InputError, match=r"images\[0\]: .*" + text):
            detector.predict(image)  # type: ignore[arg-type]


def test_a_pil_image_of_a_torn_file(tmp_path: Path, detector: Detector) -> None:
    """Pillow reads the pixels only when they are asked for."""
    Image.fromarray(RNG.integers(256, size=(90, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"images\[0\]: PIL image: cannot be read as an image"):
        detector.predict(Image.open(tmp_path / "a.png"))
