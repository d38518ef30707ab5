"""A contact sheet of training samples as the detector sees them: what the augmentations do to one's own images."""

import math
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
from accelerate import PartialState
from PIL import Image

from direct_pt.batch import Batch
from direct_pt.data.loader import Feed, Share
from direct_pt.data.mixing import mask_pixels
from direct_pt.distributed.processes import main_decides
from direct_pt.errors import InputError, printable
from direct_pt.files import check_output, open_regular, writing
from direct_pt.images.visualize import contact_sheet, draw_detections

FILE = "samples.jpg"
MAX_CELL = 448  # pixels of a sample's longer side on the sheet
COLUMNS = 4
MARK = b"Direct-PT: training samples"  # the comment in the picture, by which it is recognised


def write_samples(feed: Feed, micro_batch_size: int, class_names: tuple[str, ...], count: int, folder: Path) -> None:
    """Write the first `count` samples of a run into `folder`, by the main process. Every process must call it.

    Raises:
        InputError: it cannot be written, or a picture of that name is not its own.
    """
    processes = PartialState()
    main_decides(lambda: _draw(feed, micro_batch_size, class_names, count, folder), processes)
    processes.destroy_process_group()  # a process that exits with its connections open may abort


def _draw(feed: Feed, micro_batch_size: int, class_names: tuple[str, ...], count: int, folder: Path) -> None:
    check_output(folder)
    if (folder / FILE).exists() and not _is_own(folder / FILE):
        raise InputError(f"{folder / FILE}: is no picture that --preview made: move it, or choose another --output-dir")
    share = Share(micro_batch_size, 0, math.ceil(count / micro_batch_size))
    pictures: list[Image.Image] = []
    titles: list[str] = []
    with closing(feed.batches(share)) as batches:
        for batch in batches:
            for row in range(len(batch)):
                pictures.append(picture(batch, row, class_names))
                titles.append(Path(feed.image_name(int(batch.indices[row]))).name)
    pictures, titles = list(islice(pictures, count)), titles[:count]
    cell = min(MAX_CELL, max(max(one.size) for one in pictures))
    for one in pictures:
        one.thumbnail((cell, cell))
    with writing(str(folder / FILE)):
        folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(pictures, titles, cell, COLUMNS).save(folder / FILE, quality=90, comment=MARK)
    place = printable(str(folder / FILE))
    print(f"{len(pictures)} samples of step 1 on, crowd regions as (crowd): {place}", flush=True)


def _is_own(path: Path) -> bool:
    """Whether a file was written by `write_samples`."""
    try:
        with open_regular(path) as file, Image.open(file) as image:
            return image.info.get("comment") == MARK
    except OSError:
        return False


def picture(batch: Batch, row: int, class_names: tuple[str, ...]) -> Image.Image:
    """Sample `row` of a batch with its padding, boxes and masks."""
    image = Image.fromarray(np.ascontiguousarray(batch.images[row].permute(1, 2, 0).numpy()))
    slots = np.flatnonzero((batch.valid[row] | batch.crowd[row]).numpy())
    labels = batch.labels[row].numpy()[slots]
    crowd = batch.crowd[row].numpy()[slots]
    captions = [
        class_names[label] + " (crowd)" * bool(is_crowd) for label, is_crowd in zip(labels.tolist(), crowd, strict=True)
    ]
    boxes, masks = batch.boxes[row].numpy()[slots], None
    if batch.masks is not None and batch.mask_rows is not None:
        masks = [_whole(batch, int(mask)) for mask in batch.mask_rows[row].numpy()[slots]]
    return draw_detections(image, boxes, labels, captions, masks)


def _whole(batch: Batch, mask: int) -> np.ndarray:
    """A mask [height, width] bool of the padded image."""
    assert batch.masks is not None
    whole = np.zeros(batch.images.shape[-2:], bool)
    (x1, y1, x2, y2), inside = mask_pixels(batch.masks, mask)
    whole[y1:y2, x1:x2] = inside.numpy()
    return whole
