"""What predict.py writes for other tools: read back, the same boxes; what may have been corrected is not replaced."""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import small_detectors
import small_runs as runs
from PIL import Image
from pycocotools import mask as coco_mask

from direct_pt import as_supervision, from_pretrained
from direct_pt.checkpoint import save_model
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.errors import InputError
from direct_pt.images.decoding import read_image
from direct_pt.onnx_detector import Found
from direct_pt.prediction import looking, seen
from direct_pt.prediction.annotation_files import outline_of
from direct_pt.prediction.pictures import class_folders
from direct_pt.prediction.seen import Classes

KINDS = ("--as-annotations", "--as-yolo", "--as-label-studio", "--as-cvat", "--crops")
NAMES = tuple(map(str, range(small_detectors.CLASSES)))


@pytest.fixture(scope="module")
def photos(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images, some in a folder of their own, one of them turned by its EXIF orientation, and one damaged."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more & other").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, path in enumerate(sorted((demo / "images").iterdir())[:4]):
        image = Image.open(path).convert("RGB").resize((128, 96 + 8 * number))
        place = folder / ("more & other" if number % 2 else ".") / f"photo {number}.jpg"
        image.save(place, quality=95, **({"exif": exif} if number == 3 else {}))
    (folder / "damaged.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module", params=[small_detectors.RETINANET, small_detectors.MASK])
def written(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What predict.py wrote with all its flags, of a box detector and of a mask detector."""
    folder = tmp_path_factory.mktemp("predict")
    save_model(folder / "model", small_detectors.small_detector(request.param), [])
    eager = runs.make_eager(folder / "model", folder / "eager")
    threshold = 0.05 if request.param == small_detectors.MASK else 0.3
    flags = ("--checkpoint", eager, photos, *runs.MACHINE, *KINDS, "--score-threshold", threshold)
    runs.call_script("predict", *flags, "--output-dir", folder / "out")
    return folder / "out"


def rows_by_image(written: Path) -> dict[str, list[dict[str, Any]]]:
    """predictions.json, by the files' names."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in runs.read_json(written / "predictions.json"):
        rows.setdefault(Path(row["file_name"]).name, []).append(row)
    assert len(rows) == 4 and min(map(len, rows.values())) > 3
    return rows


def assert_same_boxes(table: AnnotationTable, rows: dict[str, list[dict[str, Any]]], tolerance: float) -> None:
    """Those of predictions.json, image by image."""
    assert len(table) == len(rows)
    for image in range(len(table)):
        own = rows[Path(table.image_name(image)).name]
        part = slice(table.starts[image], table.starts[image + 1])
        expected = np.array([row["bbox"] for row in own])
        order = [np.lexsort(np.round(boxes, 3).T) for boxes in (expected, table.boxes[part])]
        np.testing.assert_allclose(table.boxes[part][order[1]], expected[order[0]], atol=tolerance)
        names = np.array(table.class_names)[table.labels[part]][order[1]]
        assert names.tolist() == np.array([row["category_name"] for row in own])[order[0]].tolist()
        assert table.image_size(image) == read_image(table.path(image)).shape[:2]


def test_annotations_can_be_trained_on(written: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """annotations.json is a data set with the images where they lie: boxes, classes, and masks."""
    paths = {"train_images": (photos,), "train_annotations": (written / "annotations.json",)}
    table = load_tables(DataOptions(**paths, val_share=0.0))["train"]
    rows = rows_by_image(written)
    assert_same_boxes(table, rows, 1e-9)
    content = runs.read_json(written / "annotations.json")
    assert all(0 < one["score"] <= 1 and one["area"] > 0 for one in content["annotations"])
    for one in content["annotations"]:
        width, height = one["bbox"][2:]
        area = coco_mask.area(one["segmentation"]) if "segmentation" in one else width * height
        assert one["area"] == (area or width * height)
    if "segmentation" in content["annotations"][0]:
        table.require_masks()
    flags = ("--train-images", photos, "--train-annotations", written / "annotations.json", "--val-share", 0)
    runs.call_script("check_data", *flags, "--output-dir", written.parent / "report")
    assert "4 images" in capsys.readouterr().out


def test_yolo(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A YOLO data set with links to the images."""
    table = load_tables(DataOptions(data=written / "yolo", val_share=0.0))["train"]
    assert_same_boxes(table, rows_by_image(written), 1e-4)
    assert len(table.class_names) == small_detectors.CLASSES
    links = [path for path in (written / "yolo/images").rglob("*") if not path.is_dir()]
    assert len(links) == 4 and all(path.is_symlink() for path in links)
    runs.call_script("check_data", "--data", written / "yolo", "--output-dir", written.parent / "report-yolo")
    assert "train: 3 images" in capsys.readouterr().out


def test_label_studio(written: Path, photos: Path) -> None:
    """Per cent of the sides; the names of the set-up; the images' addresses under the document root."""
    rows, setup = rows_by_image(written), ElementTree.parse(written / "label_studio.xml").getroot()
    assert [label.get("value") for label in setup.iter("Label")] == 2 * list(NAMES)
    tasks = runs.read_json(written / "label_studio.json")
    assert len(tasks) == 4
    identifiers: list[str] = []
    for task in tasks:
        address = task["data"]["image"]
        path = photos.parent / unquote(address.removeprefix("/data/local-files/?d="))
        assert path.is_file()
        (prediction,) = task["predictions"]
        own = rows[path.name]
        boxes = []
        for shape in prediction["result"]:
            tag = setup.find(f".//*[@name='{shape['from_name']}']")
            assert tag is not None and tag.tag.lower() == shape["type"] and shape["to_name"] == tag.get("toName")
            sides = np.array([shape["original_width"], shape["original_height"]]) / 100
            value = shape["value"]
            assert value[shape["type"]][0] in NAMES
            identifiers.append(shape["id"])
            if shape["type"] == "rectanglelabels":
                boxes.append(np.array([value[key] for key in ("x", "y", "width", "height")]) * np.tile(sides, 2))
            else:
                points = np.array(value["points"]) * sides
                assert (points >= 0).all() and (points <= sides * 100).all()
        if all("segmentation" not in row for row in own):
            np.testing.assert_allclose(boxes, [row["bbox"] for row in own], atol=1e-3)
        else:
            assert len(boxes) < len(prediction["result"])
        assert len(prediction["result"]) == len(own)
    assert len(set(identifiers)) == sum(map(len, rows.values()))


def test_cvat(written: Path, photos: Path) -> None:
    """One shape for each detection: boxes, or outlines of the masks, or the masks themselves."""
    rows, root = rows_by_image(written), ElementTree.parse(written / "cvat.xml").getroot()
    assert root.tag == "annotations" and root.findtext("version") == "1.1"
    images = root.findall("image")
    assert [image.get("id") for image in images] == ["0", "1", "2", "3"]
    assert [name.text for name in root.findall("meta/task/labels/label/name")] == list(NAMES)
    assert root.findtext("meta/task/mode") == "annotation"
    for image in images:
        path = photos / image.get("name", "")
        assert path.is_file()
        own = rows[path.name]
        boxes = [[float(box.get(key, "nan")) for key in ("xtl", "ytl", "xbr", "ybr")] for box in image.findall("box")]
        expected = np.array([row["bbox"] for row in own])
        expected[:, 2:] += expected[:, :2]
        if "segmentation" not in own[0]:
            np.testing.assert_allclose(boxes, expected, atol=1e-3)
            assert [box.get("label") for box in image.findall("box")] == [row["category_name"] for row in own]
        else:
            assert len(image) == len(own) > len(boxes)
            for row, shape in zip(own, image, strict=True):
                assert shape.get("label") == row["category_name"]
                mask = coco_mask.decode(row["segmentation"]).astype(bool)
                if shape.tag == "polygon":
                    points = np.array([pair.split(",") for pair in shape.get("points", "").split(";")], float)
                    drawn = np.zeros(mask.shape, np.uint8)
                    # By the centres of its pixels, as COCO fills polygons.
                    cv2.fillPoly(drawn, [np.round((points - 0.5) * 256).astype(np.int32)], 1, shift=8)
                    assert np.abs(points[:, None] - np.argwhere(mask)[None, :, ::-1] - 0.5).max(axis=2).min() <= 0.5
                    assert np.logical_xor(drawn, mask).sum() <= 0.25 * mask.sum() + 8
                elif shape.tag == "mask":
                    height, width, left, top = (int(shape.get(k, -1)) for k in ("height", "width", "left", "top"))
                    counts = np.array(shape.get("rle", "").split(", "), int)
                    window = np.repeat(np.arange(len(counts)) % 2, counts).reshape(height, width)
                    drawn = np.zeros(mask.shape, np.uint8)
                    drawn[top : top + height, left : left + width] = window
                    np.testing.assert_array_equal(drawn, mask)
                else:
                    assert not mask.any()


def drawn_mask(*pieces: tuple[int, int, int, int]) -> Found:
    """A detection whose mask is 1 in rectangles (x1, y1, x2, y2) of a box of 28x28 pixels at (10, 20)."""
    masks = np.zeros((1, 28, 28), np.float32)
    for x1, y1, x2, y2 in pieces:
        masks[0, y1:y2, x1:x2] = 1
    box = np.array([[10, 20, 38, 48]], np.float32)
    return Found(box, np.ones(1, np.float32), np.zeros(1, np.int64), masks)


def test_outlines_follow_the_edges_of_pixels() -> None:
    """Of a square the corners, to the bit; holes and further pieces are noticed; a single pixel is a square."""
    outline = outline_of(drawn_mask((2, 3, 12, 13)), 0, (60, 50))
    assert outline.corners is not None and outline.is_whole
    assert sorted(map(tuple, outline.corners.tolist())) == [(12, 23), (12, 33), (22, 23), (22, 33)]
    outline = outline_of(drawn_mask((4, 4, 5, 5)), 0, (60, 50))
    assert outline.corners is not None and cv2.contourArea(outline.corners.astype(np.float32)) == 1
    outline = outline_of(drawn_mask((2, 2, 12, 12), (20, 20, 24, 24)), 0, (60, 50))
    assert outline.corners is not None and not outline.is_whole
    assert outline.corners.max(axis=0).tolist() == [22, 32]  # the larger one's
    ring = drawn_mask((2, 2, 20, 20))
    assert ring.masks is not None
    ring.masks[0, 8:12, 8:12] = 0
    assert not outline_of(ring, 0, (60, 50)).is_whole
    assert outline_of(drawn_mask(), 0, (60, 50)).corners is None
    rows, columns = np.mgrid[:28, :28]
    disc = drawn_mask((0, 0, 28, 28))
    disc.masks = ((rows - 13.5) ** 2 + (columns - 13.5) ** 2 < 12**2).astype(np.float32)[None]
    outline = outline_of(disc, 0, (60, 50))
    assert outline.corners is not None and len(outline.corners) < 30
    assert cv2.contourArea(outline.corners.astype(np.float32)) == pytest.approx(disc.masks.sum(), rel=0.03)


def test_crops(written: Path) -> None:
    """One for each detection, in its class's folder, as large as its box."""
    rows = rows_by_image(written)
    files = list((written / "crops").rglob("*.jpg"))
    assert len(files) == sum(map(len, rows.values()))
    own = rows["photo 0.jpg"]
    for number, row in enumerate(own, start=1):
        crop = Image.open(written / "crops" / row["category_name"] / f"photo 0_{number}.jpg")
        assert np.abs(np.array(crop.size) - row["bbox"][2:]).max() < 2


def test_what_is_there_is_kept(written: Path, photos: Path, tmp_path: Path) -> None:
    """Somebody may have corrected it: each flag names it and the remedy, before anything is done or loaded."""
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    for kind, name in zip(KINDS, ("annotations.json", "yolo", "label_studio.json", "cvat.xml", "crops"), strict=True):
        flags = ("--checkpoint", tmp_path, photos, *runs.MACHINE, kind, "--output-dir", written)
        with pytest.raises(InputError, match=f"has {name}, which may hold corrections; name another place"):
            runs.call_script("predict", *flags)
    assert before == {path: path.stat().st_mtime_ns for path in written.rglob("*")}


def predicted(photos: Path, output: Path, *flags: object) -> list[dict[str, Any]]:
    """The rows of predictions.json of an eager detector."""
    model = output.parent / "eager"
    if not model.exists():
        save_model(output.parent / "model", small_detectors.small_detector(small_detectors.RETINANET), [])
        runs.make_eager(output.parent / "model", model)
    flags = ("--checkpoint", model, photos, *runs.MACHINE, "--score-threshold", 0.3, *flags)
    runs.call_script("predict", *flags, "--output-dir", output)
    return list(runs.read_json(output / "predictions.json"))


def test_no_image_is_written_over(tmp_path: Path) -> None:
    """Long names that differ in their folders alone stay apart in every kind of result, and images as they are."""
    contents = {}
    for number, folder in enumerate(("a", "b", "yolo/images", "images", "crops")):
        path = tmp_path / "photos" / folder / f"{'x' * 250}.jpeg"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((64, 96, 3), 40 * number, np.uint8)).save(path)
        contents[path] = path.read_bytes()
    rows = predicted(tmp_path / "photos", tmp_path / "out", "--as-yolo", "--crops")
    assert all(path.read_bytes() == content for path, content in contents.items())
    links = [path for path in (tmp_path / "out/yolo/images").rglob("*") if path.is_symlink()]
    assert {path.resolve() for path in links} == set(contents)
    for link in links:  # as readers find them
        head, _, tail = str(link).rpartition("/images/")
        label = Path(f"{head}/labels/{tail}").with_suffix(".txt")
        own = [row for row in rows if row["file_name"] == str(link.resolve())]
        assert len(label.read_text().splitlines()) == len(own) > 0
    assert len(list((tmp_path / "out/crops").rglob("*.jpg"))) == len(rows)
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == len(rows) + len(contents)


def test_a_damaged_image_changes_nothing_for_others(tmp_path: Path) -> None:
    """Of the same shape by its header, and computed together with them."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = cv2.resize(rng.integers(0, 256, (3, 9, 3), dtype=np.uint8), (320, 40))
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")
    damaged = tmp_path / "photos/2.png"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    together, alone = (
        predicted(tmp_path / "photos", tmp_path / f"by {count}", "--micro-batch-size", count) for count in (4, 1)
    )
    assert len(together) == len(alone) > 0
    np.testing.assert_allclose([row["bbox"] for row in together], [row["bbox"] for row in alone], atol=0.05)


def test_an_image_that_vanishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, and the others have their results; a name that is no UTF-8 does no harm either."""
    (tmp_path / "photos").mkdir()
    for name in (b"a.png", b"b.png", b"c\xff.png"):
        Image.fromarray(np.full((64, 96, 3), 99, np.uint8)).save(tmp_path / "photos" / os.fsdecode(name))
    original = looking.ImageFiles.__getitem__

    def vanishing(self: looking.ImageFiles, key: Any) -> Any:
        sample = original(self, key)
        if self.paths[key].name == "b.png":
            self.paths[key].unlink()
        return sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looking.ImageFiles, "__getitem__", vanishing)
        rows = predicted(tmp_path / "photos", tmp_path / "out", "--as-label-studio", "--as-annotations")
    assert {Path(row["file_name"]).name[0] for row in rows} == {"a", "c"}
    said = capsys.readouterr()
    assert "2 images, 1 unreadable" in said.out and "b.png" in said.out + said.err
    addresses = [task["data"]["image"] for task in runs.read_json(tmp_path / "out/label_studio.json")]
    assert addresses == ["/data/local-files/?d=photos/a.png", "/data/local-files/?d=photos/c%FF.png"]


def test_large_images_are_drawn_smaller(
    written: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it is said; the boxes are drawn where the objects are."""
    monkeypatch.setattr(seen, "MAX_DRAWN_PIXELS", 60 * 40)
    flags = ("--checkpoint", written.parent / "eager", photos / "photo 0.jpg", *runs.MACHINE)
    runs.call_script("predict", *flags, "--output-dir", tmp_path / "small")
    picture = Image.open(tmp_path / "small/photo 0.jpg")
    assert picture.width * picture.height <= 60 * 40 and picture.width / picture.height == pytest.approx(128 / 96, 0.05)
    assert "drawn smaller, as a picture here has at most 2,400 pixels" in capsys.readouterr().out
    runs.call_script("predict", *flags, "--no-pictures", "--output-dir", tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["predictions.json"]


def test_nothing_found(written: Path, photos: Path, tmp_path: Path) -> None:
    """Files without detections are files all the same."""
    flags = ("--checkpoint", written.parent / "eager", photos / "photo 0.jpg", *runs.MACHINE, *KINDS)
    runs.call_script("predict", *flags, "--score-threshold", 0.9999999, "--output-dir", tmp_path / "out")
    assert runs.read_json(tmp_path / "out/predictions.json") == []
    content = runs.read_json(tmp_path / "out/annotations.json")
    assert content["annotations"] == [] and len(content["images"]) == 1
    assert json.loads((tmp_path / "out/label_studio.json").read_text())[0]["predictions"][0]["result"] == []
    assert ElementTree.parse(tmp_path / "out/cvat.xml").getroot().find("image") is not None
    assert (tmp_path / "out/yolo/labels/photo 0.txt").read_text() == ""


def test_folders_of_classes() -> None:
    """No two the same, none outside of its place."""
    names = ("a/b", "A_B", "..", "zebra", "日本", "x\ny", " ", "z" * 300)
    folders = class_folders(Classes(names, tuple(range(len(names)))))
    assert len({folder.casefold() for folder in folders}) == len(names)
    assert all(folder and "/" not in folder and set(folder) != {"."} for folder in folders)
    assert folders[3] == "zebra" and folders[4] == "日本"


def test_supervision(written: Path, photos: Path) -> None:
    """supervision's class has what `predict` returned."""
    supervision = pytest.importorskip("supervision")
    detector = from_pretrained(written.parent / "eager")
    result = detector.predict(photos / "photo 0.jpg", 0.0)[0]
    found = as_supervision(result)
    assert isinstance(found, supervision.Detections) and len(found) == len(result["scores"]) > 3
    np.testing.assert_array_equal(found.xyxy, result["boxes"])
    np.testing.assert_array_equal(found.confidence, result["scores"])
    assert found.class_id.tolist() == result["class_ids"] and found.data["class_name"].tolist() == result["labels"]
    assert (found.mask is None) == ("masks" not in result)
    if found.mask is not None:
        np.testing.assert_array_equal(found.mask, result["masks"])
    best = found[found.confidence > float(np.median(found.confidence))]
    assert 0 < len(best) < len(found)
    assert len(as_supervision(detector.predict(photos / "photo 0.jpg", 0.9999999)[0])) == 0
