"""Streaming: memory of the processes over many samples, and the share of time that they take.

Rows of one small JPEG and three boxes lie in parquet shards; one process streams them for some epochs into
micro-batches of 8, with two processes that decode. Memory is what belongs to the three processes alone (USS), summed.
"""

import argparse
import io
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.rows import Row, row
from direct_pt.data.images import Decoding
from direct_pt.data.loader import Share
from direct_pt.data.stream import StreamFeed, open_stream
from direct_pt.flags import positive_integer
from direct_pt.transforms import PretrainPreset

ROWS, SHARDS, SIDE, MICRO_BATCH, READINGS = 20_000, 8, 64, 8, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much is streamed."""
    parser.add_argument("--samples", type=positive_integer, default=100_000, metavar="N", help="in all (100000)")
    parser.add_argument("--window", type=positive_integer, default=1000, metavar="N", help="--shuffle-buffer (1000)")


def measure(args: argparse.Namespace) -> list[Row]:
    """The highest memory in each tenth, and the rate."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with TemporaryDirectory() as name:
        _write(Path(name))
        stream = open_stream(Path(name), "coco", Decoding(), args.window)
        feed = StreamFeed(stream, PretrainPreset(SIDE), seed=0, with_masks=False, num_workers=2)
        count = args.samples // MICRO_BATCH
        start, highest = time.perf_counter(), 0.0
        for done, _ in enumerate(feed.batches(Share(MICRO_BATCH, 0, count)), start=1):
            if done % max(1, count // READINGS // 20) == 0:
                highest = max(highest, _memory_mib())
            if done % (count // READINGS) == 0:
                label = f"highest memory up to {done * MICRO_BATCH:,} samples"
                rows.append(row("stream", label, highest, "MiB", target="flat"))
                highest = 0.0
        rate = count * MICRO_BATCH / (time.perf_counter() - start)
        rows.append(row("stream", f"samples of {SIDE}x{SIDE}", rate, "images/s"))
    return rows


def _write(folder: Path) -> None:
    """The shards."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)).save(file, "JPEG")
    names = datasets.List(datasets.ClassLabel(names=["a", "b", "c"]))
    boxes = datasets.List(datasets.List(datasets.Value("float64")))
    features = datasets.Features(image=datasets.Image(), objects={"bbox": boxes, "category": names})
    datasets.disable_progress_bars()
    for shard in range(SHARDS):
        rows = [
            {
                "image": {"bytes": file.getvalue(), "path": None},
                "objects": {"bbox": rng.uniform(1, SIDE / 2, (3, 4)).tolist(), "category": [0, 1, 2]},
            }
            for _ in range(ROWS // SHARDS)
        ]
        part = datasets.Dataset.from_list(rows, features=features)
        part.to_parquet(str(folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"))


def _memory_mib() -> float:
    """Of this process and those that it started, without what they share."""
    me = psutil.Process()
    return sum(process.memory_full_info().uss for process in (me, *me.children())) / 2**20
