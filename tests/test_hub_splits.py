"""Hugging Face sets whose splits do not agree: other orders of the classes, other columns, several images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.data.stream import open_stream
from direct_pt.errors import InputError
from direct_pt.images.decoding import DEFAULT_DECODING

BOX = [1.0, 2.0, 8.0, 9.0]
Rows = list[list[Any]]  # of each image, its objects' categories


def split_of(
    rows: Rows, kind: Any, tmp_path: Path, objects: str = "objects", images: tuple[str, ...] = ("image",)
) -> datasets.Dataset:
    """A split with images of 30x20; those of the columns `images` differ in size, by their place."""
    columns: dict[str, Any] = {objects: [{"bbox": [BOX] * len(row), "category": row} for row in rows]}
    fields = {"bbox": datasets.List(datasets.List(datasets.Value("float64"), 4)), "category": datasets.List(kind)}
    features: dict[str, Any] = {objects: fields}
    for number, name in enumerate(images):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (30 + number, 20)).save(path)
        columns[name] = [{"bytes": path.read_bytes(), "path": None}] * len(rows)
        features[name] = datasets.Image()
    ordered = {name: columns[name] for name in (*images, objects)}
    return datasets.Dataset.from_dict(ordered, features=datasets.Features({name: features[name] for name in ordered}))


def parquet(splits: dict[str, datasets.Dataset], folder: Path) -> None:
    folder.mkdir()
    for name, rows in splits.items():
        rows.to_parquet(folder / f"{name}-00000-of-00001.parquet")


def saved(splits: dict[str, datasets.Dataset], folder: Path) -> None:
    datasets.DatasetDict(splits).save_to_disk(folder)


Write = Callable[[dict[str, datasets.Dataset], Path], None]


@pytest.fixture(params=[parquet, saved])
def write(request: pytest.FixtureRequest) -> Write:
    return request.param


def names_of_objects(table: AnnotationTable) -> list[str]:
    return [table.class_names[label] for label in table.labels.tolist()]


CAT_DOG, DOG_CAT = datasets.ClassLabel(names=["cat", "dog"]), datasets.ClassLabel(names=["dog", "cat"])
DOG_EEL = datasets.ClassLabel(names=["dog", "eel"])
TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")


@pytest.mark.parametrize(
    ("train", "val", "val_rows", "expected", "classes"),
    [
        (CAT_DOG, DOG_CAT, [[0], [1, 0]], ["dog", "cat", "dog"], ("cat", "dog")),
        (CAT_DOG, TEXT, [["dog"], ["cat"]], ["dog", "cat"], ("cat", "dog")),
        (CAT_DOG, DOG_EEL, [[0, 1]], ["dog", "eel"], ("cat", "dog", "eel")),
    ],
)
def test_classes_are_matched_by_name(
    write: Write, tmp_path: Path, train: Any, val: Any, val_rows: Rows, expected: list[str], classes: tuple[str, ...]
) -> None:
    splits = {"train": split_of([[0], [1]], train, tmp_path), "validation": split_of(val_rows, val, tmp_path)}
    write(splits, tmp_path / "set")
    tables = load_tables(DataOptions(data=tmp_path / "set"))
    assert tables["train"].class_names == tables["val"].class_names == classes
    assert tables["train"].category_ids == tables["val"].category_ids == tuple(range(len(classes)))
    assert names_of_objects(tables["train"]) == ["cat", "dog"]
    assert names_of_objects(tables["val"]) == expected


def test_a_stream_matches_classes_by_name(tmp_path: Path) -> None:
    """The classes are the training split's, whichever split is read."""
    splits = {"validation": split_of([[0], [1]], DOG_CAT, tmp_path), "train": split_of([[0], [1]], CAT_DOG, tmp_path)}
    parquet(splits, tmp_path / "set")
    stream = open_stream(tmp_path / "set", "coco", DEFAULT_DECODING, 10)
    val = load_tables(DataOptions(data=tmp_path / "set", streaming=True), ["val"])["val"]
    assert stream.class_names == val.class_names == ("cat", "dog")
    assert names_of_objects(val) == ["dog", "cat"]
    assert stream.layout.ids is None


def test_numbers_that_no_class_has(write: Write, tmp_path: Path) -> None:
    """In a split with an order of its own they do not become another class."""
    splits = {
        "train": split_of([[0]], datasets.ClassLabel(names=["cat", "dog", "eel"]), tmp_path),
        "validation": split_of([[-1]], DOG_CAT, tmp_path),
    }
    write(splits, tmp_path / "set")
    with pytest.raises(InputError, match=r"category_id -1, which 'categories' does not list; correct one of them"):
        load_tables(DataOptions(data=tmp_path / "set"))


def test_numbers_in_one_split_and_names_in_another(write: Write, tmp_path: Path) -> None:
    splits = {"train": split_of([[0]], CAT_DOG, tmp_path), "validation": split_of([[0]], NUMBER, tmp_path)}
    write(splits, tmp_path / "set")
    with pytest.raises(InputError, match=r"holds numbers in one split, names in another"):
        load_tables(DataOptions(data=tmp_path / "set"))


def test_columns_of_other_names_in_one_split(tmp_path: Path) -> None:
    splits = {
        "train": split_of([[0]], CAT_DOG, tmp_path),
        "validation": split_of([[1]], CAT_DOG, tmp_path, "annotations", ("photo",)),
    }
    for name, rows in splits.items():  # the library loads only splits of the same columns together
        rows.to_parquet(tmp_path / "set" / name / "rows.parquet")
    tables = load_tables(DataOptions(data=tmp_path / "set"))
    assert names_of_objects(tables["val"]) == ["dog"] and tables["val"].read_image(0).shape == (20, 30, 3)


def test_several_image_columns(write: Write, tmp_path: Path) -> None:
    """The usual name is taken; where there is none, nobody guesses."""
    write({"train": split_of([[0]], CAT_DOG, tmp_path, images=("mask", "image"))}, tmp_path / "set")
    table = load_tables(DataOptions(data=tmp_path / "set"))["train"]
    assert table.read_image(0).shape == (20, 31, 3)
    write({"train": split_of([[0]], CAT_DOG, tmp_path, images=("left", "right"))}, tmp_path / "two")
    with pytest.raises(InputError, match=r"has the image columns left, right; rename the one to learn from to 'image'"):
        load_tables(DataOptions(data=tmp_path / "two"))


def test_a_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    """The library finds nothing there, and blames the folder's content."""
    split = {"train": split_of([[0], [1]], CAT_DOG, tmp_path)}
    saved(split, tmp_path / "saved [new]")
    assert len(load_tables(DataOptions(data=tmp_path / "saved [new]", val_share=0))["train"]) == 2
    parquet(split, tmp_path / "set [new]*")
    with pytest.raises(InputError, match=r"takes \* \[ in a path for a pattern; rename the folder"):
        load_tables(DataOptions(data=tmp_path / "set [new]*"))
    parquet(split, tmp_path / "set")
    (file,) = (tmp_path / "set").iterdir()
    file.rename(file.with_name("train [1].parquet"))
    assert len(load_tables(DataOptions(data=tmp_path / "set", val_share=0))["train"]) == 2


def test_files_of_one_split_that_do_not_agree(tmp_path: Path) -> None:
    """The library would read the second file's numbers as the first one's classes."""
    (tmp_path / "set").mkdir()
    for number, kind in enumerate((CAT_DOG, DOG_CAT)):
        split_of([[0]], kind, tmp_path).to_parquet(tmp_path / "set" / f"train-0000{number}-of-00002.parquet")
    with pytest.raises(InputError, match=r"train-00001-of-00002\.parquet: its columns or classes are not those of"):
        load_tables(DataOptions(data=tmp_path / "set"))


def test_splits_that_are_not_used(tmp_path: Path) -> None:
    splits = {name: split_of([[0], [1]], CAT_DOG, tmp_path) for name in ("train", "validation", "dev", "extra")}
    saved(splits, tmp_path / "set")
    tables = load_tables(DataOptions(data=tmp_path / "set"))
    (text,) = (text for text in tables["train"].repairs if text.startswith("splits that are not used"))
    assert tables["train"].repairs[text] == 2 and not any("splits" in text for text in tables["val"].repairs)


def test_several_subsets(tmp_path: Path) -> None:
    """A flag chooses one; without it the message lists them."""
    for name, kind in (("first", CAT_DOG), ("second", DOG_CAT)):
        split_of([[0], [0]], kind, tmp_path).to_parquet(tmp_path / "set" / name / "train.parquet")
    configs = [{"config_name": name, "data_files": f"{name}/train.parquet"} for name in ("first", "second")]
    (tmp_path / "set/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with pytest.raises(InputError, match=r"has several subsets: choose one with --subset, of first, second"):
        load_tables(DataOptions(data=tmp_path / "set"))
    with pytest.raises(InputError, match=r"--subset third.*first.*second"):
        load_tables(DataOptions(data=tmp_path / "set", subset="third"))
    table = load_tables(DataOptions(data=tmp_path / "set", subset="second", val_share=0))["train"]
    assert names_of_objects(table) == ["dog", "dog"] and noted(table) == {}
    configs[0]["default"] = True
    (tmp_path / "set/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    table = load_tables(DataOptions(data=tmp_path / "set", val_share=0))["train"]
    assert names_of_objects(table) == ["cat", "cat"] and noted(table) == {"subsets that are not used": 1}


def noted(table: AnnotationTable) -> dict[str, int]:
    """How many notes of each kind."""
    return {text.partition(",")[0]: count for text, count in table.repairs.items() if ", such as " in text}


def test_files_in_no_split(tmp_path: Path) -> None:
    rows = split_of([[0], [0]], CAT_DOG, tmp_path)
    data = tmp_path / "set"
    parquet({"train": rows, "validation": rows}, data)
    assert noted(load_tables(DataOptions(data=data))["train"]) == {}
    for name in ("more", "b/trainextra", ".cache/old"):
        rows.to_parquet(data / f"{name}.parquet")
    rows.save_to_disk(data / "older")
    tables = load_tables(DataOptions(data=data))
    assert len(tables["train"]) == 2 and noted(tables["train"]) == {"files that are in no split": 3}
    assert noted(tables["val"]) == {}


def test_files_beside_a_saved_set(tmp_path: Path) -> None:
    rows = split_of([[0], [0]], CAT_DOG, tmp_path)
    data = tmp_path / "set"
    saved({"train": rows}, data)
    assert noted(load_tables(DataOptions(data=data, val_share=0))["train"]) == {}
    rows.to_parquet(data / "train.parquet")
    rows.save_to_disk(data / "validation")  # after the set itself, which does not list it
    table = load_tables(DataOptions(data=data, val_share=0, subset="x"))["train"]
    assert noted(table) == {"files that are in no split": 2, "flags without effect": 1}


# Features that only README.md states


def declare(data: Path, column: str = "image", names: tuple[str, ...] = ("pear", "apple")) -> None:
    """A README.md as the library writes it."""
    labels = {"class_label": {"names": dict(enumerate(names))}}
    boxes = {"name": "bbox", "list": {"list": "float64"}}
    objects = {"name": "objects", "struct": [boxes, {"name": "category", "list": labels}]}
    info = {"features": [{"name": column, "dtype": "image"}, objects]}
    (data / "README.md").write_text(f"---\ndataset_info: {json.dumps(info)}\n---\n")


def plain_parquet(rows: Rows, kind: Any, tmp_path: Path, image: str = "image") -> Path:
    """A set without the library's own metadata, as other programs write it."""
    table = split_of(rows, kind, tmp_path, images=(image,)).with_format("arrow")[:]
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(table.replace_schema_metadata({}), tmp_path / "set/train.parquet")
    return tmp_path / "set"


@pytest.mark.parametrize("image", ["image", "photo"])
@pytest.mark.parametrize(("kind", "rows"), [(NUMBER, [[0], [1]]), (TEXT, [["pear"], ["apple"]])])
def test_classes_that_the_readme_names(tmp_path: Path, kind: Any, rows: Rows, image: str) -> None:
    data = plain_parquet(rows, kind, tmp_path, image)
    declare(data, image)
    table = load_tables(DataOptions(data=data, val_share=0))["train"]
    assert table.class_names == ("pear", "apple") and names_of_objects(table) == ["pear", "apple"]
    stream = open_stream(data, "coco", DEFAULT_DECODING, 10)
    assert stream.class_names == ("pear", "apple")


def test_classes_of_an_image_folder_that_the_readme_names(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    row = {"file_name": "a.png", "objects": {"bbox": [BOX], "category": [1]}}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    declare(tmp_path)
    table = load_tables(DataOptions(data=tmp_path, val_share=0))["train"]
    assert names_of_objects(table) == ["apple"] and len(table.class_names) == 2


def test_a_readme_that_contradicts_the_files(tmp_path: Path) -> None:
    parquet({"train": split_of([[0]], CAT_DOG, tmp_path)}, tmp_path / "set")
    declare(tmp_path / "set", names=("cat", "dog"))
    assert load_tables(DataOptions(data=tmp_path / "set", val_share=0))["train"].class_names == ("cat", "dog")
    declare(tmp_path / "set", names=("dog", "cat"))
    with pytest.raises(InputError, match=r"its files name other classes than its README\.md: .* has 0 'cat', 1 'dog'"):
        load_tables(DataOptions(data=tmp_path / "set", val_share=0))


def test_a_class_that_the_readme_lacks(tmp_path: Path) -> None:
    data = plain_parquet([["pear"], ["plum"]], TEXT, tmp_path)
    declare(data)
    with pytest.raises(InputError, match=r"category_id 'plum'; it must be one of 'categories'"):
        load_tables(DataOptions(data=data, val_share=0))


def test_a_number_that_no_class_has_is_named(tmp_path: Path) -> None:
    """Also where the split has an order of its own."""
    fruit = datasets.ClassLabel(names=["dog", "cat"])
    split = (
        split_of([[0], [1]], CAT_DOG, tmp_path),
        split_of([[7]], NUMBER, tmp_path).cast_column(
            "objects", datasets.Features(split_of([[0]], fruit, tmp_path).features)["objects"]
        ),
    )
    saved(dict(zip(("train", "validation"), split, strict=True)), tmp_path / "set")
    with pytest.raises(InputError, match=r"category_id 7, which 'categories' does not list; correct one of them"):
        load_tables(DataOptions(data=tmp_path / "set"))


# Places, and the hold-out


def test_a_set_one_folder_below(tmp_path: Path) -> None:
    """The hub's own conversion lies in a folder of the subset's name."""
    rows = split_of([[0]], CAT_DOG, tmp_path)
    rows.to_parquet(tmp_path / "hub/default/train/0000.parquet")
    saved({"train": rows}, tmp_path / "disk/inner")
    for place in ("hub/default", "disk/inner"):
        with pytest.raises(InputError, match=rf"holds no data set itself, but .*{place} is one: give that"):
            load_tables(DataOptions(data=(tmp_path / place).parent))
        assert len(load_tables(DataOptions(data=tmp_path / place, val_share=0))["train"]) == 1


def named_rows(names: list[str], tmp_path: Path) -> datasets.Dataset:
    rows = split_of([[0]] * len(names), CAT_DOG, tmp_path)
    return rows.add_column("file_name", names)


def held_out(names: list[str], tmp_path: Path, folder: str) -> set[str]:
    """The names, without the rows' numbers, of those on the validation side; no photograph is on both."""
    saved({"train": named_rows(names, tmp_path)}, tmp_path / folder)
    tables = load_tables(DataOptions(data=tmp_path / folder, val_share=0.2))
    sides = [[name.decode().partition(", ")[2] for name in tables[split].file_names] for split in ("train", "val")]
    photographs = [{name.partition(".rf.")[0] for name in side} for side in sides]
    assert len(set(names)) < len(names) or not photographs[0] & photographs[1]
    return set(sides[1])


def test_the_hold_out_of_rows(tmp_path: Path) -> None:
    """Copies of one photograph stay on one side, whatever the order of the rows."""
    names = [f"photo{row // 3}_jpg.rf.{row:032x}.jpg" for row in range(30)]
    val = held_out(names, tmp_path, "set")
    assert len(val) == 6 and val == held_out(names[::-1], tmp_path, "turned")
    plain = [f"{row}.jpg" for row in range(20)]
    val = held_out(plain, tmp_path, "plain")
    assert len(val) == 4 and val == held_out(plain[::-1], tmp_path, "plain turned")


def test_rows_of_one_name_are_no_copies(tmp_path: Path) -> None:
    assert held_out(["image.jpg"] * 20, tmp_path, "set") == {"image.jpg"}
