"""How much memory a training step takes on a GPU, found without one: a real step on the CPU, every tensor accounted.

What is counted is what PyTorch's operators hand out: weights, gradients, optimizer state, activations and whatever else
autograd saves, autocast's copies of weights. Where a GPU computes another way than a CPU, the step takes the GPU's:
RoIAlign and NMS (`models.layers.force_gpu_path`), the optimizer's loops over all tensors at once, and autocast's
float32 norms, softmax and upsampling. bf16 stands for fp16, which is as large.

Not counted is what a kernel takes for itself while it runs (cuDNN's workspace, a sort's buffer), but for NMS's table,
and the allocator's gaps: `CONTEXT` and `FRAGMENTATION` leave room for them. Several processes hold their gradients
twice, which is not counted either. None of this was ever compared with a GPU's own figures.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from direct_pt.batch import Batch
from direct_pt.models.layers import force_gpu_path
from direct_pt.models.rpn import MAX_NMS_BOXES

BLOCK = 512  # bytes that CUDA's caching allocator rounds up to
CONTEXT = 2**30  # bytes: the driver's context, kernels, and the workspaces of cuBLAS and cuDNN
FRAGMENTATION = 0.1  # of the peak: gaps that the allocator cannot hand out
KINDS = ("weights", "gradients", "optimizer", "activations", "rest")
# In float32 under CUDA's autocast, whatever comes in; the CPU's leaves them in bf16.
FLOAT32_ON_GPU = ("layer_norm", "group_norm", "softmax.int", "upsample_nearest2d.vec", "upsample_bilinear2d.vec")


@dataclass(frozen=True)
class MemoryPeak:
    """The moment of a training step at which most is allocated, in bytes.

    Attributes:
        weights: parameters and buffers.
        gradients: of the parameters.
        optimizer: its state.
        activations: made in the forward pass, or again in the backward pass; with autocast's copies of weights.
        rest: images and objects, gradients of activations, the update's temporaries.
        passes: the most that forward and backward pass have allocated together.
        update: the most that the optimizer's step has.
        at_nms: allocated when NMS has most boxes.
        nms_boxes: how many those are.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    rest: int
    passes: int
    update: int
    at_nms: int
    nms_boxes: int

    @property
    def total(self) -> int:
        """All that is allocated at the peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.rest


class MemoryAccount(TorchDispatchMode):
    """Inside it, the storages that are alive, each counted once, by kind.

    A storage counts from the operator that made it until it dies, whether a variable holds it, a view, or autograd
    alone: its Python object lives as long as it does, so a weak reference tells. Backward passes must run in the thread
    that entered the account, as they do on a CPU.

    Attributes:
        kind: of what is made from now on without gradients, one of `KINDS`; what is made with them is activations.
        now: bytes alive of each kind.
        most: the same at the peak.
        at_nms: bytes alive when NMS had most boxes.
        nms_boxes: how many those were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "rest"
        self.now = dict.fromkeys(KINDS, 0)
        self.most = dict(self.now)
        self.at_nms = self.nms_boxes = 0
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator and count what it made."""
        results = func(*args, **(kwargs or {}))
        self.hold(tree_leaves(results))
        if func is torch.ops.torchvision.nms.default:
            self._count_nms(len(args[0]))
        return results

    def hold(self, values: Iterable[Any], kind: str | None = None) -> None:
        """Count the tensors among `values` as `kind`; without it as what they are counted, or were just made as."""
        made = "activations" if torch.is_grad_enabled() else self.kind
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key, size = id(storage), -(-storage.nbytes() // BLOCK) * BLOCK
            reference, old_size, old_kind = self._alive.get(key) or (weakref.ref(storage, self._release(key)), 0, "")
            if old_size == size and kind in (None, old_kind):
                continue
            new_kind = kind or old_kind or made
            if old_kind:
                self.now[old_kind] -= old_size
            self.now[new_kind] += size
            self._alive[key] = reference, size, new_kind
            self._compare(self.now)

    def _release(self, key: int) -> Callable[[Any], None]:
        def release(reference: Any) -> None:
            _, size, kind = self._alive.pop(key)
            self.now[kind] -= size

        return release

    def _compare(self, now: dict[str, int]) -> None:
        if sum(now.values()) > sum(self.most.values()):
            self.most = dict(now)

    def _count_nms(self, boxes: int) -> None:
        """torchvision's kernel on a GPU makes a table of which box suppresses which."""
        if boxes > self.nms_boxes:
            self.at_nms, self.nms_boxes = sum(self.now.values()), boxes
        self._compare({**self.now, self.kind: self.now[self.kind] + nms_bytes(boxes)})


def nms_bytes(boxes: int) -> int:
    """Of the GPU's table: a bit for each pair of boxes, in words of 64."""
    return boxes * -(-boxes // 64) * 8


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Inside it, the CPU's autocast computes in float32 what CUDA's does."""
    library = torch.library.Library("aten", "IMPL")
    for name in FLOAT32_ON_GPU:
        library.impl(name, functools.partial(_in_float32, attrgetter(name)(torch.ops.aten)), "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


def _in_float32(operator: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return operator(*(v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args), **options)


def peak_of_step(
    detector: nn.Module, batch: Batch, precision: str, optimizer: torch.optim.Optimizer, waiting: int = 0
) -> MemoryPeak:
    """The peak of one micro-batch of a training step, with the optimizer's state and accumulated gradients there.

    Weights, gradients and the optimizer's state change.

    Args:
        detector: in training mode, on the CPU.
        batch: the micro-batch.
        precision: "no", "fp16" or "bf16".
        optimizer: of the detector's parameters that train.
        waiting: further micro-batches of the step, which wait on the device.
    """
    images = [value for part in (batch, batch.masks) if part is not None for value in vars(part).values()]
    return peak_of_losses(lambda: detector(batch), detector, images, precision, optimizer, waiting)


def peak_of_losses(
    losses: Callable[[], dict[str, Tensor]],
    module: nn.Module,
    inputs: Iterable[Any],
    precision: str,
    optimizer: torch.optim.Optimizer,
    waiting: int = 0,
) -> MemoryPeak:
    """`peak_of_step` for any `module` whose `losses` are to be summed; `inputs` hold the tensors of the micro-batch."""
    for group in optimizer.param_groups:
        group["foreach"] = not group["fused"]  # the default on a GPU
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the optimizer's state
    account = MemoryAccount()
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    account.now["rest"] = waiting * sum(tensor.nbytes for tensor in tensors)
    account.hold(tensors, "rest")
    account.hold([*module.parameters(), *module.buffers()], "weights")
    account.hold([parameter.grad for parameter in trained], "gradients")
    account.hold(tree_leaves([list(state.values()) for state in optimizer.state.values()]), "optimizer")
    with account, force_gpu_path(), cuda_autocast():
        account.kind = "activations"
        with nullcontext() if precision == "no" else torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack(list(losses().values())).sum()
        account.kind = "rest"
        loss.backward()
        of_passes, account.most = account.most, dict(account.now)
        optimizer.step()
    passes, update = sum(of_passes.values()), sum(account.most.values())
    most = of_passes if passes > update else account.most
    return MemoryPeak(**most, passes=passes, update=update, at_nms=account.at_nms, nms_boxes=account.nms_boxes)


def card_bytes(allocated: int) -> int:
    """What a card must have for a peak of so much: with the context and the gaps."""
    return CONTEXT + round((1 + FRAGMENTATION) * allocated)


def largest_micro_batch(available: int, peaks: dict[int, MemoryPeak]) -> int:
    """How many images fit on a card of `available` bytes, 0 where not even one does.

    A step's memory grows by the same with each image, NMS's table with the square of their number, up to a limit.

    Args:
        available: bytes of the card.
        peaks: of micro-batches of some numbers of images, at least two.
    """
    moments = ("passes", "update", "at_nms", "nms_boxes")
    passes, update, at_nms, boxes = ({n: getattr(peak, name) for n, peak in peaks.items()} for name in moments)
    images = 0
    while True:
        more = images + 1
        in_nms = _line(at_nms, more) + nms_bytes(min(_line(boxes, more), MAX_NMS_BOXES))
        if card_bytes(max(_line(passes, more), _line(update, more), in_nms)) > available:
            return images
        images = more


def _line(points: dict[int, int], place: int) -> int:
    """At `place`, the value of a line through `points`: beyond the last two of them with the steepest slope."""
    places = sorted(points)
    slopes = [(points[b] - points[a]) / (b - a) for a, b in pairwise(places)]
    if place > places[-1]:
        return round(points[places[-1]] + max(slopes) * (place - places[-1]))
    number = max(0, sum(place > start for start in places) - 1)
    return round(points[places[number]] + slopes[min(number, len(slopes) - 1)] * (place - places[number]))
