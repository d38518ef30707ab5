"""Names of files and classes at the limits, on terminals of any encoding; pictures larger than JPEG allows."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_runs as runs
from label_trees import save_image, write
from PIL import Image
from small_detectors import small_detector

from direct_pt.checkpoint import save_model
from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.errors import InputError
from direct_pt.files import MAX_NAME_BYTES, replacing, shortened, unfinished, valid_unicode
from direct_pt.images.visualize import MAX_JPEG_SIDE, contact_sheet
from direct_pt.prediction.inputs import LONGEST_ENDING

LONG = "ü" * 125 + "a"  # 251 bytes
NO_UTF8 = os.fsdecode(b"caf\xe9")
NAMES = (LONG, "a\nb", "\x1b[31mred", NO_UTF8, "$x_{$", "a. b ", "\u202egpj", "%00", "-q", "a\\b")
CLASSES = ["\x1b[31mred\nerror: none", "$\\frac$ 図é", "plain"]


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """A set with an image of each name, and odd classes."""
    folder = tmp_path / "set"
    write(folder / "data.yaml", f"names: {json.dumps(CLASSES)}\ntrain: images\nval: images\n")
    for number, name in enumerate(NAMES):
        save_image(folder / f"images/{name}.jpg")
        write(folder / f"labels/{name}.txt", f"{number % 3} .5 .5 .5 .5\n")
    return folder


def is_shown(name: str, printed: str) -> None:
    """Whether a text has the name, and nothing that a terminal would obey."""
    assert name in printed
    assert not set(printed) & {"\x1b", "\u202e", "\udce9"}, printed


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", small_detector(), [])
    return tmp_path / "model"


def test_every_image_has_its_labels(yolo: Path) -> None:
    table = load_tables(DataOptions(data=yolo))["train"]
    assert len(table) == len(NAMES) and np.diff(table.starts).tolist() == [1] * len(NAMES)
    for row in range(len(table)):
        assert table.read_image(row).shape == (32, 64, 3)


def test_check_data(yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each image is named as it is, on one line; the report is valid Unicode."""
    for path in (yolo / "images").iterdir():
        path.write_bytes(b"")
    output = tmp_path / "report\x1b[2J\n"
    with pytest.raises(InputError) as error:
        runs.call_script("check_data", "--data", yolo, "--output-dir", output, "--num-workers", 0)
    captured = capsys.readouterr()
    is_shown("report\\x1b[2J\\n", captured.out)
    text = (output / "report.json").read_text()
    report = json.loads(text)
    assert json.dumps(report, ensure_ascii=False).encode()  # no lone surrogates
    named = {row["file"] for row in report["problems"]}
    for name in NAMES:
        assert valid_unicode(f"{yolo}/images/{name}.jpg") in named
    assert "\n" not in str(error.value)


def test_check_data_of_a_sound_set(yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.call_script("check_data", "--data", yolo, "--output-dir", tmp_path / "report", "--num-workers", 0)
    printed = capsys.readouterr().out
    is_shown("0 \\x1b[31mred\\nerror: none", printed)
    assert not any(line.startswith("error: none") for line in printed.splitlines())
    for name in ("classes.png", "samples_train.jpg"):
        assert (tmp_path / "report" / name).stat().st_size > 1000


def test_predict(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture for each; predictions.json is valid Unicode."""
    photos, output = tmp_path / "photos", tmp_path / "found"
    for name in NAMES:
        save_image(photos / f"{name}.jpg")
    save_image(photos / f"{LONG}.png")
    save_image(photos / "..jpg", format="JPEG")
    (photos / "..jpg").rename(photos / ("x" * MAX_NAME_BYTES))
    save_image(photos / "..jpg", format="JPEG")
    (photos / "empty\x1b[2J\n.jpg").touch()
    given = (photos, photos / "..jpg", photos / ("x" * MAX_NAME_BYTES))  # which a search leaves out by their names
    flags = ("--checkpoint", model, "--output-dir", output, "--score-threshold", 0, *runs.MACHINE)
    for _ in range(2):  # the second time over its own pictures
        runs.call_script("predict", *given, *flags)
        printed = capsys.readouterr().out
        is_shown("empty\\x1b[2J\\n.jpg", printed)
        assert f"{len(NAMES) + 3} images, 1 unreadable" in printed
    pictures = {path.name for path in output.iterdir()} - {"predictions.json"}
    assert len(pictures) == len(NAMES) + 3
    most = MAX_NAME_BYTES - LONGEST_ENDING
    assert pictures >= {f"{shortened(name, most)}.jpg" for name in NAMES} | {"..jpg", f"{'x' * most}.jpg"}
    (second,) = (name for name in pictures if name.endswith("_2.jpg"))
    assert LONG.startswith(second.removesuffix("_2.jpg")) and len(os.fsencode(second)) >= most
    rows = json.loads((output / "predictions.json").read_text())
    assert json.dumps(rows, ensure_ascii=False).encode()
    assert {row["file_name"] for row in rows} >= {valid_unicode(str(photos / f"{name}.jpg")) for name in NAMES}


def test_pictures_beyond_the_largest_jpeg(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn smaller, and named; boxes stay in the image's own pixels."""
    Image.new("RGB", (MAX_JPEG_SIDE + 500, 40), "grey").save(tmp_path / "wide.png")
    Image.new("RGB", (8, MAX_JPEG_SIDE), "grey").save(tmp_path / "high.png")
    flags = ("--checkpoint", model, "--output-dir", tmp_path / "found", *runs.MACHINE)
    runs.call_script("predict", tmp_path / "wide.png", tmp_path / "high.png", *flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("drawn smaller")]
    assert lines == [f"drawn smaller, as a JPEG has at most {MAX_JPEG_SIDE} pixels a side: {tmp_path / 'wide.png'}"]
    assert Image.open(tmp_path / "found/wide.jpg").size == (MAX_JPEG_SIDE, 40)
    assert Image.open(tmp_path / "found/high.jpg").size == (8, MAX_JPEG_SIDE)


def test_sheets_beyond_the_largest_jpeg(tmp_path: Path) -> None:
    """More columns in their place."""
    pictures = [Image.new("RGB", (4, 4))] * 4090
    sheet = contact_sheet(pictures, ["a"] * len(pictures), 4, columns=1)
    assert MAX_JPEG_SIDE * 0.9 < sheet.height <= MAX_JPEG_SIDE and sheet.width < 30
    sheet.save(tmp_path / "sheet.jpg")
    assert contact_sheet(pictures[:5], ["a"] * 5, 4, columns=2).width == 4 + 8 + 4


def test_names_are_cut_between_characters(tmp_path: Path) -> None:
    for name, limit, expected in (("üü", 3, "ü"), ("abc", 3, "abc"), (NO_UTF8, 3, "caf"), (NO_UTF8, 4, NO_UTF8)):
        assert shortened(name, limit) == expected
    path = tmp_path / f"{LONG}.jpg"
    assert unfinished(path).name.encode()  # valid
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_terminals_of_another_encoding(yolo: Path, tmp_path: Path) -> None:
    """Escapes stand for what they lack: in a banner, a table, a report, an error."""
    run = tmp_path / "run é"
    flags = {
        "pretrain": ("--data", yolo, *runs.TINY, *runs.EIGHT, "--max-steps", 1, "--output-dir", run),
        "check_data": ("--data", yolo, "--output-dir", tmp_path / "é", "--num-workers", 0),
    }
    for script, arguments in flags.items():
        process = runs.start_script(script, *arguments, PYTHONIOENCODING="ascii", LC_ALL="C")
        printed, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert "\\u56f3\\xe9" in printed and "\x1b" not in printed and "Traceback" not in errors
        assert ("run \\xe9" if script == "pretrain" else "\\xe9:") in printed
    shutil.rmtree(yolo / "labels")
    write(yolo / "labels", "é")
    process = runs.start_script("check_data", *flags["check_data"], PYTHONIOENCODING="ascii")
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 2 and "Traceback" not in errors
