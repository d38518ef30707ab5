"""From COCO files to the annotation table and back: what is read, repaired and rejected."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import CocoFolder, MakeCocoFolder
from PIL import Image
from pycocotools import mask as coco_mask

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats import json_stream
from direct_pt.data.formats.coco import CocoSplit, find_coco
from direct_pt.data.problems import ERROR, DataError, Problems
from direct_pt.data.sources import DataOptions, find_sources, load_split, load_tables
from direct_pt.errors import InputError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
SIZES = ((20, 30), (40, 25), (16, 16))  # of the images 10, 20, 30, (height, width)
SQUARE = [[2.0, 3.0, 12.5, 3.0, 12.5, 9.0, 2.0, 9.0]]
TWO_PARTS = [[0.0, 0.0, 4.0, 0.0, 4.0, 4.0], [10.0, 10.0, 15.0, 10.0, 15.0, 15.0, 10.0, 15.0]]


def box_of(image_id: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "bbox": bbox, **more}


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed form, as it stands in JSON files."""
    packed = coco_mask.encode(np.asfortranarray(mask))
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def some_mask(height: int, width: int, first: int = 0) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[3:9, 5:12] = 1
    mask[0, 0] = first
    return mask


@pytest.fixture
def folder(coco_folder: MakeCocoFolder) -> CocoFolder:
    """Objects in the wrong order, one image without any."""
    boxes = [[1.0, 2, 10, 5], [4.0, 4, 6, 6], [3.0, 3, 8, 8], [0.5, 0.25, 7.125, 9]]
    return coco_folder(
        SIZES,
        [
            box_of(30, boxes[0], category_id=7, area=33.5),
            box_of(10, boxes[1], category_id=2, area=20, iscrowd=1),
            box_of(30, boxes[2], category_id=2, area=64, iscrowd=0),
            box_of(10, boxes[3], category_id=7, area=50),
        ],
    )


# What is found


@pytest.mark.parametrize(
    ("train_file", "train_images", "val_file", "val_images"),
    [
        ("instances_train2017.json", "train2017", "instances_val2017.json", "val2017"),
        ("instances_train.json", "images", "instances_val.json", "images"),
    ],
)
def test_both_layouts(tmp_path: Path, train_file: str, train_images: str, val_file: str, val_images: str) -> None:
    (tmp_path / "annotations").mkdir()
    for name in (train_file, val_file):
        (tmp_path / "annotations" / name).touch()
    assert find_coco(tmp_path) == {
        "train": CocoSplit(tmp_path / train_images, tmp_path / "annotations" / train_file),
        "val": CocoSplit(tmp_path / val_images, tmp_path / "annotations" / val_file),
    }
    (tmp_path / "annotations" / val_file).unlink()
    assert set(find_coco(tmp_path)) == {"train"}


def explicit(train: CocoSplit, val: CocoSplit | None = None, **flags: Any) -> DataOptions:
    more = {} if val is None else {"val_images": (val.images,), "val_annotations": (val.annotations,)}
    return DataOptions(train_images=(train.images,), train_annotations=(train.annotations,), **more, **flags)


def test_explicit_paths(folder: CocoFolder, coco_folder: MakeCocoFolder) -> None:
    train, val = folder.write(), coco_folder(SIZES, name="elsewhere").write()
    assert find_sources(explicit(train, val)) == {"train": [train], "val": [val]}
    tables = load_tables(explicit(train, val))
    assert (len(tables["train"].boxes), len(tables["val"].boxes)) == (4, 0)
    assert find_sources(explicit(train)) == {"train": [train]}


def test_explicit_paths_incomplete_or_too_many(tmp_path: Path) -> None:
    here = (tmp_path,)
    for flags, message in (
        ({"train_images": here}, "--train-annotations is missing"),
        ({"train_images": here, "train_annotations": here, "val_annotations": here}, "--val-images is missing"),
        ({}, "use --data DIR, or --train-images"),
        ({"data": tmp_path, "train_images": here, "train_annotations": here}, "not both"),
        ({"train_images": here * 2, "train_annotations": here * 3}, "2 folders, --train-annotations 3 files"),
    ):
        with pytest.raises(InputError, match=message):
            find_sources(DataOptions(**flags))


@pytest.mark.parametrize("name", ["nothing", "empty", "file"])
def test_no_layout(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        find_sources(DataOptions(data=tmp_path / name))
    assert f"--data {tmp_path / name}" in str(error.value)
    if name == "empty":
        for word in ("instances_train2017.json", "instances_train.json", "--train-images", "--val-annotations"):
            assert word in str(error.value)


# What is read


def test_categories_become_contiguous_and_come_back(folder: CocoFolder) -> None:
    table = folder.load()
    assert (table.category_ids, table.class_names) == ((2, 7), ("two", "seven"))
    assert [table.class_names[label] for label in table.labels] == ["two", "seven", "seven", "two"]
    assert table.labels.min() >= 0 and table.labels.max() < 2
    back = table.coco()
    assert {c["id"]: c["name"] for c in back["categories"]} == {2: "two", 7: "seven"}
    written = {(a["image_id"], tuple(a["bbox"])): a["category_id"] for a in folder.content["annotations"]}
    assert {(a["image_id"], tuple(a["bbox"])): a["category_id"] for a in back["annotations"]} == written


def test_objects_are_sorted_by_image(folder: CocoFolder) -> None:
    folder.content["images"].reverse()  # the file's order of images stays, whatever their ids
    table = folder.load()
    assert table.image_ids.tolist() == [30, 20, 10]
    assert table.sizes.tolist() == [[16, 16], [40, 25], [20, 30]]
    assert [table.path(row).name for row in range(3)] == ["2.png", "1.png", "0.png"]
    assert table.annotation_ids.tolist() == [100, 102, 101, 103]  # within an image, the file's order
    assert [len(table.objects(row, with_masks=False)) for row in range(3)] == [2, 0, 2]
    third = table.objects(2, with_masks=False)
    assert third.boxes.tolist() == [[4, 4, 10, 10], [0.5, 0.25, 7.625, 9.25]]
    assert third.labels.tolist() == [0, 1]
    assert third.areas.tolist() == [20, 50]
    assert third.crowd.tolist() == [True, False]


def test_coco_dictionary_equals_the_file(folder: CocoFolder) -> None:
    folder.content["annotations"].append({"id": 9, **box_of(20, [-5.5, -2, 200, 0], category_id=2, area=3)})
    back = folder.load().coco()

    def rows(content: dict[str, Any]) -> list[tuple[Any, ...]]:
        keys = ("image_id", "category_id", "bbox", "area")
        return sorted((*(a[key] for key in keys), a.get("iscrowd", 0)) for a in content["annotations"])

    assert rows(back) == rows(folder.content)
    sizes = [{key: image[key] for key in ("id", "height", "width")} for image in folder.content["images"]]
    assert back["images"] == sizes
    assert len({a["id"] for a in back["annotations"]}) == 5 and min(a["id"] for a in back["annotations"]) > 0


def test_images_without_objects(coco_folder: MakeCocoFolder) -> None:
    table = coco_folder(SIZES).load()
    assert len(table) == 3
    assert table.targets_per_image().tolist() == [0, 0, 0]
    objects = table.objects(1, with_masks=True)
    assert len(objects) == 0 and objects.boxes.shape == (0, 4) and objects.segmentations == []
    assert table.coco()["annotations"] == []
    assert len(table.without_empty_images()) == 0


def test_boxes_outside_their_image(coco_folder: MakeCocoFolder) -> None:
    boxes = {
        "inside": [1, 1, 5, 5],
        "left": [-4, 2, 10, 5],
        "right": [25, 2, 10, 5],
        "above": [2, -3, 5, 6],
        "below": [2, 18, 5, 6],
        "rounding": [24.5, 2, 6, 5],  # half a pixel over: clipped, but nothing to report
        "zero width": [3, 3, 0, 5],
        "zero height": [3, 3, 5, 0],
        "thin": [3, 3, 0.99, 5],
        "outside": [40, 3, 5, 5],
        "sliver": [29.5, 3, 5, 5],
    }
    folder = coco_folder(SIZES[:1], [box_of(10, box, area=1) for box in boxes.values()])
    table = folder.load()
    assert table.objects(0, with_masks=False).boxes.tolist() == [
        [1, 1, 6, 6], [0, 2, 6, 7], [25, 2, 30, 7], [2, 0, 7, 3], [2, 18, 7, 20], [24.5, 2, 30, 7],
    ]  # fmt: skip
    assert table.usable().tolist() == 6 * [True] + 5 * [False]
    assert table.targets_per_image().tolist() == [6]
    assert [a["bbox"] for a in table.coco()["annotations"]] == list(boxes.values())
    counts = {
        word: count for text, count in table.repairs.items() for word in ("under 1 pixel", "clipped") if word in text
    }
    assert counts == {"under 1 pixel": 5, "clipped": 6}  # left, right, above, below, outside, sliver


def test_no_repairs_where_nothing_is_wrong(folder: CocoFolder) -> None:
    assert folder.load().repairs == {}


@pytest.mark.parametrize("area", [None, float("nan"), "12", [4]])
def test_area_missing(folder: CocoFolder, area: Any) -> None:
    for annotation in folder.content["annotations"][:2]:
        annotation["area"] = area
    del folder.content["annotations"][2]["area"]
    table = folder.load()
    assert dict(zip(table.annotation_ids.tolist(), table.areas.tolist(), strict=True)) == {
        100: 50, 101: 36, 102: 64, 103: 50,
    }  # fmt: skip
    assert [count for text, count in table.repairs.items() if "area" in text] == [3]


def test_crowd_and_iscrowd_missing(folder: CocoFolder) -> None:
    folder.content["annotations"][0]["iscrowd"] = None
    table = folder.load()  # annotation 103 has none
    assert dict(zip(table.annotation_ids.tolist(), table.crowd.tolist(), strict=True)) == {
        100: False, 101: True, 102: False, 103: False,
    }  # fmt: skip
    assert table.targets_per_image().tolist() == [1, 0, 2]  # a crowd is no target
    assert table.objects(0, with_masks=False).crowd.tolist() == [True, False]  # but it is there


@pytest.mark.parametrize("value", [-1, None, 0, "30", 30.5])
def test_size_read_from_the_image(folder: CocoFolder, value: Any) -> None:
    folder.content["images"][0]["width"] = value
    del folder.content["images"][1]["height"], folder.content["images"][1]["width"]
    assert folder.load().sizes.tolist() == [list(size) for size in SIZES]


def test_size_read_from_the_image_is_the_upright_one(folder: CocoFolder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(folder.paths.images / "0.png", exif=exif)
    folder.content["images"][0]["width"] = -1
    assert folder.load().sizes[0].tolist() == [30, 20]


def test_annotation_ids_are_optional(folder: CocoFolder) -> None:
    for annotation in folder.content["annotations"]:
        del annotation["id"]
    assert len(folder.load().coco()["annotations"]) == 4


def test_file_names_in_other_scripts_and_subfolders(folder: CocoFolder) -> None:
    target = folder.paths.images / "été" / "图 1.png"
    target.parent.mkdir()
    (folder.paths.images / "1.png").rename(target)
    folder.content["images"][1]["file_name"] = "été/图 1.png"
    assert folder.load().path(1) == target


def assert_what_json_says(table: AnnotationTable, content: dict[str, Any]) -> None:
    """The table's every value beside those of the whole file at once."""
    classes = sorted(content["categories"], key=lambda category: category["id"])
    assert table.category_ids == tuple(category["id"] for category in classes)
    assert table.class_names == tuple(category["name"] for category in classes)
    assert table.image_ids.tolist() == [image["id"] for image in content["images"]]
    assert table.sizes.tolist() == [[image["height"], image["width"]] for image in content["images"]]
    names = [str(table.path(row).relative_to(table.folder)) for row in range(len(table))]
    assert names == [image["file_name"] for image in content["images"]]
    rows = {image["id"]: row for row, image in enumerate(content["images"])}
    records = sorted(content["annotations"], key=lambda record: rows[record["image_id"]])
    assert table.annotation_ids.tolist() == [record["id"] for record in records]
    assert table.boxes.tolist() == [record["bbox"] for record in records]
    assert [table.category_ids[label] for label in table.labels] == [record["category_id"] for record in records]
    box_areas = [record["bbox"][2] * record["bbox"][3] for record in records]
    assert table.areas.tolist() == [record.get("area", area) for record, area in zip(records, box_areas, strict=True)]
    assert table.crowd.tolist() == [bool(record.get("iscrowd", 0)) for record in records]
    of_each = table.starts[[[rows[record["image_id"]], rows[record["image_id"]] + 1] for record in records]]
    assert all(start <= row < stop for row, (start, stop) in enumerate(of_each.reshape(-1, 2)))
    outlines = outlines_of(table)
    for record in records:
        outline = record.get("segmentation") or []
        if isinstance(outline, dict):
            packed = outline
            if isinstance(outline["counts"], list):
                packed = coco_mask.frPyObjects(outline, *outline["size"])
            np.testing.assert_array_equal(outlines[record["id"]], coco_mask.decode(packed))
        else:
            assert outlines[record["id"]] == outline


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets do not lie beside the project")
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", ["cbc", "coco_permissive", "rice_leaf"])
def test_real_data_in_small_pieces(name: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = find_coco(REAL / name)[split]
    content = json.loads(paths.annotations.read_bytes())
    assert_what_json_says(load_split(paths), content)
    monkeypatch.setattr(json_stream, "CHUNK", 7)
    monkeypatch.setattr(json_stream, "BLOCK", 1000)
    assert_what_json_says(load_split(paths), content)


def test_several_chunks(coco_folder: MakeCocoFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of outline on both sides of a chunk's end."""
    kinds = [SQUARE, TWO_PARTS, run_lengths(some_mask(20, 20)), [], None, {"size": [20, 20], "counts": [30, 20, 350]}]
    boxes = np.random.default_rng(0).uniform((1, 1, 9, 9), (3, 3, 12, 12), (50, 4)).tolist()
    annotations = [
        box_of(10 * (13 * row % 9) + 10, box, segmentation=kinds[row * 5 % 6], iscrowd=row % 2, area=box[2])
        for row, box in enumerate(boxes)
    ]
    folder = coco_folder([(20, 20)] * 9, annotations)
    for chunk in (1, 2, 3, 49, 50, 51):
        monkeypatch.setattr(json_stream, "CHUNK", chunk)
        assert_what_json_says(folder.load(), folder.content)


def test_keys_in_any_order(folder: CocoFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 2)
    content = {**folder.content, "info": {"images": [3]}, "licenses": [[], 1, None], "type": "instances"}
    for order in itertools.permutations(content):
        folder.content = {key: content[key] for key in order}
        assert folder.load().annotation_ids.tolist() == [101, 103, 100, 102]


def test_duplicate_keys_the_last_wins(folder: CocoFolder) -> None:
    paths = folder.write()
    text = paths.annotations.read_text()
    other = {**folder.content["annotations"][0], "id": 7}
    paths.annotations.write_text(f'{text[:-1]}, "annotations": [{json.dumps(other)}]}}')
    assert load_split(paths).annotation_ids.tolist() == [7]
    paths.annotations.write_text(f'{text[:-1]}, "annotations": []}}')
    assert load_split(paths).annotation_ids.tolist() == []
    paths.annotations.write_text(f'{text[:-1]}, "images": null}}')
    with pytest.raises(InputError, match="needs the key 'images' with a list"):
        load_split(paths)


def test_records_are_named_by_their_place_in_the_file(folder: CocoFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in their chunk."""
    monkeypatch.setattr(json_stream, "CHUNK", 2)
    for annotation in folder.content["annotations"]:
        del annotation["id"]
    assert folder.load().annotation_ids.tolist() == [1, 3, 0, 2]
    folder.content["annotations"][3]["bbox"] = None
    assert "annotation 3 has bbox None" in refused(folder)
    folder.content["annotations"][3]["category_id"] = "2"
    assert "annotations[3] has category_id '2'" in refused(folder)
    del folder.content["annotations"][3]["bbox"]
    assert "annotations[3] lacks 'bbox'" in refused(folder)


def test_file_names_that_are_not_utf8(folder: CocoFolder) -> None:
    """Bytes of a file system that are not UTF-8, as Python writes them into JSON."""
    name = os.fsdecode(b"\xff1.png")
    try:
        (folder.paths.images / "1.png").rename(folder.paths.images / name)
    except OSError:
        pytest.skip("this file system has no such names")
    folder.content["images"][1]["file_name"] = name
    assert folder.load().path(1) == folder.paths.images / name
    folder.content["images"][1]["file_name"] = "\ud800.png"  # half a character: no file can have this name
    assert "1 of 3 images are missing" in refused(folder)


# Outlines


@pytest.fixture
def outlined(coco_folder: MakeCocoFolder) -> tuple[AnnotationTable, dict[int, Any]]:
    """A table, and by annotation id the outlines as they should come back: polygons, or a mask."""
    masks = {image_id: some_mask(*size) for image_id, size in zip((10, 20, 30), SIZES, strict=True)}
    counted = {"size": [40, 25], "counts": []}
    flat = masks[20].ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counted["counts"] = np.diff([0, *changes, len(flat)]).tolist()
    assert flat[0] == 0  # counts begin with zeros
    box = [1, 1, 10, 10]
    outlines = [  # annotation 100, 101, ...
        (30, TWO_PARTS, 0),
        (10, SQUARE, 0),
        (20, counted, 1),
        (10, run_lengths(masks[10]), 0),
        (30, None, 0),
        (20, run_lengths(some_mask(40, 25, first=1)), 1),
        (30, SQUARE, 0),
        (30, run_lengths(masks[30]), 1),
    ]
    annotations = [box_of(i, box, segmentation=s, iscrowd=c) for i, s, c in outlines]
    del annotations[4]["segmentation"]
    expected = {100: TWO_PARTS, 101: SQUARE, 102: masks[20], 103: masks[10], 104: [], 106: SQUARE, 107: masks[30]}
    expected[105] = some_mask(40, 25, first=1)
    return coco_folder(SIZES, annotations).load(), expected


def outlines_of(table: AnnotationTable) -> dict[int, Any]:
    """What `coco` returns, by annotation id, run lengths decoded."""
    found = [a["segmentation"] for a in table.coco(with_masks=True)["annotations"]]
    decoded = [coco_mask.decode(s) if isinstance(s, dict) else s for s in found]
    return dict(zip(table.annotation_ids.tolist(), decoded, strict=True))


def assert_same_outlines(found: dict[int, Any], expected: dict[int, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, outline in expected.items():
        assert type(found[key]) is type(outline), key
        if isinstance(outline, list):
            assert found[key] == outline, key
        else:
            np.testing.assert_array_equal(found[key], outline, str(key))


def test_outlines_come_back(outlined: tuple[AnnotationTable, dict[int, Any]]) -> None:
    table, expected = outlined
    assert_same_outlines(outlines_of(table), expected)
    present = dict(zip(table.annotation_ids.tolist(), table.segmentations.present().tolist(), strict=True))
    assert [key for key, there in present.items() if not there] == [104]


def test_objects_carry_their_outlines(outlined: tuple[AnnotationTable, dict[int, Any]]) -> None:
    objects = outlined[0].objects(2, with_masks=True)  # annotations 100, 104, 106, 107
    assert objects.segmentations is not None and len(objects.segmentations) == len(objects) == 4
    assert [polygon.ravel().tolist() for polygon in objects.segmentations[0]] == TWO_PARTS
    assert objects.segmentations[1] == []
    np.testing.assert_array_equal(coco_mask.decode(objects.segmentations[3]), some_mask(16, 16))
    assert outlined[0].objects(2, with_masks=False).segmentations is None


def test_without_empty_images_keeps_the_right_outlines(coco_folder: MakeCocoFolder) -> None:
    box, mask = [1, 1, 10, 10], some_mask(20, 20)
    annotations = [
        box_of(20, box, segmentation=run_lengths(mask), iscrowd=1),  # only a crowd: nothing to learn
        box_of(30, box, segmentation=TWO_PARTS),
        box_of(30, box, segmentation=run_lengths(mask)),
        box_of(40, [1, 1, 0, 9], segmentation=SQUARE),  # only a box that is dropped
        box_of(50, box),
        box_of(60, box, segmentation=SQUARE, category_id=2),
        box_of(60, [2, 2, 5, 5], segmentation=run_lengths(some_mask(20, 20, first=1)), iscrowd=1),
    ]
    whole = coco_folder([(20, 20)] * 7, annotations).load()
    table = whole.without_empty_images()
    assert table.image_ids.tolist() == [30, 50, 60]
    assert [table.path(row).name for row in range(3)] == ["2.png", "4.png", "5.png"]
    assert table.annotation_ids.tolist() == [101, 102, 104, 105, 106]
    before = outlines_of(whole)
    assert_same_outlines(outlines_of(table), {key: before[key] for key in table.annotation_ids.tolist()})
    for row, old in enumerate((2, 4, 5)):
        mine, theirs = table.objects(row, with_masks=False), whole.objects(old, with_masks=False)
        for name in ("boxes", "labels", "areas", "crowd"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    kept = [a for a in whole.coco()["annotations"] if a["image_id"] in (30, 50, 60)]
    assert [a | {"id": 0} for a in table.coco()["annotations"]] == [a | {"id": 0} for a in kept]
    assert whole.image_ids.tolist() == [10, 20, 30, 40, 50, 60, 70]  # left as it was


def test_require_masks(coco_folder: MakeCocoFolder) -> None:
    box = [1, 1, 10, 10]
    annotations = [
        box_of(10, box, segmentation=SQUARE),
        box_of(10, box, iscrowd=1),  # neither a crowd
        box_of(10, [3, 3, 0, 0]),  # nor what is not learnt needs one
    ]
    folder = coco_folder(SIZES, annotations)
    folder.load().require_masks()
    folder.content["annotations"][0]["segmentation"] = [[1, 1, 2, 2]]  # two corners are no polygon
    with pytest.raises(InputError) as error:
        folder.load().require_masks()
    for word in (
        str(folder.paths.annotations),
        "1 object(s) without",
        "first object 1 of ",
        "(id 100)",
        "segmentation",
        "faster_rcnn",
    ):
        assert word in str(error.value)


# What is refused

Content = dict[str, Any]


def put(key: str, row: int, field: str, value: Any) -> Callable[[Content], None]:
    """Change one field of one record."""
    return lambda content: content[key][row].__setitem__(field, value)


def cut(key: str, row: int, field: str) -> Callable[[Content], None]:
    """Take one field from one record."""
    return lambda content: content[key][row].pop(field)


BAD = {
    "no images": (lambda c: c.pop("images"), ["'images'", "list"]),
    "no annotations": (lambda c: c.pop("annotations"), ["'annotations'", "list"]),
    "categories no list": (lambda c: c.update(categories={"2": "two"}), ["'categories'", "list"]),
    "categories empty": (lambda c: c["categories"].clear(), ["'categories'", "empty", "list the classes"]),
    "images empty": (lambda c: c["images"].clear(), ["'images'", "empty"]),
    "record no object": (lambda c: c["annotations"].append(None), ["annotations[4]", "'image_id'"]),
    "no file name": (cut("images", 1, "file_name"), ["images[1]", "id 20", "lacks 'file_name'"]),
    "no image id": (cut("images", 1, "id"), ["images[1]", "lacks 'id'"]),
    "no box": (cut("annotations", 2, "bbox"), ["annotations[2]", "id 102", "lacks 'bbox'"]),
    "no category": (cut("annotations", 2, "category_id"), ["annotations[2]", "id 102", "lacks 'category_id'"]),
    "no class name": (cut("categories", 0, "name"), ["categories[0]", "id 7", "lacks 'name'"]),
    "image id twice": (put("images", 1, "id", 10), ["images[].id 10", "twice", "unique"]),
    "category id twice": (put("categories", 1, "id", 7), ["categories[].id 7", "twice", "unique"]),
    "image id text": (put("images", 1, "id", "20"), ["images[1]", "id '20'", "whole number"]),
    "image id huge": (put("images", 1, "id", 2**64), ["images[1]", "whole number"]),
    "category id text": (put("categories", 1, "id", "2"), ["categories[1]", "id '2'", "whole number"]),
    "category id null": (put("categories", 1, "id", None), ["categories[1]", "id None", "whole number"]),
    "names image by text": (
        put("annotations", 2, "image_id", "30"),
        ["annotations[2]", "id 102", "image_id '30'", "whole number"],
    ),
    "names category by float": (
        put("annotations", 2, "category_id", 2.0),
        ["annotations[2]", "id 102", "category_id 2.0", "whole number"],
    ),
    "unknown image": (put("annotations", 2, "image_id", 40), ["annotation 102", "image_id 40", "'images'"]),
    "image below all": (put("annotations", 2, "image_id", -1), ["annotation 102", "image_id -1", "'images'"]),
    "unknown category": (put("annotations", 2, "category_id", 3), ["annotation 102", "category_id 3", "'categories'"]),
    "annotation id text": (put("annotations", 2, "id", "x"), ["annotations[2]", "id 'x'", "whole number"]),
    "crowd text": (put("annotations", 2, "iscrowd", "0"), ["annotation 102", "iscrowd '0'", "0 or 1"]),
}
BOXES = {
    "nan": [1, 1, float("nan"), 5],
    "infinite": [float("-inf"), 1, 5, 5],
    "beyond float": [10**400, 1, 5, 5],
    "negative width": [1, 1, -5, 5],
    "negative height": [1, 1, 5, -0.1],
    "short": [1, 1, 5],
    "long": [1, 1, 5, 5, 5],
    "text": ["1", 1, 5, 5],
    "null": None,
    "corners by name": {"x": 1, "y": 1, "width": 5, "height": 5},
}
SEGMENTATIONS = {
    "polygon not in a list": [1, 1, 5, 1, 5, 5],
    "odd polygon": [[1, 1, 5, 1, 5, 5, 9]],
    "polygon nan": [[1, 1, 5, 1, 5, float("nan")]],
    "polygon text": [["a", "b", "c", "d", "e", "f"]],
    "polygon digits": ["123456"],
    "polygon null": [[1, 1, 5, 1, 5, None]],
    "polygon of points": [[[1, 1], [5, 1], [5, 5], [4, 4], [3, 3], [2, 2]]],
    "number": 5,
    "size not positive": {"size": [-40, -25], "counts": [1000]},
    "size of three": {"size": [40, 25, 1], "counts": [1000]},
    "run lengths transposed": {"size": [25, 40], "counts": [0, 1000]},
    "run lengths without size": {"counts": [1000]},
    "run lengths without counts": {"size": [40, 25]},
    "counts null": {"size": [40, 25], "counts": None},
    "counts too short": {"size": [40, 25], "counts": [100, 5]},
    "counts too long": {"size": [40, 25], "counts": [100, 901]},
    "counts negative": {"size": [40, 25], "counts": [-1, 1001]},
    "compressed of another size": run_lengths(some_mask(25, 40)),
}


def refused(folder: CocoFolder) -> str:
    with pytest.raises(InputError) as error:
        folder.load()
    message = str(error.value)
    assert str(folder.paths.annotations) in message and "\n" not in message
    return message


@pytest.mark.parametrize("case", BAD)
def test_bad_field(folder: CocoFolder, case: str) -> None:
    change, words = BAD[case]
    change(folder.content)
    message = refused(folder)
    for word in words:
        assert word in message


@pytest.mark.parametrize("case", BOXES)
def test_bad_box(folder: CocoFolder, case: str) -> None:
    folder.content["annotations"][2]["bbox"] = BOXES[case]
    message = refused(folder)
    for word in ("annotation 102", "bbox", "expected [x, y, width, height] in pixels"):
        assert word in message


@pytest.mark.parametrize("case", SEGMENTATIONS)
def test_bad_segmentation(folder: CocoFolder, case: str) -> None:
    folder.content["annotations"].append(
        {"id": 55, "category_id": 2, **box_of(20, [1, 1, 5, 5], segmentation=SEGMENTATIONS[case])}
    )
    message = refused(folder)
    for word in ("annotation 55", "'segmentation'", "[[x1, y1, x2, y2, ...], ...]"):
        assert word in message


BESIDE = run_lengths(some_mask(40, 25))  # columns 5 to 11, rows 3 to 8
OFF_THE_BOX = {  # box in an image 25 wide and 40 high, outline, the reason
    "in shares": ([5, 10, 10, 20], [[0.2, 0.2, 0.6, 0.2, 0.6, 0.7]], "looks like shares"),
    "in shares, the box at the corner": ([0, 0, 25, 40], [[0, 0, 1, 0, 1, 1, 0, 1]], "looks like shares"),
    "to the left": ([14, 10, 10, 20], SQUARE, "outside of its bbox"),
    "below": ([2, 3, 10, 5], [[2, 20, 9, 20, 9, 30]], "outside of its bbox"),
    "below, of two parts": ([2, 30, 10, 9], TWO_PARTS, "outside of its bbox"),
    "in the part of the box that is cut off": ([20, 5, 30, 5], [[30, 5, 50, 5, 50, 10]], "or of its image"),
    "run lengths": ([14, 10, 10, 20], BESIDE, "outside of its bbox"),
}


@pytest.mark.parametrize("case", OFF_THE_BOX)
def test_outlines_off_their_box(folder: CocoFolder, case: str) -> None:
    """Their masks would be empty."""
    box, outline, reason = OFF_THE_BOX[case]
    folder.content["annotations"].append({"id": 55, "category_id": 2, **box_of(20, box, segmentation=outline)})
    message = refused(folder)
    assert "annotation 55 has a 'segmentation'" in message and reason in message


@pytest.mark.parametrize(
    ("box", "outline"),
    [
        ([13.4, 3, 5, 5], SQUARE),  # less than a pixel beside it
        ([0, 0, 2, 2], [[0, 0, 1, 0, 1, 1, 0, 1]]),
        ([12.5, 3, 0.5, 5], TWO_PARTS),
        ([24.5, 10, 5, 5], SQUARE),  # half a pixel of the box is left in the image: it is not trained on
        ([1, 1, 20, 30], {"size": [40, 25], "counts": [1000]}),
        ([11, 8, 10, 20], BESIDE),
    ],
)
def test_outlines_that_fit_their_box(folder: CocoFolder, box: list[float], outline: Any) -> None:
    folder.content["annotations"].append({"id": 55, "category_id": 2, **box_of(20, box, segmentation=outline)})
    assert len(folder.load().boxes) == 5


def test_listed_images_are_absent(folder: CocoFolder) -> None:
    (folder.paths.images / "1.png").unlink()
    (folder.paths.images / "2.png").unlink()
    message = refused(folder)
    for word in (str(folder.paths.images / "1.png"), "2 of 3", "check the image folder"):
        assert word in message


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("./0.png", "0.png", "./0.png and 0.png are the same file"),
        ("sub/0.png", "sub//./0.png", "sub/0.png and sub//./0.png are the same file"),
        ("SUB/0.png", "sub/%30.png", "'SUB/0.png' and 'sub/%30.png', which both mean 'sub/0.png'"),
        ("./SUB/0.png", "SUB/0.PNG", "'./SUB/0.png' and 'SUB/0.PNG', which both mean 'sub/0.png'"),
    ],
)
def test_two_names_of_one_file(folder: CocoFolder, first: str, second: str, words: str) -> None:
    """Each would teach that there is nothing but its own objects."""
    (folder.paths.images / "sub").mkdir()
    shutil.copy(folder.paths.images / "0.png", folder.paths.images / "sub")
    for record, name in zip(folder.content["images"], (first, second), strict=False):
        record["file_name"] = name
    assert words in refused(folder)
    problems = Problems(collects=True)
    table = load_split(folder.paths, problems=problems)
    assert problems.counts(ERROR).popitem()[1] == 1 and len(table) == 2


def test_names_with_superfluous_parts(folder: CocoFolder) -> None:
    folder.content["images"][0]["file_name"] = ".//0.png"
    assert folder.load().read_image(0).shape[:2] == SIZES[0]


def test_no_size_and_an_unreadable_image(folder: CocoFolder) -> None:
    folder.content["images"][1]["width"] = -1
    (folder.paths.images / "1.png").write_bytes(b"")
    message = refused(folder)
    for word in (str(folder.paths.images / "1.png"), "image 20", "width and height"):
        assert word in message


@pytest.mark.parametrize("text", [b"", b'{"images": [', b"\xff\xfe\x00", b"[1, 2]", b"null", b"[" * 100_000])
def test_no_coco_file(folder: CocoFolder, text: bytes) -> None:
    folder.write().annotations.write_bytes(text)
    with pytest.raises(InputError) as error:
        load_split(folder.paths)
    assert str(folder.paths.annotations) in str(error.value)
    assert "JSON" in str(error.value) or "expected an object with 'images'" in str(error.value)


def test_byte_order_mark(folder: CocoFolder) -> None:
    folder.write().annotations.write_bytes(b"\xef\xbb\xbf" + json.dumps(folder.content).encode())
    assert len(load_split(folder.paths)) == 3


def test_missing_paths(folder: CocoFolder, tmp_path: Path) -> None:
    paths = folder.write()
    with pytest.raises(InputError, match=r"absent\.json: no such annotation file"):
        load_split(CocoSplit(paths.images, tmp_path / "absent.json"))
    with pytest.raises(InputError, match="absent: no such image folder") as error:
        load_split(CocoSplit(tmp_path / "absent", paths.annotations))
    assert str(paths.annotations) in str(error.value)  # whose images they are


@pytest.mark.parametrize(
    "change", [put("categories", 0, "id", 8), put("categories", 0, "name", "eight"), lambda c: c["categories"].pop(0)]
)
def test_splits_must_list_the_same_categories(
    folder: CocoFolder, coco_folder: MakeCocoFolder, change: Callable[[Content], None]
) -> None:
    folder.write()
    val = coco_folder(SIZES, name="val")
    val.content["categories"].reverse()  # another order is no difference
    assert len(load_tables(explicit(folder.paths, val.write()))) == 2
    val.content["categories"].reverse()
    change(val.content)
    with pytest.raises(InputError) as error:
        load_tables(explicit(folder.paths, val.write()))
    for word in (str(val.paths.annotations), str(folder.paths.annotations), "categories", "the same"):
        assert word in str(error.value)


@pytest.mark.parametrize("stated", [True, False])
def test_names_that_no_file_can_have(folder: CocoFolder, stated: bool) -> None:
    """Too long ones, with the separators of another system too; whether their sizes are to be read or not."""
    for name in ("x" * 300, "x" * 300 + "\\y", "a\0b"):
        folder.content["images"][1] |= {"file_name": name, "width": 25 if stated else None}
        message = refused(folder)
        assert ("must lie in the image folder" if "\0" in name else "1 of 3 images are missing") in message


def test_no_image_is_left(folder: CocoFolder) -> None:
    """Who collects problems gets one for each image, and no table."""
    for row in range(3):
        (folder.paths.images / f"{row}.png").unlink()
    problems = Problems(collects=True)
    with pytest.raises(DataError, match="none of its images can be read"):
        load_split(folder.write(), problems=problems)
    assert [problem.kind for problem in problems.listed] == ["missing image"] * 3


def test_messages_are_one_line(folder: CocoFolder) -> None:
    folder.content["images"][1]["id"] = "2\n\x1b[0m0"
    assert "\x1b" not in refused(folder)


def test_categories_of_a_hub_set_that_are_lists(tmp_path: Path) -> None:
    """In objects one by one; where they are lists beside each other, a list of categories is right."""
    objects = {
        "one": [[{"bbox": [1, 2, 9, 9], "category": [0]}]],
        "beside": [{"bbox": [[1, 2, 9, 9]], "category": [0]}],
    }
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    for name, column in objects.items():
        rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "image.png")], "objects": column})
        rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / name)
    with pytest.raises(InputError, match=r"'objects\.category' is of the type List"):
        load_tables(DataOptions(data=tmp_path / "one"))
    assert load_tables(DataOptions(data=tmp_path / "beside"))["train"].labels.tolist() == [0]


@pytest.mark.parametrize("name", ["\ud800", "a\0", " ", None, True, ["cat"]])
def test_class_names_that_cannot_be_written(folder: CocoFolder, name: Any) -> None:
    folder.content["categories"][1]["name"] = name
    assert f"categories[1] (id 2) has name {name!r}; it must be text" in refused(folder)
