"""Hugging Face sets whose splits do not agree: other orders of the classes, other columns, several images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.data.stream import open_stream
from direct_pt.errors import InputError
from direct_pt.images import DEFAULT_DECODING

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
    with pytest.raises(InputError, match=r"category_id -1, which 'categories' does not list"):
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
    assert names_of_objects(table) == ["dog", "dog"]
