"""Odd and damaged data sets by the ten thousand: whatever reads a user's files takes them, or says what is wrong.

  python tests/fuzz/fuzz.py [--inputs 200000] [--target coco|json|...] [--seed 0]
  python tests/fuzz/fuzz.py --input FILE          one that was saved

Each of them must be read as follows; otherwise it is saved to a file, and the exit status is 1:
- Nothing but InputError leaves the readers, UnreadableImage the decoders; with a short message that names the place.
- It takes no longer than LIMIT seconds: a timer's signal ends the process, and faulthandler shows where it was.
- It takes no more than MEMORY bytes beyond what the process had: it gets no more (RLIMIT_DATA).
- No file outside of the data set's folder is opened, none is written, no program started (sys.addaudithook).
- The process does not crash: it is one of its own.
- What is taken is a sound table: its arrays fit together, it can be written as COCO's, and its images be rendered.
- Collecting problems finds an error where reading stops at one, and takes what reading takes, as the same table.

Prints a line for each target. `test_fuzz.py` is the short form.
"""

import argparse
import faulthandler
import json
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import datasets
import hypothesis
import hypothesis.configuration
import numpy as np
import odd_data
import torch
from hypothesis.strategies import SearchStrategy
from odd_data import Files, Make, damage
from pycocotools import mask as coco_mask

from direct_pt.data import images, json_stream
from direct_pt.data.annotations import AnnotationTable
from direct_pt.data.images import UnreadableImage, decode_image, encoded_size, header_sizes
from direct_pt.data.problems import ERROR, Problems
from direct_pt.data.run_lengths import totals
from direct_pt.data.sources import SPLITS, DataOptions, load_tables
from direct_pt.data.survey import describe
from direct_pt.data.transforms import PretrainPreset
from direct_pt.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a folder where files are written fast
LIMIT = 10.0  # seconds for one input
MEMORY = 2**31  # bytes: far more than the small inputs need, and what they state is often larger
MOST_PIXELS = 2000 * 2000  # of an image that is decoded, in place of MAX_PIXELS, which takes seconds
RENDERED = 2000  # largest side of an image that is rendered
LONGEST = 20_000  # characters of a message: some names are long
BATCH = 1000  # documents that hypothesis makes at a time: it remembers them
MOST_CRASHES = 20  # of one target
ROOM = 2**26  # bytes: of an input and the report, shared with the process that reads it
SAMPLES = 300  # that libFuzzer begins with
READING = (  # modules whose lines it counts
    *(
        f"direct_pt.data.{name}"
        for name in ("images", "json_stream", "label_files", "records", "run_lengths", "voc", "yolo")
    ),
    *(f"yaml.{name}" for name in ("composer", "constructor", "parser", "reader", "scanner")),
    *(f"PIL.{name}ImagePlugin" for name in ("Bmp", "Gif", "Jpeg", "Png", "Tiff", "WebP")),
    *("PIL.Image", "PIL.ImageFile"),
)
OPENING = ("open", "os.listdir", "os.scandir")  # audit events with a path
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")


class Broken(Exception):
    """A rule is."""


@dataclass(frozen=True)
class Target:
    """A reader and what it is given.

    Attributes:
        name: of the command line, with more behind a comma.
        usual: files of a data set in which nothing is wrong.
        inputs: those that are others; by hypothesis, or made with a random.Random.
        check: reads the folder, whether it took that; raises anything else where a rule is broken.
        share: of all inputs.
    """

    name: str
    usual: Files
    inputs: "SearchStrategy[Files] | Make"
    check: Callable[[Path, Files], bool]
    share: float = 0.0


@dataclass
class Failure:
    """A rule that an input breaks. Two with the same key are taken for one."""

    key: str
    text: str
    files: Files


@dataclass
class Report:
    """What came of a target's inputs."""

    name: str
    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    failures: dict[str, Failure] = field(default_factory=dict)

    def line(self) -> str:
        """Of the table."""
        refused = self.inputs - self.accepted
        return (
            f"{self.name:20} {self.inputs:8} {self.accepted:9} {refused:9} {self.seconds:9.1f} "
            f"{1000 * self.slowest:10.1f} {len(self.failures):7}"
        )


HEADER = f"{'target':20} {'inputs':>8} {'accepted':>9} {'refused':>9} {'CPU s':>9} {'slowest ms':>10} {'broken':>7}"


# What is read, and the rules


def refusal(error: Exception, place: Path) -> None:
    """Whether an error is one for users: raises Broken."""
    text, cause = str(error), error
    if str(place) not in text or len(text) > LONGEST:
        raise Broken(f"no message for users: {text[:1000]!r}")
    while cause is not None:
        if isinstance(cause, MemoryError):
            raise Broken(f"more than {MEMORY} bytes: {text[:1000]}")
        cause = cause.__cause__ or cause.__context__


def options_for(folder: Path, files: Files) -> DataOptions:
    """Some, by chance, but the same for the same input."""
    chance = chance_of(files) >> 2
    exif, alpha, bbox_format = (pair[chance >> place & 1] for place, pair in enumerate(CHOICES))
    return DataOptions(data=folder, exif=exif, alpha=alpha, bbox_format=bbox_format)


def chance_of(files: Files) -> int:
    """A number that is another one for another input."""
    return zlib.crc32(repr(sorted(files.items())).encode(errors="surrogatepass"))


CHOICES = (("apply", "ignore"), ("black", "white"), ("coco", "voc"))


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
            table.without_empty_images()
    return tables is not None


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
    found = totals(np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0, *map(len, parts)])).tolist()
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


# The process that reads


class Watch:
    """What is opened, written and started while it is on; not to be removed from a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = f"{folder}/"
        libraries = {sys.prefix, sys.base_prefix, str(REPOSITORY / "direct_pt"), str(REPOSITORY / "tests")}
        self.allowed = tuple(f"{place}/" for place in (*libraries, folder.parent / "cache"))
        self.on = False
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The hook."""
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.300}")
        elif event in OPENING or event in WRITING:
            path = arguments[0]
            if path is None or isinstance(path, int) or (event in WRITING and arguments[-1] != -1):
                return  # the last: relative to a folder that was opened before
            place = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (links are followed below the folder)
            writes = event in WRITING or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            inside = f"{place}/".startswith(self.folder)
            if (inside and writes) or not (inside or f"{place}/".startswith(self.allowed) or place == os.devnull):
                self.seen.append(f"{event} {place!r}")


class Reader:
    """Gives a target its inputs, in a process of its own."""

    def __init__(self, target: Target, folder: Path, state: mmap.mmap, limit: float) -> None:
        self.target, self.state, self.limit = target, state, limit
        self.folder, self.corpus = folder / "data", folder / "corpus"
        self.cache = folder / "cache"
        self.report, _ = pickle.loads(state)
        self.watch = Watch(self.folder)
        self.folder.mkdir(exist_ok=True)
        for path, content in target.usual.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(content or b"")

    def prepare(self, memory: int) -> None:
        """Load what is loaded late, and set the limits."""
        warnings.simplefilter("error", RuntimeWarning)  # numpy's, of values that should not have come there
        images.MAX_PIXELS = MOST_PIXELS
        datasets.disable_progress_bars()
        datasets.config.HF_HUB_OFFLINE = True
        datasets.config.HF_DATASETS_CACHE = self.cache
        os.environ["DIRECT_PT_CACHE"] = str(self.cache)
        hypothesis.configuration.set_hypothesis_home_dir(self.cache / "hypothesis")
        if self.target.usual and not self.target.check(self.folder, {}):
            raise Broken(f"{self.target.name}: the usual files are refused")
        faulthandler.enable()
        faulthandler.register(signal.SIGALRM, chain=True)  # then the process ends
        status = Path("/proc/self/status").read_text()
        used = int(re.findall(r"VmData:\s+(\d+) kB", status)[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + memory, used + memory))
        sys.addaudithook(self.watch)

    def save(self, files: Files | None) -> None:
        """For the process that waits: the report, and the input that is next."""
        self.state.seek(0)
        self.state.write(pickle.dumps((self.report, files)))

    def read(self, files: Files) -> tuple[Failure, BaseException] | None:
        """One input; the rule that it breaks."""
        report, watch = self.report, self.watch
        self.save(files)
        for path, content in files.items():
            if content is None:
                (self.folder / path).unlink()
            else:
                (self.folder / path).write_bytes(content)
        problem: BaseException | None = None
        accepted = False
        signal.setitimer(signal.ITIMER_REAL, self.limit)
        began = time.perf_counter()
        watch.on = True
        try:
            accepted = self.target.check(self.folder, files)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            problem = error
        watch.on = False
        took = time.perf_counter() - began
        signal.setitimer(signal.ITIMER_REAL, 0)
        if watch.seen and problem is None:
            problem = Broken(f"outside of its folder: {watch.seen}")
        watch.seen = []
        for path in files:
            usual = self.target.usual.get(path)
            if usual is None:
                (self.folder / path).unlink(missing_ok=True)
            else:
                (self.folder / path).write_bytes(usual)
        report.inputs += 1
        report.accepted += accepted
        report.slowest = max(report.slowest, took)
        if problem is None:
            return None
        text = "".join(traceback.format_exception(problem))
        return Failure(key_of(problem), text, files), problem

    def give_documents(self, strategy: SearchStrategy[Files], inputs: int, seed: str) -> None:
        """Those of hypothesis. One that breaks a rule is made as small as it gets, one of each kind."""
        report = self.report
        new: dict[str, Failure] = {}

        def read(files: Files) -> None:
            found = self.read(files)
            if found is not None and found[0].key not in report.failures:
                new[found[0].key] = found[0]  # the last one is the smallest
                raise found[1]

        while report.inputs < inputs:
            settings = hypothesis.settings(
                max_examples=min(BATCH, inputs - report.inputs),
                deadline=None,
                database=None,
                phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
                suppress_health_check=list(hypothesis.HealthCheck),
                report_multiple_bugs=False,
                verbosity=hypothesis.Verbosity.quiet,
            )
            number = zlib.crc32(f"{seed} {self.target.name} {report.inputs}".encode())
            try:
                hypothesis.seed(number)(settings(hypothesis.given(strategy)(read)))()
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                if not new:
                    raise Broken("hypothesis fails") from error
                report.failures |= new
                new.clear()

    def give_bytes(self, make: Make, inputs: int, seed: str) -> None:
        """Those of a generator of random numbers."""
        rng = random.Random(f"{seed} {self.target.name} {self.report.inputs}")
        while self.report.inputs < inputs:
            self.keep(make(rng))

    def give_guided(self, make: Make, inputs: int, seed: str) -> None:
        """Some of the same, and what libFuzzer makes of them, which keeps those that reach new lines of READING."""
        import atheris

        rng = random.Random(f"{seed} {self.target.name} {self.report.inputs}")
        samples = [make(rng) for _ in range(SAMPLES)]
        paths = sorted({path for files in samples for path in files})
        shutil.rmtree(self.corpus, ignore_errors=True)
        self.corpus.mkdir()
        for number, files in enumerate(samples):
            path, content = next(iter(files.items()))
            (self.corpus / str(number)).write_bytes(bytes([paths.index(path)]) + (content or b""))
        for module in READING:
            for function in functions_of(sys.modules[module]):
                atheris.instrument_func(function)

        def read(data: bytes) -> None:
            if data:
                self.keep({paths[data[0] % len(paths)]: data[1:]})
            if self.report.inputs >= inputs:
                self.save(None)
                os._exit(0)

        flags = ("-timeout=0", "-rss_limit_mb=0", f"-seed={zlib.crc32(seed.encode())}", "-max_len=8000", "-runs=-1")
        atheris.Setup([self.target.name, str(self.corpus), *flags], read)
        atheris.Fuzz()

    def keep(self, files: Files) -> None:
        """One input; what it breaks is kept, the first one of a kind."""
        found = self.read(files)
        if found is not None:
            self.report.failures.setdefault(found[0].key, found[0])


def functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """And the methods of its classes."""
    for value in vars(module).values():
        for function in vars(value).values() if isinstance(value, type) else (value,):
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                yield function


def key_of(error: BaseException) -> str:
    """What an error is and where in our files it comes from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in frame.filename]
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(REPOSITORY)]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return (
        f"{type(error).__name__} {place} {error!s:.40}"
        if isinstance(error, Broken)
        else f"{type(error).__name__} {place}"
    )


def hunt(
    target: Target, inputs: int, seed: int, limit: float = LIMIT, memory: int = MEMORY, guided: bool = False
) -> Report:
    """Give a target so many inputs, in processes of their own."""
    report, crashes, began = Report(target.name), 0, cpu_seconds()
    with mmap.mmap(-1, ROOM) as state, tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        log = Path(folder) / "stderr"
        while report.inputs < inputs and crashes < MOST_CRASHES:
            state.seek(0)
            state.write(pickle.dumps((report, None)))
            sys.stdout.flush()
            child = os.fork()
            if not child:
                status = 1
                try:
                    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.__stderr__.fileno())
                    reader = Reader(target, Path(folder), state, limit)
                    reader.prepare(memory)
                    if isinstance(target.inputs, SearchStrategy):
                        reader.give_documents(target.inputs, inputs, f"{seed} {crashes}")
                    elif guided:
                        reader.give_guided(target.inputs, inputs, f"{seed} {crashes}")
                    else:
                        reader.give_bytes(target.inputs, inputs, f"{seed} {crashes}")
                    reader.save(None)
                    status = 0
                except BaseException:
                    traceback.print_exc(file=sys.__stderr__)
                finally:
                    sys.__stderr__.flush()
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            report, files = pickle.loads(state)
            if not status:
                break
            said = log.read_bytes()[-5000:].decode(errors="replace")
            if files is None:
                raise RuntimeError(f"{target.name}: the reading process ended with {status} by itself: {said}")
            crashes += 1
            report.inputs += 1
            text = (
                f"took more than {limit:g} seconds" if status == -signal.SIGALRM else f"the process ended with {status}"
            )
            report.failures[f"crash {crashes}"] = Failure(f"crash {crashes}", f"{text}\n{said}", files)
    report.seconds = cpu_seconds() - began
    return report


def cpu_seconds() -> float:
    """That processes which have ended took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def targets() -> list[Target]:
    """All of them."""
    coco, yolo, voc = odd_data.usual_coco(), odd_data.usual_yolo(), odd_data.usual_voc()
    hub, folder = odd_data.usual_hub(), odd_data.usual_imagefolder()
    pictures = odd_data.image_files()
    counts = [
        b"05d0a1",
        b"PP7000",
        b"0`3",
        b"o0",
        coco_mask.encode(np.asfortranarray(np.eye(40, dtype=np.uint8)))["counts"],
    ]
    return [
        Target("json", {"file.json": b"{}"}, odd_data.json_bytes, check_json, 0.22),
        Target("rle", {}, partial(odd_data.damaged_counts, counts), check_run_lengths, 0.15),
        Target("images", {"image": pictures[0]}, partial(odd_data.damaged_images, pictures), check_image, 0.17),
        Target("coco, documents", coco, odd_data.coco_inputs(), check_set, 0.14),
        Target("coco, bytes", coco, damage(coco, [odd_data.COCO_FILE], odd_data.JSON_WORDS), check_set, 0.07),
        Target("yolo, documents", yolo, odd_data.yolo_inputs(), check_set, 0.06),
        Target("yolo, bytes", yolo, damage(yolo, odd_data.YOLO_FILES, odd_data.YOLO_WORDS), check_set, 0.06),
        Target("voc, documents", voc, odd_data.voc_inputs(), check_set, 0.06),
        Target("voc, bytes", voc, damage(voc, odd_data.VOC_FILES, odd_data.XML_WORDS), check_set, 0.055),
        Target("hub, saved", hub, odd_data.hub_inputs([hub_image()]), check_set, 0.012),
        Target("hub, imagefolder", folder, odd_data.imagefolder_inputs(), check_set, 0.003),
    ]


def hub_image() -> bytes:
    """A small one."""
    return odd_data.usual_images()["a.png"]


def save(failure: Failure, target: Target, folder: Path) -> Path:
    """The input that breaks a rule, as a file that --input reads."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {path: None if content is None else content.decode("latin-1") for path, content in failure.files.items()}
    text = json.dumps({"target": target.name, "files": files, "problem": failure.text}, indent=1)
    path = folder / f"{target.name.replace(', ', '-')}-{zlib.crc32(text.encode()):08x}.json"
    path.write_text(text)
    return path


def saved_input(path: Path, among: list[Target]) -> Target:
    """The target that gives one saved input."""
    saved = json.loads(path.read_text())
    files = {name: None if text is None else text.encode("latin-1") for name, text in saved["files"].items()}
    target = next(target for target in among if target.name == saved["target"])
    return Target(target.name, target.usual, lambda _: files, target.check)


def main() -> None:
    """The command."""
    known = targets()
    kinds = tuple(dict.fromkeys(target.name.split(",")[0] for target in known))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--inputs", type=int, default=200_000, help="of all targets, or of the one that is named (200000)")
    p.add_argument("--target", choices=kinds, help="(all)")
    p.add_argument("--seed", type=int, default=0, help="of the inputs (0)")
    p.add_argument("--guided", action="store_true", help="bytes are changed by libFuzzer, if atheris is installed")
    p.add_argument("--input", type=Path, help="read this one alone")
    p.add_argument("--output-dir", type=Path, default=Path(tempfile.gettempdir()) / "direct_pt_fuzz", help="for inputs")
    arguments = p.parse_args()
    torch.set_num_threads(1)
    print(HEADER, flush=True)
    chosen = [target for target in known if arguments.target in (None, target.name.split(",")[0])]
    whole, broken, reports = sum(target.share for target in chosen), 0, []
    if arguments.input:
        chosen, whole, arguments.inputs = [saved_input(arguments.input, known)], 0, 1
    for target in chosen:
        count = round(arguments.inputs * target.share / whole) if whole else 1
        report = hunt(target, count, arguments.seed, guided=arguments.guided)
        reports.append(report)
        print(report.line(), flush=True)
        for failure in report.failures.values():
            path = save(failure, target, arguments.output_dir)
            print(f"BROKEN: {path}\n{failure.text}", flush=True)
        broken += len(report.failures)
    total = Report("all", *(sum(getattr(one, name) for one in reports) for name in ("inputs", "accepted", "seconds")))
    total.slowest = max(report.slowest for report in reports)
    print(f"{total.line().rsplit(None, 1)[0]} {broken:7}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
