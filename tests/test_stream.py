"""Streams: every image once an epoch over all processes, in random order, and on from where a run stopped."""

import io
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import small_runs as runs
from PIL import Image

from direct_pt.batch import Batch
from direct_pt.data.loader import FeedFailed, Share
from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.data.stream import Stream, StreamFeed, open_stream
from direct_pt.errors import InputError, TrainingStopped
from direct_pt.images.decoding import Decoding
from direct_pt.transforms import PretrainPreset, TestPreset

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # one core is enough here
FEATURES = datasets.Features(
    image_id=datasets.Value("int64"),
    image=datasets.Image(),
    width=datasets.Value("int32"),
    height=datasets.Value("int32"),
    objects={
        "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
        "category": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
    },
)
IMAGES, SHARDS = 41, 3


def encoded(size: tuple[int, int], seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def a_row(number: int) -> dict[str, Any]:
    """Image `number`, from 0, with one or two objects; every fifth has none. Two shapes."""
    size = (32, 40) if number % 3 else (40, 32)
    boxes = [[2.0 + number % 7, 3.0, 20.0, 15.0], [1.0, 1.0, 12.0, 10.0]][: 0 if number % 5 == 4 else 1 + number % 2]
    objects = {"bbox": boxes, "category": [number % 2] * len(boxes)}
    image = {"bytes": encoded(size, number), "path": f"{number}.png"}
    return {"image_id": 100 + number, "image": image, "width": size[1], "height": size[0], "objects": objects}


def write(folder: Path, rows: list[dict[str, Any]], shards: int = SHARDS, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        part = datasets.Dataset.from_list(rows[shard::shards], features=FEATURES)
        part.to_parquet(str(folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("stream") / "shards", [a_row(number) for number in range(IMAGES)])
    return write(folder, [a_row(number) for number in range(IMAGES, IMAGES + 6)], 1, "validation")


def stream_of(folder: Path, window: int = 8) -> Stream:
    return open_stream(folder, "coco", Decoding(), window)


def feed_of(folder: Path, window: int = 8, workers: int = 0, **more: Any) -> StreamFeed:
    return StreamFeed(stream_of(folder, window), PretrainPreset(32), 5, False, workers, **more)


def ids_of(batches: list[Batch], feed: StreamFeed) -> list[int]:
    """What the names say: "row 3, 17.png"."""
    names = [feed.image_name(number) for batch in batches for number in batch.indices.tolist()]
    return [int(name.split(", ")[-1].removesuffix(".png")) for name in names]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for name in ("images", "boxes", "labels", "indices", "seeds", "sizes"):
            assert getattr(one, name).equal(getattr(other, name)), name


@pytest.mark.parametrize("window", [1, 8, 1000])
def test_every_image_once_an_epoch(shards: Path, window: int) -> None:
    """In another order each time."""
    feed = feed_of(shards, window)
    assert len(feed) == IMAGES
    orders = []
    batches = feed.batches(Share(1, 0, 3 * IMAGES))
    for _ in range(3):
        orders.append([ids_of([next(batches)], feed)[0] for _ in range(IMAGES)])
    assert all(sorted(order) == list(range(IMAGES)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    if window == 1000:  # not one shard after another
        assert len({number % SHARDS for number in orders[0][:10]}) == SHARDS


@pytest.mark.parametrize("shard_count", [4, 3, 1])
def test_two_processes_see_every_image_once(tmp_path: Path, shard_count: int) -> None:
    """They have shards of their own, or rows of their own where the shards do not divide."""
    rows = [a_row(number) for number in range(24)]
    folder = write(tmp_path / "set", rows, shard_count)
    feeds = [feed_of(folder), feed_of(folder)]
    seen = []
    for rank, feed in enumerate(feeds):
        batches = list(feed.batches(Share(2, 0, 12, rank, 2)))
        assert len(batches) == 6
        seen += ids_of(batches, feed)
    assert sorted(seen) == list(range(24))


def test_samples_are_those_of_the_table(shards: Path) -> None:
    """Pixels, boxes and labels, however they are read."""
    table = load_tables(DataOptions(data=shards))["train"]
    feed = StreamFeed(stream_of(shards), TestPreset(48, 48), 0, False, 0)
    rows = {name.decode().split(", ")[-1]: row for row, name in enumerate(table.file_names.tolist())}
    for batch in feed.batches(Share(1, 0, IMAGES)):
        (image,) = ids_of([batch], feed)
        row = rows[f"{image}.png"]
        objects = table.objects(row, with_masks=False)
        there = batch.valid[0]
        assert int(there.sum()) == len(objects) and batch.labels[0, there].tolist() == objects.labels.tolist()
        expected = objects.boxes * np.tile(batch.scales[0].numpy(), 2)
        np.testing.assert_allclose(batch.boxes[0, there].numpy(), expected, rtol=1e-6)
        assert batch.original_sizes[0].tolist() == table.sizes[row].tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 2, 4, 9, 10, 11, 20])
def test_resumed_stream_continues(shards: Path, workers: int, taken: int) -> None:
    """Windows of eight, micro-batches of four: at their ends and within, also of epochs."""
    whole = list(feed_of(shards).batches(Share(4, 0, 24)))
    feed = feed_of(shards, workers=workers)
    batches = feed.batches(Share(4, 0, 24))
    for _ in range(taken):
        next(batches)
    state = feed.state(taken)
    del batches
    rest = list(feed_of(shards, workers=workers).batches(Share(4, taken, 24), state))
    assert_same(whole[taken:], rest)


def test_with_another_number_of_processes_the_next_epoch_begins(shards: Path) -> None:
    feed = feed_of(shards)
    next(feed.batches(Share(4, 0, 8)))
    state = feed.state(1)
    halves = [feed_of(shards), feed_of(shards)]
    seen = []
    for rank, half in enumerate(halves):
        seen += ids_of(list(half.batches(Share(1, 4, 44, rank, 2), state)), half)
    assert Counter(seen).most_common(1)[0][1] == 1 and len(seen) == 40


def test_micro_batches_of_one_shape(shards: Path) -> None:
    feed = feed_of(shards, window=1000, grouped=True)
    shapes = [{tuple(size) for size in b.original_sizes.tolist()} for b in feed.batches(Share(4, 0, IMAGES // 4))]
    assert sum(len(found) > 1 for found in shapes) <= 1


def test_without_empty_images(shards: Path) -> None:
    feed = feed_of(shards, drop_empty=True)
    seen = ids_of(list(feed.batches(Share(1, 0, 33))), feed)
    assert sorted(seen) == [number for number in range(IMAGES) if number % 5 != 4]


def test_nothing_to_learn_ends(tmp_path: Path) -> None:
    """In place of going through the shards for ever."""
    rows = [a_row(number) for number in range(4, 40, 5)]  # without objects
    feed = feed_of(write(tmp_path / "set", rows, 1), drop_empty=True)
    with pytest.raises(FeedFailed, match="no image of a whole epoch can be trained on"):
        next(feed.batches(Share(2, 0, 4)))


def test_wrong_rows_are_replaced_and_named(tmp_path: Path) -> None:
    rows = [a_row(number) for number in range(120)]
    rows[7]["objects"]["bbox"][0][2] = float("nan")
    rows[50]["image"]["bytes"] = b"no image"
    folder = write(tmp_path / "set", rows, 1)
    feed = feed_of(folder, window=200)
    feed.check()
    batches = list(feed.batches(Share(4, 0, 29)))
    reasons = [feed.unreadable_reason(number) for batch in batches for number in batch.unreadable]
    assert len(reasons) == 2, reasons
    assert any("image 107: annotation 10 has bbox [2.0, 3.0, nan, 15.0]; expected" in reason for reason in reasons)
    assert any("50.png: cannot be read" in reason for reason in reasons)


def test_many_wrong_rows_are_refused(tmp_path: Path) -> None:
    rows = [a_row(number) for number in range(40)]
    for row in rows[:10]:
        row["objects"]["category"] = [-1] * len(row["objects"]["category"])
    folder = write(tmp_path / "set", rows, 1)
    with pytest.raises(InputError, match=r"8 of the first 40 images are wrong, first: .*category_id -1"):
        feed_of(folder, window=100).check()


def test_missing_masks(shards: Path) -> None:
    feed = StreamFeed(stream_of(shards), PretrainPreset(32), 0, True, 0)
    with pytest.raises(InputError, match="has objects without 'segmentation'"):
        feed.check()


def test_sets_that_cannot_be_streamed(tmp_path: Path, demo: Path) -> None:
    for folder, message in ((demo, "is no data set on the hub"), (tmp_path / "absent", "is no data set on the hub")):
        with pytest.raises(InputError, match=message):
            stream_of(folder)
    write(tmp_path / "val", [a_row(0)], 1, "validation")
    with pytest.raises(InputError, match="has no training split, only val"):
        stream_of(tmp_path / "val")


# Runs


@runs.cpu_only
def test_interrupted_run_is_uninterrupted(shards: Path, tmp_path: Path) -> None:
    """To the bit, in the middle of a window; the validation split is read as ever."""
    flags = (*runs.TINY, "--data", shards, "--streaming", "--shuffle-buffer", 16, "--image-size", 64)
    flags += (
        "--global-batch-size",
        4,
        "--micro-batch-size",
        2,
        "--max-steps",
        6,
        "--log-every",
        1,
        *runs.NO_EVALUATION,
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    runs.train("pretrain", *flags, "--output-dir", whole)
    runs.train("pretrain", *flags, "--save-every", 1, "--keep-checkpoints", 9, "--output-dir", resumed)
    assert "bbox" in runs.records(whole)[-1]
    for step in (4, 5, 6):
        shutil.rmtree(resumed / f"checkpoints/step-{step}")
    runs.train("pretrain", *flags, "--output-dir", resumed, "--resume")
    assert runs.largest_difference(runs.weights(whole / "model"), runs.weights(resumed / "model")) == 0


@runs.cpu_only
def test_a_stream_that_breaks_off(shards: Path, tmp_path: Path) -> None:
    """The state is saved, and once the file is whole again the run goes on to the same end."""
    data = shutil.copytree(shards, tmp_path / "set")
    flags = (*runs.TINY, "--data", data, "--streaming", "--shuffle-buffer", 4, "--image-size", 64)
    flags += ("--global-batch-size", 4, "--micro-batch-size", 4, "--max-steps", 9, *runs.NO_EVALUATION)
    runs.train("pretrain", *flags, "--output-dir", tmp_path / "whole")
    last = int(np.random.default_rng((0, 0)).permutation(SHARDS)[-1])  # of the first epoch
    path = data / f"train-{last:05d}-of-{SHARDS:05d}.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes(5000) + content[5008:])  # the footer is whole
    with pytest.raises(TrainingStopped) as error:
        runs.train("pretrain", *flags, "--output-dir", tmp_path / "run")
    message = str(error.value)
    assert f"{data} (train) cannot be read any further (" in message and message.endswith("continue with --resume")
    assert runs.steps_saved(tmp_path / "run")
    path.write_bytes(content)
    runs.train("pretrain", *flags, "--output-dir", tmp_path / "run", "--resume")
    found, expected = (runs.weights(tmp_path / name / "model") for name in ("run", "whole"))
    assert runs.largest_difference(found, expected) == 0


def test_a_file_that_is_cut_short(shards: Path, tmp_path: Path) -> None:
    data = shutil.copytree(shards, tmp_path / "set")
    path = sorted(data.glob("train-*"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"{path.name}: cannot be read as parquet"):
        stream_of(data)


def test_flags_that_look_at_all_images(shards: Path, tmp_path: Path) -> None:
    flags = (*runs.TINY, *runs.EIGHT, "--data", shards, "--streaming", "--output-dir", tmp_path / "run")
    for more in (("--cache", "raw"), ("--repeat-threshold", 0.1), ("--micro-batch-size", "auto")):
        with pytest.raises(InputError, match=f"--streaming excludes {more[0]}"):
            runs.train("pretrain", *flags, *more)
