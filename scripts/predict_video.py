"""Detect objects in a video, a stream or a camera's pictures: an annotated video, and a line of JSON for each frame.

  python scripts/predict_video.py --checkpoint RUN VIDEO|rtsp://...|camera:0 [--output-dir DIR] [--tiles PIXELS]

Writes video.mp4, every frame at its own time with its detections drawn, and detections.jsonl: "frame" (from 0), "time"
(seconds since the first) and "detections", COCO results with class names. Streams and cameras do not wait: the newest
frame is taken each time, and those that are left out are counted; one that breaks off is called again. A stop signal
(Ctrl-C) ends it, and what was written is whole.
"""

from direct_pt.program.run import run_program
import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from direct_pt.coco_eval import Predictions
from direct_pt.distributed.launch import ComputeOptions, make_accelerator
from direct_pt.errors import InputError, StopSignal, printable
from direct_pt.files import check_output, counted_folder, writing
from direct_pt.flags import (
    add_flags,
    any_path,
    flag,
    make_parser,
    positive_float,
    positive_integer,
    read_flags,
)
from direct_pt.images.tiles import TileOptions, find_in_tiles
from direct_pt.onnx_detector import Found
from direct_pt.prediction.detector_options import DetectorOptions
from direct_pt.prediction.pictures import drawable_names, with_detections
from direct_pt.prediction.seen import Classes
from direct_pt.prediction.video import Frame, LiveVideo, VideoWriter, open_video
from direct_pt.program.folder_lock import folder_held
from direct_pt.program.signals import StopSignals
from direct_pt.transforms import TestPreset

VIDEO, LINES = "video.mp4", "detections.jsonl"


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Which frames are looked at, and what is written."""

    every: int = flag(1, "look at every N-th frame alone", positive_integer, metavar="N")
    max_frames: int | None = flag(None, "end after looking at so many frames", positive_integer, metavar="N")
    reconnect: float = flag(
        60.0, "for how long a stream or camera that breaks off is called again", positive_float, metavar="SECONDS"
    )
    no_video: bool = flag(False, "write no video")

    def chosen(self, frames: Iterator[Frame], signals: StopSignals) -> Iterator[Frame]:
        """The frames to look at, until a stop signal comes."""
        due = count = 0
        for frame in frames:
            if frame.number >= due:  # of live sources, those in between may be missing
                yield frame
                due, count = frame.number + self.every, count + 1
            if signals.number or count == self.max_frames:
                return

    def count(self, total: int | None) -> int | None:
        """How many they are, of so many."""
        number = None if total is None else -(-total // self.every)
        return self.max_frames if number is None else min(number, self.max_frames or number)


def line(frame: Frame, found: Found, classes: Classes) -> str:
    """A frame's line of JSON."""
    size = frame.pixels.shape[0], frame.pixels.shape[1]
    names = dict(zip(classes.ids, classes.names, strict=True))
    rows = Predictions.of_image(0, found, size).coco(np.zeros(1, np.int64), classes.ids)
    for row in rows:
        del row["image_id"]
    detections = [{"category_name": names[row["category_id"]], **row} for row in rows]
    return json.dumps({"frame": frame.number, "time": round(frame.time, 6), "detections": detections}) + "\n"


def main() -> None:
    """Predict, frame by frame."""
    p = make_parser(__doc__ or "")
    p.add_argument("source", metavar="VIDEO", help="a file, an address such as rtsp://..., or a camera: camera:0")
    p.add_argument("--output-dir", type=any_path, metavar="DIR", help="where to write (runs/video, -2 and so on)")
    add_flags(p, DetectorOptions)
    add_flags(p, VideoOptions)
    add_flags(p, TileOptions)
    add_flags(p, ComputeOptions)
    args = p.parse_args()

    own, compute = read_flags(args, DetectorOptions), read_flags(args, ComputeOptions)
    own.check(compute)
    options, output = read_flags(args, VideoOptions), args.output_dir or counted_folder(Path("runs/video"))
    check_output(output)
    for name in (VIDEO, LINES):
        if os.path.lexists(output / name):
            raise InputError(f"--output-dir {output}: has {name}, which is not written over; name another place")
    video = open_video(args.source, options.reconnect)
    accelerator = make_accelerator(compute.mixed_precision, device=compute.device)
    detector, thresholds = own.load(accelerator.device)
    config, tiling = detector.config, read_flags(args, TileOptions).tiling(detector.tiling)
    preset, classes = TestPreset(config.short_side, config.long_side), Classes(config.class_names, config.category_ids)
    print(f"frames are looked at whole{f' {tiling}' if tiling else ''}")

    def find(images: list[np.ndarray]) -> list[Found]:
        with accelerator.autocast():
            return [found.above(thresholds) for found in detector.find(images, preset)]

    at_once = 1 if isinstance(video, LiveVideo) else own.micro_batch_size
    count = detections = 0
    names, signals = drawable_names(classes), StopSignals()
    with ExitStack() as stack:
        stack.enter_context(writing(f"--output-dir {output}"))
        stack.enter_context(folder_held(output, "predict"))
        lines = stack.enter_context((output / LINES).open("w"))
        rate = video.rate / options.every
        writer = None if options.no_video else stack.enter_context(closing(VideoWriter(output / VIDEO, rate)))
        frames = options.chosen(stack.enter_context(closing(video.frames(lambda: bool(signals.number)))), signals)
        bar = stack.enter_context(tqdm(total=options.count(video.total), desc="predict", unit="frame"))
        signals.catch()
        while batch := list(islice(frames, at_once)):
            images = [frame.pixels for frame in batch]
            if tiling is None:
                everything = find(images)
            else:
                everything = [find_in_tiles(image, tiling, find, own.micro_batch_size) for image in images]
            for frame, found in zip(batch, everything, strict=True):
                lines.write(line(frame, found, classes))
                if writer is not None:
                    writer.write(np.asarray(with_detections(Image.fromarray(frame.pixels), found, names)), frame.time)
                bar.update()
            count += len(batch)
            detections += sum(len(found.scores) for found in everything)
            lines.flush()
    for note in [*video.notes, *([] if writer is None else writer.notes)]:
        print(printable(f"{video.name}: {note}"))
    if not count:
        raise InputError(f"{video.name}: no picture of it could be read")
    written = LINES if writer is None else f"{LINES}, {VIDEO}"
    print(printable(f"{count} frames, {detections} detections: {output} ({written})"))
    if signals.number:
        raise StopSignal(
            f"{signal.Signals(signals.number).name}: what was found until now is whole", 128 + signals.number
        )


if __name__ == "__main__":
    with torch.inference_mode():
        run_program(main)
