"""Sets at the edges of what is trained on: each ends sensibly."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as runs
from PIL import Image

from direct_pt.data.loader import TableFeed
from direct_pt.data.order import SampleOrder, repeat_factors
from direct_pt.data.problems import NOTE, Problems
from direct_pt.data.sources import DataOptions, hold_out, load_tables
from direct_pt.errors import InputError
from direct_pt.transforms import PretrainPreset

FLAGS = (*runs.TINY, "--image-size", 64, "--max-steps", 2, *runs.NO_EVALUATION)


def write(folder: Path, objects: list[list[int]], classes: int, splits: tuple[str, ...] = ("train",)) -> Path:
    """A COCO tree: of each image the classes of its objects."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    content: dict[str, list[Any]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": 3 * number + 1, "name": f"class {number}"} for number in range(classes)]
    rng = np.random.default_rng(0)
    for row, labels in enumerate(objects):
        name = f"{row:04d}.jpg"
        Image.fromarray(rng.integers(256, size=(48, 64, 3), dtype=np.uint8)).save(folder / "images" / name)
        content["images"].append({"id": row + 1, "file_name": name, "width": 64, "height": 48})
        for label in labels:
            box = [*rng.integers(1, 20, 2).tolist(), 24, 20]
            record = {"id": len(content["annotations"]) + 1, "image_id": row + 1, "bbox": box}
            content["annotations"].append(record | {"category_id": 3 * label + 1, "area": 480, "iscrowd": 0})
    for split in splits:
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return folder


def train_both(data: Path, run: Path, *flags: object) -> list[dict[str, Any]]:
    """Both stages, two steps each; the records of the second."""
    common = ("--data", data, *runs.MACHINE, *flags)
    runs.train("pretrain", *FLAGS, *common, "--output-dir", run / "first")
    second = ("--init", run / "first", *runs.COUNTS, "--short-side", 64, "--long-side", 96, "--max-steps", 2)
    runs.train("finetune", *second, *common, *runs.NO_EVALUATION, "--output-dir", run / "second")
    records = runs.records(run / "second")
    assert records[-1]["step"] == 2 and all(np.isfinite(r["loss"]) for r in records if "loss" in r)
    return records


def test_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It cannot be split: there is no evaluation."""
    flags = ("--global-batch-size", 4, "--micro-batch-size", 4)
    records = train_both(write(tmp_path / "set", [[0, 1]], 2), tmp_path, *flags)
    assert not any("bbox" in record for record in records)
    assert "val        none: no evaluation" in capsys.readouterr().out


def test_one_class_and_one_object(tmp_path: Path) -> None:
    """In one of the images; the same in both splits."""
    data = write(tmp_path / "set", [[], [0], []], 1, ("train", "val"))
    records = train_both(data, tmp_path, "--global-batch-size", 4, "--micro-batch-size", 2)
    assert records[-1]["bbox"]["AP"] >= 0 and list(records[-1]["per_class"]) == ["class 0"]


def test_as_many_classes_as_lvis(tmp_path: Path) -> None:
    """1,203, nine in ten without an object."""
    data = write(tmp_path / "set", [[label, 1202 - label, 600] for label in range(0, 600, 40)], 1203)
    records = train_both(data, tmp_path, "--global-batch-size", 4, "--micro-batch-size", 2, "--repeat-threshold", 0.3)
    assert len(records[-1]["per_class"]) == 1203 and records[-1]["bbox"]["AP"] >= 0
    assert sum(row["objects"] for row in records[-1]["per_class"].values()) == 6  # two of 15 images are held out


def test_no_object_at_all(tmp_path: Path) -> None:
    data = write(tmp_path / "set", [[], []], 2)
    with pytest.raises(InputError, match=r"no image has an object to learn \(1 images, 0 objects\); annotate some"):
        runs.train("pretrain", *FLAGS, "--data", data, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# A validation split out of the training images


def test_hold_out_is_stated_and_stable(tmp_path: Path) -> None:
    data = write(tmp_path / "set", [[0]] * 40, 1)
    options = DataOptions(data=data)
    tables = load_tables(options)
    held, kept = tables["val"], tables["train"]
    assert (len(held), len(kept)) == (4, 36)
    assert not set(held.image_ids) & set(kept.image_ids)
    assert "0.1 held out" in held.source and "0.1 held out" in kept.describe()
    assert load_tables(options, ["val"])["val"].image_ids.tolist() == held.image_ids.tolist()
    whole = load_tables(DataOptions(data=data, val_share=0))
    assert list(whole) == ["train"] and len(whole["train"]) == 40
    # Whatever the order of the file: another image more moves none of those that were held out back.
    turned = hold_out(whole["train"].select(np.arange(40)[::-1]), 0.1)[1]
    assert sorted(turned.image_ids) == sorted(held.image_ids)
    more = hold_out(whole["train"].select(np.arange(20)), 0.5)[1]
    assert set(held.image_ids[held.image_ids <= 20]) <= set(more.image_ids)


HASHES = [f"{number:032x}" for number in range(60)]


@pytest.mark.parametrize(
    "name",
    [
        "{side}/photo{photo}_jpg.rf.{hash}.jpg",
        "photo{photo}_jpg.rf.{hash}.{suffix}",
        "{side}/photo{photo}_jpg.rf.{hash}_jpg.rf.{hash}.jpg",  # exported twice
    ],
)
def test_copies_in_several_folders_stay_on_one_side(tmp_path: Path, name: str) -> None:
    table = load_tables(DataOptions(data=write(tmp_path / "set", [[0]] * 60, 1), val_share=0))["train"]
    names = [
        name.format(side="ab"[row % 2], suffix=("jpg", "png")[row % 2], photo=row // 3, hash=HASHES[row])
        for row in range(60)
    ]
    table.file_names = np.array([name.encode() for name in names])
    train, val = hold_out(table, 0.1)
    photographs = [{re.sub(rb".*/|_jpg.*", b"", name) for name in part.file_names.tolist()} for part in (train, val)]
    assert not photographs[0] & photographs[1] and 4 <= len(val) <= 8


def test_photographs_of_one_name_in_several_folders(tmp_path: Path) -> None:
    """They are no copies, and held out by their whole names, as ever."""
    table = load_tables(DataOptions(data=write(tmp_path / "set", [[0]] * 60, 1), val_share=0))["train"]
    table.file_names = np.array([b"%d/%04d.jpg" % (row % 3, row // 3) for row in range(60)])
    lowest = sorted(table.file_names.tolist(), key=lambda name: hashlib.sha256(name).digest())[:6]
    assert sorted(hold_out(table, 0.1)[1].file_names.tolist()) == sorted(lowest)


# Flags, and joined sets


def notes(options: DataOptions) -> list[str]:
    """The notes of check_data; the banner of training has as many."""
    problems = {split: Problems(collects=True) for split in ("train", "val", "test")}
    load_tables(options, problems=problems)
    found = [problem for own in problems.values() for problem in own.listed if problem.grade == NOTE]
    banner = {text: count for table in load_tables(options).values() for text, count in table.repairs.items()}
    assert sum(count for text, count in banner.items() if ", such as " in text) == len(found)
    return [str(problem) for problem in found]


def test_flags_without_effect(tmp_path: Path) -> None:
    data = write(tmp_path / "set", [[0]] * 4, 1)
    assert notes(DataOptions(data=data)) == notes(DataOptions(data=data, val_share=0.3)) == []
    hub = "has no effect: it is for Hugging Face data"
    assert notes(DataOptions(data=data, subset="x", bbox_format="voc")) == [f"--subset: {hub}", f"--bbox-format: {hub}"]
    explicit = (data / "images",), (data / "annotations/instances_train.json",)
    options = DataOptions(
        train_images=explicit[0], train_annotations=explicit[1], val_images=explicit[0], val_annotations=explicit[1],
        val_share=0.3, bbox_format="voc", shuffle_buffer=5,
    )  # fmt: skip
    found = notes(options)
    assert found[:3] == [
        f"--bbox-format: {hub}",
        "--val-share: has no effect: there is a validation split",
        "--shuffle-buffer: has no effect: it is for --streaming",
    ]
    assert len(found) == 7 and all("is in train too" in note for note in found[3:])  # the same four images


def test_repairs_of_joined_files_count_once(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", [[0]], 1), write(tmp_path / "b", [[0]], 1)
    files = [folder / "annotations/instances_train.json" for folder in (first, second)]
    content = json.loads(files[0].read_text())
    content["annotations"][0]["bbox"][2] = 500
    files[0].write_text(json.dumps(content))
    options = DataOptions(
        train_images=(first / "images", second / "images"), train_annotations=tuple(files), val_share=0
    )
    problems = {"train": Problems(collects=True)}
    expected = {"boxes clipped to their image by more than 1 pixel": 1}
    assert load_tables(options)["train"].repairs == expected
    assert load_tables(options, ["train"], problems)["train"].repairs == expected


@pytest.mark.parametrize("second", ["images", "link", "link/../images", "links"])
def test_one_image_in_two_joined_files(tmp_path: Path, second: str) -> None:
    """By whatever path: the folder itself, a link to it, or a folder of links to its files."""
    data = write(tmp_path / "set", [[0], [0]], 1)
    (data / "link").symlink_to("images")
    (data / "links").mkdir()
    for image in (data / "images").iterdir():
        (data / "links" / image.name).symlink_to(image)
    file = data / "annotations/instances_train.json"
    other = data / "other.json"
    other.write_text(file.read_text())
    options = DataOptions(train_images=(data / "images", data / second), train_annotations=(file, other))
    with pytest.raises(InputError, match=r"other\.json: lists 0000\.jpg, as does .*instances_train\.json; join its"):
        load_tables(options)


# Classes


def test_class_subset(tmp_path: Path) -> None:
    data = write(tmp_path / "set", [[0, 1, 2], [1], [2, 2]], 3)
    table = load_tables(DataOptions(data=data, val_share=0, classes=("class 2", "class 0")))["train"]
    assert (table.class_names, table.category_ids) == (("class 0", "class 2"), (1, 7))
    assert table.labels.tolist() == [0, 1, 1, 1] and np.diff(table.starts).tolist() == [2, 0, 2]
    with pytest.raises(InputError, match=r"--classes clas 1: .* has no such class; near ones: class 1"):
        load_tables(DataOptions(data=data, classes=("clas 1",)))


def test_files_are_joined_by_class_name(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", [[0, 1]], 2), write(tmp_path / "b", [[0], [2]], 3)
    path = second / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    names = ("class 1", "class 0", "other")
    for category, name in zip(content["categories"], names, strict=True):
        category["name"] = name
    path.write_text(json.dumps(content))
    options = DataOptions(
        train_images=(first / "images", second / "images"),
        train_annotations=(first / "annotations/instances_train.json", path),
        val_share=0,
    )
    table = load_tables(options)["train"]
    assert table.class_names == ("class 0", "class 1", "other") and table.category_ids == (1, 2, 3)
    assert [table.class_names[label] for label in table.labels] == ["class 0", "class 1", "class 1", "other"]
    assert table.image_ids.tolist() == [1, 2, 3] and np.diff(table.starts).tolist() == [2, 1, 1]
    assert [table.path(row) for row in range(3)] == [
        first / "images/0000.jpg", second / "images/0000.jpg", second / "images/0001.jpg",
    ]  # fmt: skip
    assert table.read_image(2).shape == (48, 64, 3)
    val = DataOptions(**vars(options) | {"val_images": (second / "images",), "val_annotations": (path,)})
    with pytest.raises(InputError, match="categories"):  # ids of its own, which are not the joined ones
        load_tables(val)


# Rare classes


def test_rare_classes_are_repeated(tmp_path: Path) -> None:
    data = write(tmp_path / "set", [[0]] * 38 + [[0, 1], [1, 0]], 2)
    table = load_tables(DataOptions(data=data, val_share=0))["train"]
    factors = repeat_factors(table, 0.8)
    np.testing.assert_allclose(factors, [1.0] * 38 + [4.0] * 2)  # sqrt(0.8 / (2 / 40))
    order = SampleOrder(40, seed=0, micro_batch_size=4, repeats=factors)
    assert order.count == 46
    for epoch in range(20):
        counts = np.bincount(order.epoch(epoch), minlength=40)
        assert counts[:38].tolist() == [1] * 38 and counts[38:].tolist() == [4, 4]
    keys = [key for keys in order.micro_batches(0, 23, 0, 1) for key in keys]
    assert len(set(keys)) == len(keys) == 92  # no augmentation comes twice
    halves = SampleOrder(3, 0, 1, repeats=np.array([1.0, 1.5, 2.25]))
    counts = np.mean([np.bincount(halves.epoch(epoch), minlength=3) for epoch in range(2000)], axis=0)
    np.testing.assert_allclose(counts, np.array([1.0, 1.5, 2.25]) * 5 / 4.75, atol=0.05)
    feed = TableFeed(table, PretrainPreset(32), 0, False, 0, repeat_threshold=0.8)
    assert "2 with rare classes come up to 4.0 times an epoch" in feed.describe()
