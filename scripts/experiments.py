"""Compare ways to train on your own data sets, at equal processor time: declared, run, and told with intervals.

  python scripts/experiments.py plan      --file docs/experiments.toml     what would run, and how long it takes
  python scripts/experiments.py calibrate --file docs/experiments.toml     measure what a step costs, first
  python scripts/experiments.py run       --file docs/experiments.toml --cores 0,1
  python scripts/experiments.py report    --file docs/experiments.toml     the tables

The file declares sets, and experiments: each has arms, which are flags of pretrain.py and finetune.py, and trains
every arm on every fold of every set with every seed. docs/small_sets.md explains it, and has the project's own results.
Results go to a CSV beside the file, one row a run. A run that has a row there is not repeated, one that was stopped
goes on. Each process is pinned to a core, and cost is counted in seconds of processor time.
"""

from direct_pt.program.run import run_program
import argparse
import contextlib
import itertools
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from direct_pt.errors import InputError, StopSignal, printable
from direct_pt.files import writing
from direct_pt.flags import any_path, make_parser, positive_integer
from direct_pt.program.folder_lock import folder_held
from direct_pt.training.settings import FinetuneFlags, PretrainFlags, parse_flags
from small_sets.costs import LENGTH, Costs, cost_key, without_length
from small_sets.folds import fold_flags
from small_sets.plan import CHECKPOINT, PEERS, STEPS, Plan, RunId, read_plan
from small_sets.runs import (
    POLL_SECONDS,
    Job,
    Place,
    append_result,
    clean_commit,
    is_done,
    read_results,
    resolved_stages,
    result_of,
    stage_seconds,
    stages_of,
)
from small_sets.tables import write_report

ROOT = Path(__file__).parents[1]


def main(argv: list[str] | None = None) -> None:
    """Do what the first word says."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("what", choices=["plan", "calibrate", "run", "report"])
    parser.add_argument("--file", type=any_path, required=True, help="the experiments, as TOML")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these experiments (all)")
    parser.add_argument("--data-root", type=any_path, default=Path("data"), metavar="DIR", help="of the sets (data)")
    parser.add_argument("--runs", type=any_path, default=Path("runs/experiments"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--cores", type=core_list, default=[0], metavar="A,B,...", help="one run at once on each (0)")
    parser.add_argument(
        "--calibration-steps", type=positive_integer, nargs=2, default=(10, 40), metavar="N", help="%(default)s"
    )
    parser.add_argument("--document", type=any_path, metavar="FILE", help="that report writes its tables into")
    parser.add_argument("--plot", type=any_path, metavar="FILE", help="of report: the comparisons as a picture")
    args = parser.parse_args(argv)
    low, high = args.calibration_steps
    if low >= high:
        raise InputError(f"--calibration-steps {low} {high}: the second must be above the first")
    plan = read_plan(args.file)
    results = args.file.with_suffix(".csv")
    place = Place(args.data_root, args.runs.resolve(), Costs.read(args.file.with_suffix(".costs.json")))
    runs = plan.runs(args.only)
    if args.what != "report":
        for name in dict.fromkeys(run.set for run in runs):
            plan.sets[name].path(args.data_root)
        check_arms(plan.only(args.only))
    if args.what in ("calibrate", "run"):
        commit = clean_commit(ROOT, results, place.costs.path)
        for name in dict.fromkeys(run.set for run in runs):  # what cannot be divided is found before the first run
            with writing(f"--runs {args.runs}"):
                fold_flags(plan.sets[name], args.data_root, 0, place.folder / "folds")
    if args.what == "plan":
        show_plan(plan, runs, results, place)
    elif args.what in ("calibrate", "run"):
        with writing(f"--runs {args.runs}"), folder_held(args.runs, "experiments", "--runs"):
            if args.what == "calibrate":
                calibrate(plan, runs, place, args.cores[0], low, high)
            else:
                run_all(plan, runs, results, place, args.cores, commit)
    else:
        write_report(plan.only(args.only), read_results(results), place.costs, args.document, args.plot)


def core_list(text: str) -> list[int]:
    """Numbers of this machine's cores between commas, each once."""
    known = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    try:
        cores = [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give the numbers of cores, such as 0,1") from None
    if len(set(cores)) < len(cores) or not known.issuperset(cores):
        raise argparse.ArgumentTypeError(f"{text}: give each core once, of {', '.join(map(str, sorted(known)))}")
    return cores


def check_arms(plan: Plan) -> None:
    """Check the flags of all arms, before the first of them runs. Raises InputError, naming the arm."""
    for experiment in plan.experiments:
        for arm in experiment.arms:
            for stage, flags in arm.stages.items():
                if stage == PEERS:
                    continue
                given = [CHECKPOINT.sub(".", flag.replace(STEPS, "1")) for flag in flags]
                own = ["--data", ".", "--output-dir", ".", *(["--init", "."] if stage == "finetune" else [])]
                try:
                    parse_flags(PretrainFlags if stage == "pretrain" else FinetuneFlags, "", [*own, *given])
                except InputError as error:
                    raise InputError(
                        f"{plan.path}: experiment {experiment.name}, arm {arm.name}, {stage}: {error}"
                    ) from error


def show_plan(plan: Plan, runs: list[RunId], results: Path, place: Place) -> None:
    """Print each experiment's runs, how many are done, and the processor hours of the others, as far as known."""
    done = {row.run: row.seconds for row in read_results(results)}
    known = list(done.values())
    for experiment in plan.experiments:
        own = [run for run in runs if run.experiment == experiment.name]
        if not own:
            continue
        left = [run for run in own if run not in done]
        seconds = sum(estimate(plan, run, place, known) for run in left)
        hours = f"{seconds / 3600:.1f} hours left" if seconds or not left else "not calibrated"
        print(printable(f"{experiment.name}: {len(own)} runs, {len(own) - len(left)} done, {hours}: "
                        f"{experiment.question}"))  # fmt: skip
        for run in left:
            print(printable(f"  {run.set} fold {run.fold} seed {run.seed}: {run.arm}"))


def estimate(plan: Plan, run: RunId, place: Place, known: list[float]) -> float:
    """Processor seconds of a run: by the measured costs, or else the mean of the runs that are done."""
    arm = plan.arm(run)
    try:
        return place.costs.of_arm(run.set, plan.arm_named(run.experiment, arm.equal_cost or arm.name))
    except InputError:
        return sum(known) / len(known) if known else 0.0


def calibrate(plan: Plan, runs: list[RunId], place: Place, core: int, low: int, high: int) -> None:
    """Measure the cost of a step of each stage of arms that are compared at equal cost, where it is not known.

    It is what runs of `high` steps take longer than those of `low`.
    """
    for experiment, data in dict.fromkeys((run.experiment, run.set) for run in runs):
        arms = [arm for one in plan.experiments if one.name == experiment for arm in one.arms]
        names = {name for arm in arms if arm.equal_cost for name in (arm.name, arm.equal_cost)}
        chains = [list(arm.stages.items()) for arm in arms if arm.name in names and PEERS not in arm.stages]
        keys = [cost_key(data, stage, flags) for chain in chains for stage, flags in chain]
        if all(key in place.costs.stages for key in keys):
            continue
        seconds: dict[tuple[str, int], float] = {}
        folder = place.folder / "calibration" / data
        shutil.rmtree(folder, ignore_errors=True)
        flags_of_data = fold_flags(plan.sets[data], place.data_root, 0, place.folder / "folds")
        for steps, chain in itertools.product((low, high), chains):  # by turns, as the machine's speed changes
            before: Path | None = None
            for stage, flags in chain:
                key = cost_key(data, stage, flags)
                own = folder / f"{steps}-{len(seconds)}"
                flags = without_length(flags)
                init = ["--init", str(before)] if before is not None and "--init" not in flags else []
                script = str(ROOT / "scripts" / f"{stage}.py")
                command = [script, *flags_of_data, *flags, *init, LENGTH, str(steps), "--output-dir", str(own)]
                wait(Job(RunId(experiment, data, 0, 0, key), core, [(stage, own, command)]))
                seconds[key, steps] = stage_seconds(own)
                before = own
        place.costs.add({key: (seconds[key, low], seconds[key, high]) for key in keys}, low, high)
        for key in dict.fromkeys(keys):
            print(printable(f"{key}: {place.costs.stages[key][1]:.3f} seconds a step"), flush=True)
        place.costs.write()


def wait(job: Job) -> None:
    """Until a job has ended. Raises InputError where it failed."""
    with stopping([job]):
        while not (outcome := job.step()):
            time.sleep(POLL_SECONDS)
    if outcome != "done":
        raise InputError(f"{job.run.text}: {outcome}")


def run_all(plan: Plan, runs: list[RunId], results: Path, place: Place, cores: list[int], commit: str) -> None:
    """Run what has no row yet, one run at once on each core. Raises InputError at the end if some failed."""
    add_equal_runs(plan, runs, results, place)
    done = {row.run for row in read_results(results)}
    waiting = [run for run in runs if run not in done]
    stages_of_run = {run: stages_of(plan, run, place) for run in waiting}  # all before the first: costs may be missing
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} are done", flush=True)
    jobs: list[Job] = []
    failed: list[str] = []
    with stopping(jobs):
        while waiting or jobs:
            free = [core for core in cores if core not in {job.core for job in jobs}]
            busy = {folder for job in jobs for _, folder, _ in job.stages}
            for run in list(waiting):
                stages = stages_of_run[run]
                if free and busy.isdisjoint(folder for _, folder, _ in stages):  # stages are shared
                    waiting.remove(run)
                    left = list(itertools.dropwhile(lambda stage: is_done(stage[1]), stages))
                    jobs.append(Job(run, free.pop(), left))
                    busy |= {folder for _, folder, _ in stages}
            for job in list(jobs):
                if not (outcome := job.step()):
                    continue
                jobs.remove(job)
                if outcome == "done":
                    row = result_of(plan, job.run, place, commit)
                    append_result(results, row)
                    text = f"{job.run.text}: AP {row.AP:.3f}, {row.seconds:.0f} s of a processor"
                    print(printable(text), flush=True)
                else:
                    failed.append(job.run.text)
                    print(printable(f"error: {job.run.text}: {outcome}"), file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
    if failed:
        raise InputError(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed[:3])}")


def add_equal_runs(plan: Plan, runs: list[RunId], results: Path, place: Place) -> None:
    """Add rows of runs that are the same, flag by flag, as runs of other arms that are done."""
    rows, known = read_results(results), set(plan.runs())
    done = {row.run for row in rows}
    stages: dict[RunId, dict[str, tuple[str, ...]]] = {}
    for run in {*runs, *(done & known)}:
        with contextlib.suppress(InputError):  # its cost was not measured
            stages[run] = resolved_stages(plan, run, place.costs)
    for run in runs:
        for row in rows if run in stages and run not in done else ():
            same_place = (row.set, row.fold, row.seed) == (run.set, run.fold, run.seed)
            if same_place and stages.get(row.run) == stages[run]:
                append_result(results, replace(row, experiment=run.experiment, arm=run.arm))
                print(f"{run.text}: is the same as {row.run.text}", flush=True)
                break


class stopping:
    """Within it a stop signal, or an error, ends the jobs' processes, which save their state first."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def __enter__(self) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            raise StopSignal(f"{signal.Signals(number).name}: start again to go on", 128 + number)

        for number in self.before:
            signal.signal(number, stop)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        running = [job for job in self.jobs if job.process is not None and job.process.returncode is None]
        for job in running:
            assert job.process is not None
            job.process.terminate()
            del job.stages[1:]
        while running:
            running = [job for job in running if not job.step()]
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    run_program(main)
