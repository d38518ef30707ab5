"""Processes that read images: what they hand over, and that whatever ends one of them ends the program in one line."""

import gc
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest
import small_runs
import torch
from torch import Tensor
from torch.utils.data import Dataset

from direct_pt.batch import Batch
from direct_pt.data import parcels
from direct_pt.data.loader import Share, TableFeed, TrainingImages
from direct_pt.data.parcels import SLOTS, Slots
from direct_pt.data.reader_processes import Readers, ReadersFailed, runs
from direct_pt.training.failures import explain_failure

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # one core is enough here


# What machines are short of


class Numbers(Dataset[Any]):
    """Samples that do something, by key."""

    def __init__(self, act: Callable[[int], Any] = lambda key: key) -> None:
        self.act = act

    def __getitem__(self, key: int) -> Any:
        return self.act(key)


def read(act: Callable[[int], Any], workers: int = 2, count: int = 20) -> list[Any]:
    """What comes of some keys, two at a time."""
    with closing(iter(Readers(Numbers(act), partial(iter, runs(0, count, 2)), workers, list))) as found:
        return list(found)


def test_the_limit_of_open_files_is_raised_where_it_may_be() -> None:
    with small_runs.limited(resource.RLIMIT_NOFILE, psutil.Process().num_fds() + 15):
        assert read(lambda key: key) == runs(0, 20, 2)


def open_all(key: int) -> list[Any]:
    """As many files as can be."""
    return [open(os.devnull) for _ in range(100_000)] if key == 6 else []  # noqa: PTH123


def test_open_files_run_out_in_a_process(table_feed: TableFeed) -> None:
    with pytest.raises(ReadersFailed, match=r"too many files are open: \d+ are allowed: raise that limit"):
        read(open_all)


def test_an_image_is_not_blamed_for_the_machine(table_feed: TableFeed) -> None:
    """Where no file can be opened, it is no image's fault."""
    images = TrainingImages(table_feed.table, table_feed.preset, 0, False)
    with small_runs.limited(resource.RLIMIT_NOFILE, 3), pytest.raises(OSError, match="Too many open files"):
        images[0, 0, 0]


def exhaust(key: int) -> int:
    if key == 6:
        raise MemoryError
    return key


def test_memory_runs_out_in_a_process() -> None:
    with pytest.raises(ReadersFailed, match=r"no memory for processes that read .*: give fewer --num-workers"):
        read(exhaust)


# Processes that end


def end_as(status: int, key: int) -> int:
    """Ends the process at the sixth key: by a signal, if `status` is negative."""
    if key == 6 and status < 0:
        os.kill(os.getpid(), -status)
        time.sleep(60)
    if key == 6:
        os._exit(status)
    return key


@pytest.mark.parametrize(
    ("status", "words"),
    [(-signal.SIGKILL, "by SIGKILL, as where memory runs out"), (-signal.SIGSEGV, "by SIGSEGV"), (3, "with status 3")],
)
def test_a_process_ends(status: int, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(ReadersFailed, match=f"^a process that reads images ended {words}: give fewer --num-workers"):
        read(partial(end_as, int(status)))
    assert time.monotonic() - start < 30 and not psutil.Process().children()


class Unsendable:
    """Cannot be pickled by the thread that sends."""

    def __reduce__(self) -> Any:
        raise ValueError("cannot be sent")


def test_what_cannot_be_sent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the process sends; what it cannot send it leaves out."""
    monkeypatch.setattr(parcels.Parcel, "packed", lambda item, slots, worker: Unsendable())
    with pytest.raises(ReadersFailed, match="a process that reads images ended with status 1"):
        read(lambda key: key)


def test_an_unknown_error_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError, match="in DataLoader worker process"):
        read(lambda key: key // 0)
    assert not psutil.Process().children()


def test_a_child_that_is_no_reader_is_left_alone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert read(lambda key: key) == runs(0, 20, 2)
    with pytest.raises(ReadersFailed):
        read(partial(end_as, 3))
    assert child.poll() is None
    child.communicate(b"\n")


def test_training_says_how_to_continue(table_feed: TableFeed) -> None:
    failure = ReadersFailed("a process that reads images ended by SIGKILL", "give fewer --num-workers")
    assert explain_failure(failure, None, "") == (  # type: ignore[arg-type]
        "a process that reads images ended by SIGKILL",
        "--resume; give fewer --num-workers",
    )


# What travels


@pytest.fixture
def table_feed(training_images: TrainingImages) -> TableFeed:
    """The small set's training images, with masks."""
    return TableFeed(training_images.table, training_images.preset, 0, with_masks=True, num_workers=0)


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a batch."""
    parts = [vars(batch), vars(batch.masks) if batch.masks is not None else {}]
    return {name: value for part in parts for name, value in part.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("slots", ["all", "none", "small"])
def test_batches_are_the_same_whichever_way_they_come(
    slots: str, table_feed: TableFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through shared memory, or the pipes; also their layout, by which convolutions choose how they compute."""
    if slots == "small":
        monkeypatch.setattr(parcels, "SLOT_BYTES", 4096)
    if slots == "none":
        monkeypatch.setattr(parcels, "SLOT_BYTES", 2**60)  # more than there are addresses
    share = Share(4, 0, 12)
    table_feed.num_workers = 0
    expected = list(table_feed.batches(share))
    table_feed.num_workers = 2
    found = list(table_feed.batches(share))
    assert len(found) == len(expected) == 12 and any(batch.masks is not None for batch in found)
    for one, other in zip(found, expected, strict=True):
        mine, theirs = tensors_of(one), tensors_of(other)
        assert mine.keys() == theirs.keys() and one.unreadable == other.unreadable
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype and tensor.stride() == theirs[name].stride(), name
            assert torch.equal(tensor, theirs[name]), name


def odd_tensors(key: int) -> dict[str, Any]:
    """Of all kinds of layouts."""
    numbers = torch.arange(24.0) + key
    return {
        "turned": numbers.view(2, 3, 4).permute(2, 0, 1),
        "expanded": numbers[:1].expand(5),
        "sparse": numbers[::2],
        "empty": torch.zeros(0, 4, dtype=torch.int64),
        "single": torch.tensor(key),
        "flags": numbers > 3,
        "array": np.arange(3) + key,
        "text": f"{key}",
    }


def test_tensors_of_all_layouts() -> None:
    for number, (found,) in enumerate(
        item for item in Readers(Numbers(odd_tensors), lambda: [[key] for key in range(9)], 1, list)
    ):
        for name, value in odd_tensors(number).items():
            same = torch.equal(found[name], value) if isinstance(value, Tensor) else np.all(found[name] == value)
            assert same, name
        assert found["turned"].stride() == odd_tensors(0)["turned"].stride()


def test_batches_that_are_kept_do_not_change() -> None:
    """They are copies: the memory that they came through is used again."""
    items = list(Readers(Numbers(lambda key: torch.full((1000,), key)), lambda: [[key] for key in range(40)], 2, list))
    assert [item[0].unique().tolist() for item in items] == [[key] for key in range(40)]


def test_memory_is_used_again_and_given_back() -> None:
    """A worker has few slots, and all of them are free at the end."""
    gc.collect()
    before = set(Slots.known)  # of other tests, where an exception still holds its frames
    readers = Readers(Numbers(lambda key: torch.full((1000,), key)), lambda: [[key] for key in range(40)], 2, list)
    with closing(iter(readers)) as items:
        next(items)
        (number,) = set(Slots.known) - before
        slots = Slots.known[number]
        assert len(slots.memory) == 2 * SLOTS
        list(items)
    assert not any(slots.taken[slot] for slot in range(2 * SLOTS))
    del slots
    gc.collect()
    assert number not in Slots.known


def test_no_reader_is_started_for_none() -> None:
    found = [os.getpid()] * 2
    assert read(lambda key: os.getpid(), workers=0, count=2) == [found]
    assert read(lambda key: os.getpid(), workers=1, count=2) != [found]
