"""Check a data set before training: its figures, what is wrong with it, and what to change for it.

  python scripts/check_data.py --data DIR [--output-dir DIR] [--num-workers N]

Reads all annotations and decodes every image. Prints a report and writes it as report.json, with pictures: histograms
of objects, classes and images, and samples of each split with their annotations drawn. Exit status 2 if there are
errors, which training would refuse or skip.
"""

from direct_pt.program.run import run_program
from collections import Counter
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from direct_pt.data.problems import ERROR, NOTE, REPAIRED, Problem, Problems
from direct_pt.data.sources import SPLITS, DataOptions, load_tables
from direct_pt.errors import InputError, printable
from direct_pt.files import DamagedFile, check_inputs_kept, check_output, read_json, valid_unicode, write_json, writing
from direct_pt.flags import add_flags, any_path, make_parser, paths_of, read_flags, worker_count
from direct_pt.program.folder_lock import hold_folder, release_folder
from direct_pt.recipes import STAGES, recipe_name
from direct_pt.reports.data_report import picture_names, report_text, write_pictures
from direct_pt.reports.duplicates import LEAK, find_duplicates
from direct_pt.reports.image_check import check_images
from direct_pt.reports.survey import advice, anchor_figures, describe, nothing_to_learn
from direct_pt.training.plan import make_plan
from direct_pt.training.settings import ScheduleOptions

REPORT = "report.json"


def main() -> None:
    """Check a data set."""
    p = make_parser(__doc__ or "")
    add_flags(p, DataOptions, "data")
    text = "folder for report.json and the pictures (runs/check_data)"
    p.add_argument("--output-dir", type=any_path, default=Path("runs/check_data"), metavar="DIR", help=text)
    text = "processes that decode images (2)"
    p.add_argument("--num-workers", type=worker_count, default=2, metavar="N", help=text)
    args = p.parse_args()
    if args.streaming:
        raise InputError("--streaming: check_data reads all images: leave it out, or check a part of the data")

    folder: Path = args.output_dir
    check_output(folder)
    options = read_flags(args, DataOptions)
    problems = {split: Problems(collects=True) for split in SPLITS}
    tables = {split: table for split, table in load_tables(options, SPLITS, problems).items() if len(table)}
    paths = paths_of(options)
    check_inputs_kept([folder], [*paths, *(table.folder for table in tables.values() if table.encoded is None)])
    images = (table.path(row) for table in tables.values() if table.encoded is None for row in range(len(table)))
    check_inputs_kept([folder / name for name in (REPORT, *picture_names(tables))], chain(paths, images))
    if (folder / REPORT).exists() and not is_own(folder / REPORT):
        raise InputError(f"--output-dir {folder}: {folder / REPORT} was not made by check_data.py; name another place")
    with writing(f"--output-dir {folder}"):
        hold_folder(folder, "check_data")
    prints = check_images(tables, problems, args.num_workers) if tables else {}
    duplicates = find_duplicates(tables, prints, problems)
    leaks = [
        f"{count} image(s) occur in two splits ({kind}): the AP there is not that on new images; take them out of one"
        for kind, count in Counter(pair["kind"] for pair in duplicates if LEAK in pair["kind"]).items()
    ]
    train = tables.get("train")
    if train is None:
        missing = "there is no training split, or no image of it can be used"
        problems["train"].add(Problem(ERROR, "no training images", str(args.data or "--train-images"), missing))
    elif reason := nothing_to_learn(train):
        problems["train"].add(Problem(ERROR, "nothing to learn", train.source, reason))
    anchors = anchor_figures(train) if train else {}
    listed = [asdict(problem) | {"split": split} for split in problems for problem in problems[split].listed]
    report: dict[str, Any] = {
        "data": str(args.data or " ".join(table.source for table in tables.values())),
        "splits": {split: describe(table) for split, table in tables.items()},
        "counts": {grade: sum(row["grade"] == grade for row in listed) for grade in (ERROR, REPAIRED, NOTE)},
        "problems": listed,
        "duplicates": duplicates,
        "anchors": anchors,
        "schedules": schedules(len(train)) if train else {},
        "advice": leaks + advice(tables, anchors),
    }
    print(report_text(report))
    with writing(f"--output-dir {folder}"):
        report["pictures"] = write_pictures(tables, prints, folder) if tables else []
        write_json(folder / REPORT, valid_unicode(report))
    release_folder(folder, "check_data")
    print()
    print(printable(f"written to {folder}: {', '.join([REPORT, *report['pictures']])}"))
    errors = [problem for split in problems.values() for problem in split.listed if problem.grade == ERROR]
    if errors:
        place = printable(str(folder / REPORT))
        raise InputError(f"{len(errors)} error(s) in the data, all in {place}; first: {errors[0]}")


def is_own(path: Path) -> bool:
    """Whether an existing file is an earlier report."""
    try:
        report = read_json(path, most_bytes=2**34)
    except DamagedFile:
        return False
    return isinstance(report, dict) and {"splits", "problems"} <= report.keys()


def schedules(images: int) -> dict[str, Any]:
    """What the recipe's two stages will do with this number of training images."""
    found = {}
    for name, stage in STAGES.items():
        recipe = stage.recipe("faster_rcnn_r50_fpn", "sgd", recipe_name("auto", images))
        plan = make_plan(ScheduleOptions(), recipe, images, processes=1)
        found[name] = {
            "recipe": recipe.name, "steps": plan.total_steps, "images_per_step": plan.global_batch_size,
            "epochs": round(plan.epochs, 1), "lr": plan.lr, "warmup_steps": plan.warmup_steps,
            "notes": list(plan.notes),
        }  # fmt: skip
    return found


if __name__ == "__main__":
    run_program(main)
