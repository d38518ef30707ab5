"""From YOLO folders to records, and folders in which something is wrong."""

import os
from collections import defaultdict
from pathlib import Path

import pytest
from label_trees import HEIGHT, WIDTH, Lists, names, read, save_image, write
from PIL import Image

from direct_pt.data.formats.label_files import number_records
from direct_pt.data.formats.yolo import YoloSplit, find_yolo
from direct_pt.data.problems import NOTE, REPAIRED, DataError, Problems
from direct_pt.data.records import read_table
from direct_pt.images.decoding import ORIENTATION_TAG, Decoding, UnreadableImage, image_size

YAML = "names: [cat, dog]\ntrain: images/train\nval: images/val\n"
GOOD = "1 0.5 0.5 0.25 0.5\n"
GOOD_BOX = [24.0, 8.0, 16.0, 16.0]


def make(folder: Path, yaml: str | bytes = YAML, labels: dict[str, str | bytes] | None = None) -> Path:
    """A data set with an image for each label file; by default one training and one validation image."""
    write(folder / "data.yaml", yaml)
    for name, content in {"train/a": GOOD, "val/b": GOOD, **(labels or {})}.items():
        save_image(folder / "images" / f"{name}.png")
        write(folder / "labels" / f"{name}.txt", content)
    return folder


def find(folder: Path) -> dict[str, YoloSplit]:
    found = find_yolo(folder)
    assert found is not None
    return found


# What is read


def test_records(tmp_path: Path) -> None:
    labels = {
        "train/deep/c": "0 0 0 1 0 0.5 1\n\n 1 0.5 0.5 0.25 0.5\r\n1 -0.02 0.25 0.5 0.5\n",  # polygon, and boxes
        "train/b": "",
        "train/d": b"\xef\xbb\xbf0.0 .5 5e-1 0 0",
    }
    split = find(make(tmp_path, labels=labels))["train"]
    save_image(tmp_path / "images/train/B.JPG")  # without a label file
    write(tmp_path / "images/train/notes.txt", "no image")
    assert (split.source, split.folder) == (f"{tmp_path}/data.yaml (train)", tmp_path)
    size = {"height": HEIGHT, "width": WIDTH}
    assert read(split) == {
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        "images": [
            {"id": 1, "file_name": "images/train/B.JPG", **size},
            {"id": 2, "file_name": "images/train/a.png", **size},
            {"id": 3, "file_name": "images/train/b.png", **size},
            {"id": 4, "file_name": "images/train/d.png", **size},
            {"id": 5, "file_name": "images/train/deep/c.png", **size},
        ],
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 1, "bbox": GOOD_BOX},
            {"id": 2, "image_id": 4, "category_id": 0, "bbox": [32, 16, 0, 0]},  # left to those who read the records
            {
                "id": 3,
                "image_id": 5,
                "category_id": 0,
                "bbox": [0, 0, 64, 32],
                "segmentation": [[0, 0, 64, 0, 32, 32]],
            },
            {"id": 4, "image_id": 5, "category_id": 1, "bbox": GOOD_BOX},
            {"id": 5, "image_id": 5, "category_id": 1, "bbox": [pytest.approx(-17.28), 0, 32, 16]},
        ],
    }


def test_the_table(tmp_path: Path) -> None:
    table = read_table(find(make(tmp_path))["val"], Problems(), Decoding())
    assert (table.class_names, table.category_ids) == (("cat", "dog"), (0, 1))
    assert table.path(0) == tmp_path / "images/val/b.png"
    assert table.boxes.tolist() == [GOOD_BOX] and table.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("yaml", "images"),
    [
        ("train: images", ["images/a.png"]),
        ("train: ./images/", ["images/a.png"]),
        ("train: [images, part/images]", ["images/a.png", "part/images/b.png"]),
        ("train: list.txt", ["images/a.png", "part/images/b.png", "plain/c.png"]),
        ("train: plain", ["plain/c.png"]),
        ("train: ../part/images", ["part/images/b.png"]),  # as Roboflow writes
        ("path: part\ntrain: images", ["part/images/b.png"]),
        ("path: .\ntrain: part", ["part/images/b.png"]),
        ("path: {folder}\ntrain: {folder}/part", ["part/images/b.png"]),
        ("path: ~\ntrain: images\nval:\ntest: null", ["images/a.png"]),
    ],
)
def test_image_folders(tmp_path: Path, yaml: str, images: list[str]) -> None:
    """The label of each image, wherever it lies, is found: a box as wide as its letter's number in the alphabet."""
    for number, (image, label) in enumerate(
        [("images/a", "labels/a"), ("part/images/b", "part/labels/b"), ("plain/c", "plain/c")], start=1
    ):
        save_image(tmp_path / f"{image}.png")
        write(tmp_path / f"{label}.txt", f"0 0.5 0.5 {number / WIDTH} 1")
    write(tmp_path / "list.txt", f"plain/c.png\n./images/a.png\n\n{tmp_path}/part/../part/images/b.png\n")
    write(tmp_path / "data.yaml", "names: {0: thing}\n" + yaml.format(folder=tmp_path))
    splits = find(tmp_path)
    assert set(splits) == {"train"}
    problems = Problems()
    lists = read(splits["train"], problems)
    assert names(lists) == images
    widths = {"a": 1, "b": 2, "c": 3}
    assert [record["bbox"][2] for record in lists["annotations"]] == [widths[Path(name).stem] for name in images]
    assert not problems.counts(NOTE) and not problems.counts(REPAIRED)


def test_a_path_of_another_machine(tmp_path: Path) -> None:
    for path in ("/nowhere/at/all", "../datasets/coco8"):
        make(tmp_path, f"path: {path}\n{YAML}")
        problems = Problems(collects=True)
        assert names(read(find(tmp_path)["train"], problems)) == ["images/train/a.png"]
        text = f"its 'path' '{path}' is not there: paths are taken relative to {tmp_path}"
        assert list(map(str, problems.listed)) == [f"{tmp_path}/data.yaml: {text}"]
        assert problems.counts(NOTE) == {"YAML 'path' that is not there": 1}


@pytest.mark.parametrize("name", ["data.yaml", "dataset.yaml", "data.yml", "mine.yaml", "mine.yml"])
def test_the_yaml_file(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    (tmp_path / "data.yaml").rename(tmp_path / name)
    write(tmp_path / "recipe.yaml", "names: [other]\n nonsense: [")
    splits = find(tmp_path)
    assert list(splits) == ["train", "val"] and splits["val"].source == f"{tmp_path}/{name} (val)"


def test_no_yolo(tmp_path: Path) -> None:
    assert find_yolo(tmp_path / "nothing") is None
    write(tmp_path / "recipe.yaml", "names: [other]\nepochs: 3")
    assert find_yolo(tmp_path) is None


@pytest.mark.parametrize("files", [("a.yaml", "b.yaml"), ("data.yml", "dataset.yaml"), ("data.yaml", "mine.yml")])
def test_several_yaml_files(tmp_path: Path, files: tuple[str, str]) -> None:
    """Nothing says which is meant, unless they are equal."""
    make(tmp_path)
    (tmp_path / "data.yaml").unlink()
    for name in files:
        write(tmp_path / name, YAML)
    write(tmp_path / "recipe.yaml", "names: [other]\nepochs: 3")
    assert names(read(find(tmp_path)["train"])) == ["images/train/a.png"]
    write(tmp_path / files[1], YAML.replace("dog", "pig"))
    with pytest.raises(
        DataError, match=rf"holds several YAML files of a YOLO set \(.*{files[1]}.*\): give one of them"
    ):
        find_yolo(tmp_path)
    assert find(tmp_path / files[1])["train"].class_names == ("cat", "pig")


@pytest.mark.parametrize("key", ["Train", "training", "TRAIN", "train"])
def test_split_keys_of_other_spelling(tmp_path: Path, key: str) -> None:
    make(tmp_path, YAML.replace("train:", f"{key}:").replace("val:", "validation:"))
    splits = find(tmp_path)
    assert {split: names(read(one)) for split, one in splits.items()} == {
        "train": ["images/train/a.png"], "val": ["images/val/b.png"]
    }  # fmt: skip


def test_names(tmp_path: Path) -> None:
    """Whatever YAML makes of them elsewhere, names are text; the order is the indices'."""
    make(tmp_path, "names: {2: no, 0: 007, 1: 'a b', 3: ~}\nnc: 4\nvalid: images/val\ntrain: ''\n")
    splits = find(tmp_path)
    assert list(splits) == ["val"]
    assert [record["name"] for record in read(splits["val"])["categories"]] == ["007", "a b", "no", "~"]


@pytest.mark.parametrize(("exif", "sides"), [(True, (HEIGHT, WIDTH)), (False, (WIDTH, HEIGHT))])
def test_shares_are_of_the_upright_image(tmp_path: Path, exif: bool, sides: tuple[int, int]) -> None:
    orientation = Image.Exif()
    orientation[ORIENTATION_TAG] = 6
    save_image(make(tmp_path) / "images/train/a.png", exif=orientation)
    found = find_yolo(tmp_path, Decoding(exif=exif))
    assert found is not None
    lists = read(found["train"])
    assert (lists["images"][0]["width"], lists["images"][0]["height"]) == sides
    width, height = sides
    assert lists["annotations"][0]["bbox"] == [0.375 * width, 0.25 * height, 0.25 * width, 0.5 * height]


def test_repeated_lines_and_images(tmp_path: Path) -> None:
    yaml = "names: [cat, dog]\ntrain: [images, images/train]"
    make(tmp_path, yaml, {"train/a": f"{GOOD}0 0.1 0.1 0.1 0.1\n 1  0.5 0.5 0.25 0.5 \n{GOOD}"})
    problems = Problems(collects=True)
    lists = read(find(tmp_path)["train"], problems)
    assert names(lists) == ["images/train/a.png", "images/val/b.png"]
    assert [record["category_id"] for record in lists["annotations"]] == [1, 0, 1]
    assert problems.counts(REPAIRED) == {
        "images listed again left out": 1,
        "label lines that repeat one left out": 2,
    }
    assert list(map(str, problems.listed)) == [
        f"{tmp_path}/data.yaml: its 'train' lists images/train/a.png 2 times; it counts once",
        f"{tmp_path}/labels/train/a.txt:3: is the same as line 1; it is left out",
        f"{tmp_path}/labels/train/a.txt:4: is the same as line 1; it is left out",
    ]


def test_no_label_at_all(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "labels").rename(folder / "Labels")
    problems = Problems(collects=True)
    assert read(find(folder)["train"], problems)["annotations"] == []
    text = f"none of its 1 images has a label file, such as {folder}/labels/train/a.txt"
    assert list(map(str, problems.listed)) == [f"{folder}/data.yaml (train): {text}"]
    assert problems.counts(NOTE) == {"splits without a label file": 1}


def test_links(tmp_path: Path) -> None:
    """A split's folder, an image and a label file may be links, even out of the data set; loops are harmless."""
    make(tmp_path / "elsewhere", labels={"train/c": "0 0.5 0.5 1 1"})
    folder = tmp_path / "set"
    write(folder / "data.yaml", YAML)
    (folder / "images").mkdir()
    (folder / "images/train").symlink_to(tmp_path / "elsewhere/images/train")
    (folder / "labels").symlink_to(tmp_path / "elsewhere/labels")
    (tmp_path / "elsewhere/images/train/again").symlink_to(tmp_path / "elsewhere/images/train")
    (tmp_path / "elsewhere/images/train/itself").symlink_to("itself")
    (tmp_path / "elsewhere/images/train/d.png").symlink_to("a.png")
    lists = read(find(folder)["train"])
    assert names(lists) == [f"images/train/{name}.png" for name in "acd"]
    assert [record["image_id"] for record in lists["annotations"]] == [1, 2]


def test_chunks() -> None:
    images = [({"file_name": str(row)}, [{"row": row, "bbox": [0, 0, row, 2]}] * (row % 5)) for row in range(5000)]
    lists: Lists = defaultdict(list)
    for key, first, records in number_records([{"id": 0}], images):
        assert first == len(lists[key]) and (len(records) or not lists[key]) and len(records) <= 4096 + 4
        lists[key] += records
    assert [record["id"] for record in lists["images"]] == list(range(1, 5001))
    assert [record["id"] for record in lists["annotations"]] == list(range(1, 10001))
    assert all(record["image_id"] == record["row"] + 1 for record in lists["annotations"])
    assert all(record["area"] == 2 * record["row"] for record in lists["annotations"])
    assert list(number_records([], [])) == [("categories", 0, []), ("images", 0, []), ("annotations", 0, [])]


# What is refused

FIELDS = "expected 'class x_center y_center width height', or a class and 3 or more points 'x y' of a polygon"
SHARES = "expected shares from 0 to 1: divide by the image's width and height"
FINITE = "has a number that is not finite; annotate the object anew, or remove the line"
KNOWN = "expected a whole number from 0 to 1, as in 'names': correct it, or add a name"
LINES = {
    "0 0.5 0.5 0.5": f"has 4 fields; {FIELDS}",
    "0 0.5 0.5 0.5 0.5 0.9": f"has 6 fields; {FIELDS}",
    "0 0.1 0.1 0.2 0.1 0.2 0.2 0.3": f"has 8 fields; {FIELDS}",
    "0": f"has 1 fields; {FIELDS}",
    "0,0.5,0.5,0.5,0.5": f"has 1 fields; {FIELDS}",
    "cat 0.5 0.5 0.5 0.5": f"has a field that is no number (could not convert string to float: 'cat'); {FIELDS}",
    "0 0.5 0,5 0.5 0.5": f"has a field that is no number (could not convert string to float: '0,5'); {FIELDS}",
    "0 nan 0.5 0.5 0.5": FINITE,
    "0 0.5 0.5 inf 0.5": FINITE,
    "nan 0.5 0.5 0.5 0.5": FINITE,
    "0 0.5 0.5 1e999 0.5": FINITE,
    "2 0.5 0.5 0.5 0.5": "has the class 2; " + KNOWN,
    "-1 0.5 0.5 0.5 0.5": "has the class -1; " + KNOWN,
    "0.5 0.5 0.5 0.5 0.5": "has the class 0.5; " + KNOWN,
    "0 0.5 0.5 -0.5 0.5": "has the negative width or height -0.5; write it without sign",
    "0 0.5 0.5 0.5 -1e-9": "has the negative width or height -1e-09; write it without sign",
    "0 320 0.5 0.5 0.5": f"has 320, {SHARES}",
    "0 0.5 -0.6 0.5 0.5": f"has -0.6, {SHARES}",
    "1 0.1 0.1 12 0.1 0.5 -40": f"has 12, {SHARES}",
}


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line(tmp_path: Path, line: str) -> None:
    split = find(make(tmp_path, labels={"train/c": f"0 0.5 0.5 1 1\n\n{line}\n{GOOD}"}))["train"]
    expected = f"{tmp_path}/labels/train/c.txt:3: {LINES[line]}"
    with pytest.raises(DataError) as error:
        read(split)
    assert str(error.value) == expected
    problems = Problems(collects=True)
    lists = read(split, problems)
    assert list(map(str, problems.listed)) == [expected]
    assert problems.listed[0].image == "images/train/c.png"
    assert [record["bbox"] for record in lists["annotations"]] == [GOOD_BOX, [0, 0, 64, 32], GOOD_BOX]


def test_all_wrong_lines_are_collected(tmp_path: Path) -> None:
    split = find(make(tmp_path, labels={"train/c": GOOD + "\n".join(LINES)}))["train"]
    problems = Problems(collects=True)
    assert len(read(split, problems)["annotations"]) == 2
    assert [problem.message for problem in problems.listed] == list(LINES.values())
    assert [problem.file for problem in problems.listed] == [
        f"{tmp_path}/labels/train/c.txt:{number}" for number in range(2, len(LINES) + 2)
    ]


PATH = "its 'train' {!r} is no folder and no .txt file in {{folder}}; write a path relative to it"
LIST = "lists {!r}, which is no file in {{folder}}; write paths relative to {{folder}}"
# What a split's key says, or what its files hold: message, and the images that are read all the same.
SPLITS: dict[str, tuple[dict[str, str | bytes], str, list[str]]] = {
    "absent": ({"data.yaml": "train: [nothing, images/train]"}, "{folder}/data.yaml: " + PATH.format("nothing"), ["a"]),
    "outside": ({"data.yaml": "train: /"}, "{folder}/data.yaml: " + PATH.format("/"), []),
    "above": ({"data.yaml": "train: ../../etc"}, "{folder}/data.yaml: " + PATH.format("../../etc"), []),
    "aside": ({"data.yaml": "train: images/../.."}, "{folder}/data.yaml: " + PATH.format("images/../.."), []),
    "a file": ({"data.yaml": "train: images/train/a.png"},
               "{folder}/data.yaml: " + PATH.format("images/train/a.png"), []),
    "long": ({"data.yaml": "train: " + 5000 * "x"}, "{folder}/data.yaml: " +
             PATH.format(5000 * "x").replace("; write", " (File name too long); write"), []),
    "path outside": (
        {"data.yaml": "path: ..\ntrain: images/train"},
        "{folder}/data.yaml: its 'path' '..' lies outside of {folder}, where nothing is read; copy the file into "
        "{folder.parent}, and give that folder as --data", [],
    ),
    "empty folder": ({"data.yaml": "train: labels"},
                     "{folder}/data.yaml: its 'train' names {folder}/labels, which holds no images", []),
    "empty list": ({"data.yaml": "train: list.txt", "list.txt": "\n"},
                   "{folder}/list.txt: lists no images (the 'train' of {folder}/data.yaml)", []),
    "list outside": ({"data.yaml": "train: list.txt", "list.txt": "images/train/a.png\n../secret.png\n"},
                     "{folder}/list.txt:2: " + LIST.format("../secret.png"), ["a"]),
    "list absent": ({"data.yaml": "train: list.txt", "list.txt": "/a.png\nimages/train/a.png"},
                    "{folder}/list.txt:1: " + LIST.format("/a.png"), ["a"]),
    "list nul": ({"data.yaml": "train: list.txt", "list.txt": "a\0b\nimages/train/a.png"},
                 "{folder}/list.txt:1: " + LIST.format("a\0b"), ["a"]),
    "list binary": (
        {"data.yaml": "train: list.txt", "list.txt": b"\xff\xfea\0"},
        "{folder}/list.txt: cannot be read as UTF-8 text ('utf-8' codec can't decode byte 0xff in position 0: invalid "
        "start byte); save it anew", [],
    ),
    "label binary": (
        {"data.yaml": "train: images", "labels/train/a.txt": b"0 0.5 0.5 0.5 0.5 \xe9"},
        "{folder}/labels/train/a.txt: cannot be read as UTF-8 text ('utf-8' codec can't decode byte 0xe9 in position "
        "18: unexpected end of data); save it anew", ["b"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_a_wrong_split(tmp_path: Path, case: str) -> None:
    files, message, images = SPLITS[case]
    folder = tmp_path / "set"
    save_image(tmp_path / "secret.png")
    save_image(tmp_path / "images/train/secret.png")
    make(folder)
    for name, content in files.items():
        write(folder / name, f"names: [cat, dog]\n{content!s}" if name == "data.yaml" else content)
    split, expected = find(folder)["train"], message.format(folder=folder)
    with pytest.raises(DataError) as error:
        read(split)
    assert str(error.value) == expected
    problems = Problems(collects=True)
    assert [Path(name).stem for name in names(read(split, problems))] == images
    assert list(map(str, problems.listed)) == [expected]


def test_an_unreadable_image(tmp_path: Path) -> None:
    folder = make(tmp_path, "names: [cat, dog]\ntrain: images")
    write(folder / "images/train/a.png", b"\x89PNG")
    with pytest.raises(UnreadableImage) as unreadable:
        image_size(folder / "images/train/a.png")
    with pytest.raises(DataError) as error:
        read(find(folder)["train"])
    assert str(error.value) == str(unreadable.value) and f"{folder}/images/train/a.png: " in str(error.value)
    problems = Problems(collects=True)
    assert names(read(find(folder)["train"], problems)) == ["images/val/b.png"]
    assert list(map(str, problems.listed)) == [str(error.value)]


def test_broken_links(tmp_path: Path) -> None:
    folder = make(tmp_path, labels={"train/c": ""})
    (folder / "labels/train/c.txt").unlink()
    (folder / "labels/train/c.txt").symlink_to("gone.txt")
    (folder / "images/train/d.png").symlink_to("d.png")
    problems = Problems(collects=True)
    assert names(read(find(folder)["train"], problems)) == ["images/train/a.png"]
    assert [problem.file for problem in problems.listed] == [
        f"{folder}/labels/train/c.txt", f"{folder}/images/train/d.png"
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    folder = make(tmp_path, labels={"train/deep/c": ""})
    (folder / "images/train/deep").chmod(0)
    with pytest.raises(DataError, match="images/train/deep: cannot be listed"):
        read(find(folder)["train"])
    (folder / "images/train/deep").chmod(0o700)


NAMES = "needs 'names', a list of the classes or a mapping {index: name}"
NUMBERED = "its 'names' must number its {} classes from 0 without gaps; found {!r}"
OWN = "give every class a name of its own"
BOMB = "k0: &a0 [x]\n" + "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGES = "k0: &a0 {x: y}\n" + "".join(f"k{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))
YAMLS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "must hold a mapping with the keys 'names', 'train' and 'val'"),
    "a list": ("- names", "must hold a mapping with the keys 'names', 'train' and 'val'"),
    "no names": ("train: images\nnc: 2", NAMES),
    "names null": ("names:\ntrain: images", NAMES),
    "names empty": ("names: []\ntrain: images", NAMES),
    "names a word": ("names: cat dog\ntrain: images", NAMES),
    "from 1": ("names: {1: cat, 2: dog}", NUMBERED.format(2, "2")),
    "the other way": ("names: {cat: 0, dog: 1}", NUMBERED.format(2, "cat")),
    "twice": ("names: [cat, dog, cat]", f"its 'names' has 'cat' 2 times; {OWN}"),
    "blank": ("names: [cat, '']", f"its 'names' has an entry without text; {OWN}"),
    "nested": ("names: [cat, [dog]]", f"its 'names' has an entry without text; {OWN}"),
    "nc": ("names: [cat]\nnc: 2", "its 'nc' is '2', but 'names' lists 1 classes; correct one of them"),
    "nc a bomb": (BOMB + "nc: *a29\nnames: [cat]",
                  "its 'nc' is no number, but 'names' lists 1 classes; correct one of them"),
    "nc a list": ("names: [cat]\nnc: [1]", "its 'nc' is no number, but 'names' lists 1 classes; correct one of them"),
    "no split": ("names: [cat]\ntrain:\n", "needs the key 'train' or 'val' with the folder of its images"),
    "split a mapping": ("names: [cat]\ntrain: {a: b}", "its 'train' must be a path or a list of paths"),
    "split of lists": ("names: [cat]\nval: [[a]]", "its 'val' must be a path or a list of paths"),
    "two keys": ("names: [cat]\nval: a\nValid: b",
                 "has 'val' and 'Valid' for one split, which differ: leave one of them"),
    "path a list": ("names: [cat]\ntrain: a\npath: [a]", "its 'path' must be one path"),
    "keypoints": ("names: [cat]\ntrain: a\nkpt_shape: [17, 3]",
                  "has 'kpt_shape': its labels hold keypoints, which are not supported; export boxes or polygons"),
    "bomb": (BOMB + "train: *a29\nnames: *a29", f"its 'names' has an entry without text; {OWN}"),
    "merges": (MERGES + "names: *a59\ntrain: a", NUMBERED.format(1, "<<")),
    "long": ("names: [cat]\n#" + 10**6 * "x", "cannot be read as YAML (it is larger than 1 MB); mend it"),
    "deep": ("names: " + 10**4 * "[", "cannot be read as YAML (maximum recursion depth exceeded"),
    "itself": ("names: &a [*a]", "cannot be read as YAML (found unconstructable recursive node in"),
    "open": ("names: [cat", "cannot be read as YAML (while parsing a flow sequence in"),
    "tabs": ("names:\n\t- cat", "cannot be read as YAML (while scanning for the next token found character '\\t'"),
    "binary": (b"\x00\xff", "cannot be read as YAML ("),
    "latin": (b"names: [caf\xe9]", "cannot be read as YAML (unacceptable character #x00e9: invalid"),
    "two": ("names: [cat]\n---\nnames: [dog]", "cannot be read as YAML (expected a single document"),
    "no character": ('names: ["\\UFFFFFFFF"]', "cannot be read as YAML ("),
}  # fmt: skip


REPEATED = {
    "names: {0: cat, 0: dog, 1: bird}\ntrain: a": (1, "0", 1),
    "names:\n  0: cat\n  1: dog\n  '0': bird\ntrain: a": (4, "0", 2),
    'names: [cat]\ntrain: a\nnc: 1\n"train": b': (4, "train", 2),
    "names: [cat]\ntrain: a\nnames: [dog]": (3, "names", 1),
}


@pytest.mark.parametrize("content", REPEATED)
def test_a_key_that_stands_twice(tmp_path: Path, content: str) -> None:
    """No class and no folder is lost."""
    write(tmp_path / "data.yaml", content)
    line, key, first = REPEATED[content]
    with pytest.raises(DataError) as error:
        find_yolo(tmp_path)
    text = f"has the key {key!r} again, after line {first}; YAML allows it once: remove one"
    assert str(error.value) == f"{tmp_path}/data.yaml:{line}: {text}"


@pytest.mark.parametrize("case", YAMLS)
def test_a_wrong_yaml_file(tmp_path: Path, case: str) -> None:
    content, message = YAMLS[case]
    write(tmp_path / "data.yaml", content)
    with pytest.raises(DataError) as error:
        find_yolo(tmp_path)
    found, expected = str(error.value), f"{tmp_path}/data.yaml: {message}"
    assert found == expected or ("cannot be read" in message and found.startswith(expected))
    assert "\n" not in found and len(found) < 500


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    make(tmp_path, f"names: [cat, dog]\ntrain: !!python/object/apply:os.mkdir [{tmp_path}/made]")
    find_yolo(tmp_path)
    assert not (tmp_path / "made").exists()
