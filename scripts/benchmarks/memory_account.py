"""The memory of a training step on a GPU, found without one: a real step on the CPU, with every tensor counted.

Counted are the tensors that PyTorch's operators return: weights, gradients, optimizer state, activations and whatever
else autograd saves, autocast's copies of weights. Where a GPU computes in another way than a CPU, the step computes as
the GPU does: RoIAlign and NMS (`models.layers.force_gpu_path`), the optimizer's loops over all tensors at once, and
autocast's float32 norms, softmax and upsampling. bf16 stands for fp16, which is as large.

Not counted are the buffers of a running kernel (cuDNN's workspace, a sort's buffer), except for NMS's table, and the
gaps in the allocator's memory: `CONTEXT` and `FRAGMENTATION` leave room for them. Several processes hold their
gradients twice, which is not counted either. The account has not been compared with a GPU's own figures.
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
FRAGMENTATION = 0.1  # of the peak: gaps that the allocator cannot use
KINDS = ("weights", "gradients", "optimizer", "activations", "rest")
# CUDA's autocast computes these in float32 whatever their inputs; the CPU's leaves them in bf16.
FLOAT32_ON_GPU = ("layer_norm", "group_norm", "softmax.int", "upsample_nearest2d.vec", "upsample_bilinear2d.vec")


@dataclass(frozen=True)
class MemoryPeak:
    """The moment of a training step at which most is allocated, in bytes.

    Attributes:
        weights: parameters and buffers.
        gradients: of the parameters.
        optimizer: its state.
        activations: of the forward pass, also when recomputed in the backward pass; with autocast's copies of weights.
        rest: images and objects, gradients of activations, the update's temporaries.
        passes: the peak of all that is allocated in the forward and backward pass.
        update: the same in the optimizer's step.
        at_nms: what is allocated when NMS has the most boxes.
        nms_boxes: how many boxes those are.
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
    """Counts the live storages while it is entered, each once, by kind.

    A storage counts from the operator that made it until it is freed, whether a variable, a view or only autograd holds
    it: its Python object lives as long as the storage, so a weak reference shows its end. Backward passes must run in
    the thread that entered the account, as they do on a CPU.

    Attributes:
        kind: how new tensors made without gradients count, one of `KINDS`; those made with gradients are activations.
        now: live bytes of each kind.
        most: the same at the peak.
        at_nms: live bytes when NMS had the most boxes.
        nms_boxes: how many boxes those were.
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
            boxes = len(args[0])
            if boxes > self.nms_boxes:
                self.at_nms, self.nms_boxes = sum(self.now.values()), boxes
            # On a GPU, torchvision's kernel also allocates a table of which box suppresses which.
            self._compare({**self.now, self.kind: self.now[self.kind] + nms_bytes(boxes)})
        return results

    def hold(self, values: Iterable[Any], kind: str | None = None) -> None:
        """Count the tensors among `values` as `kind`; without it, known ones keep their kind and new ones get one."""
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


def nms_bytes(boxes: int) -> int:
    """The bytes of the GPU's table: a bit for each pair of boxes, in words of 64."""
    return boxes * -(-boxes // 64) * 8


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Within it, the CPU's autocast computes in float32 what CUDA's does."""
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
    """The peak of one micro-batch of a training step, with optimizer state and accumulated gradients in memory.

    Weights, gradients and the optimizer's state change.

    Args:
        detector: in training mode, on the CPU.
        batch: the micro-batch.
        precision: "no", "fp16" or "bf16".
        optimizer: of the detector's parameters that train.
        waiting: further micro-batches of the step, which are on the device already.
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
    """`peak_of_step` for any `module` whose `losses` are summed; `inputs` contain the tensors of the micro-batch."""
    for group in optimizer.param_groups:
        group["foreach"] = not group["fused"]  # the default on a GPU
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates the optimizer's state
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
    """The memory that a card needs for a peak of `allocated` bytes: with the context and the gaps."""
    return CONTEXT + round((1 + FRAGMENTATION) * allocated)


def largest_micro_batch(available: int, peaks: dict[int, MemoryPeak]) -> int:
    """How many images fit on a card of `available` bytes; 0 if not even one does.

    A step's memory grows linearly with the number of images, NMS's table with its square, up to a limit.

    Args:
        available: bytes of the card.
        peaks: for at least two numbers of images, the peak of a micro-batch.
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
    """The value at `place` of a line through `points`; beyond the last point it has their steepest slope."""
    places = sorted(points)
    slopes = [(points[b] - points[a]) / (b - a) for a, b in pairwise(places)]
    if place > places[-1]:
        return round(points[places[-1]] + max(slopes) * (place - places[-1]))
    number = max(0, sum(place > start for start in places) - 1)
    return round(points[places[number]] + slopes[min(number, len(slopes) - 1)] * (place - places[number]))
