"""Which image comes when, on which process; that samples do not depend on how they are made; batches."""

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCocoFolder

from direct_pt.batch import Batch, Objects, PackedMasks, Sample, collate
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.evaluation_loader import evaluation_loader
from direct_pt.data.loader import Share, TableFeed, unreadable_reason
from direct_pt.data.order import SampleOrder, aspect_groups
from direct_pt.transforms import FinetunePreset, PretrainPreset, TestPreset

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # one core is enough here
Keys = list[list[tuple[int, int]]]


def groups_of(count: int) -> np.ndarray:
    """Two groups, two thirds and one third, mixed."""
    return (np.random.default_rng(count).random(count) < 1 / 3).astype(np.int64)


def stream(order: SampleOrder, micro_batches: int) -> Keys:
    return list(order.micro_batches(0, micro_batches, 0, 1))


# The order

SHAPES = [(12, 4), (13, 4), (10, 8), (7, 1), (3, 8), (1, 4), (101, 8)]  # images, images a micro-batch


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("count", "size"), SHAPES)
def test_every_epoch_is_a_permutation(count: int, size: int, grouped: bool) -> None:
    order = SampleOrder(count, seed=3, micro_batch_size=size, groups=groups_of(count) if grouped else None)
    epochs = 2 * size  # after `size` epochs the micro-batches end where an epoch does
    keys = [key for keys in stream(order, count * epochs // size) for key in keys]
    assert keys == sorted(keys, key=lambda key: key[0])  # one epoch after another
    for epoch in range(epochs):
        assert sorted(image for e, image in keys if e == epoch) == list(range(count))
    if count > 5:
        assert len({tuple(image for e, image in keys if e == epoch) for epoch in range(epochs)}) == epochs


def test_order_follows_the_seed() -> None:
    first, again, other = (SampleOrder(50, seed, 4).epoch(0).tolist() for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(("count", "size"), [(12, 4), (40, 8), (101, 8), (64, 2), (33, 2)])
def test_micro_batches_are_of_one_group(count: int, size: int) -> None:
    groups, epochs = groups_of(count), 40
    order = SampleOrder(count, seed=0, micro_batch_size=size, groups=groups)
    keys = stream(order, count * epochs // size)
    mixed = [keys for keys in keys if len({groups[image] for _, image in keys}) > 1]
    assert len(mixed) <= 3 * epochs  # at the ends of an epoch, where the groups do not divide
    inside = [keys for keys in mixed if len({epoch for epoch, _ in keys}) == 1]
    assert len(inside) <= 2 * epochs
    ungrouped = stream(SampleOrder(count, 0, size), count * epochs // size)
    assert len(mixed) < sum(len({groups[image] for _, image in keys}) > 1 for keys in ungrouped)


def test_groups_take_turns_at_random() -> None:
    groups = np.arange(80) % 2
    kinds = [groups[keys[0][1]] for keys in stream(SampleOrder(80, 0, 4, groups), 20)]
    assert 4 <= sum(a != b for a, b in itertools.pairwise(kinds)) <= 18


@pytest.mark.parametrize("grouped", [False, True])
def test_processes_share_the_stream(grouped: bool) -> None:
    order = SampleOrder(13, 0, 2, groups_of(13) if grouped else None)
    whole = stream(order, 24)
    for world in (2, 3):
        shares = [list(order.micro_batches(0, 24, rank, world)) for rank in range(world)]
        assert [keys for turn in zip(*shares, strict=True) for keys in turn] == whole


@pytest.mark.parametrize(("size", "world"), [(8, 1), (4, 1), (2, 1), (1, 1), (4, 2), (1, 8), (2, 2)])
def test_optimizer_steps_see_the_same_images(size: int, world: int) -> None:
    """8 images a step, however they are spread over micro-batches and processes."""
    order = SampleOrder(13, seed=5, micro_batch_size=size)
    a_step = 8 // size  # micro-batches, over all processes
    shares = [list(order.micro_batches(0, 10 * a_step, rank, world)) for rank in range(world)]
    each = a_step // world
    reference = stream(SampleOrder(13, seed=5, micro_batch_size=8), 10)
    for step in range(10):
        seen = [key for share in shares for keys in share[step * each : (step + 1) * each] for key in keys]
        assert sorted(seen) == sorted(reference[step])


@pytest.mark.parametrize("grouped", [False, True])
def test_resuming_gives_the_tail(grouped: bool) -> None:
    order = SampleOrder(13, 0, 4, groups_of(13) if grouped else None)
    whole = stream(order, 30)
    for start in (1, 7, 13, 29, 30):
        assert list(order.micro_batches(start, 30, 0, 1)) == whole[start:]
    assert list(order.micro_batches(8, 30, 1, 2)) == whole[8:][1::2]


def test_aspect_groups(coco_folder: MakeCocoFolder) -> None:
    table = coco_folder([(20, 30), (30, 20), (20, 20)]).load()
    assert aspect_groups(table).tolist() == [0, 1, 0]


# The samples

SIZES = [(40, 60), (60, 40), (50, 50), (30, 70), (64, 48), (40, 60), (52, 36)]
SQUARE = [[4.0, 5.0, 24.0, 5.0, 24.0, 20.0, 4.0, 20.0]]


@pytest.fixture
def table(coco_folder: MakeCocoFolder) -> AnnotationTable:
    """Seven images, the third one without objects, the fourth one with a crowd region only."""
    counts = (1, 2, 0, 1, 3, 1, 2)
    annotations = [
        {"image_id": 10 * image + 10, "bbox": [4 + 3 * row, 5, 20, 15], "segmentation": SQUARE, "iscrowd": image == 3}
        for image, count in enumerate(counts)
        for row in range(count)
    ]
    return coco_folder(SIZES, [a | {"iscrowd": int(a["iscrowd"])} for a in annotations]).load()


def batches_of(
    table: AnnotationTable, part: tuple[int, int, int, int], size: int = 2, workers: int = 0, with_masks: bool = True
) -> list[Batch]:
    return list(TableFeed(table, PretrainPreset(48), 0, with_masks, workers).batches(Share(size, *part)))


def as_lists(batch: Batch) -> dict[str, Any]:
    """Everything in a batch, to compare to the bit."""
    content = dict(vars(batch))
    if batch.masks is not None:
        content.update(vars(batch.masks))
    del content["masks"]
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in content.items()}


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert as_lists(one) == as_lists(other)


def test_workers_make_no_difference(table: AnnotationTable) -> None:
    alone = batches_of(table, (0, 9, 0, 1))
    assert_same(alone, batches_of(table, (0, 9, 0, 1), workers=2))
    assert len({tuple(batch.seeds.tolist()) for batch in alone}) == 9


def test_resumed_loader_continues_with_the_same_samples(table: AnnotationTable) -> None:
    assert_same(batches_of(table, (0, 9, 0, 1))[5:], batches_of(table, (5, 9, 0, 1)))
    assert_same(batches_of(table, (0, 9, 0, 1))[5::2], batches_of(table, (4, 9, 1, 2)))


def test_a_sample_does_not_depend_on_its_micro_batch(table: AnnotationTable) -> None:
    single = batches_of(table, (0, 12, 0, 1), size=1)
    for position, batch in enumerate(batches_of(table, (0, 3, 0, 1), size=4)):
        for row in range(4):
            alone = single[4 * position + row]
            assert torch.equal(batch.images[row], alone.images[0])
            for name in ("indices", "seeds", "sizes", "scales", "original_sizes"):
                assert torch.equal(getattr(batch, name)[row], getattr(alone, name)[0]), name
            count = alone.boxes.shape[1]
            assert torch.equal(batch.boxes[row, :count], alone.boxes[0])
            assert torch.equal(batch.valid[row, :count], alone.valid[0]) and not batch.valid[row, count:].any()


def test_epochs_differ_in_augmentation(table: AnnotationTable) -> None:
    single = batches_of(table, (0, 21, 0, 1), size=1)
    for image in range(7):
        mine = [batch for batch in single if batch.indices[0] == image]
        assert len(mine) == 3
        assert len({tuple(batch.scales[0].tolist()) for batch in mine}) == 3
        assert len({int(batch.seeds[0]) for batch in mine}) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_the_global_generators(table: AnnotationTable, workers: int) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    batches_of(table, (0, 2, 0, 1), workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_batches_contain_the_tables_objects(table: AnnotationTable) -> None:
    for batch in TableFeed(table, TestPreset(64, 64), 0, False, num_workers=0).batches(Share(3, 0, 7)):
        assert batch.masks is None and batch.mask_rows is None and batch.images.dtype == torch.uint8
        for row, image in enumerate(batch.indices.tolist()):
            objects = table.objects(image, with_masks=False)
            assert batch.original_sizes[row].tolist() == list(SIZES[image])
            there = batch.valid[row] | batch.crowd[row]
            assert int(there.sum()) == len(objects) and bool(batch.crowd[row].any()) == (image == 3)
            x, y = batch.scales[row].tolist()
            expected = objects.boxes * [x, y, x, y]
            np.testing.assert_allclose(batch.boxes[row, there].numpy(), expected, rtol=1e-5)
            assert batch.labels[row, there].tolist() == objects.labels.tolist()


ENDS = """
import contextlib, pathlib, sys
from direct_pt.data.formats.coco import CocoSplit
from direct_pt.data.loader import Share, TableFeed
from direct_pt.data.sources import load_split
from direct_pt.transforms import PretrainPreset

def train():
    feed = TableFeed(load_split(CocoSplit(*map(pathlib.Path, sys.argv[1:]))), PretrainPreset(32), 0, False, 1)
    with contextlib.closing(feed.batches(Share(2, 0, 100))) as batches:
        step(batches)

def step(batches):
    next(batches)
    raise ValueError("enough")

try:
    train()
except ValueError as error:
    kept = error  # and with it all frames
print("ends")
"""


def test_workers_end_even_if_the_batches_are_still_held(table: AnnotationTable) -> None:
    """They ignore stop signals: a program that forgets them would wait for them for ever."""
    paths = [str(table.folder), table.source]
    done = subprocess.run([sys.executable, "-c", ENDS, *paths], timeout=120, capture_output=True, text=True, check=True)
    assert done.stdout == "ends\n"


# Images that cannot be read


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_and_named(table: AnnotationTable, workers: int) -> None:
    good = batches_of(table, (0, 14, 0, 1), size=1)
    cut_short(table.path(4))
    batches = batches_of(table, (0, 14, 0, 1), size=1, workers=workers)
    assert_same(batches, batches_of(table, (0, 14, 0, 1), size=1))
    for before, after in zip(good, batches, strict=True):
        if before.indices[0] == 4:
            assert set(after.unreadable) == {4} and after.indices[0] != 4
            assert after.original_sizes[0].tolist() == list(SIZES[int(after.indices[0])])
        else:
            assert as_lists(before) == as_lists(after)
    replacements = batches_of(table, (0, 140, 0, 1), size=1)
    assert len({int(batch.indices[0]) for batch in replacements if batch.unreadable}) > 2  # not always the same one
    reason = unreadable_reason(table, 4)
    assert str(table.path(4)) in reason and "cannot be read" in reason


def test_an_image_of_another_size_is_unreadable(table: AnnotationTable) -> None:
    table.sizes[2] = (50, 51)
    batches = batches_of(table, (0, 7, 0, 1), size=1)
    assert Counter(row for batch in batches for row in set(batch.unreadable)) == {2: 1}
    assert "annotation says 51x50" in unreadable_reason(table, 2)


def test_names_survive_collation(table: AnnotationTable) -> None:
    cut_short(table.path(0))
    cut_short(table.path(6))
    (batch,) = batches_of(table, (0, 1, 0, 1), size=7)
    assert set(batch.unreadable) == {0, 6}
    assert not {0, 6} & set(batch.indices.tolist())


@pytest.mark.parametrize("with_masks", [False, True])
def test_nothing_can_be_read(table: AnnotationTable, with_masks: bool) -> None:
    for image in range(7):
        table.path(image).write_bytes(b"")
    batches = batches_of(table, (0, 4, 0, 1), with_masks=with_masks)
    for batch in batches:
        assert batch.images.shape == (2, 3, 48, 48)
        assert not batch.valid.any() and not batch.crowd.any()
    assert {row for batch in batches for row in batch.unreadable} == set(range(7))


# Evaluation


def evaluation_batches(table: AnnotationTable, world: int, workers: int = 0) -> list[Batch]:
    """Of all processes, in the order of a single one."""
    preset = TestPreset(48, 64)
    shares = [list(evaluation_loader(table, preset, 2, rank, world, workers)) for rank in range(world)]
    turns = itertools.zip_longest(*shares)
    return [batch for turn in turns for batch in turn if batch is not None]


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_evaluation_shows_every_image_once(table: AnnotationTable, world: int) -> None:
    batches = evaluation_batches(table, world)
    assert sorted(image for batch in batches for image in batch.indices.tolist()) == list(range(7))
    assert_same(batches, evaluation_batches(table, world=1))
    assert all(not batch.valid.any() and not batch.crowd.any() for batch in batches)


def test_evaluation_with_workers(table: AnnotationTable) -> None:
    assert_same(evaluation_batches(table, 1, workers=2), evaluation_batches(table, 1))


def test_evaluation_batches_are_of_like_shape(table: AnnotationTable) -> None:
    ratios = [
        height / width for batch in evaluation_batches(table, 1) for height, width in batch.original_sizes.tolist()
    ]
    assert ratios == sorted(ratios)


def test_unreadable_image_in_evaluation(table: AnnotationTable) -> None:
    good = evaluation_batches(table, 1)
    cut_short(table.path(5))
    for before, after in zip(good, evaluation_batches(table, 1), strict=True):
        if 5 not in after.indices:
            assert as_lists(before) == as_lists(after)
            continue
        row = after.indices.tolist().index(5)
        assert after.unreadable == (5,)
        assert not after.images[row].any()
        assert after.original_sizes[row].tolist() == list(SIZES[5])
        assert torch.equal(before.sizes, after.sizes)
        assert torch.equal(before.images[1 - row], after.images[1 - row])


# Batches


def sample(height: int, width: int, padded: tuple[int, int], count: int, with_masks: bool = False) -> Sample:
    """White, with `count` objects, the last one a crowd."""
    boxes = np.arange(count)[:, None] + np.array([[1.0, 2.0, 5.0, 9.0]])
    objects = Objects(boxes, np.arange(count) + 3, np.full(count, 28.0), np.arange(count) == count - 1)
    crops = [np.full((3, 2 + row), 1, np.uint8) for row in range(count)]
    windows = np.array([[row, 1, 2 + 2 * row, 4] for row in range(count)]).reshape(-1, 4)
    image = torch.full((3, height, width), 255, dtype=torch.uint8)
    frames = np.full((count, 2), (height, width))
    masks = PackedMasks.pack(crops, windows, frames, np.ones(count)) if with_masks else None
    return Sample(image, padded, (10 * height, 10 * width), (0.1, 0.1), objects, masks, index=height, seed=width)


def test_collate_pads_at_the_right_and_the_bottom() -> None:
    batch = collate([sample(20, 30, (32, 32), 2), sample(50, 40, (64, 64), 0), sample(64, 10, (64, 32), 1)])
    assert batch.images.shape == (3, 3, 64, 64) and len(batch) == 3
    for row, (height, width) in enumerate([(20, 30), (50, 40), (64, 10)]):
        assert (batch.images[row, :, :height, :width] == 255).all()
        assert not batch.images[row, :, height:].any() and not batch.images[row, :, :, width:].any()
    assert batch.sizes.tolist() == [[20, 30], [50, 40], [64, 10]]
    assert batch.padded_sizes.tolist() == [[32, 32], [64, 64], [64, 32]]
    assert batch.original_sizes.tolist() == [[200, 300], [500, 400], [640, 100]]
    assert batch.indices.tolist() == [20, 50, 64] and batch.seeds.tolist() == [30, 40, 10]
    assert batch.valid.tolist() == [[True, False], [False, False], [False, False]]
    assert batch.crowd.tolist() == [[False, True], [False, False], [True, False]]
    assert batch.boxes[0].tolist() == [[1, 2, 5, 9], [2, 3, 6, 10]]
    assert not batch.boxes[1].any() and not batch.boxes[2, 1].any()
    assert batch.labels[0].tolist() == [3, 4]
    assert batch.masks is None


@pytest.mark.parametrize("with_masks", [False, True])
def test_collate_without_any_object(with_masks: bool) -> None:
    batch = collate([sample(20, 30, (32, 32), 0, with_masks), sample(20, 20, (32, 32), 0, with_masks)])
    assert batch.boxes.shape == (2, 1, 4) and batch.labels.shape == (2, 1)
    assert not batch.valid.any() and not batch.crowd.any()
    if with_masks:
        assert batch.masks is not None and len(batch.masks) == 0
        assert batch.mask_rows is not None and (batch.mask_rows == -1).all()


def test_mask_rows_name_the_right_masks() -> None:
    samples = [sample(20, 30, (32, 32), count, with_masks=True) for count in (2, 0, 3, 1)]
    batch = collate(samples).to(torch.device("cpu"))
    assert batch.masks is not None and batch.mask_rows is not None and len(batch.masks) == 6
    for row, one in enumerate(samples):
        assert one.masks is not None
        for slot in range(len(one.objects)):
            found = batch.masks.dense(int(batch.mask_rows[row, slot]))
            assert torch.equal(found, one.masks.dense(slot)) and found.any()
        assert (batch.mask_rows[row, len(one.objects) :] == -1).all()


def test_finetuning_batches_of_unequal_images(table: AnnotationTable) -> None:
    feed = TableFeed(table, FinetunePreset(64, 96), 0, True, num_workers=0, grouped=True)
    for batch in feed.batches(Share(2, 0, 7)):
        assert batch.images.shape[2] % 32 == 0 and batch.images.shape[3] % 32 == 0
        assert (batch.padded_sizes >= batch.sizes).all()
        limits = batch.sizes[:, None, [1, 0, 1, 0]]
        assert (batch.boxes <= limits).all() and (batch.boxes >= 0).all()
