"""From the data flags to one annotation table per split: find the data set, read it, make its splits agree."""

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from direct_pt.data.annotations import AnnotationTable, decode_name, encode_name
from direct_pt.data.formats.coco import CocoSplit, find_coco, find_coco_file
from direct_pt.data.formats.voc import find_voc
from direct_pt.data.formats.yolo import find_yolo
from direct_pt.data.image_files import find_files, note_shared_images
from direct_pt.data.names import is_no_data, is_no_folder, report_unused_splits
from direct_pt.data.outlines import Segmentations, starts_of
from direct_pt.data.problems import NOTE, DataError, Problem, Problems
from direct_pt.data.records import Source, read_table
from direct_pt.data.table_cache import CachedTable, cached_table
from direct_pt.errors import InputError, class_differences
from direct_pt.files import reading
from direct_pt.flags import FREE, flag, names, positive_integer, quoted_name, share
from direct_pt.images.decoding import DEFAULT_DECODING, Decoding, UnreadableImage, header_sizes

SPLITS = ("train", "val", "test")
COCO_TEXT = "COCO in place of --data; several sets are joined by class name"
MAX_HELD_OUT = 5000  # of the training images, if a set has no validation split
SPOT_CHECKED = 256  # images, spread over the table
MAX_WRONG_SHARE = 0.01  # of the spot-checked images that training tolerates; one is always tolerated
COPY = re.compile(rb"\.rf\.[0-9A-Za-z]{16,}(?=\.)")  # what Roboflow puts into the names of augmented copies
FIRST_COPY = re.compile(rb"([^/]*?)\.rf\.[0-9A-Za-z]{16,}[._]")  # the same behind the photograph's own name
MAX_FOLDERS_SEARCHED = 100  # in one that is no data set, for one that is
Paths = tuple[Path, ...]


def exif_flag() -> Any:
    """A field for --exif."""
    text = "turn photographs upright, unless their annotation says otherwise; or leave them as stored"
    return flag("apply", text, choices=["apply", "ignore"])


def alpha_flag() -> Any:
    """A field for --alpha."""
    return flag("black", "background of transparent pixels", choices=["black", "white"])


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How image files become pixels."""

    exif: str = exif_flag()
    alpha: str = alpha_flag()

    @property
    def decoding(self) -> Decoding:
        """The same for the decoder."""
        return Decoding(exif=self.exif == "apply", alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which data, and how they are read."""

    data: Path | None = flag(
        None, "a folder (COCO, Roboflow, YOLO, Pascal VOC, Hugging Face), a COCO or YAML file in it, or a hub name",
        Path, metavar="DIR|NAME", on_resume=FREE,
    )  # fmt: skip
    train_images: Paths | None = flag(None, COCO_TEXT, Path, metavar="DIR", many=True, on_resume=FREE)
    train_annotations: Paths | None = flag(None, COCO_TEXT, Path, metavar="FILE", many=True, on_resume=FREE)
    val_images: Paths | None = flag(None, COCO_TEXT, Path, metavar="DIR", many=True, on_resume=FREE)
    val_annotations: Paths | None = flag(None, COCO_TEXT, Path, metavar="FILE", many=True, on_resume=FREE)
    classes: tuple[str, ...] | None = flag(None, "use only these classes (all)", names, metavar="A,B,...")
    val_share: float = flag(
        0.1, "of the training images, held out where there is no validation split; 0: no evaluation", share, metavar="X"
    )
    subset: str | None = flag(None, "which subset (configuration) of hub data, where there are several", metavar="NAME")
    bbox_format: str = flag("coco", "of hub data: x, y, width, height, or x1, y1, x2, y2", choices=["coco", "voc"])
    exif: str = exif_flag()
    alpha: str = alpha_flag()
    streaming: bool = flag(False, "read the training images of hub data in one direction, without a copy on the disk")
    shuffle_buffer: int = flag(
        1000, "of a stream, that are shuffled together, and held in memory", positive_integer, metavar="IMAGES"
    )

    @property
    def decoding(self) -> Decoding:
        """How image files become pixels."""
        return DecodingOptions(exif=self.exif, alpha=self.alpha).decoding


def find_sources(options: DataOptions) -> dict[str, list[Source]]:
    """The sources of each split. Raises InputError if the flags name nothing, or contradict each other."""
    explicit = {
        "train": (options.train_images, options.train_annotations),
        "val": (options.val_images, options.val_annotations),
    }
    if options.data is not None:
        if any(paths is not None for pair in explicit.values() for paths in pair):
            raise InputError("give either --data or the explicit --train-... and --val-... paths, not both")
        return {split: [source] for split, source in _find_tree(options.data, options).items()}
    sources: dict[str, list[Source]] = {}
    for split, (images, annotations) in explicit.items():
        if (images is None) != (annotations is None):
            missing = "images" if images is None else "annotations"
            raise InputError(f"--{split}-{missing} is missing: images and annotations of a split belong together")
        if images is None or annotations is None:
            continue
        if len(images) not in (1, len(annotations)):
            raise InputError(
                f"--{split}-images names {len(images)} folders, --{split}-annotations {len(annotations)} files: give "
                "one folder for all, or one for each file"
            )
        folders = images * len(annotations) if len(images) == 1 else images
        sources[split] = [CocoSplit(*pair) for pair in zip(folders, annotations, strict=True)]
    if not sources:
        raise InputError("no data given: use --data DIR, or --train-images and --train-annotations")
    return sources


def _find_tree(data: Path, options: DataOptions) -> Mapping[str, Source]:
    """The splits of a data set in one place; its format is recognised by the folder's content."""
    if not options.streaming and (tree := _find_files(data, options.decoding)):
        return tree
    from direct_pt.data.formats.hugging_face import find_hugging_face  # its library takes a second to load

    found = find_hugging_face(data, options.bbox_format, options.streaming, options.subset)
    if found is not None:
        return found
    raise InputError(f"--data {data}: {_why_no_data_set(data, options)}")


def _find_files(data: Path, decoding: Decoding) -> Mapping[str, Source] | None:
    """The splits of a COCO, YOLO or Pascal VOC set, if it is one."""
    trees: Iterator[Mapping[str, Source] | None] = iter(())
    if data.is_dir():
        trees = (find(data) for find in (find_coco, partial(find_yolo, decoding=decoding), find_voc))
    elif data.suffix in (".yaml", ".yml") and is_no_folder(data):
        trees = iter([find_yolo(data, decoding)])
    elif data.suffix == ".json" and is_no_folder(data):
        trees = iter([find_coco_file(data)])
    return next((tree for tree in trees if tree), None)


def _why_no_data_set(data: Path, options: DataOptions) -> str:
    """What is wrong with a path where no data set was found, and the remedy."""
    if not data.exists():
        return "no such folder"
    if not data.is_file() and not data.is_dir():
        return "is neither a folder nor a file: give the folder of the data set"
    if data.is_file():
        what = "unpack it, and give" if data.suffix in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar") else "give"
        return (
            f"is a file: {what} the folder of the data set (a COCO file, or a YOLO set's YAML file, may be given too)"
        )
    if options.streaming:
        return "--streaming reads Hugging Face data sets alone (on the hub, or a folder of parquet files): leave it out"
    from direct_pt.data.formats.hugging_face import holds_saved_rows  # see _find_tree

    inside = sorted(path for path in data.iterdir() if path.is_dir() and not is_no_data(path.name))
    for place in inside[:MAX_FOLDERS_SEARCHED]:  # nothing is read outside of the folder that was given
        try:
            found = _find_files(place, options.decoding)
        except InputError:  # a set, with faults of its own
            found = {"train": None}  # type: ignore[dict-item]
        if found or holds_saved_rows(place):
            return f"holds no data set itself, but {place} is one: give that"
    hint = ""
    if (data / "labels").is_dir() and (data / "images").is_dir():
        hint = "; it has images/ and labels/: write a data.yaml with names and train, as YOLO has it"
    elif data.name in ("images", "labels", "annotations", "Annotations", "JPEGImages", *SPLITS, "valid"):
        hint = "; it looks like a part of a data set: give the folder above"
    return (
        "holds none of: COCO's annotations/instances_train2017.json (with images in train2017/) or "
        "annotations/instances_train.json (with images in images/), Roboflow's train/_annotations.coco.json, YOLO's "
        "data.yaml, Pascal VOC's Annotations/, a Hugging Face data set (save_to_disk, parquet, metadata.jsonl); or "
        f"name COCO files with --train-images, --train-annotations, --val-images, --val-annotations{hint}"
    )


@reading("the data")
def load_tables(
    options: DataOptions,
    wanted: Iterable[str] = ("train", "val"),
    problems: Mapping[str, Problems] | None = None,
    required: str | None = None,
) -> dict[str, AnnotationTable]:
    """The tables of the wanted splits that exist, all with the same classes.

    A set without "val" gets one from its training images: see hold_out.

    Args:
        options: the data flags.
        wanted: some of SPLITS.
        problems: collects the problems of each split; splits that cannot be read at all are then left out.
        required: a split that must exist.

    Raises:
        InputError: naming the file, the field and the annotation, and the remedy.
    """
    sources, wanted = find_sources(options), set(wanted)
    without_val = "train" in sources and "val" not in sources and options.val_share > 0
    holds_out = without_val and not wanted.isdisjoint(("train", "val"))
    if required is not None and required not in sources and not (holds_out and required == "val"):
        remedy = "add it, or name COCO files with --train-images, --train-annotations, --val-images, --val-annotations"
        raise InputError(f"the data have no split {required!r}, only {', '.join(sources)}: {remedy}")
    needed = wanted | ({"train"} if holds_out or len(sources.get("train", ())) > 1 else set())
    tables: dict[str, AnnotationTable] = {}
    for split in (split for split in SPLITS if split in needed and split in sources):
        split_problems = problems[split] if problems else Problems()
        with split_problems.caught():
            parts = [  # without a list to collect them in, each part counts its own problems
                load_split(source, options.decoding, split_problems if problems else Problems())
                for source in sources[split]
            ]
            tables[split] = parts[0] if len(parts) == 1 else join(parts, like=tables.get("train"))
            if problems:
                tables[split].repairs = split_problems.summary()
    first = next(iter(tables.values()), None)
    if first is not None:
        notes = problems[next(iter(tables))] if problems else Problems()
        _note_unused(options, sources, tables.values(), notes)
        note_shared_images(tables, notes)
        first.repairs = first.repairs | notes.summary()
    for split, table in tables.items():
        if first is not None and _classes(table) != _classes(first):
            differences = class_differences(_classes(table), _classes(first))
            text = f"its categories differ from those of {first.source}: {differences}; all splits must list the same"
            with (problems[split] if problems else Problems()).caught():
                raise DataError("categories", table.source, text)
    if options.classes is not None:
        tables = {split: _only_classes(table, options.classes) for split, table in tables.items()}
    if holds_out and "train" in tables:
        tables["train"], val = hold_out(tables["train"], options.val_share)
        if len(val):
            tables["val"] = val
    return {split: table for split, table in tables.items() if split in wanted}


def _note_unused(
    options: DataOptions,
    sources: Mapping[str, list[Source]],
    tables: Iterable[AnnotationTable],
    notes: Problems,
) -> None:
    """Note the flags that do not matter to these data, and what is named as a split and is not used."""
    parts = [source for split in sources.values() for source in split]
    files = all(source.encoded is None for source in parts)
    held_out = "val" not in sources or options.val_share in (0, DataOptions.val_share)
    streamed = options.streaming or options.shuffle_buffer == DataOptions.shuffle_buffer
    for name, given, reason in (
        ("subset", files and options.subset is not None, "it is for Hugging Face data"),
        ("bbox-format", files and options.bbox_format != DataOptions.bbox_format, "it is for Hugging Face data"),
        ("val-share", not held_out, "there is a validation split"),
        ("shuffle-buffer", not streamed, "it is for --streaming"),
    ):
        if given:
            notes.add(Problem(NOTE, "flags without effect", f"--{name}", f"has no effect: {reason}"))
    used = [path for source in parts for path in source.paths_read]
    if options.data is None or not used:
        return
    if any(path.suffix == ".txt" for path in used):  # the folders of listed images
        for table in tables:
            folders = {name.rpartition(b"/")[0] for name in table.file_names.tolist()}
            used += [table.folder / decode_name(folder) for folder in folders]
    report_unused_splits(options.data if options.data.is_dir() else options.data.parent, used, notes)


def load_split(
    source: Source, decoding: Decoding = DEFAULT_DECODING, problems: Problems | None = None
) -> AnnotationTable:
    """Read one split, from the cache if that holds its table, and check that its images are there.

    Raises:
        InputError: naming the file, the field and the annotation, and the remedy.
    """
    problems = problems or Problems()
    file = source.annotation_file
    # A missing file or folder is reported by read_table.
    if file is None or problems.collects or not (file.is_file() and source.folder.is_dir()):
        return read_table(source, problems, decoding)
    table = cached_table(file, source.folder, lambda: read_table(source, problems, decoding))
    if isinstance(table, CachedTable):
        table.file_names, _ = find_files(source.folder, table.file_names, source.source, problems)
    table.decoding = decoding
    return table


def hold_out(table: AnnotationTable, share: float) -> tuple[AnnotationTable, AnnotationTable]:
    """Training and validation images from one table, the same for every stage, seed and order of the files.

    The images whose names have the lowest SHA-256 are held out: `share` of all, at least one of two or more, at most
    MAX_HELD_OUT. Augmented copies of one photograph (Roboflow's NAME.rf.HASH.jpg, whatever their folders) are held out
    together, or not at all.
    """
    digests = _digests(table)
    order = sorted(range(len(table)), key=digests.__getitem__)
    count = min(max(1, round(share * len(table))), MAX_HELD_OUT, len(table) - 1)
    cuts = [row for row in range(1, len(order)) if digests[order[row]] != digests[order[row - 1]]]
    count = min(cuts, key=lambda cut: (abs(cut - count), cut), default=0) if len(cuts) < len(order) - 1 else count
    held, kept = np.sort(np.array(order[:count], np.int64)), np.sort(np.array(order[count:], np.int64))
    source = f"{table.source} ({share:g} held out)"
    return replace(table.select(kept), source=source), replace(table.select(held), source=source, repairs={})


def _digests(table: AnnotationTable) -> list[bytes]:
    """SHA-256 of each image's name; of copies of one photograph the lowest."""
    names = own = table.file_names.tolist()
    if table.encoded is not None:  # "row 7, NAME": the order of the rows does not matter, unless names repeat
        own = [name.partition(b", ")[2] for name in names]
        counts = Counter(own)
        names = [name if name and counts[name] == 1 else row for name, row in zip(own, names, strict=True)]
    digests = [hashlib.sha256(COPY.sub(b"", name)).digest() for name in names]
    copies = [FIRST_COPY.match(name, name.rfind(b"/") + 1) for name in own]
    photographs = [copy[1] if copy else digest for copy, digest in zip(copies, digests, strict=True)]
    lowest: dict[bytes, bytes] = {}
    for photograph, digest in zip(photographs, digests, strict=True):
        lowest[photograph] = min(digest, lowest.get(photograph, digest))
    return [lowest[photograph] for photograph in photographs]


def _only_classes(table: AnnotationTable, names: tuple[str, ...]) -> AnnotationTable:
    for name in names:
        if name not in table.class_names:
            near = difflib.get_close_matches(name, table.class_names, n=3) or list(table.class_names[:5])
            raise InputError(
                f"--classes {name}: {table.source} has no such class; near ones: {', '.join(map(quoted_name, near))}"
            )
    chosen = [row for row, name in enumerate(table.class_names) if name in names]
    ids = tuple(table.category_ids[row] for row in chosen)
    return table.with_classes(tuple(table.class_names[row] for row in chosen), ids)


def _classes(table: AnnotationTable) -> dict[int, str]:
    return dict(zip(table.category_ids, table.class_names, strict=True))


def join(tables: list[AnnotationTable], like: AnnotationTable | None = None) -> AnnotationTable:
    """All images of some tables, with their classes joined by name.

    Ids are kept if they agree. Otherwise classes are numbered from 1 in order of appearance, and so are images.

    Args:
        tables: of image files.
        like: a table whose class ids the joined table takes over, for the classes that both have.

    Raises:
        DataError: several tables list the same image; each would teach that there is nothing but its own objects.
    """
    ids: dict[str, int] = dict(zip(like.class_names, like.category_ids, strict=True)) if like is not None else {}
    pairs = [pair for table in tables for pair in zip(table.class_names, table.category_ids, strict=True)]
    names = list(dict.fromkeys([*ids, *(name for name, _ in pairs)]))
    if like is None:
        ids = dict(pairs)
        if len(set(pairs)) > len(names) or len(set(ids.values())) < len(names):
            ids = {name: number for number, name in enumerate(names, start=1)}
    free_id = max(ids.values(), default=0) + 1
    for name in names:  # classes that `like` lacks; load_tables refuses the split
        ids.setdefault(name, free_id)
    names.sort(key=ids.__getitem__)
    classes = tuple(names), tuple(ids[name] for name in names)
    parts = [table.with_classes(*classes) for table in tables]

    folder = Path(os.path.commonpath([table.folder.absolute() for table in tables]))
    paths: list[Path] = []
    listed_by: dict[str, AnnotationTable] = {}
    for table in tables:
        resolved: dict[str, str] = {}  # folders of images, without links
        for name in map(decode_name, table.file_names.tolist()):
            paths.append(table.folder.absolute() / name)
            if listed_by.setdefault(file := _real_path(paths[-1], resolved), table) is not table:
                text = f"lists {name}, as does {listed_by[file].source}; join its objects in one file"
                raise DataError("duplicate image", table.source, text, name)
    image_ids = np.concatenate([table.image_ids for table in tables])
    if len(np.unique(image_ids)) < len(image_ids):
        image_ids = np.arange(1, len(image_ids) + 1)
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("sizes", "boxes", "labels", "areas", "crowd", "annotation_ids")
    }
    repairs: dict[str, int] = {}
    for table in tables:
        for kind, count in table.repairs.items():
            repairs[kind] = repairs.get(kind, 0) + count
    return replace(
        parts[0],
        source=" + ".join(table.source for table in tables),
        folder=folder,
        file_names=np.array([encode_name(str(path.relative_to(folder))) for path in paths], dtype=np.bytes_),
        image_ids=image_ids,
        starts=starts_of(np.concatenate([np.diff(part.starts) for part in parts])),
        segmentations=Segmentations.concatenate([part.segmentations for part in parts]),
        repairs=repairs,
        **joined,
    )


def _real_path(path: Path, folders: dict[str, str]) -> str:
    """A file's path without links; `folders` keeps that of its folder, because each look-up takes a system call."""
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.realpath(path) if path.is_symlink() else f"{folders[folder]}/{name}"


def spot_check(table: AnnotationTable) -> None:
    """Raises InputError if the headers of many images are unreadable, or state another size than the annotations."""
    rows = np.unique(np.linspace(0, len(table) - 1, SPOT_CHECKED).astype(int))
    wrong = [reason for row in rows.tolist() if (reason := _header_problem(table, row))]
    if len(wrong) > max(1, MAX_WRONG_SHARE * len(rows)):
        raise InputError(
            f"{len(wrong)} of {len(rows)} images that were looked at cannot be trained on, first: {wrong[0]}; "
            "scripts/check_data.py lists all"
        )


def _header_problem(table: AnnotationTable, row: int) -> str:
    """Why an image cannot be trained on, by its header; "" if it can."""
    name = table.image_name(row)
    try:
        sizes = header_sizes(table.path(row) if table.encoded is None else table.image_content(row), name)
    except (UnreadableImage, OSError) as error:
        return str(error)
    height, width = table.image_size(row)
    accepted = [sizes.upright, sizes.stored] if table.decoding.exif else [sizes.stored]
    if (height, width) in accepted:
        return ""
    return f"{name}: is {accepted[0][1]}x{accepted[0][0]} pixels, but its annotation says {width}x{height}"
