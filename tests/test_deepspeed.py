"""DeepSpeed's ZeRO in two real processes on the CPU (gloo, bf16): what it trains is what plain processes train, its
model folder is like any other, and its runs go on anywhere."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_runs as runs
import torch
from safetensors.torch import load_file

from direct_pt.checkpoint import from_pretrained, read_history

pytestmark = runs.cpu_only

CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
# Accumulated, without BatchNorm: it sees micro-batches, and its rounding grows.
STEPS = (
    "--norm", "group", "--global-batch-size", 8, "--micro-batch-size", 2, "--max-steps", 3, "--save-every", 2,
    "--warmup-steps", 0, "--log-every", 1, *runs.NO_EVALUATION,
)  # fmt: skip
BF16 = ("--mixed-precision", "bf16")
ZERO = {"faster_rcnn_r50_fpn": 3, "mask_rcnn_r50_fpn": 2}  # the stage that each trains with: what is shared out
GOES_ON = {"faster_rcnn_r50_fpn": (2, 1), "mask_rcnn_r50_fpn": (3, 2)}  # stage and processes after plain ones
# Between equal runs of DDP and ZeRO in bf16: after a step of size lr x gradient, 0.002 x 10 at the most.
ALIKE = 2e-3


def flags(demo: Path, run: Path, model: str, *more: object) -> tuple[object, ...]:
    return ("--data", demo, *runs.TINY, *STEPS, *BF16, "--model", model, "--output-dir", run, *more)


def deepspeed(stage: int, processes: int, *flags: object, script: str = "pretrain") -> str:
    """A stage under DeepSpeed, as `accelerate_configs/` has it; what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(CONFIGS / f"deepspeed_zero{stage}.yaml"), "--num_processes", str(processes)]
    command += [str(runs.SCRIPTS / f"{script}.py"), *map(str, flags)]
    done = subprocess.run(command, env=runs.ENVIRONMENT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def plain(processes: int, *flags: object) -> str:
    """Stage 1 without DeepSpeed."""
    process = runs.launch(processes, runs.SCRIPTS / "pretrain.py", *flags)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr[-5000:]
    return stdout


@pytest.fixture(scope="module", params=ZERO)
def ddp(request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A detector, and its run in two plain processes."""
    run = tmp_path_factory.mktemp("ddp") / "run"
    plain(2, *flags(demo, run, request.param))
    return request.param, run


def without_last(run: Path, folder: Path) -> Path:
    """A copy of a run as it is when it dies after step 2 of 3."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("step-3", "model", "best"))
    return folder


def test_trains_as_plain_processes_do(ddp: tuple[str, Path], demo: Path, tmp_path: Path) -> None:
    model, reference = ddp
    stage, run = ZERO[model], tmp_path / "run"
    text = deepspeed(stage, 2, *flags(demo, run, model))
    assert "8 images a step = 2 process(es) x 2 micro-batch x 2 accumulated" in text and "precision bf16" in text
    difference = runs.largest_difference(runs.weights(run), runs.weights(reference))
    start = {"rel": 2e-3, "abs": 1e-3}
    assert runs.records(run)[0]["losses"] == pytest.approx(runs.records(reference)[0]["losses"], **start)
    print(f"ZeRO {stage}, {model}: largest difference {difference:.1e}")
    assert difference < ALIKE

    # The same files, whole and in float32; the model is one that every script reads.
    for name in ("model", "optimizer"):
        mine, theirs = (load_file(r / f"checkpoints/step-2/{name}.safetensors") for r in (run, reference))
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        assert all(value.dtype in (torch.float32, torch.int64) for value in mine.values())
    assert read_history(run)[-1]["steps"] == 3
    found = from_pretrained(run).predict([np.zeros((64, 64, 3), np.uint8)], score_threshold=0.05)[0]
    assert found["boxes"].shape[1] == 4

    # It goes on without DeepSpeed, in one process, as it went on itself.
    copy = without_last(run, tmp_path / "copy")
    runs.train("pretrain", *flags(demo, copy, model, "--resume"))
    difference = runs.largest_difference(runs.weights(copy), runs.weights(run))
    print(f"ZeRO {stage}, {model}, resumed in one plain process: largest difference {difference:.1e}")
    assert difference < ALIKE


def test_goes_on_from_plain_processes(ddp: tuple[str, Path], demo: Path, tmp_path: Path) -> None:
    """The momentum too: without it the last step would be another. Also with another number of processes."""
    model, reference = ddp
    stage, processes = GOES_ON[model]
    copy = without_last(reference, tmp_path / "copy")
    text = deepspeed(stage, processes, *flags(demo, copy, model, "--resume"))
    assert "from step 2" in text
    assert ("resumed on 1 process(es) with 2 images at once, before 2 with 2" in text) == (processes == 1)
    difference = runs.largest_difference(runs.weights(copy), runs.weights(reference))
    last_step = runs.largest_difference(
        load_file(reference / "checkpoints/step-2/model.safetensors"), runs.weights(reference)
    )
    print(f"ZeRO {stage} x {processes}: largest difference {difference:.1e}, of the step itself {last_step:.1e}")
    assert difference < 0.05 * last_step


@pytest.mark.parametrize("stage", [2, 3])
def test_stage_two_with_options(stage: int, pretrained: Path, demo: Path, tmp_path: Path) -> None:
    """Fine-tuning with frozen layers, gradient clipping and a moving average, interrupted and taken up again."""
    run, copy = tmp_path / "run", tmp_path / "copy"
    length = ("--global-batch-size", 4, "--micro-batch-size", 2, "--max-steps", 3, "--save-every", 2, "--log-every", 1)
    options = ("--clip-grad-norm", 1.0, "--ema", 0.9, "--lr-schedule", "cosine", *runs.NO_EVALUATION)
    all_flags = ("--data", demo, *runs.FINETUNE, *length, *options, *BF16, "--init", pretrained)
    deepspeed(stage, 2, *all_flags, "--output-dir", run, script="finetune")
    before, average = runs.weights(pretrained), runs.weights(run)
    raw = load_file(run / "checkpoints/step-3/model.safetensors")
    stem = "backbone.network.conv1.weight"
    assert torch.equal(before[stem], raw[stem]) and torch.equal(before[stem], average[stem])
    head = "roi_head.box_heads.0.class_logits.weight"
    assert 0 < (raw[head] - before[head]).norm() < 0.05  # three updates of a norm of 1, momentum 0.9, lr 0.002
    assert not torch.equal(raw[head], average[head])
    saved = load_file(run / "checkpoints/step-3/average.safetensors")
    assert runs.largest_difference(saved, average) == 0

    if stage == 3:  # the other one resumes above
        without_last(run, copy)
        deepspeed(stage, 2, *all_flags, "--output-dir", copy, "--resume", script="finetune")
        difference = runs.largest_difference(runs.weights(copy), average)
        print(f"ZeRO {stage}, resumed: largest difference {difference:.1e}")
        assert difference < 1e-5
