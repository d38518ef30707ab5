"""How batches travel from the processes that read: through memory that all of them share.

PyTorch hands tensors over in files of /dev/shm (64 MB in a container, unless it is told otherwise), with an open file
for each tensor. Where either runs out, a thread of the reading process fails, and the main process waits for ever.
Here the memory is the main process's own, mapped before the others are forked: there is nothing to open, and no limit
but the machine's. Where that cannot be, batches go through the pipes, which takes longer.
"""

import itertools
import mmap
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

SLOTS = 4  # of a process: two batches that it is asked for ahead, and those that wait for their turn
SLOT_BYTES = 2**28  # addresses, not memory: a page of it is taken when it is first written to
ALIGNMENT = 64
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Slots:
    """Memory that a process shares with those that it forks; an object that was pickled has none.

    Attributes:
        number: of this object in the main process.
        memory: of each slot; those of a worker follow each other.
        taken: a byte for each slot. The worker sets it when it has filled the slot, the main process clears it.
    """

    numbers: ClassVar[Iterator[int]] = itertools.count()
    known: ClassVar["WeakValueDictionary[int, Slots]"] = WeakValueDictionary()

    def __init__(self, workers: int) -> None:
        self.number = next(Slots.numbers)
        self.memory: list[mmap.mmap] = []
        self.taken = mmap.mmap(-1, max(1, SLOTS * workers))
        Slots.known[self.number] = self
        try:
            flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | NO_RESERVE
            self.memory = [mmap.mmap(-1, SLOT_BYTES, flags=flags) for _ in range(SLOTS * workers)]
        except (OSError, OverflowError):  # addresses are limited
            self.memory = []

    def free(self, worker: int, size: int) -> int | None:
        """A slot for so many bytes of a worker; None if there is none."""
        if not self.memory or size > SLOT_BYTES:
            return None
        own = range(SLOTS * worker, SLOTS * (worker + 1))
        return next((slot for slot in own if not self.taken[slot]), None)

    def __reduce__(self) -> tuple[Any, ...]:
        return Slots, (0,)


class _Place(NamedTuple):
    """Where a tensor lies in memory."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class Parcel:
    """An item on its way: its structure, pickled, and the bytes of its tensors in a slot, or here.

    Attributes:
        structure: with a _Place for each tensor.
        slots: the number of the Slots.
        slot: that has the tensors; None if `content` has them.
        content: the tensors' bytes.
    """

    structure: bytes
    slots: int
    slot: int | None
    content: bytearray

    @staticmethod
    def packed(item: Any, slots: Slots, worker: int) -> "Parcel":
        """A parcel with an item."""
        file = BytesIO()
        pickler = _Pickler(file)
        pickler.dump(item)
        slot, content = None, bytearray()
        if pickler.size:
            slot = slots.free(worker, pickler.size)
            content = content if slot is not None else bytearray(pickler.size)
            memory = content if slot is None else slots.memory[slot]
            for place, tensor in zip(pickler.places, pickler.tensors, strict=True):
                _view(memory, place).copy_(tensor)
        parcel = Parcel(file.getvalue(), slots.number, slot, content)
        if slot is not None:
            slots.taken[slot] = 1
        return parcel

    def opened(self, pinned: bool = False) -> Any:
        """The item. Its tensors are copies."""
        slots = None if self.slot is None else Slots.known[self.slots]
        memory = self.content if slots is None or self.slot is None else slots.memory[self.slot]
        item = _Unpickler(BytesIO(self.structure), memory, pinned).load()
        if slots is not None and self.slot is not None:
            slots.taken[self.slot] = 0
        return item

    def pin_memory(self) -> Any:
        """The item with its tensors in pinned memory; the data loader's thread calls it."""
        return self.opened(pinned=True)


class _Pickler(pickle.Pickler):
    """Leaves the bytes of tensors out, and lays down where they will lie."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.places: list[_Place] = []
        self.size = 0

    def persistent_id(self, value: Any) -> _Place | None:
        """The place of a tensor; None for anything else."""
        if not isinstance(value, Tensor):
            return None
        strides = torch.empty_like(value, device="meta").stride()  # without gaps, in the same order
        place = _Place(self.size, value.dtype, tuple(value.shape), tuple(strides))
        if value.numel():
            self.tensors.append(value)
            self.places.append(place)
            self.size += -(-value.numel() * value.element_size() // ALIGNMENT) * ALIGNMENT
        return place


class _Unpickler(pickle.Unpickler):
    """Copies tensors out of memory."""

    def __init__(self, file: BytesIO, memory: Any, pinned: bool) -> None:
        super().__init__(file)
        self.memory = memory
        self.pinned = pinned

    def persistent_load(self, place: _Place) -> Tensor:
        """A copy of the tensor at a place."""
        if 0 in place.shape:
            return torch.empty(place.shape, dtype=place.dtype)
        view = _view(self.memory, place)
        return view.pin_memory() if self.pinned else view.clone()


def _view(memory: Any, place: _Place) -> Tensor:
    """The tensor at a place of some memory."""
    count = 1
    for side in place.shape:
        count *= side
    flat = torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset)
    return flat.as_strided(place.shape, place.strides)
