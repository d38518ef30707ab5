"""Odd and damaged data sets, models and runs by the ten thousand: what reads them takes them, or says what is wrong.

  python tests/fuzz/fuzz.py [--inputs 200000] [--target coco|json|...] [--seed 0]
  python tests/fuzz/fuzz.py --input FILE          one that was saved

Each of them must be read as follows; otherwise it is saved to a file, and the exit status is 1:
- Nothing but InputError leaves the readers, UnreadableImage the decoders; with a short message that names the place.
- It takes no longer than LIMIT seconds: a timer's signal ends the process, and faulthandler shows where it was.
- It takes no more than MEMORY bytes beyond what the process had: it gets no more (RLIMIT_DATA).
- No file outside of the data set's folder is opened, none is written, no program started (sys.addaudithook).
- The process does not crash: it is one of its own.
- What is taken of a model or a run is what training and detecting can go on with.
- What is taken of a data set is a sound table: its arrays fit together, it can be written as COCO's, and its images be
  rendered.
- Collecting problems finds an error where reading stops at one, and takes what reading takes, as the same table.

Prints a line for each target. `test_fuzz.py` is the short form.
"""

import argparse
import faulthandler
import importlib
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import datasets
import hypothesis
import hypothesis.configuration
import odd_data
import odd_runs
import torch
from hypothesis.strategies import SearchStrategy
from odd_data import Files, Make, damage
from rules import Broken, check_image, check_json, check_run_lengths, check_set, check_stream
from run_rules import check_model, check_run

from direct_pt.images import decoding

REPOSITORY = Path(__file__).resolve().parents[2]
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a folder where files are written fast
LIMIT = 10.0  # seconds for one input
MEMORY = 2**31  # bytes: far more than the small inputs need, and what they state is often larger
MODEL_MEMORY = 2**30  # of a model that takes a few megabytes
MOST_PIXELS = 2000 * 2000  # of an image that is decoded, in place of MAX_PIXELS, which takes seconds
BATCH = 1000  # documents that hypothesis makes at a time: it remembers them
MOST_CRASHES = 20  # of one target
ROOM = 2**26  # bytes: of an input and the report, shared with the process that reads it
SAMPLES = 300  # that libFuzzer begins with
READING = [  # modules whose lines libFuzzer counts; a name that does not exist ends the program
    importlib.import_module(name)
    for name in (
        *(f"direct_pt.{name}" for name in ("images.decoding", "data.names", "data.outlines", "data.records")),
        *(f"direct_pt.data.formats.{name}" for name in ("coco", "json_stream", "label_files", "voc", "yolo")),
        *(f"yaml.{name}" for name in ("composer", "constructor", "parser", "reader", "scanner")),
        *(f"PIL.{name}ImagePlugin" for name in ("Avif", "Bmp", "Gif", "Jpeg", "Jpeg2K", "Png", "Ppm", "Tiff", "WebP")),
        *("PIL.Image", "PIL.ImageFile"),
    )
]
OPENING = ("open", "os.listdir", "os.scandir")  # audit events with a path
STARTING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")


@dataclass(frozen=True)
class Target:
    """A reader and what it is given.

    Attributes:
        name: of the command line, with more behind a comma.
        usual: files of a data set in which nothing is wrong.
        inputs: those that are others; by hypothesis, or made with a random.Random.
        check: reads the folder, whether it took that; raises anything else where a rule is broken.
        share: of all inputs.
        memory: that an input may take, in bytes.
    """

    name: str
    usual: Files
    inputs: "SearchStrategy[Files] | Make"
    check: Callable[[Path, Files], bool]
    share: float = 0.0
    memory: int = MEMORY


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
        if event in (*STARTING, "pickle.find_class"):
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
        self.cache.mkdir(exist_ok=True)
        self.report, _ = pickle.loads(state)
        self.watch = Watch(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for path, content in target.usual.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(content or b"")

    def prepare(self, memory: int) -> None:
        """Load what is loaded late, and set the limits."""
        warnings.simplefilter("error", RuntimeWarning)  # numpy's, of values that should not have come there
        decoding.MAX_PIXELS = MOST_PIXELS
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
            for function in functions_of(module):
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
    return f"{type(error).__name__} {place} {str(error)[: 40 * isinstance(error, Broken)]}"


def hunt(
    target: Target, inputs: int, seed: int, limit: float = LIMIT, memory: int = MEMORY, guided: bool = False
) -> Report:
    """Give a target so many inputs, in processes of their own."""
    report, crashes, began = Report(target.name), 0, cpu_seconds()
    with mmap.mmap(-1, ROOM) as state, tempfile.TemporaryDirectory(prefix="direct_pt_fuzz_", dir=IN_MEMORY) as folder:
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
            said = log.read_bytes()[-5000:].decode(errors="replace")
            if files is None and not status:
                break
            if files is None:  # it has not begun
                report.failures["usual"] = Failure("usual", f"the usual files: {said}", {})
                break
            crashes += 1
            report.inputs += 1
            late = status == -signal.SIGALRM
            text = f"took more than {limit:g} seconds" if late else f"the process ended with {status}"
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
    rows, pictures = odd_data.hub_inputs([coco["images/a.png"] or b""]), odd_data.image_files()
    return [
        Target("json", {"file.json": b"{}"}, odd_data.json_bytes, check_json, 0.22),
        Target("rle", {}, odd_data.damaged_counts, check_run_lengths, 0.15),
        Target("images", {"image": pictures[0]}, partial(odd_data.damaged_images, pictures), check_image, 0.17),
        Target("coco, documents", coco, odd_data.coco_inputs(), check_set, 0.14),
        Target("coco, bytes", coco, damage(coco, [odd_data.COCO_FILE], odd_data.JSON_WORDS), check_set, 0.07),
        Target("yolo, documents", yolo, odd_data.yolo_inputs(), check_set, 0.06),
        Target("yolo, bytes", yolo, damage(yolo, odd_data.YOLO_FILES, odd_data.YOLO_WORDS), check_set, 0.06),
        Target("voc, documents", voc, odd_data.voc_inputs(), check_set, 0.06),
        Target("voc, bytes", voc, damage(voc, odd_data.VOC_FILES, odd_data.XML_WORDS), check_set, 0.052),
        Target("hub, saved", hub, rows, check_set, 0.01),
        Target("hub, streamed", hub, rows, check_stream, 0.005),
        Target("hub, imagefolder", folder, odd_data.imagefolder_inputs(), check_set, 0.003),
        Target("model", *odd_runs.model_inputs(), check_model, 0.03, MODEL_MEMORY),
        Target("run", *odd_runs.run_inputs(), check_run, 0.05, MODEL_MEMORY),
    ]


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
    return Target(target.name, target.usual, lambda _: files, target.check, memory=target.memory)


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
        report = hunt(target, count, arguments.seed, memory=target.memory, guided=arguments.guided)
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
