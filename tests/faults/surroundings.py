"""What runs meet, for faults.py: a second run in their folder, readers of their output that go away, little shared
memory and few files for the processes that read images, processes that stop for a while."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a command; pytest has it there already
from faults import Failure, Job, NotPermitted, Reference, Report, damage, differences, step_saved

SAVES = ("--save-every", 2)
PAUSE = 3.0  # seconds that a process stops, at most
# Docker gives 64 MB of shared memory, and a batch of these runs takes far less than photographs do.
LITTLE_MEMORY = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size={}k none /dev/shm && exec "$@"', "sh")
FEW_FILES = ("sh", "-c", 'ulimit -n {} && exec "$@"', "sh")


def meet(kind: str, reference: Reference, folder: Path, trials: int, seed: int) -> Report:
    """Have runs meet a kind of trouble, `trials` times in all, a run each, and compare their ends.

    Args:
        kind: a key of TROUBLES.
        reference: of the same setup.
        folder: for the runs; those that came to the same end are removed.
        trials: how many.
        seed: of the moments.

    Raises:
        NotPermitted: this machine does not let us cause it.
    """
    report, rng = Report(f"{kind}, {reference.setup.processes} process(es)"), random.Random(f"{kind} {seed}")
    while report.faults < trials:
        run = folder / f"run-{report.runs}"
        report.runs += 1
        found = [*TROUBLES[kind](reference, run, rng, report), *damage(run)]
        for _ in range(2 if step_saved(run) < reference.setup.steps else 0):  # it was to stop: it goes on
            job = Job(reference.setup, run, *SAVES, "--num-workers", 0, "--resume")
            status, errors = job.end()
            if status == 0:
                break
            found.append(f"resumed: exit status {status}: {errors[-2000:]}")
        found += differences(run, reference)
        for text in found:
            report.problem(f"{run.name}: {text}")
        if not found:
            shutil.rmtree(run)
    print(report, flush=True)
    return report


def started(reference: Reference, run: Path, rng: random.Random, *flags: object) -> Job:
    """A run at a random moment after its beginning."""
    job = Job(reference.setup, run, *SAVES, *(flags or ("--num-workers", 0)))
    while not (run / "config.json").exists():
        if job.ends_within(0.01):
            raise Failure(f"it ended before it began: {job.process.communicate()[1][-2000:]}")
    job.ends_within(rng.uniform(0, reference.step * reference.setup.steps * 0.8))
    return job


def second_run(reference: Reference, run: Path, rng: random.Random, report: Report) -> list[str]:
    """Another run in the same folder, new or resumed, while the first one trains; that waits, lest it ends before."""
    first = started(reference, run, rng)
    stopped = first.members()
    for member in stopped:
        with suppress(psutil.Error):
            member.suspend()
    was_there = (run / ".train.lock").exists()
    flags = ("--resume",) if rng.random() < 0.7 else ()
    second = Job(reference.setup, run, *SAVES, "--num-workers", 0, *flags)
    status, errors = second.end()
    for member in stopped:
        with suppress(psutil.Error):
            member.resume()
    first_status, first_errors = first.end()
    report.faults += was_there
    last = errors.strip().splitlines()[-1] if errors.strip() else ""
    print(f"  second run{' with --resume' * bool(flags)}: exit status {status}; {last[:150]}", flush=True)
    found = [] if first_status == 0 else [f"the first run: exit status {first_status}: {first_errors[-2000:]}"]
    if was_there and (status == 0 or "writes there; wait until" not in errors or "Traceback" in errors):
        found.append(f"the second run: exit status {status}: {errors[-2000:]}")
    return found


def lost_reader(reference: Reference, run: Path, rng: random.Random, report: Report) -> list[str]:
    """Nobody reads what a run prints any more; or its terminal is closed, which is also a signal."""
    job = started(reference, run, rng)
    assert job.process.stdout is not None and job.process.stderr is not None
    job.process.stdout.close()
    job.process.stderr.close()
    hangs_up = rng.random() < 0.5
    if hangs_up:
        for member in job.members():
            with suppress(psutil.Error):
                member.send_signal(signal.SIGHUP)
    if not job.ends_within(reference.step * reference.setup.steps * 20 + 60):
        job.kill()
        return ["no end without a reader"]
    status = job.process.wait()
    report.faults += 1
    report.restarts += [step_saved(run)] * hangs_up
    print(
        f"  reader gone{', SIGHUP' * hangs_up}: exit status {status}, newest checkpoint {step_saved(run)}", flush=True
    )
    if status == 0 or (hangs_up and status == 128 + signal.SIGTERM and step_saved(run)):
        return []
    return [f"exit status {status}"]


def poor_readers(reference: Reference, run: Path, rng: random.Random, report: Report) -> list[str]:
    """The processes that read images get little shared memory, or few files: it works, or it is said."""
    few_files = rng.random() < 0.5
    amount = rng.choice((16, 24, 40, 64)) if few_files else rng.choice((4, 64, 512, 4096))
    prefix = [part.format(amount) for part in (FEW_FILES if few_files else LITTLE_MEMORY)]
    if not few_files and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        raise NotPermitted("mount namespaces")
    job = Job(reference.setup, run, *SAVES, "--num-workers", rng.choice((1, 2)), prefix=prefix)
    began = time.monotonic()
    try:
        status, errors = job.end()
    except Failure as failure:
        return [str(failure)]
    last = errors.strip().splitlines()[-1] if errors.strip() else ""
    what = f"{amount} files" if few_files else f"{amount} KiB of shared memory"
    print(f"  {what}: exit status {status} after {time.monotonic() - began:.0f} s; {last[:150]}", flush=True)
    report.faults += 1
    if status == 0:
        return []
    said = last.startswith(("error: ", "stopped: ")) and "Traceback" not in errors
    return [] if said else [f"{what}: exit status {status}: {errors[-2000:]}"]


def paused_process(reference: Reference, run: Path, rng: random.Random, report: Report) -> list[str]:
    """One of the run's processes stops for a while, as on a machine that swaps; it is waited for."""
    job = started(reference, run, rng)
    ranks = [member for member in job.members() if any("pretrain.py" in word for word in _command(member))]
    chosen = rng.choice(ranks or [psutil.Process(job.process.pid)])
    pause = rng.uniform(0.2, PAUSE)
    with suppress(psutil.Error):
        os.kill(chosen.pid, signal.SIGSTOP)
        time.sleep(pause)
        os.kill(chosen.pid, signal.SIGCONT)
    status, errors = job.end()
    report.faults += 1
    print(f"  process {chosen.pid} stopped for {pause:.1f} s: exit status {status}", flush=True)
    return [] if status == 0 else [f"exit status {status}: {errors[-2000:]}"]


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


Trouble = Callable[[Reference, Path, random.Random, Report], list[str]]
TROUBLES: dict[str, Trouble] = {
    "folders": second_run, "outputs": lost_reader, "readers": poor_readers, "ranks": paused_process,
}  # fmt: skip
