"""Runs that end early (no higher AP, the time is up), and runs that are made longer."""

import signal
from pathlib import Path

import pytest
import small_runs as runs
from safetensors.torch import load_file

from direct_pt.errors import InputError
from direct_pt.recipes import FINETUNE, PRETRAIN
from direct_pt.training.plan import make_plan
from direct_pt.training.resume import longer_plan
from direct_pt.training.settings import FinetuneFlags, PretrainFlags, parse_flags

pytestmark = runs.cpu_only

SMALL = (*runs.TINY, *runs.EIGHT, "--norm", "group", "--log-every", 1, "--save-every", 2)
# Three epochs are nine steps; at this rate the AP never changes.
STALE = (*SMALL, "--lr", "1e-12", "--max-steps", 9, "--eval-every", "0.34")


STAGE_TWO = ("--data", "d", "--init", "i", "--output-dir", "o", "--warmup-steps", "9")


def pretrain(run: Path, demo: Path, *flags: object) -> None:
    runs.train("pretrain", "--data", demo, *flags, "--output-dir", run)


def assert_same_state(run: Path, other: Path, step: int) -> None:
    """Weights, optimizer and model, to the bit."""
    for name in ("model", "optimizer"):
        one, two = (load_file(folder / f"checkpoints/step-{step}/{name}.safetensors") for folder in (run, other))
        assert runs.largest_difference(one, two) == 0
    assert runs.largest_difference(runs.weights(run), runs.weights(other)) == 0


def evaluated(run: Path) -> list[int]:
    return [record["step"] for record in runs.records(run) if "bbox" in record]


def test_patience(demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It ends after so many evaluations without a higher AP, and goes on with more patience as if it never had."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    pretrain(whole, demo, *STALE)
    assert evaluated(whole) == list(range(1, 10))
    capfd.readouterr()
    pretrain(run, demo, *STALE, "--patience", 3)
    assert evaluated(run) == [1, 2, 3, 4] and runs.steps_saved(run)[-1] == "step-4"
    ap = runs.records(run)[-1]["bbox"]["AP"]
    out = capfd.readouterr().out
    why = f"no AP of the last 3 evaluations was higher than before (--patience); the best is {ap:.3f}, of step 1"
    assert f"done: {run / 'model'}; stopped at step 4 of 9, as {why}" in out
    assert runs.read_json(run / "model/config.json")["history"][-1]["steps"] == 4

    before = runs.records(run)
    pretrain(run, demo, *STALE, "--patience", 3, "--resume")  # it has ended
    assert runs.records(run) == before and "stopped at step 4 of 9" in capfd.readouterr().out
    pretrain(run, demo, *STALE, "--patience", 5, "--resume")
    assert evaluated(run) == [1, 2, 3, 4, 5, 6]
    pretrain(run, demo, *STALE, "--resume")
    assert_same_state(run, whole, 9)
    assert runs.records(run) == runs.records(whole)


def test_patience_after_a_kill(demo: Path, tmp_path: Path) -> None:
    """It counts the evaluations before the kill too, and none twice."""
    run = tmp_path / "run"
    flags = ("--data", demo, *STALE, "--patience", 5, "--output-dir", run)
    process = runs.start_script("pretrain", *flags, OMP_NUM_THREADS=1)
    while not (run / "metrics.jsonl").exists() or len(evaluated(run)) < 3:
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    pretrain(run, demo, *STALE, "--patience", 5, "--resume")
    assert evaluated(run) == [1, 2, 3, 4, 5, 6]


def test_in_two_processes(demo: Path, tmp_path: Path) -> None:
    """All of them end at the same evaluation; the time limit ends them with status 0, to be resumed."""
    run = tmp_path / "run"
    flags = ("--data", demo, *STALE, "--micro-batch-size", 4, "--output-dir", run)
    process = runs.launch(2, runs.SCRIPTS / "pretrain.py", *flags, "--max-hours", "1e-9")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "--max-hours: the state of step" in err, out + err
    first = runs.steps_saved(run)[-1]
    assert first in ("step-1", "step-2")
    process = runs.launch(2, runs.SCRIPTS / "pretrain.py", *flags, "--patience", 3, "--resume")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "stopped at step 4 of 9" in out, out + err
    assert evaluated(run) == [1, 2, 3, 4]


def test_time_is_up(demo: Path, tmp_path: Path) -> None:
    """Saved, status 0; resumed, it ends as if it had not been stopped."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = (*SMALL, "--max-steps", 6, "--eval-every", 2)
    pretrain(whole, demo, *flags)
    limited = ("--data", demo, *flags, "--output-dir", run, "--max-hours", "1e-9")
    process = runs.start_script("pretrain", *limited)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "stopped: --max-hours: the state of step 1 is saved; continue with --resume" in err
    pretrain(run, demo, *flags, "--resume")
    assert_same_state(run, whole, 6)
    assert runs.records(run) == runs.records(whole)


def test_a_signal_after_the_time(demo: Path, tmp_path: Path) -> None:
    """The first of the two counts, whichever it is."""
    from direct_pt.program.signals import ECHO_SECONDS, TIME_IS_UP, StopSignals

    signals = StopSignals()
    signals._handle(signal.SIGTERM, None)
    signals._time -= 2 * ECHO_SECONDS
    signals._handle(TIME_IS_UP, None)  # does not end the program
    assert signals.number == signal.SIGTERM


@pytest.mark.parametrize("longer", [("--max-steps", 6), ("--epochs", 2)], ids=str)
def test_made_longer(demo: Path, tmp_path: Path, longer: tuple[object, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """A finished stage 1 ends as a run does that was as long from the start."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    pretrain(whole, demo, *SMALL, "--max-steps", 6, "--eval-every", 1)
    pretrain(run, demo, *SMALL, "--max-steps", 3, "--eval-every", 1)
    capfd.readouterr()
    pretrain(run, demo, *SMALL, *longer, "--eval-every", 1, "--resume")
    assert "made longer: 3 steps before" in capfd.readouterr().out
    assert_same_state(run, whole, 6)
    assert runs.records(run) == runs.records(whole)
    assert runs.read_json(run / "config.json")["plan"]["total_steps"] == 6


def test_stage_two_made_longer(pretrained: Path, demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What that does to the rate is said."""
    flags = ("--data", demo, "--init", pretrained, *runs.FINETUNE, *runs.EIGHT, "--output-dir", tmp_path / "run")
    runs.train("finetune", *flags, "--max-steps", 4, *runs.NO_EVALUATION)
    capfd.readouterr()
    runs.train("finetune", *flags, "--max-steps", 8, *runs.NO_EVALUATION, "--resume")
    out = capfd.readouterr().out
    assert "lr goes up again, from 0.0002 to 0.002, as the longer schedule has it at step 4" in out
    assert runs.steps_saved(tmp_path / "run")[-1] == "step-8"


def test_not_made_shorter(pretrained: Path, demo: Path, tmp_path: Path) -> None:
    """Nor as long as the default says, where the flag was only left out."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(pretrained, run)
    flags = ("--data", demo, *runs.PRETRAIN, *runs.EIGHT, "--eval-every", "0.67", "--log-every", 1, "--resume")
    with pytest.raises(InputError, match="the run has 4 steps, and 3 are fewer; give the same, or more"):
        pretrain(run, demo, *flags, "--max-steps", 3)
    with pytest.raises(InputError, match=r"--max-steps is its default but the run in .* was started with 4; give"):
        pretrain(run, demo, *flags)
    assert runs.read_json(run / "config.json")["plan"]["total_steps"] == 4


def test_longer_plans() -> None:
    """Decays and evaluations are those of the longer run; the rest stays."""
    flags = parse_flags(FinetuneFlags, "", [*STAGE_TWO, "--max-steps", "200"])
    recipe = FINETUNE.recipe(runs.MODEL, "sgd", "paper")
    plan = make_plan(parse_flags(FinetuneFlags, "", [*STAGE_TWO, "--max-steps", "100"]).schedule, recipe, 1000, 1)
    longer = longer_plan(plan, flags.schedule, recipe, 100)
    fresh = make_plan(flags.schedule, recipe, 1000, 1)
    assert (longer.decay_steps, longer.eval_steps, longer.total_steps) == (fresh.decay_steps, fresh.eval_steps, 200)
    assert any("lr goes up again" in note for note in longer.notes)
    first = parse_flags(PretrainFlags, "", ["--data", "d", "--model", runs.MODEL, "--output-dir", "o", "--epochs", "2"])
    plan = make_plan(first.schedule, recipe := PRETRAIN.recipe(runs.MODEL, "sgd", "small"), 1000, 1)
    again = longer_plan(plan, first.schedule, recipe, plan.total_steps)
    assert again == plan


def test_impossible(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--min-delta says how much --patience waits for"):
        pretrain(tmp_path / "run", demo, *SMALL, "--min-delta", "0.01")
    with pytest.raises(
        InputError, match="--patience waits for a higher AP, and there is no validation split with objects"
    ):
        runs.train("pretrain", *runs.train_part(demo), *SMALL, "--patience", 2, "--output-dir", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step(demo: Path, tmp_path: Path, number: signal.Signals) -> None:
    """From the banner on it is heeded: while the page's first pictures are drawn, too."""
    flags = ("--data", demo, *SMALL, "--max-steps", 6, "--output-dir", tmp_path / "run")
    process = runs.start_script("pretrain", *flags)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Direct-PT pretrain")
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143 and f"{number.name}: the state of step 1 is saved" in err


def test_evaluations_may_be_more_or_fewer(demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A resumed run looks as often as it is told now, and trains as if it always had."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    pretrain(whole, demo, *SMALL, "--max-steps", 4, "--eval-every", 100)
    pretrain(whole, demo, *SMALL, "--max-steps", 8, "--eval-every", 100, "--resume")
    pretrain(run, demo, *SMALL, "--max-steps", 4, "--eval-every", 100)
    capfd.readouterr()
    pretrain(run, demo, *SMALL, "--max-steps", 8, "--eval-every", "0.67", "--resume")
    assert "resumed with --eval-every 0.67, before 100.0" in capfd.readouterr().out
    assert (evaluated(whole), evaluated(run)) == ([4, 8], [4, 6, 8])
    assert_same_state(run, whole, 8)
