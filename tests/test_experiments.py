"""Experiments as declared: folds, equal costs, what is refused, statistics, tables. See test_experiment_runs.py."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from small_runs import SCRIPTS, load_script

from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.errors import InputError
from small_sets.costs import Costs, cost_key
from small_sets.factorial import combinations, effects
from small_sets.folds import assign, fold_flags, same_group
from small_sets.plan import DataSet, Plan, RunId, read_plan
from small_sets.runs import Place, Row, append_result, read_results
from small_sets.statistics import bootstrap, paired, set_means, sign_flip
from small_sets.tables import MARKS, filled, table

DOCS = SCRIPTS.parent / "docs"
DECLARED = """
[flags]
pretrain = "--model m --image-size 160"
finetune = "--short-side 256"
[sets.one]
folds = 3
[sets.two]
group = 'clip\\d+'
[[experiments]]
name = "first"
question = "Does it pay?"
sets = ["one", "two"]
folds = [0, 2]
seeds = [0, 1]
[experiments.arms.direct]
pretrain = "--max-steps 100"
finetune = "--max-steps 30"
[experiments.arms.scratch]
equal_cost = "direct"
finetune = "--init none --max-steps {steps}"
"""


def declared(folder: Path, text: str = DECLARED) -> Plan:
    path = folder / "experiments.toml"
    path.write_text(text)
    return read_plan(path)


def test_the_runs_of_a_file(tmp_path: Path) -> None:
    """Every arm on every fold of every set with every seed; flags of all runs before an arm's own."""
    plan = declared(tmp_path)
    runs = plan.runs()
    expected = itertools.product((0, 1), (0, 2), ("one", "two"), ("direct", "scratch"))
    assert runs == [RunId("first", data, fold, seed, arm) for seed, fold, data, arm in expected]
    arm = plan.arm(runs[0])
    assert arm.stages["pretrain"] == ("--model", "m", "--image-size", "160", "--max-steps", "100")
    assert list(plan.arm(runs[1]).stages) == ["finetune"]
    assert plan.sets == {"one": DataSet("one", folds=3), "two": DataSet("two", group=r"clip\d+")}
    with pytest.raises(InputError, match="has no experiment other, only first"):
        plan.runs(["other"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "first"\n', "", "experiment ?: missing 1 required positional argument: 'name'"),
        ('sets = ["one", "two"]\n', "", "missing 1 required positional argument: 'sets'"),
        ('"two"]', '"three"]', "experiment first: names a set that is not declared: three"),
        ("folds = [0, 2]", "folds = [0, 5]", "experiment first: has fold 5, and one only 3, from 0"),
        ("folds = 3", "folds = 1", "sets.one: folds must be 2 or more"),
        ("folds = 3", "folds = '3'", "sets.one: folds must be of the kind of 5"),
        ("folds = 3", "near_bits = 300", "sets.one: near_bits must be from 0 to 256"),
        ("folds = 3", "fold = 3", "sets.one: has an unknown key fold; known are folder, folds, group, images"),
        ("seeds =", "seed =", "experiment first: has an unknown key seed"),
        ('equal_cost = "direct"', 'equal_cost = "other"', "arm scratch: equal_cost names no arm of this experiment"),
        ('equal_cost = "direct"\n', "", "arm scratch: equal_cost and {steps} in the flags belong together"),
        (
            'pretrain = "--max-steps 100"\n',
            "train = 'x'\n",
            "arm direct: has other keys than pretrain, finetune, peers",
        ),
        (
            '"--init none --max-steps {steps}"',
            '"{steps}"\npeers = "{seconds}"',
            "arm scratch: peers is a stage for itself",
        ),
        (
            'finetune = "--init none --max-steps {steps}"',
            'peers = "ultralytics"',
            "equal_cost and {seconds} in the flags",
        ),
        (
            '"--max-steps 30"',
            '"--init {pretrain@9} --max-steps 3"',
            "arm direct: {pretrain@N} needs a stage pretrain",
        ),
        ("[[experiments]]", "[[experiment]]", "experiments: declare some, as [[experiments]]"),
        ("[flags]", "[flags", "cannot be read as TOML"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in DECLARED
    with pytest.raises(InputError, match=re.escape(message)) as error:
        declared(tmp_path, DECLARED.replace(old, new, 1))
    assert str(error.value).startswith(str(tmp_path / "experiments.toml"))


def test_costs_of_another_machine_are_in_the_seconds_of_the_first(tmp_path: Path) -> None:
    """A known cost stays, and what is measured beside it on a machine twice as fast is doubled."""
    costs = Costs(tmp_path / "costs.json")
    costs.add({"direct": (14.0, 44.0)}, 10, 40)
    assert costs.stages == {"direct": (4.0, 1.0)}
    costs.add({"direct": (7.0, 22.0), "tiles": (11.0, 41.0)}, 10, 40)
    assert costs.stages == {"direct": (4.0, 1.0), "tiles": (2.0, 2.0)}
    with pytest.raises(InputError, match="tiles: 40 steps took no longer than 10: give larger --calibration-steps"):
        costs.add({"tiles": (11.0, 11.0)}, 10, 40)


def test_arms_of_equal_cost(tmp_path: Path) -> None:
    """The steps that are left for the arm, after what each process takes without any."""
    plan, costs = declared(tmp_path), Costs(tmp_path / "costs.json")
    direct, scratch = plan.arm_named("first", "direct"), plan.arm_named("first", "scratch")
    for arm, stage, pair in (
        (direct, "pretrain", (5.0, 0.5)), (direct, "finetune", (7.0, 2.0)), (scratch, "finetune", (6.0, 2.5)),
    ):  # fmt: skip
        costs.stages[cost_key("one", stage, arm.stages[stage])] = pair
    assert costs.of_arm("one", direct) == 5 + 50 + 7 + 60
    assert costs.equal_steps("one", direct, scratch) == round((122 - 6) / 2.5)
    costs.write()
    assert Costs.read(tmp_path / "costs.json").stages == costs.stages
    with pytest.raises(InputError, match="has no cost of two pretrain --model m --image-size 160: run calibrate"):
        costs.equal_steps("two", direct, scratch)
    (tmp_path / "costs.json").write_text("[1]")
    with pytest.raises(InputError, match=r"costs.json: cannot be read as costs"):
        Costs.read(tmp_path / "costs.json")


# Folds


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Eight scenes of three nearly equal frames, and four images of two clips by name, in COCO's layout."""
    rng, folder = np.random.default_rng(0), tmp_path / "root/two"
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    images, annotations = [], []
    names = [f"{scene}-{frame}.png" for scene in "abcdefgh" for frame in range(3)]
    names += [f"clip{number}-{frame}.png" for number in (1, 2) for frame in range(2)]
    for number, name in enumerate(names, start=1):
        seed = ord(name[0]) if not name.startswith("clip") else number
        scene = cv2.resize(np.random.default_rng(seed).integers(256, size=(15, 15, 3), dtype=np.uint8), (64, 48))
        scene = np.clip(scene.astype(int) + rng.integers(-2, 3, scene.shape), 0, 255).astype(np.uint8)
        Image.fromarray(scene).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "height": 48, "width": 64})
        outline = [[5.0, 5, 30, 5, 30, 30]] if number % 2 else {"size": [48, 64], "counts": [240, 20, 48 * 64 - 260]}
        annotations.append({"id": number, "image_id": number, "category_id": 1 + number % 2, "iscrowd": 0,
                            "bbox": [5, 0, 25, 30], "area": 300, "segmentation": outline})  # fmt: skip
    categories = [{"id": 1, "name": "odd"}, {"id": 2, "name": "even"}]
    for split, rows in (("train", slice(0, 20)), ("val", slice(20, None))):
        content = {"images": images[rows], "annotations": annotations[rows], "categories": categories}
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return folder


def test_folds_keep_what_belongs_together(clips: Path, tmp_path: Path) -> None:
    """Every image is held out once; copies and clips are in one fold; the annotations are the set's own."""
    data, held_out = DataSet("two", folds=4, group=r"clip\d+"), []
    for fold in range(4):
        flags = fold_flags(data, clips.parent, fold, tmp_path / "folds")
        values = (
            dict(itertools.batched(flags, 2))
            if hasattr(itertools, "batched")
            else dict(zip(*[iter(flags)] * 2, strict=True))
        )
        tables = load_tables(DataOptions(
            train_images=(Path(values["--train-images"]),), train_annotations=(Path(values["--train-annotations"]),),
            val_images=(Path(values["--val-images"]),), val_annotations=(Path(values["--val-annotations"]),),
        ))  # fmt: skip
        parts = {split: {tables[split].path(row).stem for row in range(len(tables[split]))} for split in tables}
        assert len(parts["train"] | parts["val"]) == 28 and not parts["train"] & parts["val"]
        assert {len({stem.split("-")[0] for stem in part}) for part in parts.values()}
        scenes = {split: {stem.split("-")[0] for stem in part} for split, part in parts.items()}
        assert not scenes["train"] & scenes["val"]
        held_out += sorted(parts["val"])
        assert all(part.segmentations.present().all() for part in tables.values())
    assert len(held_out) == len(set(held_out)) == 28


def test_fewer_images_to_train_on(clips: Path, tmp_path: Path) -> None:
    """A smaller choice is part of a larger one, and the validation images stay."""
    parts = []
    for images in (5, 10, 0):
        flags = fold_flags(DataSet(f"two_{images}", "two", images, 4), clips.parent, 1, tmp_path / "folds")
        train, val = (json.loads(Path(flags[place]).read_text()) for place in (3, 7))
        assert {one["image_id"] for one in train["annotations"]} == {image["id"] for image in train["images"]}
        parts.append(({image["file_name"] for image in train["images"]}, val))
    (few, val), (more, _), (all_of_them, _) = parts
    assert (len(few), len(more)) == (5, 10) and few < more < all_of_them
    assert all(part[1] == val for part in parts)
    with pytest.raises(InputError, match=r"set many: images 99, and a fold has \d+ to train on"):
        fold_flags(DataSet("many", "two", 99, 4), clips.parent, 1, tmp_path / "folds")


def test_the_set_as_yolo_has_it(clips: Path, tmp_path: Path) -> None:
    """For trainers that read that: the same boxes, by the rows of the images."""
    from small_sets.peers import write_yolo

    tables = load_tables(DataOptions(data=clips))
    for split, part in tables.items():
        write_yolo(part, tmp_path / "images" / split, tmp_path / "labels" / split)
    (tmp_path / "data.yaml").write_text("{path: ., train: images/train, val: images/val, names: [odd, even]}")
    again = load_tables(DataOptions(data=tmp_path))
    for split, part in tables.items():
        assert np.allclose(again[split].boxes, part.boxes) and (again[split].labels == part.labels).all()
        assert [Path(again[split].path(row)).resolve() for row in range(len(part))] == [
            Path(part.path(row)).resolve() for row in range(len(part))
        ]


def test_groups_that_cannot_be_divided(clips: Path, tmp_path: Path) -> None:
    tables = list(load_tables(DataOptions(data=clips)).values())
    names = [part.path(row).name for part in tables for row in range(len(part))]
    groups = same_group(tables, names, r"clip\d+")
    assert len(set(groups.tolist())) == 10
    with pytest.raises(InputError, match="28 images are in 10 groups that belong together: under 11 folds"):
        assign(groups, 11, names)
    with pytest.raises(InputError, match=r"set two: 28 images .* 11 folds; give it fewer folds, or a lower near_bits"):
        fold_flags(DataSet("two", folds=11, group=r"clip\d+"), clips.parent, 0, tmp_path / "folds")
    alone = same_group(tables, names, "", near_bits=0)
    assert len(set(alone.tolist())) > len(set(same_group(tables, names, "").tolist()))
    with pytest.raises(InputError, match="has no folder three"):
        fold_flags(DataSet("three"), clips.parent, 0, tmp_path / "folds")


# Results


def row(data: str, fold: int, seed: int, arm: str, ap: float) -> Row:
    return Row("first", data, fold, seed, arm, "800 / 480", 100.0, ap, ap + 0.2, ap, ap, "0.1", "{}", "abc", "v", "cpu")


ROWS = [
    row(data, fold, seed, arm, 0.4 + 0.1 * (data == "two") + 0.02 * fold + 0.01 * seed + 0.05 * (arm == "direct"))
    for data in ("one", "two") for fold in (0, 2) for seed in (0, 1) for arm in ("direct", "scratch")
]  # fmt: skip


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert read_results(path) == []
    for one in ROWS:
        append_result(path, one)
    assert read_results(path) == ROWS
    path.write_text(path.read_text().replace("0.45,", "much,", 1))
    with pytest.raises(InputError, match=r"results.csv: cannot be read as results"):
        read_results(path)


AGAIN = """
[[experiments]]
name = "again"
sets = ["one"]
[experiments.arms.same]
pretrain = "--max-steps 100"
finetune = "--max-steps 30"
[experiments.arms.longer]
pretrain = "--max-steps 200"
finetune = "--max-steps 30"
"""


def test_a_run_that_another_experiment_has_done_is_not_repeated(tmp_path: Path) -> None:
    """Where set, fold, seed and all flags are the same."""
    plan, results = declared(tmp_path, DECLARED + AGAIN), tmp_path / "results.csv"
    for one in ROWS:
        append_result(results, one)
    place = Place(tmp_path, tmp_path / "runs", Costs(tmp_path / "costs.json"))
    for _ in range(2):
        load_script("experiments").add_equal_runs(plan, plan.runs(["again"]), results, place)
    before, after = read_results(results)[: len(ROWS)], read_results(results)[len(ROWS) :]
    assert before == ROWS and after == [replace(ROWS[0], experiment="again", arm="same")]


# Several changes at once


@pytest.mark.parametrize(("factors", "arms"), [(2, 4), (4, 16), (5, 16), (8, 16)])
def test_no_two_factors_hide_one_another(factors: int, arms: int) -> None:
    """Each is on in half of the arms, in half of those with any other, and no pair of them goes with a third."""
    signs = 2 * np.array(combinations(factors), int) - 1
    assert signs.shape == (arms, factors) and len({tuple(row) for row in signs}) == arms
    assert (signs.T @ signs == arms * np.eye(factors)).all() and (signs.sum(axis=0) == 0).all()
    for one, other, third in itertools.permutations(range(factors), 3):
        assert (signs[:, one] * signs[:, other] * signs[:, third]).sum() == 0


def test_effects_are_found_again() -> None:
    levels = {str(number): one for number, one in enumerate(combinations(5))}
    true = {"one": (0.1, -0.05, 0, 0.02, 0), "two": (0.2, -0.05, 0, 0.04, 0.01)}
    noise = np.random.default_rng(1).normal(0, 0.004, (2, 16))
    values = {
        name: {
            arm: 0.4 + float(np.dot(on, changes)) + error for (arm, on), error in zip(levels.items(), own, strict=True)
        }
        for (name, changes), own in zip(true.items(), noise, strict=True)
    }
    found = effects(levels, values)
    for number, effect in enumerate(found):
        assert 0.001 < effect.error < 0.002  # twice 0.004 / the root of 32
        assert effect.by_set == pytest.approx({name: changes[number] for name, changes in true.items()}, abs=0.01)
        assert effect.mean == pytest.approx(np.mean([changes[number] for changes in true.values()]), abs=0.007)


FACTORS = """
[experiments.factors.jitter]
pretrain = "--scale-jitter 0.5 1.5"
[experiments.factors.cosine]
finetune = "--lr-schedule cosine"
"""


def test_arms_of_factors(tmp_path: Path) -> None:
    """All combinations, named by what is on; the table has a row a factor once all are done."""
    text = DECLARED[: DECLARED.index("[experiments.arms.scratch]")] + FACTORS
    plan = declared(tmp_path, text)
    (experiment,) = plan.experiments
    names = ["direct", "direct + cosine", "direct + jitter", "direct + jitter + cosine"]
    assert [arm.name for arm in experiment.arms] == names
    assert plan.arm_named("first", names[3]).stages == {
        "pretrain": ("--model", "m", "--image-size", "160", "--max-steps", "100", "--scale-jitter", "0.5", "1.5"),
        "finetune": ("--short-side", "256", "--max-steps", "30", "--lr-schedule", "cosine"),
    }
    no_costs = Costs(tmp_path / "costs.json")
    rows = [row("one", fold, seed, arm, 0.3 + 0.1 * ("jitter" in arm))
            for fold in (0, 2) for seed in (0, 1) for arm in names]  # fmt: skip
    assert table(experiment, rows[:3], no_costs) == "3 runs are done; each set needs all of its 4."
    rows.append(row("one", 0, 2, names[0], 0.9))  # with a seed that the others have not
    assert "| jitter | +0.100 | +0.100 ± 0.000 | +0 |" in table(experiment, rows, no_costs)
    assert "| cosine | +0.000 | +0.000 ± 0.000 | +0 |" in table(experiment, rows, no_costs)
    for old, new, message in (
        ('finetune = "--lr', 'train = "--lr', "experiment first, factor cosine: has other keys than"),
        ('pretrain = "--max-steps 100"\n', "", "experiment first, factor jitter: its arm has no stage pretrain"),
        (
            '[experiments.factors.jitter]\npretrain = "--scale-jitter 0.5 1.5"',
            "",
            "needs one arm without equal_cost, and 2",
        ),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            declared(tmp_path, text.replace(old, new))


@pytest.mark.parametrize(
    ("means", "p"),
    [([0.1, 0.2, 0.05, 0.01, 0.3, 0.1], 2 / 64), ([0.1, -0.1], 1.0), ([0.2], 1.0), ([3, 2, -1], 4 / 8)],
)
def test_sign_flips_by_hand(means: list[float], p: float) -> None:
    """The share of the 2**S sign patterns whose sum is at least as far from 0; of 3, 2 and -1: those of 4 and of 6."""
    assert sign_flip(np.array(means)) == pytest.approx(p)


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets, folds and seeds with known spreads; it may be a little short with six sets, as bootstraps are."""
    monkeypatch.setattr("small_sets.statistics.RESAMPLES", 1000)  # enough for forty intervals
    rng, hits = np.random.default_rng(1), 0
    for _ in range(40):
        found = {
            f"set {data}": {fold: (center + rng.normal(0, 0.01, 2)).tolist() for fold in range(2)}
            for data, center in enumerate(0.03 + rng.normal(0, 0.02, 8))
        }
        low, high = bootstrap(found)
        hits += low <= 0.03 <= high
        assert low < float(set_means(found).mean()) < high
    assert 31 <= hits <= 40


def test_only_the_same_images_and_seeds_are_compared() -> None:
    found = paired({("a", 0, 0): 0.5, ("a", 1, 0): 0.6, ("b", 0, 0): 0.1}, {("a", 0, 0): 0.4, ("b", 0, 1): 0.3})
    assert found == {"a": {0: [pytest.approx(0.1)]}}


def test_the_table_of_an_experiment(tmp_path: Path) -> None:
    (experiment,) = declared(tmp_path).experiments
    costs = Costs(tmp_path / "costs.json")
    assert "as calibrated" not in table(experiment, ROWS, costs)
    for data, (stage, flags) in itertools.product(experiment.sets, experiment.arms[0].stages.items()):
        costs.stages[cost_key(data, stage, flags)] = (5.0, 0.5)
    text = table(experiment, ROWS, costs)
    assert "| the same, as calibrated | 75 | 75 |" in text
    assert "| AP (AP50) | direct | scratch |" in text
    assert "| `one` | 0.475 ± 0.007 (0.675) | 0.425 ± 0.007 (0.625) |" in text
    ending = "+0.050 to +0.050 out of 8 runs of each, higher on 2 of 2 sets, p 0.500"
    assert f"direct against scratch: +0.050 AP, 95 % interval {ending}" in text
    assert "direct against scratch: +0.050 AP, by one run of each: no interval" in table(experiment, ROWS[:2], costs)
    assert table(experiment, [], costs) == "No run is done yet."
    document = f"a\n{MARKS[0].format(name='first')}\nold\n{MARKS[1]}\n{MARKS[0].format(name='other')}\nkept\n{MARKS[1]}"
    assert filled(document, {"first": "new"}) == document.replace("\nold\n", "\n\nnew\n\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--cores", "0,0"), "0,0: give each core once, of "),
        (("--cores", "99999"), "99999: give each core once, of "),
        (("--cores", "all"), "'all': give the numbers of cores, such as 0,1"),
        (("--calibration-steps", "40", "10"), "--calibration-steps 40 10: the second must be above the first"),
        (("--only", "other"), "has no experiment other, only first"),
        (("--document", "DOC"), "has no place for first: write the lines <!-- results of first --> and <!-- end -->"),
    ],
)
def test_arguments_that_are_refused(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    declared(tmp_path)
    (tmp_path / "DOC").write_text("no marks")
    given = [str(tmp_path / flag) if flag == "DOC" else flag for flag in flags]
    with pytest.raises(InputError, match=re.escape(message)):
        load_script("experiments").main(["report", "--file", str(tmp_path / "experiments.toml"), *given])
    assert (tmp_path / "DOC").read_text() == "no marks"


def test_a_plan_names_what_could_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sets that are not there and misspelt flags of an arm, before the first run; what is not calibrated is said."""
    model = "--model retinanet_r50_fpn"
    text = DECLARED.replace("--model m", model).replace("--init none", f"--init none {model}")
    wrong = "experiment first, arm scratch, finetune: .*; did you mean --init"
    file, plan = tmp_path / "experiments.toml", load_script("experiments").main
    given = ["plan", "--file", str(file), "--data-root", str(tmp_path)]
    (tmp_path / "one").mkdir()
    for content, message in (
        (text, "has no folder two"),
        (text.replace("--init none", "--inti none"), wrong),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            plan(given)
        (tmp_path / "two").mkdir(exist_ok=True)
    file.write_text(text)
    plan(given)
    assert "first: 16 runs, 0 done, not calibrated" in capsys.readouterr().out


def test_the_documents_tables_are_those_of_the_committed_results() -> None:
    plan, rows = read_plan(DOCS / "experiments.toml"), read_results(DOCS / "experiments.csv")
    costs = Costs.read(DOCS / "experiments.costs.json")
    text = (DOCS / "small_sets.md").read_text()
    for experiment in plan.experiments:
        assert MARKS[0].format(name=experiment.name) in text
    assert filled(text, {one.name: table(one, rows, costs) for one in plan.experiments}) == text
