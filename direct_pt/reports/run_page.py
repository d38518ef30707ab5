"""run.html: what a run is, how far it has come and what it finds, in one file, written anew at each evaluation."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from direct_pt.batch import Batch
from direct_pt.data.annotations import AnnotationTable
from direct_pt.errors import printable
from direct_pt.files import replacing, write_text
from direct_pt.images.decoding import UnreadableImage
from direct_pt.reports.evaluation import Judged
from direct_pt.reports.overlays import QUALITY, detections, draw_overlay, file_uri, ground_truth, window_around
from direct_pt.reports.page import render
from direct_pt.reports.samples import picture

PAGE, PICTURES = "run.html", "run_pictures"
MAX_SAMPLES = 8
MAX_IMAGES = 6  # of the validation split, shown after each evaluation
MAX_COLUMNS = 12  # evaluations that are shown: the first and the latest ones
SAMPLE_SIDE = 224  # pixels


@dataclass
class RunPage:
    """The page of one run.

    Its pictures lie in `folder`/run_pictures, so that a resumed run shows the earlier ones too.

    Attributes:
        folder: of the run.
        title: of the stage.
        banner: the start banner.
        command: that started the run.
        total_steps: of the run.
        val: the validation split, if there is one.
    """

    folder: Path
    title: str
    banner: str
    command: str
    total_steps: int
    val: AnnotationTable | None

    def has_samples(self) -> bool:
        """Whether an earlier start of the run has left them."""
        return self._path("sample-0").exists()

    def add_samples(self, batches: Iterable[Batch], class_names: tuple[str, ...]) -> None:
        """Keep pictures of the first training samples, as the detector sees them. Raises OSError."""
        pictures = (picture(batch, row, class_names) for batch in batches for row in range(len(batch)))
        for number, sample in reversed(list(enumerate(islice(pictures, MAX_SAMPLES)))):  # the first says that all are
            sample.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
            self._save(sample, f"sample-{number}")

    def add_evaluation(self, step: int, judged: Judged) -> None:
        """Keep pictures of what is found in the chosen images. Raises OSError."""
        for number, row in enumerate(self._chosen()):
            with suppress(UnreadableImage):  # it was said when it was evaluated
                photo = Image.fromarray(judged.table.read_image(row))
                window = window_around(None, photo.size)
                if not self._path(f"truth-{number}").exists():
                    self._save(draw_overlay(photo, window, ground_truth(judged, row)), f"truth-{number}")
                self._save(draw_overlay(photo, window, detections(judged, row)), f"step-{step}-{number}")

    def pictures(self, step: int) -> dict[str, Path]:
        """The files of the training samples, at step 0, or of what was found at a later one, by their names."""
        kind, name = ("sample", "sample") if step == 0 else ("validation", f"step-{step}")
        named = {f"{kind}/{number}": self._path(f"{name}-{number}") for number in range(MAX_SAMPLES)}
        return {title: path for title, path in named.items() if path.exists()}

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """The page, from the records of metrics.jsonl. Raises OSError."""
        evaluations = [record for record in records if "bbox" in record]
        best = max(evaluations, key=lambda record: record["bbox"]["AP"], default=None)
        losses = [record for record in evaluations if record.get("val_loss") is not None]
        shown = evaluations[:1] + evaluations[1:][-(MAX_COLUMNS - 1) :]
        rows = [
            [self._stored(f"truth-{number}"), *(self._stored(f"step-{record['step']}-{number}") for record in shown)]
            for number in range(len(self._chosen()))
        ]
        curves = self.folder / "curves.png"
        page = render(
            "run.html",
            title=f"{self.title}: {printable(str(self.folder))}",
            step=max((record["step"] for record in records), default=0),
            total_steps=self.total_steps,
            last=evaluations[-1] if evaluations else None,
            best=best,
            lowest=min(losses, key=lambda record: record["val_loss"], default=None),
            classes=self._classes(evaluations),
            banner=self.banner,
            command=self.command,
            folder=printable(str(self.folder)),
            curves=file_uri(curves.read_bytes(), "png") if curves.exists() else "",
            samples=list(filter(None, (self._stored(f"sample-{number}") for number in range(MAX_SAMPLES)))),
            columns=[record["step"] for record in shown],
            rows=[row for row in rows if any(row)],
        )
        write_text(self.folder / PAGE, page)

    def _classes(self, evaluations: Sequence[dict[str, Any]]) -> list[tuple[str, int, float]]:
        """Name, objects and AP of each class that has objects, after the last evaluation."""
        per_class = evaluations[-1].get("per_class", {}) if evaluations else {}
        return [
            (printable(name), row["objects"], row["bbox"]["AP"]) for name, row in per_class.items() if row["objects"]
        ]

    def _chosen(self) -> list[int]:
        """Rows of a few validation images with objects, evenly over the split."""
        if self.val is None:
            return []
        rows = np.flatnonzero(self.val.targets_per_image())
        places = np.linspace(0, len(rows) - 1, min(len(rows), MAX_IMAGES)).round().astype(int)
        return rows[places].tolist()

    def _path(self, name: str) -> Path:
        return self.folder / PICTURES / f"{name}.webp"

    def _save(self, image: Image.Image, name: str) -> None:
        self._path(name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(name), to_disk=False) as temporary:
            image.save(temporary, "WEBP", quality=QUALITY)

    def _stored(self, name: str) -> str:
        """A picture as the page holds it; empty if there is none."""
        try:
            return file_uri(self._path(name).read_bytes(), "webp")
        except OSError:
            return ""
