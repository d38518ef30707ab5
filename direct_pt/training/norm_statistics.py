"""BatchNorm's running statistics: the same on all processes, and computed anew over many images."""

import math
from contextlib import closing

import torch
from accelerate import Accelerator

from direct_pt.data.loader import Feed, Share
from direct_pt.distributed.launch import autocast
from direct_pt.models.detector import Detector
from direct_pt.models.layers import batchnorms, running_statistics
from direct_pt.training.plan import Plan

MAX_IMAGES = 1024  # that the statistics are computed from


def recompute_statistics(detector: Detector, feed: Feed, plan: Plan, accelerator: Accelerator) -> None:
    """Replace the running statistics, which are those of the last few micro-batches, by the mean over many.

    Args:
        detector: whose backbone is shown the first images of the feed, as they are in training.
        feed: of the training images.
        plan: of the run.
        accelerator: every process must call it.
    """
    layers = batchnorms(detector)
    if not layers:
        return
    momenta, was_training = [layer.momentum for layer in layers], detector.training
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches from now on
    detector.train()
    per_round = plan.micro_batch_size * plan.processes
    rounds = math.ceil(min(MAX_IMAGES, len(feed)) / per_round)
    share = Share(plan.micro_batch_size, 0, rounds * plan.processes, accelerator.process_index, plan.processes)
    with torch.no_grad(), autocast(accelerator), closing(feed.batches(share)) as batches:
        for batch in batches:
            detector.backbone(detector.normalize(batch.to(accelerator.device)))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    average_running_statistics(detector, accelerator)
    detector.train(was_training)


def average_running_statistics(detector: Detector, accelerator: Accelerator) -> None:
    """Make BatchNorm's running statistics the mean over the processes: the model is then the same on all of them."""
    if accelerator.num_processes == 1:
        return
    statistics = running_statistics(detector)
    if statistics:
        flat = accelerator.reduce(torch.cat([statistic.flatten() for statistic in statistics]), reduction="mean")
        sizes = [statistic.numel() for statistic in statistics]
        for statistic, mean in zip(statistics, flat.split(sizes), strict=True):
            statistic.copy_(mean.view_as(statistic))
