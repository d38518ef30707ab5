"""Every image of a data set, decoded: what is wrong with it, what may surprise, and its fingerprint."""

import io
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset
from tqdm import tqdm

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.problems import ERROR, NOTE, Problem, Problems
from direct_pt.data.reader_processes import Readers, runs
from direct_pt.images.decoding import READABLE, UnreadableImage, header_sizes
from direct_pt.reports.duplicates import Fingerprints, perceptual_hash, pixel_digest

Checked = tuple[list[Problem], tuple[int, int, np.ndarray] | None]  # problems; row, digest and hash

IMAGES_AT_ONCE = 8  # of a process


class CheckedImages(Dataset[Checked]):
    """For each image of a table its problems, and its fingerprint if it can be read."""

    def __init__(self, table: AnnotationTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Checked:
        name = self.table.image_name(row)
        try:
            pixels = self.table.read_image(row)
            notes = [Problem(NOTE, kind, name, text, name) for kind, text in self._notes(row)]
            return notes, (row, pixel_digest(pixels), perceptual_hash(pixels))
        except (UnreadableImage, OSError) as error:  # OSError: the file was removed meanwhile
            kind = "unreadable image"
            with suppress(UnreadableImage, OSError):
                if self.table.image_size(row) not in header_sizes(self.table.image_content(row), name)[:2]:
                    kind = "image size"
            return [Problem(ERROR, kind, name, str(error).removeprefix(f"{name}: "), name)], None

    def _notes(self, row: int) -> Iterator[tuple[str, str]]:
        """Kind and text of each note about the file: how properties that may surprise are handled."""
        content, size, decoding = self.table.image_content(row), self.table.image_size(row), self.table.decoding
        stored, upright, orientation = header_sizes(content, "")
        if orientation > 1:
            exif = f"its EXIF orientation {orientation} is"
            if not decoding.exif:
                yield "EXIF orientation ignored", f"{exif} ignored (--exif ignore)"
            elif stored == upright:
                text = f"{exif} applied; its size does not tell if its annotation means that"
                yield "EXIF orientation, doubtful", text
            elif size == upright:
                yield "EXIF orientation applied", f"{exif} applied: its annotation states the size that it has then"
            else:
                yield "EXIF orientation not applied", f"{exif} not applied: its annotation states the size as stored"
        with warnings.catch_warnings(action="ignore"), suppress(Image.DecompressionBombError):
            image = Image.open(io.BytesIO(content), formats=READABLE)
            if image.has_transparency_data:
                yield "transparency", f"transparent pixels are read as {decoding.alpha} (--alpha)"
            if image.mode.startswith(("I", "F")):
                yield "more than 8 bits", f"mode {image.mode} is scaled to 8 bits: look if the samples are too dark"
            if image.mode == "CMYK":
                yield "CMYK", "is converted to RGB without its colour profile"


def check_images(
    tables: dict[str, AnnotationTable], problems: dict[str, Problems], num_workers: int
) -> dict[str, Fingerprints]:
    """The fingerprints of each split's readable images. Adds what is wrong to `problems`."""
    splits = [split for split, table in tables.items() for _ in range(len(table))]
    found: dict[str, list[tuple[int, int, np.ndarray]]] = {split: [] for split in tables}
    images: ConcatDataset[Checked] = ConcatDataset(CheckedImages(table) for table in tables.values())
    keys = partial(iter, runs(0, len(splits), IMAGES_AT_ONCE))
    with closing(iter(Readers(images, keys, num_workers, list))) as batches:
        checked = (image for batch in batches for image in batch)
        for split, (wrong, fingerprint) in zip(splits, tqdm(checked, "images", len(splits), unit="image"), strict=True):
            for problem in wrong:
                problems[split].add(problem)
            if fingerprint is not None:
                found[split].append(fingerprint)
    return {split: Fingerprints.gather(prints) for split, prints in found.items()}
