"""Where programs write: never over what they read, never through a link, and refused before the work if impossible."""

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as runs
from PIL import Image
from small_detectors import small_detector

from direct_pt.checkpoint import save_model
from direct_pt.errors import InputError
from direct_pt.files import check_inputs_kept, check_output, replacing, write_json
from direct_pt.images.decoding import UnreadableImage, read_image
from direct_pt.training.resume import check_inputs
from direct_pt.training.settings import FinetuneFlags, PretrainFlags, parse_flags

NOWHERE = Path("/proc/direct_pt")  # where even root cannot write
LONG = "x" * 300


def refusal(script: str, *flags: object) -> str:
    """The one line that a program ends with."""
    with pytest.raises(InputError) as error:
        if script in ("pretrain", "finetune"):
            runs.train(script, *flags)
        elif script == "make_demo_data":
            runs.load_script(script).main(list(map(str, flags)))
        else:
            runs.call_script(script, *flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Of every file under a folder, and where its links lead."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    return {name: str(path.readlink()) if path.is_symlink() else path.read_bytes() for name, path in paths.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo's classes, untrained, that finds something everywhere."""
    folder = tmp_path_factory.mktemp("untrained")
    save_model(folder / "model", small_detector(), [])
    return folder


@pytest.fixture
def photos(demo: Path, tmp_path: Path) -> Path:
    """A folder of images, one of them in a subfolder."""
    first, second, third = sorted((demo / "images").glob("val_*.jpg"))[:3]
    (tmp_path / "photos/more").mkdir(parents=True)
    shutil.copy(first, tmp_path / "photos/a.jpg")
    shutil.copy(second, tmp_path / "photos/more/b.jpg")
    Image.open(third).save(tmp_path / "photos/c.png")
    return tmp_path / "photos"


def predict(model: Path, *flags: object) -> tuple[object, ...]:
    return ("predict", *flags, "--checkpoint", model, *runs.MACHINE)


# predict.py


def test_pictures_in_place_of_the_photographs(model: Path, photos: Path) -> None:
    """By the folder, under another name of it, and by files: a.jpg over itself, c.jpg over what lies beside c.png."""
    shutil.copy(photos / "a.jpg", photos / "c.jpg")
    (photos.parent / "alias").symlink_to(photos)
    before = contents(photos)
    for inputs, output in (
        ([photos], photos),
        ([photos], photos.parent / "alias"),
        ([photos.parent / "alias"], photos / "more/.."),
        ([photos / "a.jpg"], photos),
        ([photos / "c.png", photos / "c.jpg"], photos),
        ([photos / "more"], photos / "more"),
    ):
        message = refusal(*predict(model, *inputs, "--output-dir", output))
        assert "--output-dir: " in message and "read" in message and "name another place" in message
        assert contents(photos) == before


def test_files_that_predict_did_not_make(model: Path, photos: Path, tmp_path: Path) -> None:
    """A photo that is not predicted, and a file of results by another program; its own results it replaces."""
    shutil.copy(photos / "more/b.jpg", photos / "more/a.jpg")
    before = contents(photos)
    message = refusal(*predict(model, photos / "more/a.jpg", "--output-dir", photos))
    assert f"{photos / 'a.jpg'} was not made by predict.py; name another place" in message
    assert contents(photos) == before
    output = tmp_path / "output"
    for _ in range(2):
        runs.call_script(*predict(model, photos, "--output-dir", output))
    (output / "predictions.json").write_text('[{"image_id": 1, "score": 0.5}]')
    assert "predictions.json was not made by predict.py" in refusal(*predict(model, photos, "--output-dir", output))


def test_links_in_the_output_folder(model: Path, photos: Path) -> None:
    """To an image they are refused; to anything else they are replaced, and what they lead to stays."""
    output = photos.parent / "pictures"
    output.mkdir()
    before = contents(photos)
    for make in (output.joinpath("a.jpg").symlink_to, output.joinpath("a.jpg").hardlink_to):
        make(photos / "more/b.jpg")
        message = refusal(*predict(model, photos, "--output-dir", output))
        assert f"{output / 'a.jpg'} is the same as {photos / 'more/b.jpg'}, which is read" in message
        (output / "a.jpg").unlink()

    precious = photos.parent / "precious.txt"
    precious.write_text("mine")
    for name in ("a.jpg", "predictions.json", ".a.jpg.partial", ".predictions.json.partial"):
        (output / name).symlink_to(precious)
    runs.call_script(*predict(model, photos, "--output-dir", output))
    assert precious.read_text() == "mine" and contents(photos) == before
    assert sorted(contents(output)) == ["a.jpg", "c.jpg", "more/b.jpg", "predictions.json"]
    assert not any(path.is_symlink() for path in output.rglob("*"))

    shutil.rmtree(output / "more")
    (photos.parent / "elsewhere").mkdir()
    (output / "more").symlink_to(photos.parent / "elsewhere")
    assert f"{output / 'more'} is a link to another folder" in refusal(*predict(model, photos, "--output-dir", output))
    assert not contents(photos.parent / "elsewhere")


def test_the_output_folder_is_not_searched(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run finds what the first one found, and says what it left out."""
    output = photos / "pictures"
    found = []
    for _ in range(2):
        runs.call_script(*predict(model, photos, "--output-dir", output))
        found.append(contents(output))
        printed = capsys.readouterr().out
    assert found[0] == found[1] and sorted(found[0]) == ["a.jpg", "c.jpg", "more/b.jpg", "predictions.json"]
    assert f"not searched, as it is --output-dir: {output} (3 image files)" in printed
    # The folder of the images in the output folder is searched.
    runs.call_script(*predict(model, photos, "--output-dir", photos.parent))
    assert (photos.parent / "a.jpg").is_file()


def test_names_that_differ_by_case_alone(model: Path, photos: Path) -> None:
    """Where case does not count, one picture would take the place of another."""
    shutil.copy(photos / "a.jpg", photos / "A.PNG")
    runs.call_script(*predict(model, photos, "--output-dir", photos.parent / "pictures"))
    names = [name.casefold() for name in contents(photos.parent / "pictures")]
    assert len(set(names)) == len(names) == 5


def test_a_long_name_gets_its_picture(model: Path, photos: Path) -> None:
    """Cut so far that there is room for the endings of all kinds of results."""
    (photos / "a.jpg").rename(photos / ("ü" * 125 + "a.jpg"))
    runs.call_script(*predict(model, photos, "--output-dir", photos.parent / "pictures"))
    assert (photos.parent / "pictures" / ("ü" * 119 + ".jpg")).is_file()


def test_reasons_of_unreadable_files(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = photos / "torn.png"
    torn.write_bytes((photos / "c.png").read_bytes()[:2000])
    with pytest.raises(UnreadableImage) as error:
        read_image(torn)
    runs.call_script(*predict(model, photos, "--output-dir", photos.parent / "pictures"))
    printed = capsys.readouterr().out
    assert f"unreadable, skipped: {error.value}" in printed and "3 images, 1 unreadable" in printed

    for name in ("empty.jpg", "other.jpg", "third.jpg"):
        (photos / name).touch()
    files = (torn, *(photos / name for name in ("empty.jpg", "other.jpg", "third.jpg")))
    message = refusal(*predict(model, *files, "--output-dir", photos.parent / "more"))
    assert message.startswith(f"none of the 4 files could be read as an image: {error.value} | {photos / 'empty.jpg'}")
    assert "is empty" in message and message.endswith(" | ...") and "third" not in message


# evaluate.py, check_data.py, and the two stages


def test_evaluation_over_the_annotations(model: Path, demo: Path, tmp_path: Path) -> None:
    annotations = tmp_path / "found/predictions.json"
    annotations.parent.mkdir()
    shutil.copy(demo / "annotations/instances_val.json", annotations)
    before = contents(tmp_path)
    data = ("--val-images", demo / "images", "--val-annotations", annotations)
    flags = ("--checkpoint", model, *data, *runs.MACHINE, "--output-dir", annotations.parent)
    assert f"{annotations} is read too" in refusal("evaluate", *flags)
    (tmp_path / "link.json").hardlink_to(annotations)
    data = ("--val-images", demo / "images", "--val-annotations", tmp_path / "link.json")
    flags = ("--checkpoint", model, *data, *runs.MACHINE, "--output-dir", annotations.parent)
    assert f"{annotations} is the same as {tmp_path / 'link.json'}" in refusal("evaluate", *flags)
    assert contents(tmp_path) == {**before, "link.json": before["found/predictions.json"]}


KINDS = (("metrics", "json"), ("predictions", "json"), ("report", "json"), ("report", "html"))


def test_metrics_of_other_splits_stand_beside_those_of_val(demo: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_detector(), [])
    for split in ("val", "train"):
        runs.call_script("evaluate", "--checkpoint", tmp_path, "--data", demo, "--split", split, *runs.MACHINE)
    files = {f"{name}{split}.{kind}" for split in ("", "_train") for name, kind in KINDS}
    assert {path.name for path in tmp_path.iterdir()} == files | {"model"}
    for name, split, count in (("", "val", runs.VAL_IMAGES), ("_train", "train", runs.TRAIN_IMAGES)):
        metrics = runs.read_json(tmp_path / f"metrics{name}.json")
        source = str(demo / f"annotations/instances_{split}.json")
        about = {"split": split, "data": source, "images": count, "unreadable_images": 0}
        about["weights"] = str(tmp_path / "model")
        assert {key: metrics[key] for key in about} == about and set(metrics) == {"bbox", "per_class", *about}
        images = {row["image_id"] for row in runs.read_json(tmp_path / f"predictions{name}.json")}
        assert images == set(range(1, count + 1))


def test_evaluation_of_unreadable_images(
    model: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An AP of 0 would say something about the detector: nothing is written."""
    shutil.copytree(demo, tmp_path / "data")
    for photo in (tmp_path / "data/images").glob("val_*"):
        photo.write_bytes(photo.read_bytes()[:300])
    flags = ("--checkpoint", model, "--data", tmp_path / "data", *runs.MACHINE, "--output-dir", tmp_path / "found")
    message = refusal("evaluate", *flags)
    assert message.startswith(f"none of the {runs.VAL_IMAGES} images could be read: {tmp_path / 'data/images/val_'}")
    assert message.endswith("| ...") and "cannot be read as an image" in message
    assert capsys.readouterr().out.count("unreadable image, no detections: ") == runs.VAL_IMAGES
    assert not list((tmp_path / "found").glob("*.json"))


def test_data_check_over_the_images(demo: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo, data)
    before = contents(data)
    for output in (data, data / "images"):
        assert "is read too" in refusal("check_data", "--data", data, "--output-dir", output, "--num-workers", 0)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/samples_val.jpg").symlink_to(min((data / "images").iterdir()))
    message = refusal("check_data", "--data", data, "--output-dir", tmp_path / "report", "--num-workers", 0)
    assert "samples_val.jpg is the same as" in message
    assert contents(data) == before


def test_report_of_another_program(demo: Path, tmp_path: Path) -> None:
    for content in ("{}", "no JSON"):
        (tmp_path / "report.json").write_text(content)
        flags = ("--data", demo, "--output-dir", tmp_path, "--num-workers", 0)
        assert "report.json was not made by check_data.py" in refusal("check_data", *flags)
        assert (tmp_path / "report.json").read_text() == content


def test_runs_over_their_data_or_initial_weights(demo: Path, model: Path, tmp_path: Path) -> None:
    """Only a new run is checked: one that began before may resume."""
    imported = tmp_path / "imported"
    shutil.copytree(model, imported)
    before, alias = contents(imported), tmp_path / "alias"
    alias.symlink_to(imported)
    for init, output in (
        (imported, imported),
        (alias, imported),
        (imported / "model", imported),
        (imported / "model/model.safetensors", alias),
    ):
        flags = ("--model", runs.MODEL, *runs.FINETUNE, "--data", demo, "--init", init, "--output-dir", output)
        assert "is read" in refusal("finetune", *flags)
    assert contents(imported) == before
    flags = (*runs.PRETRAIN, "--output-dir", demo)
    assert f"--output-dir: {demo} is read too" in refusal("pretrain", "--data", demo, *flags)
    assert "is read too" in refusal("pretrain", *runs.train_part(demo), *runs.PRETRAIN, "--output-dir", demo / "images")

    def flags_of(kind: type[Any], *flags: object) -> Any:
        return parse_flags(kind, "", list(map(str, flags)))

    inside = ("--init", tmp_path / "second/first/model", "--output-dir", tmp_path / "second")
    save_model(tmp_path / "second/first/model", small_detector(), [])
    check_inputs(flags_of(FinetuneFlags, "--data", demo, *inside))
    check_inputs(flags_of(PretrainFlags, "--data", demo, "--model", runs.MODEL, "--output-dir", demo / "run"))


def test_a_new_run_over_a_model(demo: Path, model: Path, tmp_path: Path) -> None:
    """A folder with the model of a run that is not there: copied, imported, or a link to one that training reads."""
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/best").symlink_to(model / "model")
    shutil.copytree(model, tmp_path / "copied")
    before = contents(tmp_path)
    flags = ("--data", demo, "--model", runs.MODEL)
    for script, folder, more in (
        ("pretrain", "copied", runs.PRETRAIN),
        ("finetune", "copied", (*runs.FINETUNE, "--init", "none")),
        ("finetune", "linked", (*runs.FINETUNE, "--init", model)),
        ("finetune", "linked", (*runs.FINETUNE, "--init", "none")),
    ):
        message = refusal(script, *flags, *more, "--output-dir", tmp_path / folder)
        assert "choose another folder" in message or "is read" in message
        assert contents(tmp_path) == before


# What cannot be written


def test_refused_before_the_work(demo: Path, model: Path, tmp_path: Path) -> None:
    """Whatever else is wrong: nothing has been read yet."""
    absent = tmp_path / "absent"
    for script, flags in {
        "pretrain": (*runs.PRETRAIN, "--data", absent),
        "finetune": (*runs.FINETUNE, "--data", absent, "--init", absent),
        "evaluate": ("--checkpoint", absent, "--data", absent),
        "predict": (absent, "--checkpoint", absent),
        "check_data": ("--data", absent),
        "import_mmdet": (absent, "--model", runs.MODEL),
        "make_demo_data": ("--train-images", 3),
    }.items():
        message = refusal(script, *flags, "--output-dir", NOWHERE)
        assert message.startswith(f"--output-dir {NOWHERE}: cannot be written (") and "name another place" in message
        file = tmp_path / "file"
        file.write_text("mine")
        assert refusal(script, *flags, "--output-dir", file) == f"--output-dir {file}: is a file"
        message = refusal(script, *flags, "--output-dir", file / "run")
        assert message.startswith(f"--output-dir {file / 'run'}: cannot be written (Not a directory")
        message = refusal(script, *flags, "--output-dir", tmp_path / LONG)
        assert message.startswith("argument --output-dir: ") and message.endswith("File name too long (see --help)")
        with runs.limited(resource.RLIMIT_FSIZE, 100):
            message = refusal(script, *flags, "--output-dir", tmp_path / "full")
        assert message.startswith(f"--output-dir {tmp_path / 'full'}: cannot be written (File too large)")
    assert refusal("import_mmdet", model, "--export", NOWHERE / "a.pth").startswith(f"--export {NOWHERE}: cannot be")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("pretrain", "--data"), ("pretrain", "--config"), ("pretrain", "--cache-dir"), ("finetune", "--init"),
        ("finetune", "--train-annotations"), ("evaluate", "--checkpoint"), ("evaluate", "--data"),
        ("predict", "--checkpoint"), ("predict", "IMAGE_OR_FOLDER"), ("check_data", "--val-images"),
        ("import_mmdet", "CHECKPOINT|RUN"), ("import_mmdet", "--categories"), ("import_mmdet", "--export"),
    ],
)  # fmt: skip
def test_paths_that_no_file_can_have(script: str, flag: str, tmp_path: Path) -> None:
    """A name too long, a null character, a loop of links, nothing at all: one line that names the flag."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, reason in (
        (tmp_path / LONG, "File name too long"),
        ("a\0b", "null"),
        (tmp_path / "loop/a", "Too many levels of symbolic links"),
        ("", "is empty: name a file or folder"),
    ):
        message = refusal(script, *((flag, path) if flag.startswith("-") else (path,)))
        assert message.startswith(f"argument {flag}: ") and reason in message and len(message) < 250


def test_metrics_are_printed_before_the_disk_fails(
    model: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--checkpoint", model, "--data", demo, *runs.MACHINE, "--output-dir", tmp_path)
    with runs.limited(resource.RLIMIT_FSIZE, 5000):
        message = refusal("evaluate", *flags)
    assert message.startswith(f"--output-dir {tmp_path}: cannot be written (File too large: ")
    assert "predictions.json" in message and "AP 0.0" in capsys.readouterr().out
    assert sorted(contents(tmp_path)) == ["metrics.json"]


def test_pictures_on_a_full_disk(model: Path, photos: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(256, size=(300, 300, 3), dtype=np.uint8)).save(photos / "d.png")
    with runs.limited(resource.RLIMIT_FSIZE, 30_000):
        message = refusal(*predict(model, photos / "d.png", "--output-dir", tmp_path / "pictures"))
    assert message.startswith(f"--output-dir {tmp_path / 'pictures'}: cannot be written (") and "d.jpg" in message
    assert contents(tmp_path / "pictures") == {}


def test_checkpoints_on_a_full_disk(model: Path, tmp_path: Path) -> None:
    """torch's writer raises a RuntimeError there."""
    with runs.limited(resource.RLIMIT_FSIZE, 100_000):
        message = refusal("import_mmdet", model, "--export", tmp_path / "file.pth")
    assert message.startswith(f"--export {tmp_path / 'file.pth'}: cannot be written (")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_several_processes_end_at_once(model: Path, demo: Path) -> None:
    """The main one alone looks at the folder; the others do not wait for it."""
    flags = ("--checkpoint", model, "--data", demo, *runs.MACHINE, "--output-dir", NOWHERE)
    process = runs.launch(2, runs.SCRIPTS / "evaluate.py", *flags)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        runs.end_group(process)
    assert process.returncode == 1
    assert errors.count(f"error: --output-dir {NOWHERE}: cannot be written") == 2


# The parts


def test_replacing_is_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_json(file, [1])
    with pytest.raises(KeyError), replacing(file) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert contents(tmp_path) == {"file.json": b"[\n  1\n]\n"}
    with pytest.raises(OSError, match="encoder error: "), replacing(file) as temporary:
        raise OSError("encoder error")
    (tmp_path / "other").symlink_to(file)
    write_json(tmp_path / "other", [2])
    assert not (tmp_path / "other").is_symlink() and runs.read_json(file) == [1]


def test_identity_of_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    check_inputs_kept([two, tmp_path / "three"], [one, two])  # two does not exist
    two.write_text("2")
    check_inputs_kept([two], [one, tmp_path / LONG])
    (tmp_path / "link").symlink_to(two)
    with pytest.raises(InputError, match=r"^--there: .*two is the same as .*link, which is read"):
        check_inputs_kept([two], [one, tmp_path / "link"], "--there")


def test_nothing_is_created_to_look(tmp_path: Path) -> None:
    check_output(tmp_path / "a/b/c")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="cannot be written"):
        check_output(tmp_path / "dangling")
    assert os.listdir(tmp_path) == ["dangling"]  # noqa: PTH208
