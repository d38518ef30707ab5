"""The same model from the same flags however a batch is split into processes and micro-batches, and the same metrics
however images are split over processes."""

import json
from pathlib import Path

import pytest
import small_runs as runs

pytestmark = runs.cpu_only

VAL_IMAGES = 71  # neither 2 nor 3 divides them
# Processes, images at once, accumulated micro-batches: a global batch of 64.
SPREADS = ((1, 8, 8), (2, 4, 8), (2, 8, 4))
STEPS = 2
FLAGS = (
    *runs.TINY, "--norm", "group", "--global-batch-size", 64, "--max-steps", STEPS, "--image-size", 64,
    "--warmup-steps", 0, "--log-every", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def spread(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run for each of SPREADS, without BatchNorm, in float64 (see `runs.float64`)."""
    found = []
    for processes, images, accumulated in SPREADS:
        run = tmp_path_factory.mktemp("spread") / "run"
        flags = (*runs.train_part(demo), *FLAGS, "--micro-batch-size", images, "--output-dir", run)
        script = Path(__file__).with_name("spread.py")
        process = runs.start(script, *flags) if processes == 1 else runs.launch(processes, script, *flags)
        stdout, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr[-3000:]
        assert (
            f"64 images a step = {processes} process(es) x {images} micro-batch x {accumulated} accumulated" in stdout
        )
        found.append(run)
    return found


def test_weights_do_not_depend_on_how_the_batch_is_spread(spread: list[Path]) -> None:
    first, *others = spread
    for (processes, images, accumulated), run in zip(SPREADS[1:], others, strict=True):
        difference = runs.largest_difference(runs.weights(first), runs.weights(run))
        print(f"1x8x8 and {processes}x{images}x{accumulated}, {STEPS} steps in float64: {difference:.1e}")
        assert difference < 1e-12
        for record, other in zip(runs.records(first), runs.records(run), strict=True):
            assert record["losses"] == pytest.approx(other["losses"], rel=1e-9)


def test_ap_does_not_depend_on_the_number_of_processes(pretrained: Path, tmp_path: Path) -> None:
    """Each image counts once."""
    data = tmp_path / "data"
    numbers = ("--train-images", 1, "--val-images", VAL_IMAGES, "--image-size", runs.FILE_SIZE, "--output-dir", data)
    runs.load_script("make_demo_data").main([str(value) for value in numbers])
    eager = runs.make_eager(pretrained, tmp_path / "eager")
    found = []
    for processes in (1, 2, 3):
        output = tmp_path / str(processes)
        flags = ("--checkpoint", eager, "--data", data, "--output-dir", output, *runs.MACHINE)
        if processes == 1:  # some of its detections become the ground truth for all
            runs.call_script("evaluate", *flags)
            truth = runs.make_truth(data, output / "predictions.json", tmp_path / "truth")
            flags = tuple(truth if flag == data else flag for flag in flags)
            runs.call_script("evaluate", *flags)
            data = truth
        else:
            process = runs.launch(processes, runs.SCRIPTS / "evaluate.py", *flags)
            _, stderr = process.communicate(timeout=600)
            assert process.returncode == 0, stderr[-3000:]
        found.append([json.loads((output / name).read_text()) for name in ("metrics.json", "predictions.json")])
    metrics, predictions = found[0]
    assert len({row["image_id"] for row in predictions}) == VAL_IMAGES and metrics["bbox"]["AP"] > 0.05
    print(f"{VAL_IMAGES} images: AP {metrics['bbox']['AP']:.6f} with 1, 2 and 3 processes")
    assert found[1] == found[0] and found[2] == found[0]
