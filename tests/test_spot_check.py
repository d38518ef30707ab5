"""The look at some images before training: most of them wrong is an error, a few are not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeCocoFolder
from PIL import Image

from direct_pt.data.sources import SPOT_CHECKED, spot_check
from direct_pt.errors import InputError
from direct_pt.images.decoding import ORIENTATION_TAG, Decoding


def turn(path: Path) -> None:
    """Save anew as a photograph of a camera that was held upright."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif)


def test_sizes_of_another_resolution(coco_folder: MakeCocoFolder) -> None:
    folder = coco_folder([(20, 30)] * 5)
    for image in folder.content["images"]:
        image.update(height=40, width=60)
    with pytest.raises(InputError) as error:
        spot_check(folder.load())
    assert str(error.value) == (
        f"5 of 5 images that were looked at cannot be trained on, first: {folder.paths.images / '0.png'}: is 30x20 "
        "pixels, but its annotation says 60x40; scripts/check_data.py lists all"
    )


def test_one_wrong_image_is_tolerated(coco_folder: MakeCocoFolder) -> None:
    table = coco_folder([(20, 30)] * 5).load()
    table.path(2).write_bytes(b"")
    spot_check(table)
    table.path(4).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"2 of 5 images .*/2\.png: is empty"):
        spot_check(table)


def test_rotated_photographs_annotated_either_way(coco_folder: MakeCocoFolder) -> None:
    folder = coco_folder([(20, 30)] * 3)
    table = folder.load()
    for row in range(3):
        turn(table.path(row))
    spot_check(table)  # annotated as stored
    upright = replace(table, sizes=np.full((3, 2), (30, 20), np.int32))
    spot_check(upright)
    with pytest.raises(InputError, match="is 30x20 pixels, but its annotation says 20x30"):
        spot_check(replace(upright, decoding=Decoding(exif=False)))


def test_checks_are_spread_over_the_table(coco_folder: MakeCocoFolder) -> None:
    """Also over one with more images than are looked at: each stands there many times."""
    table = coco_folder([(20, 30)] * 4).load()
    many = table.select(np.repeat(np.arange(4), SPOT_CHECKED))
    table.path(3).write_bytes(b"")
    with pytest.raises(InputError, match=f"64 of {SPOT_CHECKED} images"):
        spot_check(many)
