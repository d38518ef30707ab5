"""The launcher's configurations, each started for real; what is refused; processes that are missing, die, or are told
to stop."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import small_runs as runs
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from direct_pt.distributed.launch import computes_bf16

FILES = sorted(path.stem for path in runs.CONFIGS.glob("*.yaml"))
GPU_FILES = [name for name in FILES if not name.startswith("cpu")]
SCRIPT = runs.SCRIPTS / "pretrain.py"
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
FOURS = ("--micro-batch-size", 4, "--log-every", 1)  # a process
STEPS = 12  # of the run that is interrupted
PERIOD = (*runs.TINY, *FOURS, "--global-batch-size", 8, "--max-steps", STEPS, *runs.NO_EVALUATION)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Outcome(NamedTuple):
    """The result of a process that ended."""

    status: int
    output: str
    errors: str


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Wait for the process, and leave nothing running."""
    try:
        output, errors = process.communicate(timeout=300)
        return Outcome(process.returncode, output, errors)
    finally:
        if process.poll() is None:
            runs.end_group(process)


def two_cores() -> list[int]:
    """Two cores that this machine lets us use; conftest.py leaves this process one of them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, before)
    return allowed[:2]


def side_by_side(starts: Mapping[str, Callable[[], subprocess.Popen[str]]]) -> dict[str, Outcome]:
    """Run processes two at a time, each on its own core: they spend most of their time in Python's imports."""
    cores = two_cores()

    def take_core() -> None:
        os.sched_setaffinity(0, {cores.pop() if len(cores) > 1 else cores[0]})  # of this thread and what it starts

    with ThreadPoolExecutor(2, initializer=take_core) as pool:
        outcomes = pool.map(lambda start: finish(start()), starts.values())
        return dict(zip(starts, outcomes, strict=True))


# The configurations


def processes_of(name: str) -> int:
    """The number of processes of a file as `launcher_file` changes it."""
    return min(2, yaml.safe_load((runs.CONFIGS / f"{name}.yaml").read_text())["num_processes"])


@pytest.fixture(scope="module")
def launched(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Outcome]]:
    """One step with each file, on the CPU in place of its device: where the run is, and how it ended.

    Files that are the same then, as those of several GPUs and of several machines, share a run.
    """
    folder = tmp_path_factory.mktemp("launched")
    by_content: dict[str, str] = {}
    same_as = {name: by_content.setdefault(runs.launcher_file(name, folder).read_text(), name) for name in FILES}

    def start(name: str) -> subprocess.Popen[str]:
        flags = (*runs.TINY, *FOURS, "--global-batch-size", 4 * processes_of(name), "--max-steps", 1)
        flags = (*runs.train_part(demo), *flags, "--mixed-precision", "auto", "--output-dir", folder / name)
        several = yaml.safe_load((runs.CONFIGS / f"{name}.yaml").read_text())["distributed_type"] == "MULTI_GPU"
        return runs.launch_file(runs.launcher_file(name, folder), SCRIPT, *flags, **(ON_CPU if several else {}))

    outcomes = side_by_side({name: lambda name=name: start(name) for name in set(same_as.values())})  # type: ignore[misc]
    return {name: (folder / first, outcomes[first]) for name, first in same_as.items()}


def test_files_are_read_by_the_launcher() -> None:
    assert len(FILES) == 11
    for name in FILES:
        config = load_config_from_file(str(runs.CONFIGS / f"{name}.yaml"))
        assert config.mixed_precision in ("no", "fp16", "bf16") and config.num_processes >= 1
        first = (runs.CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
        assert first.startswith("# ") and len(first) <= 120
        if name.startswith("deepspeed"):  # other settings would be refused
            assert set(config.deepspeed_config) <= {"zero_stage", "offload_optimizer_device", "offload_param_device"}


@pytest.mark.parametrize("name", FILES)
def test_file_starts_a_run(name: str, launched: dict[str, tuple[Path, Outcome]]) -> None:
    run, outcome = launched[name]
    processes = processes_of(name)
    assert outcome.status == 0, outcome.errors[-3000:]
    assert outcome.output.count("Direct-PT pretrain") == 1
    precision = re.search(rf"device +{processes} x CPU, precision (\w+)", outcome.output)
    assert precision is not None, outcome.output
    wanted = yaml.safe_load((runs.CONFIGS / f"{name}.yaml").read_text())["mixed_precision"]
    assert precision[1] == "bf16" or wanted != "bf16"
    assert ("imitates bf16" in outcome.output) == (precision[1] == "bf16" and not computes_bf16())
    assert f"{4 * processes} images a step = {processes} process(es) x 4" in outcome.output
    assert re.search(r"trainable +(\d+) of \1 tensors, ([1-9][\d,]{6,}) of \2 parameters", outcome.output)
    assert runs.weights(run)
    assert runs.records(run)[-1]["step"] == 1


@needs_gpu
@pytest.mark.parametrize("name", GPU_FILES)
def test_file_starts_a_run_on_gpus(name: str, demo: Path, tmp_path: Path) -> None:
    """The file as it is, except for the number of GPUs and of machines."""
    content = yaml.safe_load((runs.CONFIGS / f"{name}.yaml").read_text())
    processes = min(torch.cuda.device_count(), content["num_processes"])
    config = tmp_path / "launcher.yaml"
    config.write_text(yaml.safe_dump(content | {"num_machines": 1, "num_processes": processes, "main_process_port": 0}))
    flags = (*runs.TINY, *FOURS, "--global-batch-size", 4 * processes, "--max-steps", 1)
    flags = (*runs.train_part(demo), *flags, "--mixed-precision", "auto", "--output-dir", tmp_path / "run")
    outcome = finish(runs.launch_file(config, SCRIPT, *flags, CUDA_VISIBLE_DEVICES=visible_gpus()))
    assert outcome.status == 0, outcome.errors[-3000:]
    assert f"device     {processes} x {torch.cuda.get_device_name()}" in outcome.output
    assert f"precision {content['mixed_precision']}," in outcome.output
    assert runs.weights(tmp_path / "run")


def visible_gpus() -> str:
    """The GPUs that this process sees."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))


def test_readme_names_every_file() -> None:
    rows = [line for line in (runs.CONFIGS / "README.md").read_text().splitlines() if line.startswith("|")]
    for path in runs.CONFIGS.iterdir():
        if path.suffix != ".md":
            (row,) = [row for row in rows if row.startswith(f"| `{path.name}` |")]
            assert f"accelerate_configs/{path.name}" in row or "[below]" in row
    assert len(rows) == 2 + len(list(runs.CONFIGS.iterdir())) - 1


def test_slurm_script_is_bash() -> None:
    script = runs.CONFIGS / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    inner = re.search(r"bash -c '\n(.*?)\n'", script.read_text(), re.DOTALL)
    assert inner is not None
    subprocess.run(["bash", "-n", "-c", inner[1]], check=True)
    assert 'trap "" USR1' in inner[1] and "--resume" in inner[1] and "--signal=USR1@" in script.read_text()


# What is refused

SINGLE = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 1, "main_process_port": 0}
BF16 = {**SINGLE, "distributed_type": "DEEPSPEED", "mixed_precision": "bf16"}
NO_BF16 = {**SINGLE, "mixed_precision": "no"}
# By name: the launcher's file, and a part of the message.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp16": ({**SINGLE, "distributed_type": "NO", "mixed_precision": "fp16"}, "fp16 needs a GPU, and there is none"),
    "fsdp": (
        {**NO_BF16, "distributed_type": "FSDP"},
        "FSDP is not supported: use accelerate_configs/cpu_processes.yaml",
    ),
    "gpus": (
        {**NO_BF16, "distributed_type": "MULTI_GPU", "num_processes": 2},
        "2 processes were started for GPUs (NCCL), and this machine has none: for processes on the CPU (gloo) set "
        "ACCELERATE_USE_CPU=true",
    ),
    "multi_cpu": (
        {**NO_BF16, "distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True},
        "accelerate's MULTI_CPU starts only one: use accelerate_configs/cpu_processes.yaml",
    ),
    "deepspeed_fp16": ({**BF16, "mixed_precision": "fp16", "deepspeed_config": {"zero_stage": 2}}, "fp16 needs a GPU"),
    "deepspeed_accumulation": (
        {**BF16, "deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": 4}},
        "gradient_accumulation_steps 4: leave it out of the launcher's configuration",
    ),
    "deepspeed_clipping": (
        {**BF16, "deepspeed_config": {"zero_stage": 2, "gradient_clipping": 1.0}},
        "gradient_clipping 1.0: use the scripts' --clip-grad-norm",
    ),
    "deepspeed_file": ({**BF16, "deepspeed_config": {"deepspeed_config_file": "FILE"}}, "config_file is not supported"),
}


@pytest.fixture(scope="module")
def refused(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """How each of REFUSED ended; fp16 by flag, without a launcher; and processes whose partner is missing."""
    folder = tmp_path_factory.mktemp("refused")

    def flags(name: str) -> tuple[object, ...]:
        return (*runs.train_part(demo), *runs.TINY, *FOURS, "--max-steps", 1, "--output-dir", folder / name)

    def start(name: str) -> subprocess.Popen[str]:
        config, text = folder / f"{name}.yaml", json.dumps(REFUSED[name][0])
        if "FILE" in text:  # DeepSpeed's launcher checks that it exists
            (folder / "deepspeed.json").write_text('{"train_batch_size": 4}')
        config.write_text(yaml.safe_dump(json.loads(text.replace("FILE", str(folder / "deepspeed.json")))))
        return runs.launch_file(config, SCRIPT, *flags(name), "--mixed-precision", "auto")

    def alone(rank: int) -> subprocess.Popen[str]:
        place = {"WORLD_SIZE": 2, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORTS[rank]}
        return runs.start_script("pretrain", *flags(f"alone{rank}"), **place, **ON_CPU, DIRECT_PT_JOIN_SECONDS=3)

    starts = {name: lambda name=name: start(name) for name in REFUSED}  # type: ignore[misc]
    starts["flag"] = lambda: runs.start_script("pretrain", *flags("flag"), "--mixed-precision", "fp16")
    starts |= {f"alone{rank}": lambda rank=rank: alone(rank) for rank in (0, 1)}  # type: ignore[misc]
    outcomes = side_by_side(starts)
    assert not [path for path in folder.iterdir() if path.is_dir()]  # nothing was written
    return outcomes


def free_port() -> int:
    """A port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PORTS = (free_port(), free_port())


@pytest.mark.parametrize("name", REFUSED)
def test_refused_under_the_launcher(name: str, refused: dict[str, Outcome]) -> None:
    """One line, and status 2, which the launcher reports in a traceback of its own."""
    outcome = refused[name]
    lines = {line for line in outcome.errors.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1, outcome.errors  # the same of several processes
    assert REFUSED[name][1] in lines.pop()
    assert outcome.status == 1 and outcome.errors.count("Traceback (most recent call last)") == 1
    assert "returned non-zero exit status 2" in outcome.errors or "exitcode  : 2 " in outcome.errors


def test_fp16_by_flag_is_refused_on_the_cpu(refused: dict[str, Outcome]) -> None:
    outcome = refused["flag"]
    assert outcome.errors == "error: fp16 needs a GPU, and there is none: use --mixed-precision bf16 or no\n"
    assert outcome.status == 2


@needs_gpu
def test_more_processes_than_gpus(demo: Path, tmp_path: Path) -> None:
    gpus = torch.cuda.device_count()
    config = runs.launcher_file("multi_gpu", tmp_path, num_processes=gpus + 1)
    flags = (*runs.train_part(demo), *runs.TINY, "--max-steps", 1, "--output-dir", tmp_path / "run")
    outcome = finish(runs.launch_file(config, SCRIPT, *flags, CUDA_VISIBLE_DEVICES=visible_gpus()))
    message = f"{gpus + 1} processes were started on this machine, which has {gpus} GPU(s): --num_processes {gpus}"
    assert outcome.status == 1 and f"error: {message}\n" in outcome.errors


def test_main_process_alone(refused: dict[str, Outcome]) -> None:
    assert refused["alone0"].status == 2
    assert refused["alone0"].errors.splitlines()[-1] == (
        f"error: of 2 processes, number 1 did not reach 127.0.0.1 port {PORTS[0]} over interface lo in 3 s: start the "
        "same command there, and check the address, the port and the firewalls between"
    )
    assert "Traceback" not in refused["alone0"].errors


def test_other_process_alone(refused: dict[str, Outcome]) -> None:
    """Before the message, torch reports the connection."""
    assert refused["alone1"].status == 2
    assert refused["alone1"].errors.splitlines()[-1] == (
        f"error: process 1 of 2 did not reach the main process at 127.0.0.1 port {PORTS[1]} over interface lo in 3 s: "
        "start the same command there, and check the address, the port and the firewalls between"
    )
    assert "Traceback" not in refused["alone1"].errors


# A run that is interrupted under the launcher


@contextmanager
def two_processes(config: Path, *flags: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Pre-training in two processes, one thread each, in a process group of the launcher's."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, two_cores())
    process = runs.launch_file(config, SCRIPT, *PERIOD, *flags, **ON_CPU, **options)
    os.sched_setaffinity(0, before)
    try:
        yield process
    finally:
        runs.end_group(process)


def wait_until(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until `there` is true of a running process."""
    deadline = time.monotonic() + 240
    while not there():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def assert_same_run(run: Path, other: Path) -> None:
    """Weights and records are equal to the last bit, except for timings."""
    assert runs.largest_difference(runs.weights(run), runs.weights(other)) == 0
    assert runs.records(run) == runs.records(other)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For two processes on the CPU."""
    return runs.launcher_file("cpu_processes", tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def uninterrupted(config: Path, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without interruption."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    with two_processes(config, "--data", demo, "--output-dir", run) as process:
        outcome = finish(process)
    assert outcome.status == 0, outcome.errors[-3000:]
    return run


@runs.cpu_only
def test_killed_process(uninterrupted: Path, config: Path, demo: Path, tmp_path: Path) -> None:
    """The main one is killed: the launcher starts both again, and they resume from the checkpoint."""
    run, options = tmp_path / "run", ("--max_restarts", "2")
    with two_processes(config, "--data", demo, "--output-dir", run, "--save-every", 1, options=options) as process:
        wait_until(lambda: any((run / "checkpoints").glob("step-*")), process)
        first = runs.workers(process)
        os.kill(first[0], signal.SIGKILL)
        outcome = finish(process)
    assert outcome.status == 0, outcome.errors[-3000:]
    assert len(first) == 2
    starts = [int(step) for step in re.findall(r"from step (\d+);", outcome.output)]
    assert len(starts) == 2 and starts[0] == 0 < starts[1] < STEPS
    assert_same_run(run, uninterrupted)


@runs.cpu_only
def test_stop_signals_under_the_launcher(uninterrupted: Path, config: Path, demo: Path, tmp_path: Path) -> None:
    """One after the other, as a terminal, a person and Slurm send them: both processes stop at the same step."""
    run, reached = tmp_path / "run", 0
    flags = ("--data", demo, "--output-dir", run, "--resume")
    # Slurm's goes to every process, and the launcher is shielded from it as in slurm.sbatch.
    shield = ("bash", "-c", "trap '' USR1; exec \"$@\"", "bash")
    for number, prefix in ((signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGUSR1, shield)):
        with two_processes(config, *flags, "--save-every", 1000, prefix=prefix) as process:
            log = run / "metrics.jsonl"
            wait_until(lambda: log.exists() and len(runs.records(run)) > reached, process)  # noqa: B023
            groups = [process.pid] if number != signal.SIGUSR1 else [process.pid, *runs.workers(process)]
            for group in groups:
                os.killpg(group, number)
            outcome = finish(process)
        assert outcome.status != 0
        stops = [line for line in outcome.errors.splitlines() if "stopped: " in line]
        steps = [
            re.search(r"stopped: (\w+): the state of step (\d+) is saved; continue with --resume", s) for s in stops
        ]
        assert len(steps) == 2 and all(steps), outcome.errors
        assert {found[1] for found in steps if found} == {number.name}
        (step,) = {int(found[2]) for found in steps if found}
        assert reached < step < STEPS and f"step-{step}" in runs.steps_saved(run)
        assert runs.records(run)[-1]["step"] == step
        assert runs.largest_difference(runs.weights(run), runs.weights(run / f"checkpoints/step-{step}")) == 0
        reached = step
    with two_processes(config, *flags) as process:
        outcome = finish(process)
    assert outcome.status == 0, outcome.errors[-3000:]
    assert f"from step {reached};" in outcome.output
    assert_same_run(run, uninterrupted)
