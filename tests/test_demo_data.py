"""The demo set: repeatable, honest about what is held out, and its annotations fit what was drawn."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parents[1] / "scripts" / "make_demo_data.py"
ARGUMENTS = ["--train-images", "34", "--val-images", "12", "--image-size", "96"]
SPLITS = ("train", "val")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_demo_data"] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


script = load_script()


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tables(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / "annotations" / f"instances_{split}.json").read_text()) for split in SPLITS]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "set"
    script.main(["--output-dir", str(folder), *ARGUMENTS])
    return folder


def test_same_arguments_give_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    again = run_script("--output-dir", tmp_path / "again", *ARGUMENTS)  # another process, another hash seed
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "again") == contents(demo)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]  # nothing is left of the folder it was made in
    script.main(["--output-dir", str(tmp_path / "other"), *ARGUMENTS, "--seed", "1"])
    assert (tmp_path / "other/images/train_000001.jpg").read_bytes() != contents(demo)["images/train_000001.jpg"]


def test_layout(demo: Path) -> None:
    names = [
        f"{split}_{number:06d}.jpg" for split, count in (("train", 34), ("val", 12)) for number in range(1, count + 1)
    ]
    expected = [f"images/{name}" for name in names] + [f"annotations/instances_{split}.json" for split in SPLITS]
    assert sorted(contents(demo)) == sorted(expected)
    assert [image["file_name"] for table in tables(demo) for image in table["images"]] == names
    for name in names:
        with Image.open(demo / "images" / name) as image:
            assert image.size == (96, 96) and image.mode == "RGB"


def test_held_out_scans_and_photographs_are_not_shared(demo: Path) -> None:
    train, val = script.load_sources()
    assert not set(train.numbers) & set(val.numbers)
    assert len(train.numbers) + len(val.numbers) == 1797
    assert set(val.digits) == set(range(10))
    for train_photo, val_photo in zip(train.photos, val.photos, strict=True):
        assert not np.shares_memory(train_photo, val_photo)
        assert min(*train_photo.shape[:2], *val_photo.shape[:2]) >= train.max_crop == val.max_crop
    for source, table in zip((train, val), tables(demo), strict=True):  # what was drawn comes from where it should
        digit_of = dict(zip(source.numbers.tolist(), source.digits.tolist(), strict=True))
        name_of = {category["id"]: category["name"] for category in table["categories"]}
        for annotation in table["annotations"]:
            assert name_of[annotation["category_id"]] == str(digit_of[annotation["scan"]])


def test_the_split_of_the_scans_does_not_follow_the_seed(tmp_path: Path) -> None:
    script.main(["--output-dir", str(tmp_path / "set"), *ARGUMENTS, "--seed", "7"])
    for source, table in zip(script.load_sources(), tables(tmp_path / "set"), strict=True):
        assert {annotation["scan"] for annotation in table["annotations"]} <= set(source.numbers.tolist())


def test_category_ids_have_holes(demo: Path) -> None:
    for table in tables(demo):
        assert [category["name"] for category in table["categories"]] == list("0123456789")
        assert [category["id"] for category in table["categories"]] == list(range(10, 101, 10))


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_fit_outlines_and_outlines_fit_pixels(demo: Path, split: str) -> None:
    coco = COCO(demo / "annotations" / f"instances_{split}.json")
    assert len(coco.anns) > len(coco.imgs)
    for annotation in coco.anns.values():
        x, y, width, height = annotation["bbox"]
        assert min(x, y) >= 0 and max(x + width, y + height) <= 96 + 1e-6
        assert 3 <= width <= 96 / 3 * 1.25 and 96 / 10 <= height <= 96 / 3 * 1.25
        corners = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in annotation["segmentation"]])
        np.testing.assert_allclose([*corners.min(0), *corners.max(0)], [x, y, x + width, y + height], atol=0.02)
        mask = coco.annToMask(annotation)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(edges, [x, y, x + width, y + height], atol=1.01)
        assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0


def test_outline_encloses_the_strokes() -> None:
    source = script.load_sources()[0]
    for scan in source.scans[:50]:
        alpha = script.enlarge(scan, 40.0)
        size = max(alpha.shape)
        polygons = [polygon.ravel().tolist() for polygon in script.outline(alpha)]
        mask = script.coco_mask.decode(script.coco_mask.merge(script.coco_mask.frPyObjects(polygons, size, size)))
        mask = mask[: alpha.shape[0], : alpha.shape[1]].astype(bool)
        strokes = alpha >= script.OUTLINE_LEVEL
        assert (strokes & ~mask).sum() <= 0.1 * strokes.sum()  # the rasteriser moves edges by up to a pixel


def test_digits_differ_from_the_background() -> None:
    source, rng = script.load_sources()[0], np.random.default_rng(0)
    for _ in range(20):
        background = script.draw_background(source, 96, rng)
        pixels = background.copy()
        for annotation in script.draw_digits(pixels, 3, source, rng):
            x, y, width, height = (round(value) for value in annotation["bbox"])
            change = (pixels - background)[y : y + height, x : x + width] @ script.LUMA
            assert np.abs(change).max() >= script.MIN_CONTRAST
        assert pixels.min() >= -1e-6 and pixels.max() <= 255 + 1e-6


def test_number_and_overlap_of_digits(demo: Path) -> None:
    for table in tables(demo):
        for image in table["images"]:
            boxes = np.array([a["bbox"] for a in table["annotations"] if a["image_id"] == image["id"]])
            assert len(boxes) <= 6
            if len(boxes):
                overlaps = script.coco_mask.iou(boxes, boxes, [0] * len(boxes)) - np.eye(len(boxes))
                assert overlaps.max() < 0.1


def test_some_images_are_empty(demo: Path) -> None:
    train = tables(demo)[0]
    empty = {image["id"] for image in train["images"]} - {annotation["image_id"] for annotation in train["annotations"]}
    assert len(empty) == round(0.03 * 34) == 1


def test_a_second_call_does_nothing(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in demo.parent.rglob("*")}

    before = times()
    script.main(["--output-dir", str(demo), *ARGUMENTS])
    assert times() == before
    assert str(demo) in capsys.readouterr().out


def test_other_contents_are_refused_and_kept(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    refused = run_script("--output-dir", foreign, *ARGUMENTS)
    assert refused.returncode == 2 and refused.stdout == ""
    assert str(foreign) in refused.stderr and "--output-dir" in refused.stderr and refused.stderr.count("\n") == 1
    assert contents(tmp_path) == {"foreign/notes.txt": b"mine"}


def test_other_arguments_or_missing_images_are_refused(tmp_path: Path) -> None:
    few = ["--output-dir", str(tmp_path / "set"), "--train-images", "2", "--val-images", "1"]
    (tmp_path / "set").mkdir()  # an empty folder is as good as none
    script.main(few)
    with pytest.raises(script.InputError, match="something else"):
        script.main([*few, "--seed", "1"])
    (tmp_path / "set/images/val_000001.jpg").unlink()
    with pytest.raises(script.InputError, match="something else"):
        script.main(few)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "draw_digits", full_disk)
    with pytest.raises(script.InputError, match="No space left"):
        script.main(["--output-dir", str(tmp_path / "set"), *ARGUMENTS])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--train-images", "--val-images", "--image-size", "--seed"])
def test_numbers_out_of_range_name_their_flag(flag: str, tmp_path: Path) -> None:
    with pytest.raises(script.InputError, match=f"{flag}: -1 must"):
        script.main(["--output-dir", str(tmp_path / "set"), flag, "-1"])


def test_missing_scikit_learn_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(script.InputError, match="pip install scikit-learn"):
        script.main(["--output-dir", str(tmp_path / "set")])
