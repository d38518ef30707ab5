"""Small real runs for the tests: the data, the flags that keep them small, and one stage or script at a time."""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file
from torch import Tensor

from direct_pt.checkpoint import from_pretrained, save_model
from direct_pt.models.detector import RetinaNet
from direct_pt.program import folder_lock
from direct_pt.program.signals import STOP_SIGNALS

SCRIPTS = Path(__file__).parents[1] / "scripts"
CONFIGS = SCRIPTS.parent / "accelerate_configs"
TRAIN_IMAGES, VAL_IMAGES, FILE_SIZE = 24, 9, 64  # 9: not divisible by two processes
SIZE = 96  # pixels that the files are enlarged to, for objects that anchors fit
MODEL = "faster_rcnn_r50_fpn"
DETECTOR = ("--model", MODEL, "--backbone", "resnet18", "--channels", "32")
COUNTS = ("--rois-per-image", "16", "--proposals", "64")
MACHINE = ("--num-workers", "0", "--mixed-precision", "no")
RATE = ("--lr", "0.002", "--warmup-steps", "1")
PRETRAIN = (*DETECTOR, *COUNTS, *MACHINE, "--image-size", str(SIZE), *RATE)
FINETUNE = (*COUNTS, *MACHINE, "--short-side", str(SIZE), "--long-side", "128", *RATE)
# Smaller still, where a test makes many runs or saves: a checkpoint of 10 MB, not 100.
TINY = (*PRETRAIN, "--backbone", "test_resnet", "--channels", "16")
EIGHT = ("--global-batch-size", "8", "--micro-batch-size", "8")
NO_EVALUATION = ("--eval-every", "1000")  # but for the one at the end
# Three steps whose weights are compared: without BatchNorm, which sees micro-batches.
THREE_STEPS = ("--norm", "group", "--global-batch-size", "8", "--max-steps", "3", "--log-every", "1")
COMPARED = (MODEL, "mask_rcnn_r50_fpn", "retinanet_r50_fpn")  # between micro-batch sizes, and numbers of processes
TIMINGS = ("images_per_second", "memory_gib")  # what differs between two equal runs
# Subprocesses are not to look for models on the net, nor to use a GPU.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="compares figures to the bit, as a CPU gives them: hide the GPU to run it"
)


@contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """Within it this process has no more of a resource, a number of the module of that name.

    As on a full disk, where RLIMIT_FSIZE lets no file become larger; RLIMIT_NOFILE limits the files that are open.
    """
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def load_script(name: str) -> ModuleType:
    """A script of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def demo_data(factory: pytest.TempPathFactory) -> Path:
    """The demo set in small, made once a session."""
    pytest.importorskip("sklearn")
    folder = factory.getbasetemp() / "demo_data"
    numbers = ("--train-images", TRAIN_IMAGES, "--val-images", VAL_IMAGES, "--image-size", FILE_SIZE)
    load_script("make_demo_data").main(["--output-dir", str(folder), *map(str, numbers)])
    return folder


def pretrained_run(factory: pytest.TempPathFactory) -> Path:
    """A pre-trained run of four steps on the demo set, made once a session. Tests must leave it as it is."""
    run = factory.getbasetemp() / "pretrained_run"
    if not (run / "model").exists():
        flags = (*PRETRAIN, *EIGHT, "--max-steps", "4", "--eval-every", "0.67", "--log-every", "1")
        train("pretrain", "--data", demo_data(factory), *flags, "--output-dir", run)
    return run


@contextmanager
def fresh_process() -> Iterator[None]:
    """As if this process had just started, for accelerate and signals; put back at the end."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    threads = torch.get_num_threads()
    _forget_accelerator()
    try:
        yield
    finally:
        _forget_accelerator()
        folder_lock.release_all()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _forget_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(stage: str, *flags: object) -> None:
    """Run pretrain or finetune in this process."""
    with fresh_process():
        load_script(stage).main([str(flag) for flag in flags])


def call_script(name: str, *flags: object) -> None:
    """Run evaluate.py's or predict.py's main in this process."""
    script, arguments = load_script(name), sys.argv
    sys.argv = [f"{name}.py", *map(str, flags)]
    try:
        with fresh_process(), torch.inference_mode(name.startswith("predict")):
            script.main()
    finally:
        sys.argv = arguments


def start_script(
    name: str, *flags: object, new_session: bool = False, prefix: Sequence[str] = (), **environment: object
) -> subprocess.Popen[str]:
    """A script of scripts/ in a process of its own, with more variables in its environment.

    Args:
        name: of the script.
        flags: its command line.
        new_session: whether it gets a process group of its own.
        prefix: a command that starts the command.
        environment: more variables.
    """
    return start(SCRIPTS / f"{name}.py", *flags, new_session=new_session, prefix=prefix, **environment)


def start(
    script: Path, *flags: object, new_session: bool = False, prefix: Sequence[str] = (), **environment: object
) -> subprocess.Popen[str]:
    """The same of any script."""
    command = [*prefix, sys.executable, str(script), *map(str, flags)]
    variables = {**ENVIRONMENT, **{key: str(value) for key, value in environment.items()}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=variables, text=True, start_new_session=new_session, **pipes)


def launch(processes: int, script: Path, *arguments: object, **environment: object) -> subprocess.Popen[str]:
    """A script in several processes on the CPU, in a group of its own, as a terminal gives it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"]
    command += ["--multi_gpu", "--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", str(script), *map(str, arguments)]
    variables = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", **{key: str(value) for key, value in environment.items()}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=variables, text=True, start_new_session=True, **pipes)


@contextmanager
def float64() -> Iterator[None]:
    """What is float32 otherwise is float64, for runs that are to differ by the order of sums alone.

    Another order changes float32's last digits, and ReLU and NMS make more of that within a step or two: a unit at its
    kink and a pair at the threshold fall on either side. In float64 none comes so near.
    """
    to_float32, default = Tensor.float, torch.get_default_dtype()
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        Tensor.float = to_float32  # type: ignore[method-assign]
        torch.set_default_dtype(default)


def train_part(data: Path) -> tuple[object, ...]:
    """The flags for a data folder's training split alone, so that nothing is evaluated."""
    paths = ("--train-images", data / "images", "--train-annotations", data / "annotations/instances_train.json")
    return (*paths, "--val-share", 0)


def make_eager(run: Path, folder: Path) -> Path:
    """A copy of a run's model that takes nearly nothing for background, so that it finds a lot: for comparisons."""
    detector = from_pretrained(run, weights="last")
    with torch.no_grad():
        if isinstance(detector, RetinaNet):
            detector.head.logits.bias += 4
        else:
            for head in detector.roi_head.box_heads:
                head.class_logits.bias[-1] -= 10
    save_model(folder, detector, [])
    return folder


def make_truth(data: Path, predictions: Path, folder: Path) -> Path:
    """A copy of `data` where some of the predictions are the objects of the validation images, so that AP is not 0."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").symlink_to(data / "images")
    content = read_json(data / "annotations/instances_val.json")
    fields = ("image_id", "category_id", "bbox", "segmentation")
    content["annotations"] = [
        {
            "id": number,
            "area": row["bbox"][2] * row["bbox"][3],
            "iscrowd": 0,
            **{name: row[name] for name in fields if name in row},
        }
        for number, row in enumerate(read_json(predictions)[::7], start=1)
    ]
    (folder / "annotations/instances_val.json").write_text(json.dumps(content))
    return folder


def pycocotools_figures(annotations: Path, predictions: Path, kind: str = "bbox") -> list[float]:
    """The twelve figures of two files, for boxes or masks ("segm")."""
    truth, rows = COCO(str(annotations)), read_json(predictions)
    if kind == "segm":  # beside a box, a mask's area would be the box's
        rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    scorer = COCOeval(truth, truth.loadRes(rows), kind)
    scorer.evaluate()
    scorer.accumulate()
    scorer.summarize()
    return scorer.stats.tolist()


def weights(folder: Path) -> dict[str, Tensor]:
    """Of a run's model, or of another model folder."""
    inner = folder / "model"
    return load_file((inner if inner.is_dir() else folder) / "model.safetensors")


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Over all tensors."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def read_metrics(path: Path) -> dict[str, Any]:
    """The figures in a metrics.json, without what it says about the split."""
    about = ("split", "data", "images", "unreadable_images", "weights")
    content = read_json(path)
    assert list(content)[-5:] == list(about)
    return {name: value for name, value in content.items() if name not in about}


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without timings."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS} for line in lines]


def steps_saved(run: Path) -> list[str]:
    """What stands in a run's checkpoints/, hidden entries too."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def launch_file(
    config: Path, script: Path, *arguments: object, options: Sequence[str] = (), prefix: Sequence[str] = (),
    **environment: object,
) -> subprocess.Popen[str]:  # fmt: skip
    """A script as a launcher's configuration says, in a group of its own.

    Args:
        config: the launcher's yaml file.
        script: of scripts/.
        arguments: the script's.
        options: more of the launcher's.
        prefix: a command that starts the command.
        environment: more variables.
    """
    command = [*prefix, sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *options]
    command += [str(script), *map(str, arguments)]
    variables = {**ENVIRONMENT, **{key: str(value) for key, value in environment.items()}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=variables, text=True, start_new_session=True, **pipes)


def launcher_file(name: str, folder: Path, **changes: object) -> Path:
    """A copy of a file of accelerate_configs/ for the CPU: at most two processes, on this machine, and no fp16."""
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    content.pop("gpu_ids", None)
    content |= {"num_machines": 1, "num_processes": min(2, content["num_processes"]), "main_process_port": 0}
    if content["mixed_precision"] == "fp16":
        content["mixed_precision"] = "no"
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def end_group(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a launcher and its workers, which have groups of their own."""
    for pid in [*workers(process), process.pid]:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    process.wait()


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The process ids of a launcher's workers, by their rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            variables = dict(
                entry.split("=", 1) for entry in folder.joinpath("environ").read_text().split("\0") if "=" in entry
            )
            if int(parent) == process.pid and "RANK" in variables:
                found[int(variables["RANK"])] = int(folder.name)
    return [pid for _, pid in sorted(found.items())]
