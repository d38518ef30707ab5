"""Processes that read: batches in the order of their keys, and what ends a process is one line."""

import errno
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from typing import Any, Generic, TypeVar

import psutil
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from direct_pt.data.parcels import Parcel, Slots
from direct_pt.errors import InputError

Item = TypeVar("Item")
FILES_PER_WORKER = 5  # that the main process has open for it: a queue, a lock, its end
SPARE_FILES = 32
NO_LOCKS = (errno.ENOSPC, errno.ENOSYS, errno.EACCES, errno.ENOENT, errno.EROFS)
TOO_MANY = "This DataLoader will create"  # PyTorch's two lines, several times, on more processes than cores
ENDED = "DataLoader worker (pid"  # in PyTorch's message
OUT_OF_MEMORY = ", as where memory runs out"
NOTHING_LEFT = object()
FEWER = "give fewer --num-workers; 0 reads in the main process"
MORE_FILES = f"raise that limit with ulimit -n, or {FEWER}"


class ReadersFailed(InputError, RuntimeError):
    """A process that reads has ended, or cannot go on.

    Attributes:
        reason: what happened.
        remedy: what to do.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


def runs(first: int, stop: int, size: int) -> list[list[int]]:
    """The numbers from `first` to below `stop`, `size` at a time: keys for Readers."""
    return [list(range(start, min(start + size, stop))) for start in range(first, stop, size)]


class Readers(Generic[Item]):
    """What `join` makes of the samples of each list of keys, in their order.

    Iterating starts the processes. They end with the iteration, or when it is closed.
    """

    def __init__(
        self,
        samples: Dataset[Any],
        keys: Callable[[], Iterable[list[Any]]],
        num_workers: int,
        join: Callable[[list[Any]], Item],
        pin_memory: bool = False,
    ) -> None:
        """
        Args:
            samples: by key.
            keys: gives the lists of keys, anew for each iteration.
            num_workers: processes that read; with 0 the main process reads.
            join: of the samples of a list.
            pin_memory: for copies to a GPU; items then have a method of this name.
        """
        self.samples = samples
        self.keys = keys
        self.num_workers = num_workers
        self.join = join
        self.pin_memory = pin_memory

    def __iter__(self) -> Generator[Item, None, None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", TOO_MANY)
            loader: DataLoader[Any] = DataLoader(
                _Reading(self.samples, self.join, Slots(self.num_workers)),
                batch_size=None,
                sampler=_Keys(self.keys),
                collate_fn=_unchanged,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                generator=torch.Generator(),  # its own: the global one's state is restored by a run that is resumed
                worker_init_fn=_start_reading,
            )
        if not self.num_workers:
            yield from loader
            return
        under_way, failure = _UnderWay.started(loader)
        while failure is None:
            assert under_way is not None
            item, failure = under_way.next()
            if item is NOTHING_LEFT:
                return
            if failure is None:
                yield item
            del item
        # The processes ignore stop signals, and a program that ends waits for them until the iterator is gone: the
        # frames that the error passed must not keep it.
        under_way = None
        traceback.clear_frames(failure.__traceback__)
        raise failure


@dataclass
class _UnderWay:
    """A loader's iterator, and the processes that read for it."""

    items: Iterator[Any]
    processes: list[Any]

    @staticmethod
    def started(loader: DataLoader[Any]) -> tuple["_UnderWay | None", BaseException | None]:
        """The iterator of a loader whose processes run, or why they do not."""
        others = set(multiprocessing.active_children())  # and forget those that have ended
        on_main_thread = threading.current_thread() is threading.main_thread()
        handler, hook = signal.getsignal(signal.SIGCHLD), sys.unraisablehook
        sys.unraisablehook = lambda _: None  # an iterator that was not made whole fails again as it is removed
        try:
            if failure := _check_open_files(loader.num_workers):
                return None, failure
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", TOO_MANY)
                items = iter(loader)
            return _UnderWay(items, list(getattr(items, "_workers", ()))), None  # those that have ended already, too
        except (OSError, MemoryError, RuntimeError) as error:
            failure = _shortage(error) or _no_locks(error) or _ended_early(error)
            if failure is None:
                raise
        finally:
            sys.unraisablehook = hook
            # PyTorch's would raise that a process has ended in the middle of whatever runs then. It is noticed when the
            # next item is waited for.
            if on_main_thread and handler is not None:
                signal.signal(signal.SIGCHLD, handler)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
            process.join()
        return None, failure

    def next(self) -> tuple[Any, BaseException | None]:
        """The next item or NOTHING_LEFT, or why there is none."""
        try:
            item = next(self.items, NOTHING_LEFT)
            if isinstance(item, Parcel):
                item = item.opened()
            return (None, item) if isinstance(item, ReadersFailed) else (item, None)
        except BaseException as error:
            if failure := _shortage(error):
                return None, failure
            early = _ended_early(error)
            return None, error if early is None else self._ended() or early

    def _ended(self) -> ReadersFailed | None:
        """How a process ended, if that is known."""
        codes = [process.exitcode for process in self.processes if process.exitcode]
        if not codes:
            return None
        if codes[0] > 0:
            return _ended_so(f"with status {codes[0]}")
        number = -codes[0]
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return _ended_so(f"by {name}" + OUT_OF_MEMORY * (number == signal.SIGKILL))


def _ended_early(error: BaseException) -> ReadersFailed | None:
    """That a process has ended, if that is what PyTorch's error says; it may come before all of them are started."""
    if not isinstance(error, RuntimeError) or ENDED not in str(error):
        return None
    return _ended_so("by SIGKILL" + OUT_OF_MEMORY if "signal: Killed" in str(error) else "too early")


def _ended_so(how: str) -> ReadersFailed:
    return ReadersFailed(f"a process that reads images ended {how}", FEWER)


def _check_open_files(workers: int) -> ReadersFailed | None:
    """Allow this process the open files that it needs for others; what is wrong if it may not have them."""
    needed = psutil.Process().num_fds() + FILES_PER_WORKER * workers + SPARE_FILES
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return None
    if most != resource.RLIM_INFINITY and most < needed:
        what = f"{workers} processes that read need up to {needed} open files, and {most} are allowed"
        return ReadersFailed(what, MORE_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
    return None


def _shortage(error: BaseException) -> ReadersFailed | None:
    """What the machine is short of, if that is what an error says."""
    number, text = getattr(error, "errno", None), next(iter(str(error).splitlines()), "")
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return ReadersFailed(f"too many files are open: {limit} are allowed", MORE_FILES)
    if number in (errno.ENOMEM, errno.EAGAIN) or isinstance(error, MemoryError):
        return ReadersFailed(f"there is no memory for processes that read ({text or 'out of memory'})", FEWER)
    return None


def _no_locks(error: BaseException) -> ReadersFailed | None:
    """The same of locks, which lie in /dev/shm without a name."""
    if not isinstance(error, OSError) or error.errno not in NO_LOCKS or error.filename is not None:
        return None
    what = f"processes that read cannot be started: /dev/shm is full, or cannot be written ({error.strerror})"
    return ReadersFailed(what, "make it larger (docker run --shm-size=1g), or give --num-workers 0")


# What runs in the processes


def _start_reading(worker: int) -> None:
    """Prepare a process that reads: it ends when its parent process asks for it, is gone, or cannot be reached.

    Stop signals may reach all processes: they are left to the parent, which finishes the current step first.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]
    parent = os.getppid()

    def watch() -> None:  # a process that waits to hand something over would wait for ever
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cannot_send(error: BaseException, item: object) -> None:
    """End the process: the thread that sends would leave the item out, and the parent would wait for it."""
    os._exit(1)


class _Keys:
    """A sampler: the data loader calls `__iter__` for each of its own iterators."""

    def __init__(self, start: Callable[[], Iterable[list[Any]]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.start())


class _Reading(Dataset[Any]):
    """The joined samples of a list of keys; in a process that reads, in a parcel."""

    def __init__(self, samples: Dataset[Any], join: Callable[[list[Any]], Any], slots: Slots) -> None:
        self.samples = samples
        self.join = join
        self.slots = slots

    def __getitem__(self, keys: list[Any]) -> Any:
        worker = get_worker_info()
        try:
            item = self.join([self.samples[key] for key in keys])
            return item if worker is None else Parcel.packed(item, self.slots, worker.id)
        except (OSError, MemoryError) as error:
            failure = _shortage(error)
            if failure is None or (worker is None and isinstance(error, MemoryError)):
                raise
            if worker is None:
                raise failure from error
            return Parcel.packed(failure, self.slots, worker.id)


def _unchanged(item: Any) -> Any:
    return item
