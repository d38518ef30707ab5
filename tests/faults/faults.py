"""Runs that are killed, whose disk fills up, or that meet others, end as the one that nothing happened to: to the bit.

On the CPU. What they meet besides is in surroundings.py.

  python tests/faults/faults.py [--kind anywhere|saves|disk|folders|outputs|readers|ranks] [--processes 1|2]
      [--kills 30] [--seed 0]

A line for each fault, then the counts; exit status 1 where anything differs. `test_faults.py` is the short form.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a command; pytest has it there already
import small_runs as runs

from direct_pt.files import DamagedFile, read_tensors
from direct_pt.training.checkpoints import checkpoints

KINDS = ("anywhere", "saves", "disk", "folders", "outputs", "readers", "ranks")
OF_TWO = ("anywhere", "ranks")  # kinds for two processes too, where none is chosen
# A detector whose steps and saves are quick. With BatchNorm, whose statistics are in question too; sums of losses are
# under way at most saves; two micro-batches a step on each process.
DETECTOR = ("--model", runs.MODEL, "--backbone", "test_resnet", "--channels", "16", "--image-size", runs.SIZE)
# With these rates the first evaluation is the best one: its model stays, or its loss is seen.
RATES = ("--lr", "0.01", "--warmup-steps", "4")
FLAGS = (*DETECTOR, *runs.COUNTS, *RATES, "--mixed-precision", "no", "--global-batch-size", "8")
PERIODS = ("--log-every", "3", "--eval-every", "1.67")  # epochs: 5 steps
LONG, SHORT = 40, 8  # steps of a run
MARK = "DIRECT_PT_FAULTS"  # a variable that the processes of a run are known by
AT_MOST = 300  # seconds that a run may take
START_UP = 0.2  # share of the kills that come before the first step
REACH = 4  # steps within which the others come
AFTER_SAVE = 0.3  # seconds from the sight of a save to the kill, at most


@dataclass(frozen=True)
class Setup:
    """What is run."""

    data: Path
    processes: int
    steps: int

    def flags(self, run: Path) -> tuple[object, ...]:
        """All but those that may change when a run goes on."""
        micro_batch_size = 4 // self.processes
        lengths = ("--max-steps", self.steps, "--micro-batch-size", micro_batch_size, *PERIODS)
        return ("--data", self.data, *FLAGS, *lengths, "--output-dir", run)


@dataclass(frozen=True)
class Reference:
    """The run that nothing happens to, and the seconds that it took to start and for a step with all that goes by."""

    setup: Setup
    run: Path
    startup: float
    step: float


@dataclass
class Report:
    """What came of a kind of fault."""

    name: str
    faults: int = 0
    in_saves: int = 0
    restarts: list[int] = field(default_factory=list)
    redone: int = 0
    runs: int = 0
    problems: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def problem(self, text: str) -> None:
        """Something differs."""
        print(f"  PROBLEM: {text}", flush=True)
        self.problems.append(text)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.faults} faults over {self.runs} run(s), {self.in_saves} in the middle of a save; "
            f"restarts from steps {', '.join(map(str, self.restarts)) or 'none'}; {self.redone} steps redone; "
            f"{time.monotonic() - self.began:.0f} s; {len(self.problems)} problems"
        )


class Failure(Exception):
    """A run ended by itself that should not have."""


class Job:
    """A run's processes. They are found by a variable: a launcher's children have sessions of their own."""

    def __init__(self, setup: Setup, run: Path, *flags: object, prefix: Sequence[str] = ()) -> None:
        """Start a run; a `prefix` starts the command of a single process."""
        self.mark = uuid.uuid4().hex
        start = partial(runs.start_script, prefix=prefix)
        if setup.processes > 1:
            start = partial(runs.launch, setup.processes)
        script = "pretrain" if setup.processes == 1 else runs.SCRIPTS / "pretrain.py"
        self.process = start(script, *setup.flags(run), *flags, **{MARK: self.mark})

    def members(self) -> list[psutil.Process]:
        """All that live."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def kill(self) -> None:
        """The first process before the others, lest it ends them in its own way."""
        self.process.kill()
        while members := self.members():
            for process in members:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.01)

    def kill_some(self, rng: random.Random) -> str:
        """All at once, or one process and the others later. Returns which."""
        with suppress(psutil.Error):
            children = [child for child in self.members() if child.ppid() == self.process.pid]
            victim = rng.choice(["all", "all", "the first", *["a child"] * bool(children)])
            if victim == "the first":
                self.process.kill()
            elif victim == "a child":
                rng.choice(children).kill()
            if victim != "all":
                self.ends_within(rng.uniform(0, 3))
            self.kill()
            return victim
        self.kill()  # the one that was chosen has just ended
        return "all"

    def ends_within(self, seconds: float) -> bool:
        """Whether the first process ends by itself."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def end(self) -> tuple[int, str]:
        """Wait for it: its exit status and stderr."""
        try:
            _, errors = self.process.communicate(timeout=AT_MOST)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure(f"no end after {AT_MOST} s: {self.process.communicate()[1][-2000:]}") from None
        finally:
            self.kill()
        return self.process.returncode, errors


def demo_data(folder: Path) -> Path:
    """The demo set in small, whose validation objects are what a detector like the runs' finds: so AP is not 0."""
    make = runs.load_script("make_demo_data")
    numbers = ("--train-images", runs.TRAIN_IMAGES, "--val-images", runs.VAL_IMAGES, "--image-size", runs.FILE_SIZE)
    made, first = folder / "demo", folder / "first"
    with (folder / "making.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        make.main(["--output-dir", str(made), *map(str, numbers)])
        flags = (*FLAGS, "--num-workers", 0, "--max-steps", 2, "--output-dir", first)
        runs.train("pretrain", *runs.train_part(made), *flags)
        eager = runs.make_eager(first, folder / "eager")
        runs.call_script("evaluate", "--checkpoint", eager, "--data", made, *runs.MACHINE)
    data = runs.make_truth(made, eager / "predictions.json", folder / "data")
    shutil.copy(made / "annotations/instances_train.json", data / "annotations")
    return data


def make_reference(setup: Setup, run: Path) -> Reference:
    """Train without a fault."""
    began = time.monotonic()
    job = Job(setup, run, "--save-every", 2, "--num-workers", 0)
    while not (run / "config.json").exists() and not job.ends_within(0.01):
        pass
    startup = time.monotonic() - began
    status, errors = job.end()
    if status != 0:
        raise Failure(f"exit status {status}: {errors[-2000:]}")
    seconds = time.monotonic() - began
    aps = [record["bbox"]["AP"] for record in runs.records(run) if "bbox" in record]
    print(f"uninterrupted: {seconds:.1f} s, {startup:.1f} of them to start; AP {aps}", flush=True)
    return Reference(setup, run, startup, (seconds - startup) / setup.steps)


# What a run left


def differences(run: Path, reference: Reference) -> list[str]:
    """All that tells a finished run from the uninterrupted one, but timings."""
    other, found = reference.run, []
    final = f"checkpoints/step-{reference.setup.steps}"
    for name in ("model/model.safetensors", "best/model.safetensors", *(f"{final}/{x}.safetensors" for x in PARTS)):
        try:
            (mine, facts), (theirs, other_facts) = read_tensors(run / name), read_tensors(other / name)
        except DamagedFile as error:
            found.append(str(error))
            continue
        if mine.keys() != theirs.keys():
            found.append(f"{name}: has other tensors")
        elif (difference := runs.largest_difference(mine, theirs)) != 0:
            found.append(f"{name}: differs by up to {difference:.2e}")
        if facts != other_facts:
            found.append(f"{name}: its facts are {facts} in place of {other_facts}")
    for name in ("model/config.json", "best/config.json"):  # the history is there
        if not (run / name).exists() or runs.read_json(run / name) != runs.read_json(other / name):
            found.append(f"{name}: differs")
    mine, theirs = runs.records(run), runs.records(other)
    if mine != theirs:
        odd = [record for record in mine if record not in theirs] + [record for record in theirs if record not in mine]
        found.append(f"metrics.jsonl: {len(mine)} lines in place of {len(theirs)}; {str(odd[:2])[:300]}")
    return found + [f"{path.relative_to(run)}: was left" for path in run.rglob(".*")]


PARTS = ("model", "optimizer")  # files of a checkpoint


def damage(run: Path) -> list[str]:
    """What is not whole of that which a run shows after a fault. Hidden files may be anything."""
    found = []
    states = checkpoints(run / "checkpoints")
    files = [folder / f"{part}.safetensors" for folder in states for part in PARTS]
    files += [path for folder in ("model", "best") if (path := run / folder / "model.safetensors").exists()]
    for path in files:
        try:
            read_tensors(path)
        except DamagedFile as error:
            found.append(str(error))
    if states and not (run / "model/model.safetensors").exists():
        found.append("there is a checkpoint, but no model")
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    for line in lines[:-1]:  # the last one may be cut
        with suppress(ValueError):
            json.loads(line)
            continue
        found.append(f"metrics.jsonl: {line[:80]!r} in its middle")
    return found


def step_saved(run: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    found = checkpoints(run / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


def step_reached(run: Path, errors: str, steps: int) -> int:
    """At least so far a killed run had come: by its progress bar, its records and what it was saving."""
    seen = [step_saved(run), *(int(text) for text in re.findall(rf"\b(\d+)/{steps}\b", errors))]
    seen += [int(path.name.split("-")[1].split(".")[0]) for path in (run / "checkpoints").glob(".step-*")]
    for line in (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []:
        with suppress(ValueError):
            seen.append(json.loads(line)["step"])
    return max(seen)


def hidden(run: Path) -> dict[Path, tuple[int, int]]:
    """What is being written, or was left by a kill, and when."""
    found = {}
    for path in [run / ".config.json.partial", *run.glob(".*"), *run.glob("*/.*"), *run.glob("checkpoints/.*/*")]:
        with suppress(OSError):  # in place by now
            stat = path.stat()
            found[path] = stat.st_ino, stat.st_mtime_ns
    return found


# Kills


def moment_anywhere(job: Job, run: Path, reference: Reference, patience: int, rng: random.Random) -> bool:
    """Wait for a random moment, in start-up or in the steps after it. Whether the run is still there."""
    if rng.random() < START_UP and not patience:
        return not job.ends_within(rng.uniform(0, reference.startup))
    before = _inode(run / "config.json")  # which is written anew when all is built
    while _inode(run / "config.json") == before:
        if job.ends_within(0.01):
            return False
    return not job.ends_within(rng.uniform(0, REACH * reference.step * (1 + patience)))


def _inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def moment_in_save(job: Job, run: Path, reference: Reference, patience: int, rng: random.Random) -> bool:
    """Wait until the model or a checkpoint is being written, and a moment longer. Whether the run is still there."""
    before, known = hidden(run), step_saved(run)
    saves = rng.randrange(2) + patience
    pattern = rng.choice(("checkpoints/.step-*.partial", "checkpoints/.step-*.partial", "*/.*.partial"))
    while True:
        if step_saved(run) >= known + saves:
            now = hidden(run)
            if any(now.get(path) not in (None, before.get(path)) for path in run.glob(pattern)):
                break
        if job.ends_within(0.001):
            return False
    # Most come early: the save of so small a run takes less than this.
    return not job.ends_within(AFTER_SAVE * rng.random() ** 3)


def kill_runs(name: str, reference: Reference, folder: Path, kills: int, seed: int) -> Report:
    """Kill runs `kills` times in all, have them go on, and compare their ends.

    Args:
        name: of the kind, "anywhere" or "saves".
        reference: of the same setup.
        folder: for the runs; those that came to the same end are removed.
        kills: in all; as many runs as that takes.
        seed: of the moments, and of what is killed.
    """
    setup, rng = reference.setup, random.Random(f"{name} {seed} {reference.setup.processes}")
    moment: Callable[..., bool] = {"anywhere": moment_anywhere, "saves": moment_in_save}[name]
    report = Report(f"{name}, {setup.processes} process(es)")
    while report.faults < kills:
        run, done, patience = folder / f"run-{report.runs}", False, 0
        report.runs += 1
        while not done:
            before, saved = hidden(run), step_saved(run)
            save_every, workers = (1, 0) if name == "saves" else (rng.choice((1, 2)), rng.choice((0, 2)))
            began = time.monotonic()
            job = Job(setup, run, "--save-every", save_every, "--num-workers", workers, "--resume")
            try:
                if report.faults == kills or not moment(job, run, reference, patience, rng):
                    status, errors = job.end()
                    done = status == 0
                    if not done:
                        raise Failure(f"exit status {status}: {errors[-3000:]}")
                    break
                seconds = time.monotonic() - began
                victim = job.kill_some(rng)
            finally:
                job.kill()
            errors = job.process.communicate()[1]
            if "the checkpoint before it is used" in errors:
                report.problem(f"a kill damaged a checkpoint: {errors[-500:]}")
            if setup.processes == 1 and "Traceback" in errors:  # a launcher's messages are not ours
                report.problem(f"a traceback: {errors[-2000:]}")
            reached, newest, after = step_reached(run, errors, setup.steps), step_saved(run), hidden(run)
            fresh = [path for path, when in after.items() if before.get(path) != when]
            partial_state = any(".partial" in path.name or ".old" in path.name for path in fresh)
            report.faults += 1
            report.in_saves += partial_state
            report.restarts.append(newest)
            report.redone += reached - newest
            patience = 0 if newest > saved else patience + 1
            left = ", ".join(str(path.relative_to(run)) for path in fresh) or "nothing"
            print(
                f"  kill {report.faults}: {victim}, after {seconds:.1f} s, from step {saved}, at step {reached} or "
                f"later; newest checkpoint {newest}; left half-done: {left}",
                flush=True,
            )
            for text in damage(run):
                report.problem(text)
        found = differences(run, reference)
        for text in found:
            report.problem(f"{run.name}: {text}")
        if not found:
            shutil.rmtree(run)
    print(report, flush=True)
    return report


# Disks


class NotPermitted(Exception):
    """This user or machine cannot mount."""


@contextmanager
def small_disk(folder: Path, size: int, *options: str) -> Iterator[Path]:
    """A file system in memory, of `size` bytes, as long as the block runs. Raises NotPermitted."""
    folder.mkdir(parents=True, exist_ok=True)
    text = ",".join((f"size={size}", *options))
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", text, "faults", folder], capture_output=True, text=True)
    except OSError as error:
        raise NotPermitted(str(error)) from error
    if made.returncode != 0:
        raise NotPermitted(made.stderr.strip())
    try:
        yield folder
    finally:
        if subprocess.run(["umount", folder], capture_output=True).returncode != 0:
            subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> bool:
    """Change a mounted disk. Whether that was possible."""
    return subprocess.run(["mount", "-o", f"remount,{options}", folder], capture_output=True).returncode == 0


def cover_read_only(folder: Path) -> None:
    """Mount a disk once more over itself, read-only: while files are open to write, it cannot be made so itself."""
    subprocess.run(["mount", "--bind", folder, folder], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True, capture_output=True)


def fill(file: Path) -> None:
    """Take all that is free on a disk."""
    with suppress(OSError), file.open("ab", buffering=0) as zeros:
        while zeros.write(bytes(1 << 16)):
            pass
        while zeros.write(bytes(1 << 9)):
            pass


def sizes_of(reference: Reference) -> tuple[int, int]:
    """Bytes of a model, and of a checkpoint."""
    files = [reference.run / "model/model.safetensors"]
    files += (reference.run / f"checkpoints/step-{reference.setup.steps}").iterdir()
    model, *state = (path.stat().st_size for path in files)
    return model, sum(state)


def trouble(job: Job, disk: Path, run: Path, kind: str, step: int, delay: float) -> bool:
    """Fill the disk, or make it read-only, some seconds after the checkpoint of `step`. Whether it was in time."""
    while step_saved(run) < step:
        if job.ends_within(0.005):
            return False
    if job.ends_within(delay):
        return False
    if kind == "read-only":
        cover_read_only(disk)
    else:
        while not job.ends_within(0.1):  # what is removed later is taken too
            fill(disk / "zeros")
    return True


def disk_trial(reference: Reference, folder: Path, kind: str, amount: float, report: Report) -> None:
    """One run on a disk that fills up or fails, and its resumption on one that has room.

    Args:
        reference: of the same setup.
        folder: to mount at.
        kind: "small" from the start, "filled" or "read-only" later.
        amount: 0 to 1. Of a small disk: from what a model and a checkpoint take to a little less than what the run
            needs; of the others, from the first checkpoint to half of the steps before the trouble comes.
        report: to add to.
    """
    setup = reference.setup
    flags = ("--save-every", 1000 if kind == "small" else 2, "--num-workers", 0)  # 1000: before evaluations alone
    model, state = sizes_of(reference)
    needed = 2 * model + 3 * state + (1 << 20)  # model, best, two checkpoints and a third that is being written
    least = model + state + (1 << 17)
    small = int(least + amount * (needed - (1 << 20) - least))
    with small_disk(folder, small if kind == "small" else needed + 2 * model) as disk:
        run = disk / "run"
        job, late = Job(setup, run, *flags), False
        try:
            if kind != "small":
                step = 2 + int(amount * (setup.steps / 2 - 2))
                late = not trouble(job, disk, run, kind, step, amount * reference.step)
            status, errors = job.end()
        finally:
            job.kill()
        if late and status == 0:
            print(f"  {kind} {amount:.2f}: came after the end", flush=True)
            return
        newest, last = step_saved(run), errors.strip().splitlines()[-1]
        print(f"  {kind} {amount:.2f}: exit status {status}, newest checkpoint {newest}; {last}", flush=True)
        report.faults += 1
        report.runs += 1
        report.restarts.append(newest)
        report.redone += setup.steps - newest
        warnings = [line for line in errors.splitlines() if "warning: " in line and str(run) in line]
        named = f"the newest checkpoint is {run}/checkpoints/step-{newest}" if newest else "there is no checkpoint yet"
        for right, text in (
            (status == 1, f"exit status {status}"),
            (warnings, "no warning names a file of the run"),
            (last.startswith(f"stopped: step {setup.steps} could not be saved: "), f"the last line is {last}"),
            (named in last, f"the last line does not say that {named}"),
            (str(run) in last.split("; ")[0], f"the last line names no file: {last}"),
            ("Traceback" not in errors, f"a traceback: {errors[-3000:]}"),
            (newest or kind == "small", "the checkpoint is gone"),
        ):
            if not right:
                report.problem(f"{kind} {amount:.2f}: {text}")
        for text in damage(run):
            report.problem(f"{kind} {amount:.2f}: {text}")
        if kind != "read-only" and (left := [path for path in hidden(run) if path.stat().st_size]):
            report.problem(f"{kind} {amount:.2f}: {left} keeps the disk full")

        if kind == "read-only":
            subprocess.run(["umount", disk], check=True, capture_output=True)
        if not remount(disk, f"rw,size={2 * needed + 4 * model}"):
            raise Failure("no room could be made")
        (disk / "zeros").unlink(missing_ok=True)
        job = Job(setup, run, *flags, "--resume")
        try:
            status, errors = job.end()
        finally:
            job.kill()
        if status != 0:
            report.problem(f"{kind} {amount:.2f}, resumed: exit status {status}: {errors[-2000:]}")
            return
        for text in differences(run, reference):
            report.problem(f"{kind} {amount:.2f}, resumed from step {newest}: {text}")


def read_only_trial(reference: Reference, folder: Path, report: Report) -> None:
    """A disk that is read-only from the start: one line, exit status 2, nothing else."""
    with small_disk(folder, 1 << 24, "ro") as disk:
        status, errors = Job(reference.setup, disk / "run").end()
        lines = errors.strip().splitlines()
        print(f"  read-only from the start: exit status {status}; {lines[-1]}", flush=True)
        report.faults += 1
        one_line = len(lines) == 1 or reference.setup.processes > 1  # the launcher has more to say
        if status != (2 if reference.setup.processes == 1 else 1) or not one_line or "cannot be written" not in errors:
            report.problem(f"read-only from the start: exit status {status}: {errors[-2000:]}")
        if any(disk.iterdir()):
            report.problem("read-only from the start: something was written")


def fail_disks(reference: Reference, folder: Path, trials: int, seed: int) -> Report:
    """Disks that fill up and fail, `trials` in all. Raises NotPermitted."""
    rng = random.Random(f"disk {seed}")
    report = Report(f"disk, {reference.setup.processes} process(es)")
    read_only_trial(reference, folder / "disk", report)
    for trial in range(trials):
        disk_trial(reference, folder / "disk", ("small", "filled", "read-only")[trial % 3], rng.random(), report)
    print(report, flush=True)
    return report


def main() -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", choices=KINDS, help="(all)")
    p.add_argument("--processes", type=int, choices=(1, 2), help="(1 for all kinds, and 2 for anywhere and ranks)")
    p.add_argument("--kills", type=int, default=30, help="of each kind; a third as many failing disks (30)")
    p.add_argument("--seed", type=int, default=0, help="of the moments, which depend on the machine's speed too (0)")
    p.add_argument("--steps", type=int, default=LONG, help=f"of a run ({LONG})")
    arguments = p.parse_args()
    import surroundings  # which is made of the parts above

    kinds = (arguments.kind,) if arguments.kind else KINDS
    counts = (arguments.processes,) if arguments.processes else (1, 2)
    cores = sorted(os.sched_getaffinity(0))
    reports = []
    with tempfile.TemporaryDirectory(prefix="direct_pt_faults_") as name:
        folder = Path(name)
        os.environ["DIRECT_PT_CACHE"] = runs.ENVIRONMENT["DIRECT_PT_CACHE"] = str(folder / "cache")
        os.sched_setaffinity(0, cores[-1:])
        data = demo_data(folder)
        for processes in counts:
            os.sched_setaffinity(0, cores[-processes:])  # a core for each, as other programs may run beside
            chosen = kinds if arguments.kind or arguments.processes or processes == 1 else OF_TWO
            reference = make_reference(Setup(data, processes, arguments.steps), folder / f"reference-{processes}")
            for kind in chosen:
                place = folder / f"{kind}-{processes}"
                try:
                    if kind == "disk":
                        reports.append(fail_disks(reference, place, max(3, arguments.kills // 3), arguments.seed))
                    elif kind not in ("anywhere", "saves"):
                        meet = partial(surroundings.meet, kind, reference, place)
                        reports.append(meet(arguments.kills, arguments.seed))
                    else:
                        reports.append(kill_runs(kind, reference, place, arguments.kills, arguments.seed))
                except NotPermitted as reason:
                    print(f"{kind}: left out, as nothing can be mounted here: {reason}", flush=True)
    for report in reports:
        print(report)
        for text in report.problems:
            print(f"  {text}")
    sys.exit(1 if any(report.problems for report in reports) else 0)


if __name__ == "__main__":
    import faults  # once, as surroundings.py does

    faults.main()
