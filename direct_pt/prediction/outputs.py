"""Which results are written: the flags, and what they stand for."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from direct_pt.errors import InputError
from direct_pt.flags import flag
from direct_pt.prediction.annotation_files import (
    LABEL_STUDIO_SETUP,
    coco_annotations,
    coco_results,
    cvat_images,
    label_studio_tasks,
    yolo_set,
)
from direct_pt.prediction.inputs import ANNOTATIONS, CROPS, CVAT, LABEL_STUDIO, RESULTS, YOLO
from direct_pt.prediction.pictures import crops, pictures
from direct_pt.prediction.seen import Classes, Output


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written beside predictions.json."""

    as_annotations: bool = flag(
        False, f"also as {ANNOTATIONS}, a COCO file to correct and train on; mind --score-threshold"
    )
    as_yolo: bool = flag(False, f"also as {YOLO}/, a YOLO data set to correct and train on: boxes alone")
    as_label_studio: bool = flag(False, f"also as {LABEL_STUDIO}, predictions to import into Label Studio")
    as_cvat: bool = flag(False, f"also as {CVAT}, to import into CVAT as 'CVAT for images 1.1'")
    crops: bool = flag(False, f"also cut out each object: {CROPS}/CLASS/IMAGE_N.jpg")
    no_pictures: bool = flag(False, "draw no pictures")

    def check(self, folder: Path) -> None:
        """Raises InputError: one of them is in the folder already: it may hold somebody's corrections."""
        for name in self.files():
            for place in (name, LABEL_STUDIO_SETUP) if name == LABEL_STUDIO else (name,):
                if os.path.lexists(folder / place):
                    text = f"has {place}, which may hold corrections; name another place"
                    raise InputError(f"--output-dir {folder}: {text}")

    def files(self) -> list[str]:
        """The names of what is asked for beside pictures, in the order in which it is written."""
        kinds = (
            (self.crops, CROPS),
            (self.as_annotations, ANNOTATIONS),
            (self.as_yolo, YOLO),
            (self.as_label_studio, LABEL_STUDIO),
            (self.as_cvat, CVAT),
        )
        return [name for is_asked, name in kinds if is_asked]

    def outputs(self, folder: Path, classes: Classes, base: Path) -> list[Output]:
        """What is written into a folder; files are named as seen from `base`. Raises InputError: see `check`."""
        self.check(folder)
        writers: dict[str, Callable[[Path, Classes], Output]] = {
            CROPS: crops,
            ANNOTATIONS: partial(coco_annotations, base=base),
            YOLO: yolo_set,
            LABEL_STUDIO: partial(label_studio_tasks, base=base),
            CVAT: partial(cvat_images, base=base),
        }
        drawn = [] if self.no_pictures else [pictures(folder, classes)]  # first: their files are read
        found = [writers[name](folder / name, classes) for name in self.files()]
        return [*drawn, *found, coco_results(folder / RESULTS, classes)]


def describe(options: OutputOptions, folder: Path, base: Path) -> list[str]:
    """How to go on with what was written, a line each."""
    lines = []
    if options.as_annotations:
        lines.append(f"train on {ANNOTATIONS}: --train-images {base} --train-annotations {folder / ANNOTATIONS}")
    if options.as_yolo:
        lines.append(f"train on {YOLO}: --data {folder / YOLO}")
    if options.as_label_studio:
        root = f"LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={base.parent}"
        lines.append(
            f"Label Studio: set {root}, give the project {LABEL_STUDIO_SETUP} as its labelling set-up, and a source"
        )
        lines.append(f"  storage 'Local files' of {base}, without which no image is shown; then import {LABEL_STUDIO}")
    if options.as_cvat:
        lines.append(f"CVAT: make a task of the images with the same labels, then upload {CVAT} as 'CVAT 1.1'")
    if options.as_label_studio or options.as_cvat:
        lines.append("what was corrected there comes back as COCO: export it so, and train on it")
    return lines
