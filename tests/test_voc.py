"""From Pascal VOC trees to records, and trees in which something is wrong."""

from collections import Counter
from pathlib import Path

import pytest
from label_trees import HEIGHT, WIDTH, names, read, save_image, write

from direct_pt.data.formats.voc import VocSplit, find_voc
from direct_pt.data.problems import ERROR, NOTE, DataError, Problems
from direct_pt.data.records import read_table
from direct_pt.images.decoding import Decoding

SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


def thing(name: str = "dog", corners: tuple[object, ...] = (9, 5, 24, 20), more: str = "") -> str:
    box = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


def xml(image: str, *objects: str, size: str = SIZE) -> str:
    return f"<annotation><folder>VOC</folder><filename>{image}</filename>{size}{''.join(objects)}</annotation>"


GOOD = thing()
GOOD_BOX = [8, 4, 16, 16]


def make(folder: Path, files: dict[str, str | bytes], lists: dict[str, str] | None = None) -> Path:
    """A devkit tree with an image for each XML file, which is given by its stem."""
    for stem, content in files.items():
        save_image(folder / "JPEGImages" / f"{stem}.jpg")
        write(folder / "Annotations" / f"{stem}.xml", content)
    for name, content in (lists or {}).items():
        write(folder / "ImageSets/Main" / f"{name}.txt", content)
    return folder


def find(folder: Path) -> dict[str, VocSplit]:
    found = find_voc(folder)
    assert found is not None
    return found


def problems_of(split: VocSplit) -> tuple[dict[str, int], dict[str, str]]:
    """How many objects each image has, and the message on each file."""
    problems = Problems(collects=True)
    lists = read(split, problems)
    counts = Counter(record["image_id"] for record in lists["annotations"])
    found = {record["file_name"]: counts[record["id"]] for record in lists["images"]}
    return found, {problem.file: problem.message for problem in problems.listed}


# What is read


def test_records(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    details = f"<pose>Left</pose><truncated>1</truncated><difficult> 1 </difficult>{part}"
    files = {
        "b": xml("b.jpg", thing("dog", (1, 1, WIDTH, HEIGHT)), thing(" cat\n", ("2.5", "3", "2.5", 1e1), details)),
        "a": xml("a.jpg"),
        "c": xml("c.jpg", thing("eel", more="<difficult>0</difficult>")),
        "d": xml("d.jpg", thing("zebra")),
    }
    make(tmp_path, files, {"train": "b  1\n\n a -1\r\n", "val": "\ufeffc", "trainval": "a\nb\nc", "cat_train": "b 1\n"})
    splits = find(tmp_path)
    assert list(splits) == ["train", "val"]
    split = splits["train"]
    assert (split.source, split.folder) == (f"{tmp_path} (train)", tmp_path / "JPEGImages")
    size = {"height": HEIGHT, "width": WIDTH}
    categories = [{"id": row, "name": name} for row, name in enumerate(("cat", "dog", "eel", "zebra"), start=1)]
    assert read(split) == {
        "categories": categories,
        "images": [{"id": 1, "file_name": "a.jpg", **size}, {"id": 2, "file_name": "b.jpg", **size}],
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 2, "bbox": [0, 0, WIDTH, HEIGHT], "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 1, "bbox": [1.5, 2, 1, 8], "iscrowd": 1},
        ],
    }
    lists = read(splits["val"])
    assert lists["categories"] == categories and names(lists) == ["c.jpg"]
    assert [record["category_id"] for record in lists["annotations"]] == [3]


def test_the_table(tmp_path: Path) -> None:
    split = find(make(tmp_path, {"a": xml("a.jpg", GOOD, size="")}))["train"]
    table = read_table(split, Problems(), Decoding())
    assert (table.class_names, table.category_ids) == (("dog",), (1,))
    assert table.path(0) == tmp_path / "JPEGImages/a.jpg"
    assert table.sizes.tolist() == [[HEIGHT, WIDTH]] and table.boxes.tolist() == [GOOD_BOX]


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({}, {"train": "abc"}),
        ({"default": "a"}, {"train": "abc"}),
        ({"trainval": "b\na", "test": "c"}, {"train": "ab", "test": "c"}),
        ({"train": "c", "val": "b", "trainval": "b\nc", "test": "a"}, {"train": "c", "val": "b", "test": "a"}),
        ({"val": "b"}, {"val": "b"}),
    ],
)
def test_lists(tmp_path: Path, lists: dict[str, str], expected: dict[str, str]) -> None:
    make(tmp_path, {stem: xml(f"{stem}.jpg", GOOD) for stem in "bac"}, lists)
    found = {split: "".join(name[0] for name in names(read(source))) for split, source in find(tmp_path).items()}
    assert found == expected


@pytest.mark.parametrize("place", ["", "VOC2007", "VOCdevkit/VOC2012"])
def test_tree_locations(tmp_path: Path, place: str) -> None:
    make(tmp_path / place, {"a": xml("a.jpg", GOOD)})
    split = find(tmp_path)["train"]
    assert split.source == f"{tmp_path / place} (train)" and names(read(split)) == ["a.jpg"]


def test_several_trees(tmp_path: Path) -> None:
    for place in ("VOC2007", "VOCdevkit/VOC2012"):
        make(tmp_path / place, {"a": xml("a.jpg", GOOD)})
    with pytest.raises(DataError) as error:
        find_voc(tmp_path)
    text = f"holds several VOC trees (VOC2007, VOCdevkit/VOC2012); name one with --data {tmp_path}/VOC2007"
    assert str(error.value) == f"{tmp_path}: {text}"
    make(tmp_path, {"b": xml("b.jpg", GOOD)})
    found, messages = problems_of(find(tmp_path)["train"])
    assert found == {"b.jpg": 1} and set(messages) == {f"{tmp_path}/VOC2007", f"{tmp_path}/VOCdevkit/VOC2012"}


def test_beside_the_images(tmp_path: Path) -> None:
    """As Roboflow exports; a folder without XML files is no split."""
    for folder, stem, name in (("train", "a", "dog"), ("train", "b", "cat"), ("valid", "c", "ant")):
        save_image(tmp_path / folder / f"{stem}.png")
        write(tmp_path / folder / f"{stem}.xml", xml(f"{stem}.png", thing(name)))
    save_image(tmp_path / "test/d.png")
    splits = find(tmp_path)
    assert [(split, source.source, source.folder) for split, source in splits.items()] == [
        ("train", f"{tmp_path}/train", tmp_path / "train"),
        ("val", f"{tmp_path}/valid", tmp_path / "valid"),
    ]
    train, val = read(splits["train"]), read(splits["val"])
    assert names(train) == ["a.png", "b.png"] and names(val) == ["c.png"]
    assert [record["name"] for record in train["categories"]] == ["ant", "cat", "dog"]
    assert train["categories"] == val["categories"]
    assert [record["category_id"] for record in train["annotations"] + val["annotations"]] == [3, 2, 1]


def test_names_that_differ_in_case(tmp_path: Path) -> None:
    """The exact name comes first: none of the files stands in for another."""
    files = {stem: xml(f"{stem}.jpg", *[GOOD] * number) for number, stem in enumerate(("A", "a", "%61", "é"), start=1)}
    make(tmp_path, files | {"e\u0301": xml("e\u0301.jpg")})
    expected = {"A.jpg": 1, "a.jpg": 2, "%61.jpg": 3, "é.jpg": 4, "e\u0301.jpg": 0}
    assert problems_of(find(tmp_path)["train"]) == (expected, {})
    write(tmp_path / "ImageSets/Main/train.txt", "A\na\n%61\né\ne\u0301\n")
    assert problems_of(find(tmp_path)["train"]) == (expected, {})
    write(tmp_path / "ImageSets/Main/train.txt", "A\na\n%41\n")
    listing = f"{tmp_path}/ImageSets/Main/train.txt:3"
    text = "lists '%41', which may be %61.xml, A.xml, a.xml; write the name as it is there, with its folder"
    assert problems_of(find(tmp_path)["train"]) == ({"A.jpg": 1, "a.jpg": 2}, {listing: text})


def test_an_image_that_differs_in_case_from_another(tmp_path: Path) -> None:
    """It is not passed over because the other one has an XML file."""
    make(tmp_path, {"a": xml("a.jpg", GOOD)})
    for name in ("A.jpg", "a.png"):
        save_image(tmp_path / "JPEGImages" / name)
    found, messages = problems_of(find(tmp_path)["train"])
    assert found == {"a.jpg": 1}
    assert set(messages) == {f"{tmp_path}/JPEGImages/A.jpg", f"{tmp_path}/JPEGImages/a.png"}


@pytest.mark.parametrize(("annotations", "images"), [("Annotations", "JPEGImages"), ("train", "train")])
def test_subfolders(tmp_path: Path, annotations: str, images: str) -> None:
    """Each XML file's image is in the same subfolder, or else the only one of its name."""
    places = {"": ("a", 1), "batch2": ("a", 2), "batch2/deep": ("b", 3)}
    for place, (stem, number) in places.items():
        save_image(tmp_path / images / place / f"{stem}.jpg")
        write(tmp_path / annotations / place / f"{stem}.xml", xml(f"{stem}.jpg", *[GOOD] * number))
    (tmp_path / annotations / "other").mkdir()
    write(tmp_path / annotations / "other/c.xml", xml("c.jpg", thing("cat")))
    save_image(tmp_path / images / "c.jpg")
    save_image(tmp_path / images / "batch2/alone.jpg")
    split = find(tmp_path)["train"]
    found, messages = problems_of(split)
    assert found == {"a.jpg": 1, "batch2/a.jpg": 2, "batch2/deep/b.jpg": 3, "c.jpg": 1}
    assert messages.pop(f"{tmp_path}/{annotations}/other/c.xml") == "its image is c.jpg"
    assert list(messages) == [f"{tmp_path}/{images}/batch2/alone.jpg"]
    assert split.classes.names == ("cat", "dog")


def test_lists_of_files_in_subfolders(tmp_path: Path) -> None:
    for place in ("one", "two"):
        for stem in ("a", place):
            save_image(tmp_path / "JPEGImages" / place / f"{stem}.jpg")
            write(tmp_path / "Annotations" / place / f"{stem}.xml", xml(f"{stem}.jpg", GOOD))
    file = tmp_path / "ImageSets/Main/train.txt"
    write(file, "one/a\nJPEGImages/two/a.jpg 1\ntwo -1")
    assert problems_of(find(tmp_path)["train"]) == ({"one/a.jpg": 1, "two/a.jpg": 1, "two/two.jpg": 1}, {})
    write(file, "a\ntwo")
    text = "lists 'a', which may be one/a.xml, two/a.xml; write the name as it is there, with its folder"
    assert problems_of(find(tmp_path)["train"]) == ({"two/two.jpg": 1}, {f"{file}:1": text})


def test_a_list_that_leaves_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path, {"a": xml("a.jpg", GOOD)}, {"trainval": "a", "val": "a"})
    main = folder / "ImageSets/Main"
    text = f"{main}/trainval.txt: lists no image that {main}/val.txt does not list too; take some lines out of that one"
    refused(find(folder)["train"], text, [])


def test_no_voc(tmp_path: Path) -> None:
    assert find_voc(tmp_path / "nothing") is None
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "train").mkdir()
    assert find_voc(tmp_path) is None


def test_classes_are_read_once(tmp_path: Path) -> None:
    make(tmp_path, {"a": xml("a.jpg", GOOD), "b": xml("b.jpg", thing("cat"))}, {"train": "a", "val": "b"})
    splits = find(tmp_path)
    before = read(splits["train"])["categories"]
    write(tmp_path / "Annotations/c.xml", xml("c.jpg", thing("ant")))
    assert read(splits["val"])["categories"] == before
    assert len(read(find(tmp_path)["val"])["categories"]) == 3


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (SIZE, {"height": HEIGHT, "width": WIDTH}),
        ("", {}),
        ("<size/>", {}),
        ("<size><width>64</width></size>", {}),
        ("<size><width>64</width><height></height></size>", {}),
        ("<size><width>0</width><height>0</height><depth>0</depth></size>", {}),
    ],
)
def test_sizes(tmp_path: Path, size: str, expected: dict[str, int]) -> None:
    split = find(make(tmp_path, {"a": xml("a.jpg", GOOD, size=size)}))["train"]
    assert read(split)["images"] == [{"id": 1, "file_name": "a.jpg", **expected}]


@pytest.mark.parametrize(
    ("stated", "image"),
    [
        ("b.JPG", "b.JPG"),
        ("a", "a.jpg"),
        ("", "a.jpg"),
        ("renamed.jpg", "a.jpg"),
        ("a.bmp", "a.jpg"),
        ("..", "a.jpg"),
        ("notes.txt", "a.jpg"),
        ("../../secret.jpg", "a.jpg"),
        ("/etc/passwd", "a.jpg"),
        (r"C:\pictures\b.JPG", "b.JPG"),
        ("train/b.JPG", "b.JPG"),
    ],
)
def test_file_names(tmp_path: Path, stated: str, image: str) -> None:
    folder = make(tmp_path / "set", {"a": xml(f" {stated}\n", GOOD)})
    for name in ("JPEGImages/b.JPG", "../secret.jpg"):
        save_image(folder / name)
    write(folder / "JPEGImages/notes.txt", "no image")
    problems = Problems(collects=True)
    assert names(read(find(folder)["train"], problems)) == [image]
    base = stated.replace("\\", "/").split("/")[-1]
    text = f"{folder}/Annotations/a.xml: its <filename> {stated!r} is a path; only {base!r} of it counts"
    found = [problem for problem in map(str, problems.listed) if "filename" in problem]
    assert found == ([text] if base != stated else [])
    expected = {"filename is a path": int(base != stated), "images without an XML file": 1}  # the other one
    assert problems.counts(NOTE) == {kind: count for kind, count in expected.items() if count}


def test_deep_elements(tmp_path: Path) -> None:
    deep = xml("a.jpg", GOOD, 10**5 * "<a>" + 10**5 * "</a>")
    assert len(read(find(make(tmp_path, {"a": deep}))["train"])["annotations"]) == 1


def test_encodings(tmp_path: Path) -> None:
    text = xml("a.jpg", thing("Tür"))
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1"):
        head = "" if encoding.startswith("utf") else f'<?xml version="1.0" encoding="{encoding}"?>'
        make(tmp_path, {"a": (head + text).encode(encoding)})
        assert read(find(tmp_path)["train"])["categories"] == [{"id": 1, "name": "Tür"}]


def test_links(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", {"a": xml("a.jpg", GOOD)})
    (folder / "JPEGImages").rename(tmp_path / "images")
    (folder / "JPEGImages").symlink_to(tmp_path / "images")
    (folder / "JPEGImages/again").symlink_to(tmp_path / "images")
    (folder / "VOC2007").symlink_to(folder)
    assert names(read(find(folder)["train"])) == ["a.jpg"]
    (folder / "Annotations/b.xml").symlink_to("b.xml")
    with pytest.raises(DataError, match=r"b\.xml: cannot be read as XML \(.*symbolic links"):
        read(find(folder)["train"])


# What is refused

CORNER = "has no <{}> in a <bndbox>; annotate it with a box, or remove it"
OBJECTS = {
    thing(corners=(24, 5, 9, 20)): "has the corners (24, 5) and (9, 20); xmin and ymin must be the smaller ones",
    thing(corners=(9, 20.5, 24, 20)): "has the corners (9, 20.5) and (24, 20); xmin and ymin must be the smaller ones",
    thing(corners=(9, 5, "x", 20)): "has the <xmax> 'x'; expected a number of pixels",
    thing(corners=(9, 5, 24, "")): "has the <ymax> ''; expected a number of pixels",
    thing(corners=("nan", 5, 24, 20)): "has the <xmin> 'nan'; expected a number of pixels",
    thing(corners=(9, "-inf", 24, 20)): "has the <ymin> '-inf'; expected a number of pixels",
    thing(corners=(9, 5, 24, "1e999")): "has the <ymax> '1e999'; expected a number of pixels",
    thing().replace("xmin", "x"): CORNER.format("xmin"),
    "<object><name>dog</name><polygon/></object>": CORNER.format("xmin"),
    thing(" "): "has no <name>; write its class there",
    "<object/>": "has no <name>; write its class there",
    thing(more="<difficult>2</difficult>"): "has <difficult> '2'; expected 0 or 1",
}


@pytest.mark.parametrize("wrong", OBJECTS)
def test_a_wrong_object(tmp_path: Path, wrong: str) -> None:
    split = find(make(tmp_path, {"a": xml("a.jpg", GOOD, wrong, GOOD), "b": xml("b.jpg", GOOD)}))["train"]
    expected = f"{tmp_path}/Annotations/a.xml: object 2 {OBJECTS[wrong]}"
    with pytest.raises(DataError) as error:
        read(split)
    assert str(error.value) == expected
    problems = Problems(collects=True)
    lists = read(split, problems)
    assert list(map(str, problems.listed)) == [expected] and problems.listed[0].image == "a.jpg"
    assert [(record["image_id"], record["bbox"]) for record in lists["annotations"]] == [
        (1, GOOD_BOX), (1, GOOD_BOX), (2, GOOD_BOX)
    ]  # fmt: skip


BOMB = "".join(f'<!ENTITY e{n} "{10 * f"&e{n - 1};"}">' for n in range(1, 10))
DOCTYPE = "it declares a document type; remove the line <!DOCTYPE ...>"
XMLS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "no element found: line 1, column 0"),
    "open": ("<annotation>\n<object>", "no element found: line 2, column 8"),
    "crossed": ("<annotation></object>", "mismatched tag: line 1, column 14"),
    "two": ("<annotation/><annotation/>", "junk after document element: line 1, column 13"),
    "text": ("0 0.5 0.5 0.5 0.5", "syntax error: line 1, column 0"),
    "binary": (b"\x00\xff\x00", "syntax error: line 1, column 0"),
    "latin": (b"<annotation>\xe9</annotation>", "not well-formed (invalid token): line 1, column 12"),
    "encoding": ('<?xml version="1.0" encoding="nothing"?><annotation/>', "unknown encoding: nothing"),
    "many bytes": ('<?xml version="1.0" encoding="gb2312"?><annotation/>',
                   "multi-byte encodings are not supported"),
    "entity": ("<annotation>&e;</annotation>", "undefined entity: line 1, column 12"),
    "bomb": (f'<!DOCTYPE x [<!ENTITY e0 "ha">{BOMB}]><annotation><filename>&e9;</filename></annotation>', DOCTYPE),
    "hidden bomb": (f'<!DOCTYPE x [<!ENTITY e0 "ha">{BOMB}]><annotation>&e9;</annotation>'.encode("utf-16"), DOCTYPE),
    "outside": ('<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>', DOCTYPE),
    "deep": (10**5 * "<a>", f"no element found: line 1, column {3 * 10**5}"),
    "large": (b"<annotation>" + 20 * 10**6 * b" ", "it is larger than 20 MB"),
}  # fmt: skip
ANNOTATIONS = {
    "<annotations/>": "is no VOC annotation: its outermost element is <annotations>, not <annotation>",
    xml("c.jpg", size="<size><width>64.5</width><height>-2</height></size>"): (
        "its <size> is 64.5 x -2; expected whole numbers of pixels, or 0"
    ),
    xml("c.jpg", size=f"<size><width>{10**10}</width><height>2</height></size>"): (
        f"its <size> is {10**10} x 2; expected whole numbers of pixels, or 0"
    ),
    xml("a.jpg"): "is of the image a.jpg, as is {folder}/Annotations/a.xml; correct its <filename>, or remove one",
}


def with_file(folder: Path, content: str | bytes) -> VocSplit:
    """A split of three, whose second file has this content."""
    return find(make(folder, {"a": xml("a.jpg", GOOD), "c": content, "d": xml("d.jpg", GOOD)}))["train"]


def refused(split: VocSplit, expected: str, images: list[str]) -> None:
    """It ends with the message `expected`; where problems are collected, that is the only one and `images` are read."""
    with pytest.raises(DataError) as error:
        read(split)
    assert str(error.value) == expected
    problems = Problems(collects=True)
    assert names(read(split, problems)) == images
    assert [str(problem) for problem in problems.listed if problem.grade == ERROR] == [expected]


@pytest.mark.parametrize("case", XMLS)
def test_no_xml(tmp_path: Path, case: str) -> None:
    content, reason = XMLS[case]
    text = f"cannot be read as XML ({reason}); mend it, or save it anew in UTF-8"
    refused(with_file(tmp_path, content), f"{tmp_path}/Annotations/c.xml: {text}", ["a.jpg", "d.jpg"])


@pytest.mark.parametrize("content", ANNOTATIONS)
def test_no_annotation(tmp_path: Path, content: str) -> None:
    text = ANNOTATIONS[content].format(folder=tmp_path)
    refused(with_file(tmp_path, content), f"{tmp_path}/Annotations/c.xml: {text}", ["a.jpg", "d.jpg"])


def test_missing_images(tmp_path: Path) -> None:
    folder = make(tmp_path, {"a": xml("a.jpg", GOOD), "b": xml("b.jpg", GOOD)})
    split, file = find(folder)["train"], f"{folder}/Annotations/b.xml"
    (folder / "JPEGImages/b.jpg").rename(folder / "JPEGImages/c.jpg")
    text = f"its <filename> 'b.jpg' is not in {folder}/JPEGImages, and"
    refused(split, f"{file}: {text} no b.jpg or the like either; correct it or add the image", ["a.jpg"])
    for suffix in ("PNG", "jpeg"):
        save_image(folder / f"JPEGImages/b.{suffix}")
    refused(split, f"{file}: {text} several images fit (b.PNG, b.jpeg); correct it or add the image", ["a.jpg"])
    for path in (folder / "JPEGImages").iterdir():
        path.unlink()
    refused(split, f"{folder}/JPEGImages: holds no images (those of {folder}/Annotations)", [])
    (folder / "JPEGImages").rmdir()
    refused(split, f"{folder}/JPEGImages: no such image folder (the images of {folder}/Annotations)", [])


@pytest.mark.parametrize(
    ("content", "line", "message", "images"),
    [
        ("a\nc\nb", 2, "lists 'c', but {folder}/Annotations has no c.xml; add it or remove the line", "ab"),
        ("a.jp\nb", 1, "lists 'a.jp', but {folder}/Annotations has no a.jp.xml; add it or remove the line", "b"),
        ("a\n\nb\na 1", 4, "lists 'a 1' again, after line 1; remove one", "ab"),
        ("a\nb\nA.jpg", 3, "lists 'A.jpg' again, after line 1; remove one", "ab"),
        (" \n", None, "lists no images; write a name without suffix on each line", ""),
        (
            b"\xff", None,
            "cannot be read as UTF-8 text ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); "
            "save it anew", "",
        ),
    ],
)  # fmt: skip
def test_a_wrong_list(tmp_path: Path, content: str | bytes, line: int | None, message: str, images: str) -> None:
    make(tmp_path, {"a": xml("a.jpg", GOOD), "b": xml("b.jpg", GOOD)})
    file = tmp_path / "ImageSets/Main/train.txt"
    write(file, content)
    expected = f"{file}:{line}: {message}" if line else f"{file}: {message}"
    refused(find(tmp_path)["train"], expected.format(folder=tmp_path), [f"{stem}.jpg" for stem in images])
