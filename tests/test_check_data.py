"""The check before training: duplicates, what decoding finds, the report and its exit status."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import small_runs as runs
from conftest import CocoFolder, MakeCocoFolder
from PIL import Image

from direct_pt.data.formats.coco import find_coco
from direct_pt.data.sources import load_split
from direct_pt.errors import InputError
from direct_pt.reports.duplicates import (
    MAX_BITS,
    Fingerprints,
    Pair,
    pairs_between,
    pairs_within,
    perceptual_hash,
    pixel_digest,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ORIENTATION_TAG = 0x0112
KEYS = {"data", "splits", "counts", "problems", "duplicates", "anchors", "schedules", "advice", "pictures"}


def picture(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Rectangles of many sizes and colours, as a picture has details of many sizes: [height, width, 3] uint8."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), rng.integers(256, size=3), np.uint8)
    for _ in range(60):
        (x, y), (w, h) = rng.integers((width, height)).tolist(), rng.integers(4, 60, 2).tolist()
        image[y : y + h, x : x + w] = rng.integers(256, size=3)
    return image


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def alike(image: np.ndarray) -> dict[str, np.ndarray]:
    """Copies as people make them."""
    half = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return {
        "re-encoded": as_jpeg(image, 60),
        "re-encoded and smaller": as_jpeg(half, 80),
        "squeezed": cv2.resize(image, (96, 96), interpolation=cv2.INTER_AREA),
        "brighter": cv2.convertScaleAbs(image, beta=30),
        "darker": cv2.convertScaleAbs(image, alpha=0.6),
        "grey": np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None], 3, axis=2),
    }


def prints(images: Sequence[np.ndarray]) -> Fingerprints:
    return Fingerprints.gather([(row, pixel_digest(one), perceptual_hash(one)) for row, one in enumerate(images)])


def bits(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.unpackbits(perceptual_hash(first) ^ perceptual_hash(second)).sum())


def test_copies_look_alike_and_others_do_not() -> None:
    originals = [picture(seed) for seed in range(20)]
    for image in originals:
        far = {name: bits(image, copy) for name, copy in alike(image).items() if bits(image, copy) > MAX_BITS}
        assert not far
    noise = [np.random.default_rng(seed).integers(256, size=(64, 64, 3), dtype=np.uint8) for seed in range(20)]
    assert pairs_within(prints([*originals, *noise])) == []
    assert pairs_between(prints(originals), prints(noise)) == []


def test_pairs_within() -> None:
    """Of the same pixels the first one is named; of the alike ones the most alike."""
    first, second, third = (picture(seed) for seed in range(3))
    near = as_jpeg(second, 50)
    found = pairs_within(prints([first, second, first, near, third, first]))
    assert found == [Pair(0, 2, None), Pair(0, 5, None), Pair(1, 3, bits(second, near))]
    assert pairs_within(prints([first])) == pairs_within(prints([])) == []
    assert pairs_within(prints([first, first])) == [Pair(0, 1, None)]


def test_pairs_between() -> None:
    first, second, third = (picture(seed) for seed in range(3))
    near = as_jpeg(second, 50)
    found = pairs_between(prints([third, second, first]), prints([near, first, picture(9)]))
    assert found == [Pair(2, 1, None), Pair(1, 0, bits(second, near))]
    assert pairs_between(prints([]), prints([first])) == pairs_between(prints([first]), prints([])) == []


def test_other_compression_or_size_are_the_same_pixels_or_not(tmp_path: Path) -> None:
    """The digest is of the pixels: a lossless copy has the same, a reshaped array has not."""
    image = picture(0)
    Image.fromarray(image).save(tmp_path / "a.png", compress_level=1)
    Image.fromarray(image).save(tmp_path / "a.bmp")
    copies = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "a.bmp")]
    assert {pixel_digest(one) for one in copies} == {pixel_digest(image)}
    assert pixel_digest(image.reshape(160, 120, 3)) != pixel_digest(image)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets do not lie beside the project")
@pytest.mark.parametrize(("name", "split"), [("coco_permissive", "train"), ("rice_leaf", "val"), ("cbc", "val")])
def test_photographs(name: str, split: str) -> None:
    table = load_split(find_coco(DATA / name)[split])
    images = [table.read_image(row) for row in range(len(table))]
    assert pairs_within(prints(images)) == []
    copies = [copy for image in images[:20] for copy in alike(image).values()]
    found = pairs_between(prints(images), prints(copies))
    assert {(pair.second, pair.first) for pair in found} == {(row, row // 6) for row in range(len(copies))}


def check(train: CocoFolder, val: CocoFolder, *flags: object) -> dict[str, Any]:
    """The report on a set of two splits; what the script raises comes through."""
    output = train.paths.images.parent / "report"
    try:
        runs.call_script("check_data", *flags_of(train, val), "--output-dir", output, "--num-workers", 0, *flags)
    finally:
        report = runs.read_json(output / "report.json")
    assert set(report) == KEYS
    return report


def flags_of(train: CocoFolder, val: CocoFolder) -> list[object]:
    flags: list[object] = []
    for split, folder in (("train", train), ("val", val)):
        paths = folder.write()
        flags += [f"--{split}-images", paths.images, f"--{split}-annotations", paths.annotations]
    return flags


@pytest.fixture
def splits(coco_folder: MakeCocoFolder) -> tuple[CocoFolder, CocoFolder]:
    """Two sound splits of noise: three images with four objects of both classes, and one image with fifty."""
    boxes = [{"image_id": 10, "bbox": [4, 4, 40, 40]}, {"image_id": 20, "bbox": [0, 0, 30, 30], "category_id": 2}]
    boxes += [{"image_id": 20, "bbox": [9, 9, 50, 50], "segmentation": [[9, 9, 59, 9, 59, 59, 9, 59]]}]
    boxes += [{"image_id": 10, "bbox": [0, 0, 64, 64], "iscrowd": 1}]
    for box in boxes:
        box["area"] = 1.0
    many = [{"image_id": 10, "bbox": [n, n, 9, 9], "area": 1, "category_id": 2 + 5 * (n % 2)} for n in range(50)]
    return coco_folder([(64, 64)] * 3, boxes, name="a"), coco_folder([(60, 80)], many, name="b")


def kinds(report: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for problem in report["problems"]:
        found[problem["kind"]] = found.get(problem["kind"], 0) + 1
    return found


def test_a_sound_set(splits: tuple[CocoFolder, CocoFolder], capsys: pytest.CaptureFixture[str]) -> None:
    train, val = splits
    report = check(train, val)
    assert report["counts"] == {"error": 0, "repaired": 0, "note": 0} and report["problems"] == []
    assert report["duplicates"] == []
    figures = {split: (of["images"], of["objects"], of["crowd_regions"]) for split, of in report["splits"].items()}
    assert figures == {"train": (3, 3, 1), "val": (1, 50, 0)}
    assert set(report["anchors"]) == {"448x448", "1333x800"}
    assert report["anchors"]["448x448"]["RPN"]["all"]["objects"] == 3
    pretrain = report["schedules"]["pretrain"]
    assert (pretrain["recipe"], pretrain["steps"], pretrain["images_per_step"]) == ("small", 4000, 8)
    assert pretrain["notes"][0] == "48 epochs of 3 images are 18 steps: raised to 4000 steps"
    folder = train.paths.images.parent / "report"
    names = ["object_sizes.png", "image_sizes.png", "classes.png", "samples_train.jpg", "samples_val.jpg"]
    assert report["pictures"] == names
    for name in names:
        with Image.open(folder / name) as drawn:
            assert min(drawn.size) > 200 and len(np.unique(np.asarray(drawn.convert("L")))) > 20
    output = capsys.readouterr().out
    assert "train: 3 images (1 without objects), 3 objects (1 with an outline), 1 crowd regions" in output
    assert "errors: none" in output and f"written to {folder}: report.json" in output


def test_samples_show_boxes_and_masks_where_they_are(splits: tuple[CocoFolder, CocoFolder]) -> None:
    """On black images, what is drawn is seen: the box's outline, and inside it the mask."""
    train, val = splits
    train.content["annotations"] = [
        {"id": 1, "image_id": 20, "category_id": 2, "bbox": [8, 16, 32, 32], "area": 1,
         "segmentation": [[8, 16, 40, 16, 40, 48, 8, 48]]}
    ]  # fmt: skip
    for row in range(3):
        Image.new("RGB", (64, 64)).save(train.paths.images / f"{row}.png")
    check(train, val)
    with Image.open(train.paths.images.parent / "report" / "samples_train.jpg") as sheet:
        assert sheet.width == 3 * 400 + 2 * 8
        first = np.asarray(sheet.convert("L")).astype(int)[20:, :400]  # with objects first
    inside, outside = first[130:270, 80:220], first[320:, 260:]
    assert inside.min() > 20 and outside.max() < 10  # the mask's tint; nothing


def test_leaks_and_duplicates_are_noted(splits: tuple[CocoFolder, CocoFolder]) -> None:
    train, val = splits
    image = picture(0, 64, 64)
    for row in (0, 1):
        Image.fromarray(image).save(train.paths.images / f"{row}.png")
    Image.fromarray(picture(1, 64, 64)).save(train.paths.images / "2.png")
    val.content["images"] += [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64} for n in (5, 6)]
    Image.fromarray(image).save(val.paths.images / "5.png", compress_level=0)
    Image.fromarray(as_jpeg(picture(1, 64, 64), 70)).save(val.paths.images / "6.png")
    report = check(train, val)
    assert kinds(report) == {
        "duplicates in train": 1,
        "LEAKED images of train in val": 1,
        "near-duplicates in train and val": 1,
    }
    assert report["counts"] == {"error": 0, "repaired": 0, "note": 3}  # training is sound
    same, leak, near = report["duplicates"]
    assert [Path(name).name for name in same["images"] + leak["images"] + near["images"]] == [
        "0.png", "1.png", "0.png", "5.png", "2.png", "6.png"
    ]  # fmt: skip
    assert leak["splits"] == near["splits"] == ["train", "val"]
    assert leak["bits"] is None and 0 < near["bits"] <= MAX_BITS
    assert report["advice"][0].startswith("1 image(s) occur in two splits")


def test_what_the_files_hold(splits: tuple[CocoFolder, CocoFolder]) -> None:
    """Orientation with and without regard to it, transparency, more than 8 bits, CMYK: notes, by image."""
    train, val = splits
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    files: dict[str, tuple[Image.Image, dict[str, Any], tuple[int, int]]] = {
        "upright.jpg": (Image.fromarray(picture(1)), {"exif": exif}, (120, 160)),
        "stored.jpg": (Image.fromarray(picture(2)), {"exif": exif}, (160, 120)),
        "square.jpg": (Image.fromarray(picture(3, 90, 90)), {"exif": exif}, (90, 90)),
        "alpha.png": (Image.fromarray(picture(4)).convert("RGBA"), {}, (160, 120)),
        "wide.png": (Image.fromarray(picture(5)[:, :, 0].astype(np.uint16) * 257), {}, (160, 120)),
        "float.tif": (Image.fromarray(picture(6)[:, :, 0].astype(np.float32)), {}, (160, 120)),
        "cmyk.jpg": (Image.fromarray(picture(7)).convert("CMYK"), {}, (160, 120)),
    }
    for number, (name, (image, options, (width, height))) in enumerate(files.items()):
        image.save(val.paths.images / name, **options)
        val.content["images"].append({"id": number, "file_name": name, "width": width, "height": height})
    report = check(train, val)
    assert report["counts"]["error"] == 0
    notes = {Path(problem["file"]).name: problem["kind"] for problem in report["problems"]}
    assert notes == {
        "upright.jpg": "EXIF orientation applied",
        "stored.jpg": "EXIF orientation not applied",
        "square.jpg": "EXIF orientation, doubtful",
        "alpha.png": "transparency",
        "wide.png": "more than 8 bits",
        "float.tif": "more than 8 bits",
        "cmyk.jpg": "CMYK",
    }
    assert all(problem["grade"] == "note" and problem["split"] == "val" for problem in report["problems"])


def break_it(train: CocoFolder) -> None:
    """Errors of every kind that a set has: two annotations, a cut file, a wrong size, and one repaired box."""
    train.content["annotations"] += [
        {"id": 900, "image_id": 20, "category_id": 7, "bbox": [1, 2, -3, 4]},
        {"id": 901, "image_id": 20, "category_id": 99, "bbox": [1, 2, 3, 4]},
        {"id": 902, "image_id": 10, "category_id": 7, "bbox": [40, 40, 90, 9], "area": 1},
    ]
    cut = train.paths.images / "1.png"
    cut.write_bytes(cut.read_bytes()[:3000])
    train.content["images"][2]["width"] = 100


def test_errors_are_all_listed(splits: tuple[CocoFolder, CocoFolder]) -> None:
    train, val = splits
    break_it(train)
    with pytest.raises(InputError, match=r"^4 error\(s\) in the data, all in .*report.json; first: .*labels.json: "):
        check(train, val)
    report = runs.read_json(train.paths.images.parent / "report" / "report.json")
    assert report["counts"]["error"] == 4 and report["counts"]["repaired"] == 1
    errors = [problem for problem in report["problems"] if problem["grade"] == "error"]
    assert {problem["annotation"] for problem in errors} == {900, 901, None}
    labels, images = train.paths.annotations, train.paths.images
    assert {problem["file"] for problem in errors} == {str(labels), str(images / "1.png"), str(images / "2.png")}
    by_kind = {problem["kind"]: problem for problem in errors}
    assert "its annotation says 100x64" in by_kind["image size"]["message"]
    assert Path(by_kind["unreadable image"]["file"]).name == "1.png"
    repaired = [problem["annotation"] for problem in report["problems"] if problem["grade"] == "repaired"]
    assert repaired == [902]
    assert report["splits"]["train"]["objects"] == 4  # the sound ones still count


def test_exit_status_and_one_line(splits: tuple[CocoFolder, CocoFolder], tmp_path: Path) -> None:
    """As a user runs it, with worker processes: the last line of stderr is the error, and nothing is a traceback."""
    break_it(splits[0])
    flags = (*flags_of(*splits), "--output-dir", tmp_path / "out", "--num-workers", 2)
    process = runs.start_script("check_data", *flags)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 2 and "Traceback" not in err, err
    last = err.splitlines()[-1]
    assert last.startswith("error: 4 error(s) in the data") and "labels.json" in last
    assert "errors: 4" in out and "annotation 900" in out and "advice" in out


def test_what_nobody_can_train_on(coco_folder: MakeCocoFolder, tmp_path: Path) -> None:
    """check_data refuses the sets that training does, for the same reason."""
    crowd = coco_folder([(64, 64)], [{"image_id": 10, "bbox": [1, 1, 20, 20], "iscrowd": 1}], name="crowd")
    empty = coco_folder([(64, 64)], [], name="empty")
    for folder, reason in ((crowd, "all of them are crowd regions"), (empty, "annotate some")):
        paths = folder.write()
        flags = ("--train-images", paths.images, "--train-annotations", paths.annotations)
        with pytest.raises(InputError, match=f"no image has an object to learn.*{reason}"):
            runs.call_script("check_data", *flags, "--output-dir", tmp_path / "report", "--num-workers", 0)
        report = runs.read_json(tmp_path / "report/report.json")
        assert kinds(report)["nothing to learn"] == 1 and not any("--drop-empty" in line for line in report["advice"])


def test_nothing_left_to_look_at(splits: tuple[CocoFolder, CocoFolder]) -> None:
    """All images missing is an error of each, no crash."""
    for folder in splits:
        for path in folder.paths.images.glob("*.png"):
            path.unlink()
    with pytest.raises(InputError, match=r"^\d error\(s\) in the data"):
        check(*splits)
    report = runs.read_json(splits[0].paths.images.parent / "report" / "report.json")
    assert kinds(report)["missing image"] == 4 and report["splits"] == {} and report["pictures"] == []


def test_output_that_is_a_file(splits: tuple[CocoFolder, CocoFolder], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output-dir .*file: is a file"):
        runs.call_script("check_data", *flags_of(*splits), "--output-dir", tmp_path / "file", "--num-workers", 0)
