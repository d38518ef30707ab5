"""Label files and images whose names do not agree, folders that are no data, lists and splits of other names."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeCocoFolder
from label_trees import HEIGHT, WIDTH, save_image, write
from PIL import Image

from direct_pt.data.annotations import AnnotationTable, decode_name
from direct_pt.data.problems import ERROR, NOTE, REPAIRED, DataError, Problems
from direct_pt.data.sources import DataOptions, hold_out, load_tables
from direct_pt.errors import InputError

CENTRED = "0 .5 .5 .5 .5\n"
BOX = [WIDTH / 4, HEIGHT / 4, WIDTH / 2, HEIGHT / 2]


def load(folder: Path, split: str = "train", collect: bool = False) -> tuple[AnnotationTable, Problems]:
    """A split as training reads it, and its problems as check_data lists them."""
    options = DataOptions(data=folder, val_share=0)
    problems = {name: Problems(collects=True) for name in ("train", "val", "test")}
    collected = load_tables(options, [split], problems)
    tables = collected if collect else load_tables(options, [split])
    return tables[split], problems[split]


def images_and_objects(table: AnnotationTable) -> dict[str, int]:
    """How many objects each image has."""
    return dict(zip(map(decode_name, table.file_names.tolist()), np.diff(table.starts).tolist(), strict=True))


def kinds(problems: Problems, grade: str) -> dict[str, int]:
    return problems.counts(grade)


# YOLO: label files


def yolo(folder: Path, images: dict[str, str | None], prefix: str = "images/train/") -> Path:
    """A set with these images, below images/train; the values are their label files, below labels/train."""
    write(folder / "data.yaml", "names: [cat]\ntrain: images/train\n")
    for image, label in images.items():
        save_image(folder / "images/train" / image)
        if label is not None:
            write(folder / "labels/train" / label, CENTRED)
    return folder


NFC, NFD = (unicodedata.normalize(form, "décran é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("décran.jpg", "d%C3%A9cran.txt"),
        ("a.jpg", "a.jpg.txt"),
        ("a.jpg", "a.TXT"),
        ("Photo.jpg", "photo.txt"),
        ("photo.JPG", "PHOTO.txt"),
        (f"{NFC}.png", f"{NFD}.txt"),
        (f"{NFD}.png", f"{NFC}.txt"),
        ("a b.jpg", "a%20b.txt"),
    ],
)
def test_label_files_of_other_names(tmp_path: Path, image: str, label: str) -> None:
    """They are taken, and counted: an image that has a label file never becomes a negative."""
    table, problems = load(yolo(tmp_path, {image: label, "other.jpg": "other.txt"}))
    assert images_and_objects(table) == {f"images/train/{image}": 1, "images/train/other.jpg": 1}
    assert kinds(problems, REPAIRED) == {"label files of other names taken": 1} == table.repairs
    assert not kinds(problems, NOTE)


def test_the_exact_name_wins(tmp_path: Path) -> None:
    """Two images whose names mean the same do not share a label file."""
    folder = yolo(tmp_path, {"a.jpg": "a.txt", "A.jpg": None})
    assert images_and_objects(load(folder)[0]) == {"images/train/A.jpg": 0, "images/train/a.jpg": 1}
    write(folder / "labels/train/A.txt", CENTRED + "0 .2 .2 .1 .1\n")
    assert images_and_objects(load(folder)[0]) == {"images/train/A.jpg": 2, "images/train/a.jpg": 1}


def test_labels_beside_the_images(tmp_path: Path) -> None:
    folder = yolo(tmp_path, {"a.jpg": None, "b.jpg": None})
    write(folder / "images/train/a.txt", CENTRED)
    table, problems = load(folder)
    assert images_and_objects(table) == {"images/train/a.jpg": 1, "images/train/b.jpg": 0}
    assert kinds(problems, REPAIRED) == {"label files of other names taken": 1}


def test_label_files_without_an_image(tmp_path: Path) -> None:
    """Each is listed; training says how many there are, and names one."""
    images = {f"{n}.jpg": f"{n}.txt" for n in range(20)}
    folder = yolo(tmp_path, images)
    for name in ("typo.txt", "deep/lost.txt", "classes.txt"):
        write(folder / "labels/train" / name, CENTRED)
    table, problems = load(folder)
    assert kinds(problems, NOTE) == {"label files without an image": 2}
    assert {problem.file for problem in problems.listed} == {
        str(folder / "labels/train/typo.txt"), str(folder / "labels/train/deep/lost.txt")
    }  # fmt: skip
    (text,) = table.repairs
    assert text.startswith(f"label files without an image, such as {folder}/labels/train/") and text in table.describe()


def test_label_files_of_another_split_are_no_strays(tmp_path: Path) -> None:
    """Splits by lists share their folders."""
    folder = yolo(tmp_path, {f"{n}.jpg": f"{n}.txt" for n in range(4)})
    write(folder / "data.yaml", "names: [cat]\ntrain: train.txt\nval: val.txt\n")
    write(folder / "train.txt", "images/train/0.jpg\nimages/train/1.jpg\n")
    write(folder / "val.txt", "images/train/2.jpg\nimages/train/3.jpg\n")
    for split in ("train", "val"):
        table, problems = load(folder, split)
        assert len(table) == 2 and not problems.listed


def test_many_images_without_label_files(tmp_path: Path) -> None:
    nine = {f"{n}.jpg": f"{n}.txt" for n in range(9)}
    assert not load(yolo(tmp_path / "few", nine | {"x.jpg": None}))[1].listed
    table, problems = load(yolo(tmp_path / "many", nine | {"x.jpg": None, "y.jpg": None}))
    assert kinds(problems, NOTE) == {"images without a label file": 1}
    assert "2 of 11 images have no label file" in problems.listed[0].message
    assert any("images without a label file" in text for text in table.repairs)


def test_no_label_file_fits(tmp_path: Path) -> None:
    """Training on nothing but negatives is refused where label files lie there."""
    folder = yolo(tmp_path, {"a.jpg": "one.txt", "b.jpg": "two.txt"})
    with pytest.raises(DataError, match=r"none of its 2 images has a label file.*but 2 label files have no image"):
        load_tables(DataOptions(data=folder, val_share=0))
    _, problems = load(folder, collect=True)
    assert kinds(problems, ERROR) == {"label names": 1}


def notes(problems: Problems, folder: Path) -> dict[str, str]:
    """The message on each file."""
    return {str(Path(problem.file).relative_to(folder)): problem.message for problem in problems.listed}


TWENTY = {f"{n:02d}.jpg": f"{n:02d}.txt" for n in range(20)}


def test_a_label_file_beside_an_image_alone(tmp_path: Path) -> None:
    """Though there is a folder of labels, it is no negative."""
    folder = yolo(tmp_path, TWENTY)
    (folder / "labels/train/00.txt").rename(folder / "images/train/00.txt")
    table, problems = load(folder)
    assert set(images_and_objects(table).values()) == {1}
    assert kinds(problems, REPAIRED) == {"label files of other names taken": 1} and not kinds(problems, NOTE)


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("place", ["labels/00.txt", "labels/trian/00.txt", "labels/train/deep/00.txt"])
def test_a_label_file_in_the_wrong_place(tmp_path: Path, place: str, lists: bool) -> None:
    """It is named, with the place where it belongs."""
    folder = yolo(tmp_path, TWENTY)
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / "labels/train/00.txt").rename(folder / place)
    if lists:
        write(folder / "data.yaml", "names: [cat]\ntrain: train.txt\n")
        write(folder / "train.txt", "\n".join(f"images/train/{image}" for image in TWENTY))
    table, problems = load(folder)
    assert images_and_objects(table)["images/train/00.jpg"] == 0
    text = "is not used; if it is of images/train/00.jpg, it must be labels/train/00.txt: move it there, or remove it"
    assert notes(problems, folder) == {place: text}
    assert f"label files without an image, such as {folder / place}: 1" in table.describe()


def test_label_files_that_others_stand_in_for(tmp_path: Path) -> None:
    """Named where they say something else than the one that is used; copies are none of anyone's concern."""
    folder = yolo(tmp_path, TWENTY)
    shutil.copy(folder / "labels/train/00.txt", folder / "images/train/00.txt")
    shutil.copy(folder / "labels/train/00.txt", folder / "labels/train/00.jpg.txt")
    write(folder / "images/train/captions.txt", "a text about cats")
    assert not load(folder)[1].listed
    for place in ("images/train/01.txt", "labels/train/01.jpg.txt"):
        write(folder / place, "0 .3 .3 .2 .2\n")
    text = "is not used, as the label file of images/train/01.jpg is labels/train/01.txt; remove one of them"
    assert notes(load(folder)[1], folder) == {"images/train/01.txt": text, "labels/train/01.jpg.txt": text}


def test_two_images_with_one_label_file(tmp_path: Path) -> None:
    folder = yolo(tmp_path, {"a.jpg": "a.txt", "a.png": None, "b.jpg": "b.txt"})
    table, problems = load(folder)
    assert set(images_and_objects(table).values()) == {1}
    text = "is the label file of images/train/a.jpg and of images/train/a.png: both get its objects; rename one image "
    assert notes(problems, folder) == {"labels/train/a.txt": text + "and its labels"}
    assert f"label files of two images, such as {folder}/labels/train/a.txt: 1" in table.describe()


def test_a_hidden_image_that_a_list_names(tmp_path: Path) -> None:
    folder = yolo(tmp_path, {"a.jpg": "a.txt", ".h.jpg": ".h.txt"})
    assert images_and_objects(load(folder)[0]) == {"images/train/a.jpg": 1}
    write(folder / "data.yaml", "names: [cat]\ntrain: train.txt\n")
    write(folder / "train.txt", "images/train/a.jpg\nimages/train/.h.jpg\n")
    table, problems = load(folder)
    assert images_and_objects(table) == {"images/train/.h.jpg": 1, "images/train/a.jpg": 1} and not problems.listed


# Links to folders


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    """Their images and labels are part of the set, wherever they lie."""
    folder = yolo(tmp_path / "set", {"a.jpg": "a.txt"})
    for place in ("images", "labels"):
        (tmp_path / "more" / place / "deep").mkdir(parents=True)
        (folder / place / "train/extra").symlink_to(tmp_path / "more" / place)
    save_image(tmp_path / "more/images/deep/b.jpg")
    write(tmp_path / "more/labels/deep/b.txt", CENTRED)
    write(tmp_path / "more/labels/stray.txt", CENTRED)
    table, problems = load(folder)
    assert images_and_objects(table) == {"images/train/a.jpg": 1, "images/train/extra/deep/b.jpg": 1}
    assert set(notes(problems, folder)) == {"labels/train/extra/stray.txt"}


@pytest.mark.parametrize("target", [".", "deep", "../..", "/"])
def test_no_folder_is_read_twice(tmp_path: Path, target: str) -> None:
    folder = yolo(tmp_path, {"a.jpg": "a.txt"})
    save_image(folder / "images/train/deep/b.jpg")
    write(folder / "labels/train/deep/b.txt", CENTRED)
    (folder / "images/train/again").symlink_to(target)
    (folder / "images/train/lost").symlink_to("nowhere")
    table, problems = load(folder)
    assert images_and_objects(table) == {"images/train/a.jpg": 1, "images/train/deep/b.jpg": 1}
    assert kinds(problems, NOTE) == {"links to folders left out": 1, "links that lead nowhere": 1}
    assert set(notes(problems, folder)) == {"images/train/again", "images/train/lost"}


# Folders and files that are no data


CLUTTER = [".ipynb_checkpoints", "@eaDir", ".thumbnails", "__MACOSX", ".Trash-0", "$RECYCLE.BIN"]


@pytest.mark.parametrize("name", CLUTTER)
def test_folders_that_are_no_data(tmp_path: Path, name: str) -> None:
    """Copies of images in them are no negatives."""
    folder = yolo(tmp_path, {"a.jpg": "a.txt"})
    save_image(folder / "images/train" / name / "a-checkpoint.jpg")
    save_image(folder / "images/train/deep/b.jpg")
    write(folder / "labels/train/deep/b.txt", CENTRED)
    table, problems = load(folder)
    assert images_and_objects(table) == {"images/train/a.jpg": 1, "images/train/deep/b.jpg": 1}
    assert [problem.file for problem in problems.listed] == [str(folder / "images/train" / name)]
    assert list(table.repairs) == [f"folders left out, such as {folder}/images/train/{name}"]


def test_hidden_files(tmp_path: Path) -> None:
    """macOS writes ._a.jpg beside a.jpg on other file systems."""
    folder = yolo(tmp_path, {"a.jpg": "a.txt"})
    for name in ("images/train/._a.jpg", "labels/train/._a.txt"):
        write(folder / name, "no picture")
    table, problems = load(folder)
    assert images_and_objects(table) == {"images/train/a.jpg": 1}
    assert kinds(problems, NOTE) == {"hidden images left out": 1}


@pytest.mark.parametrize("suffix", ["gif", "jfif", "jpe", "ppm", "avif", "jp2", "JPEG"])
def test_every_suffix_that_is_read(tmp_path: Path, suffix: str) -> None:
    folder = yolo(tmp_path, {"a.jpg": "a.txt"})
    kind = {"jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000"}.get(suffix)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"images/train/b.{suffix}", kind)
    write(folder / "labels/train/b.txt", CENTRED)
    table, problems = load(folder)
    assert images_and_objects(table)[f"images/train/b.{suffix}"] == 1 and not problems.listed
    assert table.read_image(1).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("suffix", ["heic", "HEIF", "dng", "psd"])
def test_images_that_are_not_read(tmp_path: Path, suffix: str) -> None:
    folder = yolo(tmp_path, {"a.jpg": "a.txt"})
    write(folder / f"images/train/b.{suffix}", "an image of a format that Pillow does not read")
    table, problems = load(folder)
    assert len(table) == 1 and kinds(problems, NOTE) == {"images of other formats left out": 1}
    assert "convert it to JPEG or PNG" in problems.listed[0].message


def test_a_label_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    """Its images are no negatives. (A loop of links fails as a folder without permission does, also for root.)"""
    folder = yolo(tmp_path, {"a.jpg": "a.txt"})
    shutil.rmtree(folder / "labels/train")
    (folder / "labels/train").symlink_to(folder / "labels/train")
    with pytest.raises(
        DataError, match=r"labels/train: cannot be listed as a folder of labels \(Too many levels of symbolic links\)"
    ):
        load_tables(DataOptions(data=folder, val_share=0))


# COCO: names and folders


@pytest.mark.parametrize(("listed", "stored"), [(NFC, NFD), (NFD, NFC), ("Photo", "photo"), ("a%20b", "a b")])
def test_coco_images_of_other_spelling(coco_folder: MakeCocoFolder, listed: str, stored: str) -> None:
    made = coco_folder([(20, 30)] * 3, [{"image_id": 10, "bbox": [1, 2, 10, 5]}])
    made.content["images"][0]["file_name"] = f"sub/{listed}.png"
    paths = made.write()
    (paths.images / "Sub").mkdir()
    (paths.images / "0.png").rename(paths.images / "Sub" / f"{stored}.png")
    table = made.load()
    assert decode_name(table.file_names[0]) == f"Sub/{stored}.png" and table.read_image(0).shape == (20, 30, 3)
    assert table.repairs["images of other spelling taken"] == 1


def test_two_records_never_get_one_image(coco_folder: MakeCocoFolder) -> None:
    made = coco_folder([(20, 30)] * 2)
    made.content["images"][0]["file_name"] = "A.png"
    made.content["images"][1]["file_name"] = "a.png"
    paths = made.write()
    (paths.images / "0.png").rename(paths.images / "a.png")
    with pytest.raises(DataError, match=r"A\.png: listed in .* but not there"):
        made.load()


def coco_split(folder: Path, place: str, file: str, images: str = ".") -> None:
    """A split of one image in a folder of its own."""
    save_image(folder / place / images / "a.jpg")
    record = {"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    content = {"images": [record], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    write(folder / place / file, json.dumps(content))


@pytest.mark.parametrize("val", ["valid", "val", "validation", "Validation", "dev"])
@pytest.mark.parametrize(("file", "images"), [("_annotations.coco.json", "."), ("labels.json", "images")])
def test_coco_trees_with_folders_of_splits(tmp_path: Path, val: str, file: str, images: str) -> None:
    """No part of the training images is held out where there is a validation folder."""
    for place in ("train", val):
        coco_split(tmp_path, place, file, images)
    tables = load_tables(DataOptions(data=tmp_path))
    assert [len(tables[split]) for split in ("train", "val")] == [1, 1]
    assert tables["val"].path(0) == tmp_path / val / images / "a.jpg"


# Copies of one photograph


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_train.json", "train"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/instances_default.json", "images"),  # CVAT
        ("annotations/instances_default.json", "images/default"),
        ("result.json", "images"),  # Label Studio
    ],
)
def test_coco_trees_of_other_programs(tmp_path: Path, file: str, images: str) -> None:
    coco_split(tmp_path, images, "labels.json")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / images / "labels.json").rename(tmp_path / file)
    table, _ = load(tmp_path)
    assert table.folder == tmp_path / images and len(table) == 1 and len(table.boxes) == 1


def test_coco_file_names_choose_the_folder(tmp_path: Path) -> None:
    """Names that are relative to images/, where there is images/train too; and the reverse."""
    coco_split(tmp_path, "images/train", "labels.json")
    (tmp_path / "annotations").mkdir()
    content = json.loads((tmp_path / "images/train/labels.json").read_text())
    save_image(tmp_path / "images/train/é.jpg")  # escaped in the file
    pairs = [(name, "images/train") for name in ("a.jpg", "é.jpg")] + [
        ("train/é.jpg", "images"),
        ("train/a.jpg", "images"),
    ]
    for written, folder in pairs:
        content["images"][0]["file_name"] = written
        (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
        table, _ = load(tmp_path)
        assert table.folder == tmp_path / folder and table.path(0).is_file()


def test_coco_images_that_are_not_listed(tmp_path: Path) -> None:
    """Named where the folder is of one split alone: by training as by check_data."""
    for place in ("train", "valid"):
        coco_split(tmp_path, place, "_annotations.coco.json")
    save_image(tmp_path / "train/more/b.jpg")
    for collect in (False, True):
        table, problems = load(tmp_path, collect=collect)
        assert len(table) == 1 and kinds(problems, NOTE) == {"images that are not listed": 1}
        assert [kind for kind in table.repairs if "not listed" in kind] == [
            f"images that are not listed, such as {tmp_path / 'train/more/b.jpg'}"
        ]


@pytest.mark.parametrize("val", ["images", "images/val"])
def test_images_of_validation_that_are_trained_on(tmp_path: Path, val: str) -> None:
    write(tmp_path / "data.yaml", f"names: [cat]\ntrain: images\nval: {val}\n")
    for place in ("images/val/a", "images/b"):
        save_image(tmp_path / f"{place}.jpg")
        write(tmp_path / f"{place.replace('images', 'labels')}.txt", CENTRED)
    count = {"images": 2, "images/val": 1}[val]
    found = load_tables(DataOptions(data=tmp_path))["train"].repairs
    assert [number for kind, number in found.items() if "val that train has too" in kind] == [count]


def test_copies_of_one_photograph_stay_on_one_side(coco_folder: MakeCocoFolder) -> None:
    """Roboflow's augmentation writes NAME.rf.HASH.jpg; other names are held out as ever."""
    made = coco_folder([(8, 8)] * 60)
    for row, record in enumerate(made.content["images"]):
        record["file_name"] = f"photo{row // 3}_jpg.rf.{row:032x}.png"
    paths = made.write()
    for row, record in enumerate(made.content["images"]):
        (paths.images / f"{row}.png").rename(paths.images / record["file_name"])
    table = made.load()
    train, val = hold_out(table, 0.1)
    sides = [{decode_name(name).split(".rf.")[0] for name in part.file_names.tolist()} for part in (train, val)]
    assert not sides[0] & sides[1] and len(train) + len(val) == 60 and 4 <= len(val) <= 8
    single = table.select(np.arange(3))  # copies of one photograph alone cannot be split
    assert [len(part) for part in hold_out(single, 0.1)] == [3, 0]


# Splits that are found and not used


def unused(folder: Path) -> set[str]:
    """What is named; training says it as check_data does."""
    table, problems = load(folder)
    found = [problem for problem in problems.listed if problem.kind == "splits that are not used"]
    assert sum(count for text, count in table.repairs.items() if text.startswith("splits that")) == len(found)
    root = folder if folder.is_dir() else folder.parent
    return {str(Path(problem.file).relative_to(root)) for problem in found}


def test_unused_splits_of_coco(tmp_path: Path) -> None:
    for place in ("train", "valid"):
        coco_split(tmp_path, place, "_annotations.coco.json")
    assert unused(tmp_path) == set()
    save_image(tmp_path / "test/a.jpg")  # without annotations
    coco_split(tmp_path, "val", "_annotations.coco.json")  # beside valid/
    assert unused(tmp_path) == {"test", "valid"}


def test_unused_splits_of_yolo(tmp_path: Path) -> None:
    folder = yolo(tmp_path, {"a.jpg": "a.txt"})
    assert unused(folder) == set()
    save_image(folder / "images/val/b.jpg")
    write(folder / "test.txt", "images/val/b.jpg\n")
    assert unused(folder) == {"images/val", "test.txt"}
    assert unused(folder / "data.yaml") == {"images/val", "test.txt"}  # the file stands for its folder
    write(folder / "data.yaml", "names: [cat]\ntrain: ../images/train\nval: images/val\ntest: test.txt\n")
    assert unused(folder) == set()


def voc(folder: Path, images: tuple[str, ...], lists: dict[str, str]) -> Path:
    for image in images:
        save_image(folder / "JPEGImages" / image)
        box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        content = f"<annotation><filename>{image}</filename><object><name>cat</name>{box}</object></annotation>"
        write(folder / "Annotations" / f"{Path(image).stem}.xml", content)
    for name, content in lists.items():
        write(folder / "ImageSets/Main" / f"{name}.txt", content)
    return folder


@pytest.mark.parametrize(
    ("lists", "train", "val"),
    [
        ({"train": "a b\na\n", "val": "c"}, "a b.jpg a.jpg", "c.jpg"),
        ({"train": "a b 1\nc -1\n", "val": "a"}, "a b.jpg c.jpg", "a.jpg"),
        ({"trainval": "a\na b\nc", "val": "c"}, "a b.jpg a.jpg", "c.jpg"),
        ({"trainval": "a\na b\nc", "train": "a", "val": "c"}, "a.jpg", "c.jpg"),
        ({"Train": "a\nc", "Validation": "a b"}, "a.jpg c.jpg", "a b.jpg"),
        ({"train": "a\nc", "valid": "a b"}, "a.jpg c.jpg", "a b.jpg"),
        ({"train": "a.jpg\nJPEGImages/c.JPG", "val": "a b.xml"}, "a.jpg c.jpg", "a b.jpg"),
    ],
)
def test_voc_lists(tmp_path: Path, lists: dict[str, str], train: str, val: str) -> None:
    """Names with spaces are whole, and no validation image is trained on."""
    folder = voc(tmp_path, ("a.jpg", "a b.jpg", "c.jpg"), lists)
    tables = load_tables(DataOptions(data=folder))
    for split, expected in (("train", train), ("val", val)):
        found = sorted(map(decode_name, tables[split].file_names.tolist()))
        assert " ".join(found) == expected


def test_unused_lists_of_voc(tmp_path: Path) -> None:
    folder = voc(tmp_path, ("a.jpg", "b.jpg"), {"train": "a", "val": "b", "cat_train": "a 1", "trainval": "a\nb"})
    assert unused(folder) == set()  # as the devkit has it
    (folder / "ImageSets/Main/trainval.txt").write_text("a\nb\nc")
    assert unused(folder) == {"ImageSets/Main/trainval.txt"}
    write(folder / "ImageSets/Main/valid.txt", "a")
    assert unused(folder) == {"ImageSets/Main/trainval.txt", "ImageSets/Main/valid.txt"}


def test_voc_images_without_an_xml_file(tmp_path: Path) -> None:
    folder = voc(tmp_path, ("a.jpg", "décran.jpg"), {})
    (folder / "Annotations/décran.xml").rename(folder / f"Annotations/{unicodedata.normalize('NFD', 'décran')}.xml")
    for name in ("b.jpg", "._a.jpg", "c.heic"):
        write(folder / "JPEGImages" / name, "no picture")
    table, problems = load(folder)
    assert len(table) == 2 and kinds(problems, NOTE) == {
        "images without an XML file": 1, "hidden images left out": 1, "images of other formats left out": 1
    }  # fmt: skip


# What is given as --data


def refusal(data: Path) -> str:
    with pytest.raises(InputError) as error:
        load_tables(DataOptions(data=data))
    return str(error.value)


def test_a_yaml_file_stands_for_its_folder(tmp_path: Path) -> None:
    folder = yolo(tmp_path, {"a.jpg": "a.txt", "b.jpg": "b.txt"})
    assert load(folder / "data.yaml")[0].source == load(folder)[0].source
    shutil.copy(folder / "data.yaml", folder / "mine.yaml")
    (folder / "data.yaml").rename(folder / "other.yml")
    write(folder / "mine.yaml", "names: [dog]\ntrain: images/train\n")
    assert len(load(folder / "mine.yaml")[0]) == 2
    assert refusal(folder).endswith(f"(mine.yaml, other.yml): give one of them, --data {folder}/mine.yaml")


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train.json", "images"),
        ("train/_annotations.coco.json", "train"),
        ("labels.json", "images"),
        ("labels.json", ""),
        ("annotations/mine.json", "images"),
    ],
)
def test_a_coco_file_stands_for_its_set(file: str, images: str, tmp_path: Path) -> None:
    """With the other splits where it is one of several; else it is the training split."""
    record = {"id": 1, "width": WIDTH, "height": HEIGHT}
    objects = [{"id": 5, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}]
    content = {
        "images": [{**record, "file_name": "a.jpg"}],
        "annotations": objects,
        "categories": [{"id": 3, "name": "cat"}],
    }
    save_image(tmp_path / images / "a.jpg")
    write(tmp_path / file, json.dumps(content))
    other = {"annotations/instances_train.json": "annotations/instances_val.json",
             "train/_annotations.coco.json": "valid/_annotations.coco.json"}.get(file)  # fmt: skip
    if other is not None:
        save_image(tmp_path / images.replace("train", "valid") / "b.jpg")
        write(tmp_path / other, json.dumps({**content, "images": [{**record, "file_name": "b.jpg"}]}))
    tables = load_tables(DataOptions(data=tmp_path / file, val_share=0), ["train", "val"])
    assert images_and_objects(tables["train"]) == {"a.jpg": 1} and tables["train"].source == str(tmp_path / file)
    assert ("val" in tables) == (other is not None)
    if other is not None:
        assert images_and_objects(tables["val"]) == {"b.jpg": 1}


def test_what_is_no_folder_of_a_data_set(tmp_path: Path) -> None:
    folder = yolo(tmp_path / "deep/set", {"a.jpg": "a.txt"})
    for name in ("labels.json", "set.zip", "notes.txt"):
        write(tmp_path / name, "{}")
    assert refusal(tmp_path / "labels.json").startswith(f"{tmp_path / 'labels.json'}: ")
    assert "is a file: unpack it, and give the folder" in refusal(tmp_path / "set.zip")
    assert "is a file: give the folder" in refusal(tmp_path / "notes.txt")
    assert refusal(folder.parent) == f"--data {folder.parent}: holds no data set itself, but {folder} is one: give that"
    assert "holds none of: COCO's" in refusal(tmp_path)
    assert refusal(tmp_path / "absent").endswith("absent: no such folder")


def test_what_is_neither_a_folder_nor_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (Path(os.devnull), tmp_path / "pipe"):
        assert f"--data {place}: is neither a folder nor a file: give the folder of the data set" in refusal(place)


@pytest.mark.parametrize(
    ("place", "hint"), [("", "write a data.yaml with names and train"), ("images", "give the folder above")]
)
def test_a_part_of_a_data_set(tmp_path: Path, place: str, hint: str) -> None:
    """labelImg's folders, whose classes no data.yaml names; and a folder too deep."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    save_image(tmp_path / "images/a.jpg")
    assert hint in refusal(tmp_path / place)


def test_a_yaml_file_that_names_a_folder_elsewhere(tmp_path: Path) -> None:
    """One refusal, whose remedy works."""
    folder = yolo(tmp_path / "pets", {"a.jpg": "a.txt", "b.jpg": "b.txt"})
    write(tmp_path / "configs/pets.yaml", "path: ../pets\nnames: [cat]\ntrain: images/train\nval: images/absent\n")
    assert refusal(tmp_path / "configs").endswith(f"copy the file into {folder}, and give that folder as --data")
    shutil.copy(tmp_path / "configs/pets.yaml", folder / "data.yaml")
    message = refusal(folder)
    assert "its 'val' 'images/absent' is no folder" in message and message.endswith("or remove the line 'val'")
    write(folder / "data.yaml", "path: ../pets\nnames: [cat]\ntrain: images/train\n")
    assert len(load(folder)[0]) == 2


def test_objects_without_an_outline_are_named(tmp_path: Path) -> None:
    """A label file may mix boxes and polygons; a mask detector learns from polygons alone."""
    folder = yolo(tmp_path, {"a.jpg": "a.txt", "b.jpg": "b.txt"})
    polygon = "0 .1 .1 .9 .1 .9 .9\n"
    write(folder / "labels/train/a.txt", polygon + CENTRED)
    write(folder / "labels/train/b.txt", polygon)
    with pytest.raises(
        InputError, match=rf"1 object\(s\) without .* first object 2 of {folder}/images/train/a\.jpg \(id"
    ):
        load(folder)[0].require_masks()
