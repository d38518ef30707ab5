"""Seconds and memory to read annotations of COCO train2017's size: the first start, later ones, and pycocotools.

The file is synthetic: polygons as long as COCO's, one object in 90 a crowd region in run lengths; the image files are
empty. Each start is a process of its own, timed without its imports; "at work" is its processor time, which depends
less on other programs. Peak memory is that of the whole process, PyTorch included, also for the peer. The worker is a
forked process that reads every image's objects once; its own memory is what it shares with no other process.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from benchmarks.rows import Row, in_process, peak_gib, row
from benchmarks.synthetic import COCO_IMAGES, write_coco_annotations
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats.coco import CocoSplit
from direct_pt.data.sources import load_split
from direct_pt.flags import any_path, positive_integer

PART = "annotations"
MEMORY_READINGS = 100  # of the worker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The number of images, and where they lie."""
    parser.add_argument(
        "--images", type=positive_integer, default=COCO_IMAGES, metavar="N", help="images (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=any_path, metavar="DIR", help="keep the synthetic data here, and use them again"
    )


def measure(args: argparse.Namespace) -> list[Row]:
    """The file, both kinds of start beside pycocotools, and a worker."""
    with _folder(args.folder) as folder:
        if not (folder / "labels.json").exists():
            write_coco_annotations(folder, args.images)
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            found = {
                task: json.loads(in_process(PART, task, str(folder), cache))
                for task in ("first", "pycocotools", "later", "worker")
            }
        megabytes = (folder / "labels.json").stat().st_size / 1e6
    rows = [row(PART, "annotation file", megabytes, "MB")]
    peer = found["pycocotools"]
    for task, limit, memory_limit in (("first", "under 60 s", "under 3 GB"), ("later", "under 3 s", None)):
        ours, name = found[task], f"{task} start"
        rows.append(row(PART, name, ours["seconds"], "s", "pycocotools", peer["seconds"], limit))
        rows.append(row(PART, f"{name}, at work", ours["at_work"], "s", "pycocotools", peer["at_work"]))
        rows.append(row(PART, f"{name}, peak", ours["gib"], "GiB", "pycocotools", peer["gib"], memory_limit))
    first, last = found["worker"]
    rows.append(row(PART, "a worker's own memory, first quarter", first, "MiB"))
    rows.append(row(PART, "the same, last quarter", last, "MiB", target="as the first quarter"))
    return rows


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """The folder to keep, or a temporary one."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(task: str, folder: str, cache: str) -> None:
    """One measurement, printed as JSON."""
    paths = CocoSplit(Path(folder, "pictures"), Path(folder, "labels.json"))
    os.environ["DIRECT_PT_CACHE"] = cache
    start, start_at_work = time.perf_counter(), time.process_time()
    if task == "pycocotools":
        with contextlib.redirect_stdout(io.StringIO()):
            COCO(str(paths.annotations))
    else:
        table = load_split(paths)
        table.require_masks()
    found = {"seconds": time.perf_counter() - start, "at_work": time.process_time() - start_at_work, "gib": peak_gib()}
    print(json.dumps(_worker(table) if task == "worker" else found))


def _worker(table: AnnotationTable) -> list[float]:
    """A worker's own memory in MiB: the mean over the first and over the last quarter of an epoch."""
    receiver, sender = get_context("fork").Pipe(duplex=False)

    def epoch(sender: Connection) -> None:
        readings = []
        for number, image in enumerate(np.random.default_rng(0).permutation(len(table))):
            table.objects(int(image), with_masks=True)
            if number % max(1, len(table) // MEMORY_READINGS) == 0:
                # In KiB: the memory that only this process holds, and that its end would free.
                fields = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
                readings.append(sum(int(words[1]) for words in fields if words[0] == "Private_Dirty:") / 1024)
        sender.send(readings)

    worker = get_context("fork").Process(target=epoch, args=(sender,))
    worker.start()
    sender.close()
    readings = receiver.recv()
    worker.join()
    quarter = len(readings) // 4
    return [float(np.mean(readings[:quarter])), float(np.mean(readings[-quarter:]))]


if __name__ == "__main__":
    main(*sys.argv[1:])
