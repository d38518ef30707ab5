"""What must hold of every input, taken or refused: see fuzz.py. Broken says which rule does not."""

import json
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from odd_data import Files
from pycocotools import mask as coco_mask

from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.formats import json_stream
from direct_pt.data.formats.hub_rows import find_layouts
from direct_pt.data.formats.hugging_face import image_root, load_splits
from direct_pt.data.outlines import run_length_totals
from direct_pt.data.problems import ERROR, Problems
from direct_pt.data.sources import SPLITS, DataOptions, load_tables, spot_check
from direct_pt.data.stream import Place, Stream
from direct_pt.errors import InputError
from direct_pt.images.decoding import UnreadableImage, decode_image, encoded_size, header_sizes
from direct_pt.reports.survey import describe
from direct_pt.transforms import PretrainPreset

LONGEST = 20_000  # characters of a message: some names are long
RENDERED = 2000  # largest side of an image that is rendered
CHOICES = (("apply", "ignore"), ("black", "white"), ("coco", "voc"))


class Broken(Exception):
    """A rule is."""


def refusal(error: Exception, place: Path) -> None:
    """Whether an error is one for users: raises Broken."""
    text, cause = str(error), error
    if str(place) not in text or len(text) > LONGEST:
        raise Broken(f"no message for users: {text[:1000]!r}")
    while cause is not None:
        if isinstance(cause, MemoryError):
            raise Broken(f"too much memory: {text[:1000]}")
        cause = cause.__cause__ or cause.__context__


def options_for(folder: Path, files: Files) -> DataOptions:
    """Some, by chance, but the same for the same input."""
    chance = chance_of(files) >> 2
    exif, alpha, bbox_format = (pair[chance >> place & 1] for place, pair in enumerate(CHOICES))
    return DataOptions(data=folder, exif=exif, alpha=alpha, bbox_format=bbox_format)


def chance_of(files: Files) -> int:
    """A number that is another one for another input."""
    return zlib.crc32(repr(sorted(files.items())).encode(errors="surrogatepass"))


def check_set(folder: Path, files: Files) -> bool:
    """A data set as training and check_data.py read it."""
    options = options_for(folder, files)
    tables: dict[str, AnnotationTable] | None = None
    try:
        tables = load_tables(options, SPLITS)
    except InputError as error:
        refusal(error, folder)
    problems = {split: Problems(collects=True) for split in SPLITS}
    collected: dict[str, AnnotationTable] | None = None
    try:
        collected = load_tables(options, SPLITS, problems)
    except InputError as error:
        refusal(error, folder)
    listed = [problem for found in problems.values() for problem in found.listed]
    errors = [problem for problem in listed if problem.grade == ERROR]
    if tables is not None and (errors or collected is None or different(tables, collected)):
        raise Broken(f"collecting problems finds {errors} and another table")
    if tables is None and collected is not None and not errors:
        raise Broken("collecting problems finds no error")
    if any(len(str(problem)) > LONGEST for problem in listed):
        raise Broken(f"no message for users: {[str(problem) for problem in listed]!r:.1000}")
    for table in (collected or {}).values():
        check_table(table)
        if not chance_of(files) % 4:  # which takes as long as all the rest
            describe(table)
            check_images(table.without_empty_images())
    return tables is not None


def check_images(table: AnnotationTable) -> None:
    """Whether what they hold is read, or refused."""
    if len(table):
        with suppress(InputError):
            spot_check(table)
    for row in range(len(table)):
        try:
            size = table.read_image(row).shape[:2]
        except UnreadableImage:
            continue
        if size != table.image_size(row):
            raise Broken(f"{table.image_name(row)} is {size}, in the table {table.image_size(row)}")


def check_stream(folder: Path, files: Files) -> bool:
    """A saved data set's rows as a stream of them is read, which leaves out the images in which something is wrong."""
    options = options_for(folder, files)
    try:
        rows = load_splits(folder)[0]["train"]
        layout = find_layouts({"train": rows}, str(folder), options.bbox_format)["train"]
        undecoded = rows.cast_column(layout.image, datasets.Image(decode=False)).to_iterable_dataset()
        stream = Stream(undecoded, layout, f"{folder} (train)", 0, image_root(folder), options.decoding, window=1000)
        _, window = next(stream.windows(Place(), seed=0, rank=0, world=1))
    except InputError as error:
        refusal(error, folder)
        return False
    table, wrong = window.table(with_masks=bool(chance_of(files) & 2))
    if table is None or not len(table):
        if not wrong:
            raise Broken("nothing is left, and nothing is told")
        return False
    check_table(table)
    check_images(table)
    return not wrong


def different(one: Any, other: Any) -> bool:
    """Whether tables, or what they hold, are."""
    if isinstance(one, np.ndarray):
        return one.dtype != other.dtype or not np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, dict):
        return one.keys() != other.keys() or any(different(one[key], other[key]) for key in one)
    if is_dataclass(one) and not isinstance(one, type):
        # `encoded` has rows of its own kind; the images are compared by what is read of them
        names = (item.name for item in fields(one) if item.name != "encoded")
        return any(different(getattr(one, name), getattr(other, name)) for name in names)
    return bool(one != other)


def check_table(table: AnnotationTable) -> None:
    """Whether it is sound."""
    objects, outlines = len(table.boxes), table.segmentations
    rows = (table.labels, table.areas, table.crowd, table.annotation_ids, outlines.object_polygons[1:])
    sound = {
        "as many of each": all(len(values) == objects for values in (*rows, outlines.run_length_starts[1:])),
        "as many of each image": len(table.file_names) == len(table.sizes) == len(table.starts) - 1 == len(table),
        "starts": are_starts(table.starts, objects),
        "outlines": are_starts(outlines.object_polygons, len(outlines.polygon_starts) - 1)
        and are_starts(outlines.polygon_starts, len(outlines.coordinates))
        and are_starts(outlines.run_length_starts, len(outlines.run_lengths)),
        "boxes": np.isfinite(table.boxes).all() and (table.boxes[:, 2:] >= 0).all() and table.boxes.shape[1] == 4,
        "areas": np.isfinite(table.areas).all(),
        "corners": np.isfinite(outlines.coordinates).all() and outlines.coordinates.shape[1] == 2,
        "labels": ((table.labels >= 0) & (table.labels < len(table.class_names))).all(),
        "sizes": (table.sizes > 0).all() and table.sizes.shape[1] == 2,
        "image ids": len(set(table.image_ids.tolist())) == len(table),
        "classes": len(set(table.class_names)) == len(set(table.category_ids)) == len(table.class_names) > 0,
        "class names": all(name.strip() and name.encode() for name in table.class_names),
        "types": (table.boxes.dtype, table.labels.dtype, table.sizes.dtype) == (np.float64, np.int64, np.int32),
    }
    if not all(sound.values()):
        raise Broken(f"the table is not sound: {[what for what, right in sound.items() if not right]}")
    table.describe()
    if len(table.coco(with_masks=True)["annotations"]) != objects:
        raise Broken("written as COCO's, some objects are missing")
    preset, rng = PretrainPreset(64), np.random.default_rng(0)
    for row in range(len(table)):
        table.image_name(row)
        found, size = table.objects(row, with_masks=True), table.image_size(row)
        if max(size) > RENDERED:
            continue
        sample = preset(np.zeros((*size, 3), np.uint8), found, rng)
        boxes, masks = sample.objects.boxes, sample.masks
        if not ((boxes >= 0) & (boxes <= 64)).all() or not (boxes[:, 2:] > boxes[:, :2]).all():
            raise Broken(f"rendered boxes {boxes.tolist()}")
        if masks is None or len(masks) != len(boxes) or bool((masks.bits > 1).any()):
            raise Broken("rendered masks are not one an object, of 0 and 1")
        for place in range(len(masks)):
            masks.dense(place)


def are_starts(starts: np.ndarray, total: int) -> bool:
    """Whether stretches of `total` things begin there."""
    return starts.dtype == np.int64 and starts[0] == 0 and starts[-1] == total and bool((np.diff(starts) >= 0).all())


def check_json(folder: Path, _: Files) -> bool:
    """As json.loads reads it, wherever a block of the file ends."""
    path = folder / "file.json"
    expected, whole = outcome(lambda: json.loads(path.read_bytes()))
    for json_stream.BLOCK, json_stream.CHUNK in ((1, 1), (7, 3), (2**22, 4096)):
        found, error = outcome(lambda: members(path))
        if isinstance(whole, RecursionError) or isinstance(error, RecursionError):
            continue  # the one is nested a little deeper than the other
        if whole is None and not isinstance(expected, dict):
            if not isinstance(error, json_stream.NotAnObject):
                raise Broken(f"blocks of {json_stream.BLOCK}: {found!r:.500} or {error!r} of what is no object")
        elif (whole is None) != (error is None) or repr(found) != repr(expected):
            raise Broken(
                f"blocks of {json_stream.BLOCK}: {found!r:.500} or {error!r}, not {expected!r:.500} or {whole!r}"
            )
        elif isinstance(whole, json.JSONDecodeError) and str(error) != str(whole) and "codec" not in str(error):
            raise Broken(f"blocks of {json_stream.BLOCK}: the message {error}, not {whole}")
    return whole is None


def outcome(read: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What it gives, or raises."""
    try:
        return read(), None
    except (ValueError, RecursionError, json_stream.NotAnObject) as error:
        return None, error


def members(path: Path) -> dict[str, Any]:
    """The object, put together again."""
    found: dict[str, Any] = {}
    for key, start, value in json_stream.read_members(path):
        if start:
            found[key] += value
        else:
            found[key] = value
    return found


def check_run_lengths(_: Path, files: Files) -> bool:
    """As they are decoded one by one."""
    parts = (files.get("counts") or b"").split(b"|")
    found = run_length_totals(np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0, *map(len, parts)])).tolist()
    expected = [slow_counts(part) for part in parts]
    if found != [-1 if counts is None else sum(counts) for counts in expected]:
        raise Broken(f"{parts}: {found}, not {expected}")
    for part, counts in zip(parts, expected, strict=True):
        if counts and 0 < sum(counts) < 10**6:
            mask = coco_mask.decode({"size": [sum(counts), 1], "counts": part})
            if mask.sum() != sum(counts[1::2]):
                raise Broken(f"{part!r}: pycocotools sees {mask.sum()} pixels in {counts}")
    return all(counts is not None for counts in expected)


def slow_counts(characters: bytes) -> list[int] | None:
    """COCO's compressed run lengths, None where they are none."""
    counts: list[int] = []
    value = groups = 0
    for code in characters:
        if not 48 <= code < 112 or groups == 6:
            return None
        value |= (code - 48 & 31) << 5 * groups
        groups += 1
        if not code - 48 & 32:
            value -= (code - 48 & 16 > 0) << 5 * groups
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = groups = 0
    return None if groups or min(counts, default=0) < 0 else counts


def check_image(folder: Path, files: Files) -> bool:
    """The header and the pixels agree, whatever the annotation says."""
    path, options = folder / "image", options_for(folder, files)
    content, decoding = path.read_bytes(), options.decoding
    try:
        sizes = header_sizes(path, str(path))
        size = sizes.upright if decoding.exif else sizes.stored
        if encoded_size(content, str(path), decoding) != size:
            raise Broken("the file and its content are of other sizes")
    except UnreadableImage as error:
        refusal(error, folder)
        size = None
    taken = False
    for stated in (size, *((sizes.stored, sizes.upright) if size else ())):
        for least in (None, (2, 3)):
            try:
                pixels = decode_image(content, str(path), stated, least, decoding)
            except UnreadableImage as error:
                refusal(error, folder)
                continue
            taken = True
            if size is None or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                raise Broken(f"header {size}, pixels {pixels.dtype} {pixels.shape}")
            right = stated or size
            if (least is None and pixels.shape[:2] != right) or min(pixels.shape) < 1:
                raise Broken(f"stated {right}, decoded {pixels.shape}")
            if least and any(a < min(b, c) or a > b for a, b, c in zip(pixels.shape, right, least, strict=False)):
                raise Broken(f"stated {right}, at least {least}, decoded {pixels.shape}")
    return taken
