"""The losses of a whole split, averaged over its batches as if it were one."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from direct_pt.batch import Batch
from direct_pt.models.detector import Detector


@dataclass
class MeanLosses:
    """Sums of the losses of batches, each by its weight.

    A two-stage detector's losses are means over images, RetinaNet's over positive anchors. Neither the sampled RoIs nor
    the weights depend on which images share a batch: a mean differs from that of other batches by padding alone.

    Attributes:
        sums: of each loss times the weight of its batch.
        weight: of all batches.
    """

    sums: dict[str, float] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, detector: Detector, features: list[Tensor], batch: Batch) -> None:
        """Those of a batch, whose labels are the detector's, from its pyramid `features`; not of unreadable images."""
        if batch.unreadable:
            kept = ~torch.isin(batch.indices, torch.tensor(batch.unreadable, device=batch.indices.device))
            tensors: dict[str, Any] = {
                f.name: v[kept] for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)
            }
            features, batch = [feature[kept] for feature in features], replace(batch, unreadable=(), **tensors)
        if not len(batch):
            return
        weight = detector.loss_weight(batch)
        losses = detector.losses(features, batch)
        share = torch.as_tensor(len(batch) if weight is None else weight, device=features[0].device).double()
        *products, total = torch.stack([*(loss.double() * share for loss in losses.values()), share]).tolist()
        for name, product in zip(losses, products, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + product
        self.weight += total

    def merged(self, others: list["MeanLosses"]) -> "MeanLosses":
        """With those of other processes."""
        parts = [self, *others]
        names = dict.fromkeys(name for part in parts for name in part.sums)
        sums = {name: math.fsum(part.sums.get(name, 0.0) for part in parts) for name in names}
        return MeanLosses(sums, math.fsum(part.weight for part in parts))

    def record(self) -> dict[str, object]:
        """{"val_loss": their sum, "val_losses": {name: mean}}; a loss that is not finite is None, empty without any."""
        means = {name: value / self.weight for name, value in self.sums.items() if self.weight}
        finite: dict[str, float | None] = {name: m if math.isfinite(m) else None for name, m in means.items()}
        total = sum(means.values())
        return {"val_loss": total if math.isfinite(total) else None, "val_losses": finite} if means else {}
