"""Streaming: the memory of the processes over many samples, and the samples a second.

The rows, of one small JPEG and three boxes each, are in parquet shards. One process streams them for several epochs
into micro-batches of 8; two more decode. Memory is the sum of what belongs to each of the three alone (USS).
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from benchmarks.rows import Row, row
from benchmarks.synthetic import write_parquet
from direct_pt.data.loader import Share
from direct_pt.data.stream import StreamFeed, open_stream
from direct_pt.flags import positive_integer
from direct_pt.images.decoding import Decoding
from direct_pt.transforms import PretrainPreset

ROWS, SHARDS, SIDE, MICRO_BATCH, READINGS = 20_000, 8, 64, 8, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The number of samples, and the size of the shuffle buffer."""
    parser.add_argument("--samples", type=positive_integer, default=100_000, metavar="N", help="in all (100000)")
    parser.add_argument("--window", type=positive_integer, default=1000, metavar="N", help="--shuffle-buffer (1000)")


def measure(args: argparse.Namespace) -> list[Row]:
    """The highest memory in each tenth of the samples, and the rate."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with TemporaryDirectory() as name:
        write_parquet(Path(name), ROWS, SHARDS, SIDE)
        stream = open_stream(Path(name), "coco", Decoding(), args.window)
        feed = StreamFeed(stream, PretrainPreset(SIDE), seed=0, with_masks=False, num_workers=2)
        count = args.samples // MICRO_BATCH
        start, highest = time.perf_counter(), 0.0
        for done, _ in enumerate(feed.batches(Share(MICRO_BATCH, 0, count)), start=1):
            if done % max(1, count // READINGS // 20) == 0:
                processes = psutil.Process(), *psutil.Process().children()
                memory = sum(process.memory_full_info().uss for process in processes)  # without what they share
                highest = max(highest, memory / 2**20)
            if done % (count // READINGS) == 0:
                label = f"highest memory up to {done * MICRO_BATCH:,} samples"
                rows.append(row("stream", label, highest, "MiB", target="flat"))
                highest = 0.0
        rate = count * MICRO_BATCH / (time.perf_counter() - start)
        rows.append(row("stream", f"samples of {SIDE}x{SIDE}", rate, "images/s"))
    return rows
