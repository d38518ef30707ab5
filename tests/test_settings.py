"""From flags to the resolved numbers of a run, and the flags that are refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from direct_pt.errors import InputError
from direct_pt.models.detector import MODELS
from direct_pt.recipes import STAGES, paper_optimizer, recipe_name
from direct_pt.training.banner import recipe_text
from direct_pt.training.plan import Plan, make_plan
from direct_pt.training.resume import resumed_plan
from direct_pt.training.settings import FinetuneFlags, PretrainFlags, ScheduleOptions, parse_flags

COCO_IMAGES = 118_287
WITH_LAYERNORM = {"mask_rcnn_swin_t_fpn"}  # detectors whose own backbone normalises so
REQUIRED = {
    "pretrain": ["--model", "faster_rcnn_r50_fpn", "--output-dir", "run"],
    "finetune": ["--init", "pretrained", "--output-dir", "run"],
}


def parse_argv(stage: str, argv: list[str]) -> Any:
    return parse_flags({"pretrain": PretrainFlags, "finetune": FinetuneFlags}[stage], "", argv)


def parse(stage: str, *flags: object) -> Any:
    return parse_argv(stage, [*REQUIRED[stage], *map(str, flags)])


def schedule(*flags: object) -> ScheduleOptions:
    return parse("pretrain", *flags).schedule


def plan(
    stage: str, *flags: object, images: int = COCO_IMAGES, processes: int = 1, model: str = "faster_rcnn_r50_fpn"
) -> Plan:
    """Of a detector with its own backbone."""
    options = parse(stage, *flags).schedule
    recipe = STAGES[stage].recipe(model, paper_optimizer(model in WITH_LAYERNORM), recipe_name(options.recipe, images))
    return make_plan(options, recipe, images, processes)


# The plan


@pytest.mark.parametrize("processes", [1, 8])
@pytest.mark.parametrize("model", MODELS)
def test_the_papers_numbers_on_coco(model: str, processes: int) -> None:
    """The step counts are epochs x images / batch: 48 x 118287 / 64, and 12 x 118287 / 16."""
    lr = {"retinanet_r50_fpn": (0.04, 0.02), "mask_rcnn_swin_t_fpn": (4e-4, 1e-4)}.get(model, (0.08, 0.02))
    warmup = 1000 if model == "retinanet_r50_fpn" else 500
    expected = {
        "pretrain": (64, 8, 8 // processes, 88715, lr[0], warmup, 0.01, ()),
        "finetune": (16, 2, 8 // processes, 88715, lr[1], 500, 0.001, (59143, 81322)),
    }
    for stage, numbers in expected.items():
        p = plan(stage, model=model, processes=processes)
        found = (
            p.global_batch_size, p.micro_batch_size, p.accumulation, p.total_steps, p.lr, p.warmup_steps,
            p.warmup_factor, p.decay_steps,
        )  # fmt: skip
        assert found == numbers
        assert p.notes == () and p.processes == processes and p.images == COCO_IMAGES
        assert p.epochs == pytest.approx({"pretrain": 48, "finetune": 12}[stage], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_optimizers(stage: str) -> None:
    """AdamW wherever the backbone normalises with LayerNorm, whatever the detector; else SGD."""
    for model in MODELS:
        recipe = STAGES[stage].recipe(model, "adamw")
        assert (recipe.optimizer, recipe.weight_decay) == ("adamw", 0.05)
        assert recipe.lr == {"pretrain": 4e-4, "finetune": 1e-4}[stage]
        assert (recipe.warmup_steps, recipe.epochs) == (500, STAGES[stage].paper.epochs)
        recipe = STAGES[stage].recipe(model, "sgd")
        assert (recipe.optimizer, recipe.weight_decay) == ("sgd", 1e-4)


@pytest.mark.parametrize(("schedule", "times"), [("1x", 1), ("3x", 3), ("6x", 6)])
def test_longer_schedules(schedule: str, times: int) -> None:
    """More epochs; in stage 2 the learning rate falls at the same shares of the run (3x: after 24 and 33 of 36)."""
    steps = {"pretrain": 48 * times * COCO_IMAGES / 64, "finetune": 12 * times * COCO_IMAGES / 16}
    for stage, expected in steps.items():
        p = plan(stage, "--schedule", schedule)
        assert p.total_steps == round(expected) and p.epochs == pytest.approx(
            STAGES[stage].paper.epochs * times, rel=1e-4
        )
    decays = [8 * times * COCO_IMAGES / 16, 11 * times * COCO_IMAGES / 16]
    assert plan("finetune", "--schedule", schedule).decay_steps == pytest.approx(decays, abs=1)


@pytest.mark.parametrize(
    ("processes", "flags", "accumulation"),
    [
        (1, ("--global-batch-size", 8, "--micro-batch-size", 8), 1),
        (1, ("--global-batch-size", 8, "--micro-batch-size", 2), 4),
        (2, ("--global-batch-size", 8, "--micro-batch-size", 2), 2),
        (2, ("--global-batch-size", 8, "--micro-batch-size", 4), 1),
        (3, ("--global-batch-size", 12, "--micro-batch-size", 1), 4),
        (1, ("--batch-size", 4), 1),  # not the default micro-batches of 8, which do not divide it
        (1, ("--batch-size", 12), 2),
        (2, ("--batch-size", 12), 1),
    ],
)
def test_accumulation_keeps_the_global_batch(processes: int, flags: tuple[object, ...], accumulation: int) -> None:
    p = plan("pretrain", *flags, processes=processes)
    assert p.accumulation == accumulation
    assert p.accumulation * p.micro_batch_size * p.processes == p.global_batch_size == int(str(flags[1]))
    assert p.total_steps == round(48 * COCO_IMAGES / p.global_batch_size)  # of the optimizer, whatever the processes


@pytest.mark.parametrize(
    ("stage", "processes", "flags", "remedy"),
    [
        ("pretrain", 3, (), "use --global-batch-size 48 or 72"),
        ("pretrain", 1, ("--global-batch-size", 11), "use --global-batch-size 8 or 16, or --micro-batch-size 1 or 11"),
        ("pretrain", 1, ("--global-batch-size", 12, "--micro-batch-size", 5),
         "use --global-batch-size 10 or 15, or --micro-batch-size 4 or 6"),
        ("finetune", 2, ("--micro-batch-size", 3),
         "use --global-batch-size 12 or 18, or --micro-batch-size 2 or 4"),
        ("pretrain", 1, ("--global-batch-size", 64, "--micro-batch-size", 7),
         "use --global-batch-size 63 or 70, or --micro-batch-size 4 or 8"),
        ("finetune", 32, (), "use --global-batch-size 64"),
    ],
)  # fmt: skip
def test_batches_that_do_not_fit(stage: str, processes: int, flags: tuple[object, ...], remedy: str) -> None:
    with pytest.raises(InputError) as error:
        plan(stage, *flags, processes=processes)
    assert remedy in str(error.value) and f"on {processes} process(es)" in str(error.value)
    assert_one_line(error.value)
    # What the message offers works.
    for option in remedy.removeprefix("use ").split(", or "):
        flag, *choices = option.replace(" or ", " ").split()
        for choice in choices:
            assert plan(stage, *flags, flag, choice, processes=processes).accumulation >= 1


def test_lr_follows_the_batch() -> None:
    p = plan("pretrain", "--global-batch-size", 16)
    assert p.lr == pytest.approx(0.02)
    assert "lr 0.02 = 0.08 x 16 / 64" in p.notes
    assert plan("finetune", "--global-batch-size", 32).lr == pytest.approx(0.04)
    assert plan("pretrain", processes=2).lr == 0.08  # not the processes
    assert plan("pretrain", "--global-batch-size", 16, model="retinanet_r50_fpn").lr == pytest.approx(0.01)
    assert plan("finetune", "--global-batch-size", 4, model="mask_rcnn_swin_t_fpn").lr == pytest.approx(
        5e-5
    )  # its root
    p = plan("pretrain", "--global-batch-size", 16, "--lr", 0.5)
    assert p.lr == 0.5 and not any("lr" in note for note in p.notes)


@pytest.mark.parametrize("model", MODELS)
def test_the_small_recipe(model: str) -> None:
    """Below 5,000 images: in stage 1 batches of 8 at the paper's rate for 8; in stage 2 the paper's batch and rate, of
    which RetinaNet takes half; at least 32,000 (4,000) images seen."""
    lr = {"retinanet_r50_fpn": (0.005, 0.01), "mask_rcnn_swin_t_fpn": (4e-4 / 8**0.5, 1e-4)}.get(model, (0.01, 0.02))
    for stage, expected in (
        ("pretrain", (8, 8, 1, 4000, lr[0], 200, 0.01, ())),
        ("finetune", (16, 2, 8, 250, lr[1], 50, 0.001, (167, 229))),
    ):
        p = plan(stage, images=300, model=model)
        found = (
            p.global_batch_size, p.micro_batch_size, p.accumulation, p.total_steps, pytest.approx(p.lr),
            p.warmup_steps, p.warmup_factor, p.decay_steps,
        )  # fmt: skip
        assert found == expected
        assert plan(stage, images=4_999, model=model).warmup_steps == expected[5]
        assert plan(stage, "--recipe", "small", images=5_000, model=model).warmup_steps == expected[5]
        paper = plan(stage, images=5_000, model=model)
        assert paper.global_batch_size == STAGES[stage].paper.global_batch_size and paper.notes == ()
        # Which is the paper's to the last number, whatever the size of the set.
        paper = plan(stage, "--recipe", "paper", images=300, model=model)
        assert paper.lr == plan(stage, model=model).lr and paper.warmup_steps == plan(stage, model=model).warmup_steps
        assert paper.total_steps == round(STAGES[stage].paper.epochs * 300 / STAGES[stage].paper.global_batch_size)


@pytest.mark.parametrize(
    ("stage", "batches"),
    [
        ("pretrain", {1: (8, 8), 2: (8, 4), 3: (12, 4), 4: (16, 4), 8: (32, 4), 16: (64, 4)}),
        ("finetune", {1: (16, 2), 2: (16, 2), 3: (18, 2), 4: (16, 2), 8: (16, 2), 16: (16, 1)}),
    ],
)
def test_the_small_batch_on_many_processes(stage: str, batches: dict[int, tuple[int, int]]) -> None:
    """It divides, and leaves each process as many images as BatchNorm needs; the rate and the length follow."""
    for processes, (batch, micro) in batches.items():
        p = plan(stage, images=300, processes=processes)
        assert (p.global_batch_size, p.micro_batch_size) == (batch, micro)
        alone = batches[1][0]
        assert p.lr == pytest.approx({"pretrain": 0.01, "finetune": 0.02}[stage] * batch / alone)
        seen = {"pretrain": 32_000, "finetune": 4_000}[stage]
        assert p.total_steps * batch == pytest.approx(seen, abs=batch)
        assert batch == alone or any(f"x {batch} / {alone}" in note for note in p.notes)


def test_the_banner_names_the_numbers() -> None:
    """Of the small recipe beside the paper's; of the paper's where flags replace some."""
    paper = STAGES["pretrain"].recipe("faster_rcnn_r50_fpn", "sgd")
    small = STAGES["pretrain"].recipe("faster_rcnn_r50_fpn", "sgd", "small")
    text = recipe_text(small, paper, plan("pretrain", images=300), is_given=False)
    assert text == (
        "small (under 5,000 training images): batch 8, lr 0.01, warm-up 200 steps; the paper's (--recipe paper): 64, "
        "0.08, 500"
    )
    assert recipe_text(paper, paper, plan("pretrain"), is_given=False) == "the paper's"
    changed = plan("pretrain", "--global-batch-size", 32, "--lr", 0.01, "--warmup-steps", 50)
    text = recipe_text(paper, paper, changed, is_given=True)
    assert text == "the paper's (--recipe paper), with batch 32, lr 0.01, warm-up 50 steps"


def test_floor_of_the_small_recipe() -> None:
    p = plan("pretrain", images=300)
    assert "48 epochs of 300 images are 1800 steps: raised to 4000 steps" in p.notes
    assert plan("pretrain", "--global-batch-size", 16, images=300).total_steps == 2000
    assert plan("pretrain", "--schedule", "3x", images=300).total_steps == 12_000
    assert plan("pretrain", "--schedule", "6x", images=300).total_steps == 24_000
    assert plan("finetune", "--schedule", "3x", images=4_000).total_steps == 9_000  # 36 x 4000 / 16: above it
    # Who names a length gets it.
    assert plan("pretrain", "--epochs", 10, "--global-batch-size", 16, images=300).total_steps == 188
    assert plan("pretrain", "--epochs", 0.001, images=300).total_steps == 1
    assert plan("pretrain", "--max-steps", 3, images=300).total_steps == 3


def test_largest_seed() -> None:
    """What the libraries' generators take."""
    assert parse("pretrain", "--seed", 2**32 - 1).run.seed == 2**32 - 1
    with pytest.raises(InputError, match="--seed: 4294967296 must be at most 4294967295"):
        parse("pretrain", "--seed", 2**32)
    with pytest.raises(InputError, match="--lr: inf must be a finite number"):
        parse("pretrain", "--lr", "inf")


def test_warmup() -> None:
    """Never cut short: the rate that is reached after fewer steps makes the loss diverge."""
    assert plan("pretrain", "--max-steps", 5000).warmup_steps == 500
    assert plan("pretrain", "--max-steps", 5000, model="retinanet_r50_fpn").warmup_steps == 1000
    p = plan("pretrain", "--max-steps", 200)
    assert p.warmup_steps == 500 and "the warm-up of 500 steps is longer than the run: lr stays below 0.08" in p.notes
    assert p.learning_rate(199) == pytest.approx(0.0324, abs=1e-3)
    p = plan("pretrain", "--max-steps", 1000, "--warmup-steps", 300)
    assert p.warmup_steps == 300 and not any("warm-up" in note for note in p.notes)
    assert plan("pretrain", "--max-steps", 10, "--warmup-steps", 0).learning_rate(0) == 0.08


def test_a_resumed_run_keeps_its_plan() -> None:
    """As one begun before there was a small recipe, on fewer images: its batch, length, rate and schedule."""
    before = plan("pretrain", "--recipe", "paper", "--schedule", "3x", images=300)
    resumed = resumed_plan(before, schedule(), 290, 2)
    assert replace(resumed, images=300, processes=1, accumulation=8) == replace(before, notes=())
    assert (resumed.images, resumed.processes, resumed.micro_batch_size, resumed.accumulation) == (290, 2, 8, 4)
    changed = resumed_plan(before, schedule("--lr", 0.5, "--warmup-steps", 7), 300, 1)
    assert (changed.lr, changed.warmup_steps) == (0.5, 7)
    longer = resumed_plan(before, schedule("--warmup-steps", 9999), 300, 1)
    assert longer.notes == ("the warm-up of 9999 steps is longer than the run: lr stays below 0.08",)
    assert resumed_plan(before, schedule("--micro-batch-size", 16), 300, 1).micro_batch_size == 16
    # Micro-batches that do not fit as many processes shrink.
    assert resumed_plan(before, schedule(), 300, 16).micro_batch_size == 4
    small = plan("pretrain", images=300)
    assert resumed_plan(small, schedule(), 300, 4).micro_batch_size == 2
    for flags, processes, message in (
        ((), 3, "the run's batch of 8 does not divide over 3 processes; start 1, 2, 4 or 8"),
        (("--micro-batch-size", 3), 1, "does not divide so on 1 process(es); use 1, 2, 4 or 8"),
        (("--micro-batch-size", 8), 2, "use 1, 2 or 4"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            resumed_plan(small, schedule(*flags), 300, processes)


def test_evaluation_interval() -> None:
    assert plan("pretrain", "--max-steps", 1200).eval_steps == 100  # a twelfth
    assert plan("pretrain", "--max-steps", 5).eval_steps == 1
    assert plan("pretrain", "--recipe", "paper", "--eval-every", 2, images=640).eval_steps == 20
    assert plan("pretrain", "--recipe", "paper", "--eval-every", 0.001, images=640).eval_steps == 1


def test_learning_rate_by_hand() -> None:
    p = plan("pretrain")
    assert p.learning_rate(0) == pytest.approx(0.0008)  # a hundredth
    assert p.learning_rate(250) == pytest.approx(0.0404)  # half-way from 0.0008 to 0.08
    assert p.learning_rate(499) == pytest.approx(0.0798416)
    assert p.learning_rate(500) == p.learning_rate(p.total_steps - 1) == 0.08
    p = plan("finetune", "--max-steps", 12_000)
    assert p.learning_rate(0) == pytest.approx(0.00002)  # a thousandth
    assert p.learning_rate(250) == pytest.approx(0.01001)
    assert p.learning_rate(7_999) == 0.02
    assert p.learning_rate(8_000) == p.learning_rate(10_999) == pytest.approx(0.002)
    assert p.learning_rate(11_000) == p.learning_rate(11_999) == pytest.approx(0.0002)


# Flags


def test_defaults_are_complete() -> None:
    for stage in STAGES:
        flags = parse(stage)
        assert flags.stage is STAGES[stage] and flags.run.output_dir == Path("run") and not flags.run.resume
    assert parse("pretrain").images.image_size == 448
    assert (parse("finetune").images.short_side, parse("finetune").images.long_side) == (800, 1333)
    assert parse("finetune").detector.init == "pretrained"


def test_what_init_means(tmp_path: Path) -> None:
    """A word, a file, or else a run: one that is not there is looked for on the hub."""
    weights = tmp_path / "weights.pth"
    weights.touch()
    model = ("--model", "mask_rcnn_r50_fpn")
    for given, kind in (
        ("none", "none"), ("imagenet", "imagenet"), (weights, "file"), (tmp_path, "run"), (tmp_path / "absent", "run"),
    ):  # fmt: skip
        flags = parse("finetune", "--init", given, *model)
        assert (flags.detector.init, flags.detector.init_kind) == (str(given), kind)
        assert flags.to_dict()["init"] == str(given)


@pytest.mark.parametrize("stage", STAGES)
def test_config_gives_the_same_settings_again(stage: str, tmp_path: Path) -> None:
    sizes = ("--image-size", 96) if stage == "pretrain" else ("--short-side", 96, "--long-side", 128)
    flags = parse(
        stage, "--data", "data/demo", "--drop-empty", "--norm", "group", "--box-head", "2fc", "--channels", 32,
        "--rois-per-image", 16, "--proposals", 64, *sizes, "--max-steps", 7, "--global-batch-size", 8,
        "--micro-batch-size", 4, "--lr", 0.003, "--warmup-steps", 2, "--mixed-precision", "no", "--seed", 5,
        "--num-workers", 0, "--eval-every", 1.5, "--save-every", 3, "--keep-checkpoints", 4, "--log-every", 6,
        "--report-to", "tensorboard",
    )  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"settings": flags.to_dict(), "plan": {}, "git": "x"}))
    assert parse_argv(stage, ["--config", str(config)]) == flags
    # A flag beside it wins, and resuming is not inherited.
    again = parse_argv(stage, ["--config", str(config), "--lr", "0.1", "--output-dir", "other", "--resume"])
    assert again == flags.changed({"lr": 0.1, "output_dir": Path("other"), "resume": True})
    resumed = {**flags.to_dict(), "resume": True}
    config.write_text(json.dumps({"settings": resumed}))
    assert not parse_argv(stage, ["--config", str(config)]).run.resume


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--epochs", "5"), (None, 5.0, "1x")),
        (("--schedule", "3x"), (None, None, "3x")),
        (("--max-steps", "9"), (9, None, "1x")),
    ],
)
def test_a_length_beside_config_wins(flags: tuple[str, ...], expected: tuple[object, ...], tmp_path: Path) -> None:
    for saved in (("--max-steps", 3), ("--epochs", 2), ("--schedule", "1x")):
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"settings": parse("pretrain", *saved).to_dict()}))
        options = parse_argv("pretrain", ["--config", str(config), *flags]).schedule
        assert (options.max_steps, options.epochs, options.schedule) == expected


def test_bad_config(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    cases = {
        "": "cannot be read as a run's config.json",
        "[1]": "cannot be read as a run's config.json",
        '{"detector": {}}': "cannot be read as a run's config.json",
        '{"settings": {"stage": "finetune"}}': "of the other stage",
        '{"settings": {"stage": "pretrain", "learning_rate": 1}}': "unknown settings: learning_rate",
        '{"settings": {"streaming": "yes"}}': "streaming is 'yes': write true or false",
        '{"settings": {"data": {"a": 1}}}': "data is {'a': 1}: write one value, or a list of values",
        '{"settings": {"classes": [""]}}': "names no class: give some, such as person,car",
    }
    for content, message in cases.items():
        config.write_text(content)
        with pytest.raises(InputError, match=message) as error:
            parse("pretrain", "--config", config)
        assert str(config) in str(error.value)
        assert_one_line(error.value)
    config.write_text(json.dumps({"settings": {"train_images": ["-x"], "train_annotations": ["a", "-b"]}}))
    data = parse("pretrain", "--config", config).data
    assert (data.train_images, data.train_annotations) == ((Path("-x"),), (Path("a"), Path("-b")))
    with pytest.raises(InputError, match=r"absent\.json: cannot be read"):
        parse("pretrain", "--config", tmp_path / "absent.json")


CLASS_NAMES = ("cat, big", " dog ", '"quoted"', '6" pipe', "a,b", "plain", "it's")


def test_every_class_can_be_named(tmp_path: Path) -> None:
    """Also on the way through a run's config.json."""
    text = """ "cat, big" ," dog ",\"\"\"quoted\"\"\",6" pipe,"a,b", plain ,it's,plain,"""
    options = parse("pretrain", "--classes", text)
    assert options.data.classes == CLASS_NAMES
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"settings": options.to_dict()}))
    assert parse("pretrain", "--config", config).data.classes == CLASS_NAMES
    for wrong in ('"cat', 'dog,"cat, big', '"cat" dog', ",", '""'):
        with pytest.raises(InputError, match=r"has a quote that does not end|names no class"):
            parse("pretrain", "--classes", wrong)


def assert_one_line(error: BaseException) -> None:
    assert str(error).strip() and "\n" not in str(error)


COUNTS = ("channels", "rois-per-image", "proposals", "max-steps", "global-batch-size", "micro-batch-size", "save-every",
          "keep-checkpoints", "log-every")  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        *((f"--{name}", ("0", "-1", "x", "1.5", "")) for name in COUNTS),
        *((f"--{name}", (str(10**10), "1" + 400 * "0")) for name in COUNTS),
        *((f"--{name}", ("-1", "x", "0.5", str(10**10))) for name in ("seed", "num-workers", "warmup-steps")),
        ("--lr", ("0", "-0.1", "nan", "inf", "x")),
        *((f"--{name}", ("0", "-0.1", "nan", "inf", "1e308", "x")) for name in ("epochs", "eval-every")),
        ("--norm", ("layer",)),
        ("--box-head", ("4conv", "")),
        ("--schedule", ("2x", "12x")),
        ("--mixed-precision", ("fp64",)),
        ("--report-to", ("mlfow", "")),
        ("--device", ("gpu", "0,1", "cuda:x", "mps", "", "-1")),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_bad_values(stage: str, flag: str, values: tuple[str, ...]) -> None:
    for value in values:
        with pytest.raises(InputError, match=flag) as error:
            parse(stage, f"{flag}={value}")
        assert_one_line(error.value)


@pytest.mark.parametrize(
    ("stage", "argv", "message"),
    [
        ("pretrain", ["--output-dir", "run"], f"--model is missing: one of {', '.join(MODELS)}"),
        ("pretrain", ["--output-dir", "run", "--model", "yolo"],
         f"--model yolo: no such detector; choose one of {', '.join(MODELS)}"),
        ("pretrain", [*REQUIRED["pretrain"], "--image-size", "100"], "100 is no multiple of 32: use 96 or 128"),
        ("pretrain", [*REQUIRED["pretrain"], "--image-size", "20"], "--image-size 20 .*: use 32"),
        ("pretrain", [*REQUIRED["pretrain"], "--short-side", "800"], "--short-side"),
        ("pretrain", [*REQUIRED["pretrain"], "--batch", "8"], "--batch"),
        ("pretrain", [*REQUIRED["pretrain"], "stray"], "stray"),
        ("pretrain", [*REQUIRED["pretrain"], "--lr"], "--lr.*expected one argument"),
        ("pretrain", [*REQUIRED["pretrain"], "--warmup-steps", "x"], "--warmup-steps: 'x' is not a whole number"),
        ("pretrain", [*REQUIRED["pretrain"], "--max-steps", "1.5"], "--max-steps: '1.5' is not a whole number"),
        ("pretrain", [*REQUIRED["pretrain"], "--lr", "fast"], "--lr: 'fast' is not a number"),
        ("pretrain", [*REQUIRED["pretrain"], "--val-share", "half"], "--val-share: 'half' is not a number"),
        ("pretrain", [*REQUIRED["pretrain"], "--epochs", "1", "--max-steps", "1"], "not allowed with"),
        ("finetune", ["--output-dir", "run"], "--init is missing: the pre-trained run .* none, imagenet or a file"),
        ("finetune", ["--output-dir", "run", "--init", "none"], "--model is missing"),
        ("finetune", ["--output-dir", "run", "--init", "imagenet"], "--model is missing"),
        ("finetune", ["--output-dir", "run", "--init", __file__], "--model is missing"),
        ("finetune", ["--output-dir", "run", "--init", "imagenet", "--norm", "group", "--model", "faster_rcnn_r50_fpn"],
         "--norm group with --init imagenet: such weights are trained with their own norms"),
        ("finetune", ["--output-dir", "run", "--init", __file__, "--norm", "group", "--model", "retinanet_r50_fpn"],
         "--norm group with --init .*test_settings.py: such weights"),
        ("finetune", [*REQUIRED["finetune"], "--short-side", "90", "--long-side", "80"], "--short-side 90 is above"),
        ("finetune", [*REQUIRED["finetune"], "--image-size", "64"], "--image-size"),
        ("finetune", [*REQUIRED["finetune"], "--model", "yolo"], "--model yolo: .*faster_rcnn_r50_fpn"),
    ],
)  # fmt: skip
def test_refused_command_lines(stage: str, argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_argv(stage, argv)
    assert_one_line(error.value)
