"""Names in pictures and on the terminal: characters of all scripts, dollar signs, control characters."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_runs as runs
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from direct_pt.errors import printable, printable_lines
from direct_pt.images import visualize
from direct_pt.images.visualize import contact_sheet, draw_detections, drawable, drawable_name, find_font
from direct_pt.reports.plots import plot_classes

UNASSIGNED = "\U0003fffd"
CUNEIFORM = "\U00012000\U00012001\U00012002"  # that hardly any system has a font for
ASCII = "".join(map(chr, range(33, 127)))


def caption(text: str) -> bytes:
    """A picture with one box of this caption."""
    box = np.array([[10, 60, 190, 90]], np.float32)
    return draw_detections(Image.new("RGB", (200, 100)), box, np.array([0]), [text]).tobytes()


def chart(names: list[str], path: Path) -> bytes:
    """A chart of classes with these names; a missing glyph is an error."""
    with warnings.catch_warnings(action="error"):
        plot_classes(names, {"train": np.ones(len(names), int)}, path)
    return np.asarray(Image.open(path)).tobytes()


@pytest.fixture
def cuneiform_font(tmp_path: Path) -> Iterator[Path]:
    """A font of the system with ASCII and three more characters: each a bar of its own height."""
    characters = ASCII + CUNEIFORM
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "space", *(f"g{ord(c)}" for c in characters)])
    builder.setupCharacterMap({32: "space", **{ord(c): f"g{ord(c)}" for c in characters}})
    glyphs = {}
    for place, name in enumerate([".notdef", "space", *(f"g{ord(c)}" for c in characters)]):
        pen = TTGlyphPen(None)
        for x, y in ((50, 0), (50, 100 + 7 * place), (450, 100 + 7 * place), (450, 0)):
            (pen.lineTo if pen.points else pen.moveTo)((x, y))
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (500, 50)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Bars", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    path = tmp_path / "bars.ttf"
    builder.save(path)
    before = list(fontManager.ttflist)
    fontManager.addfont(path)
    visualize._font_with.cache_clear()
    yield path
    fontManager.ttflist[:] = before
    visualize._font_with.cache_clear()


def test_every_character_has_its_glyph() -> None:
    """No two captions look the same, and none like a character that no font has."""
    characters = "éüßñøÅçŁőЖЯλΩאعمא"[:16]
    font = visualize._text_font(characters, 20)
    missing = bytes(font.getmask(UNASSIGNED))
    for character in characters:
        assert drawable_name(character, 7) == drawable(character) == character
        assert bytes(font.getmask(character)) != missing
    pictures = {caption(character) for character in characters}
    assert len(pictures) == len(set(characters))
    sheets = {contact_sheet([Image.new("RGB", (50, 50))], [c], 50).tobytes() for c in characters}
    assert len(sheets) == len(set(characters))


def test_scripts_of_the_systems_fonts(cuneiform_font: Path, tmp_path: Path) -> None:
    """A font that has all characters of the caption, also the ASCII ones."""
    first, second, third = CUNEIFORM
    found = find_font(f"{CUNEIFORM} 0.87")
    assert found is not None and found.path == str(cuneiform_font)
    assert find_font("abc") == find_font("é") != found
    assert drawable_name(CUNEIFORM, 7) == CUNEIFORM
    assert len({caption(f"{character} 0.87") for character in (*CUNEIFORM, UNASSIGNED)}) == 4
    assert chart([first, second], tmp_path / "a.png") != chart([first, third], tmp_path / "b.png")


def test_a_script_without_a_font() -> None:
    assert find_font(UNASSIGNED) is None
    assert drawable_name(f"a{UNASSIGNED}", 7) == "class 7"
    assert drawable(f"a{UNASSIGNED}") == "a\\U0003fffd"
    assert caption(f"a{UNASSIGNED}") == caption("a\\U0003fffd")
    contact_sheet([Image.new("RGB", (50, 50))], [f"{UNASSIGNED * 9}.jpg"], 50)


def test_dollar_signs_are_no_formulas(tmp_path: Path) -> None:
    assert chart(["$\\gamma$"], tmp_path / "a.png") != chart(["\u03b3"], tmp_path / "b.png")
    plain = chart(["$x$", "a_b"], tmp_path / "a.png")
    assert plain != chart(["x", "a_b"], tmp_path / "b.png")
    for name in ("$\\frac$", "$", "a$b$", "\\$", "$_$", "$$", "_hidden", "x" * 29 + "$x$y$"):
        chart([name, "é", "\u202eabc"], tmp_path / "a.png")
    chart([UNASSIGNED], tmp_path / "a.png")


def test_control_characters() -> None:
    for name, shown in (
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\nb\tc\x7f\x9b", "a\\nb\\tc\\x7f\\x9b"),
        ("a\u202egpj.exe\u2066\u2028", "a\\u202egpj.exe\\u2066\\u2028"),
        ("\udcff", "\\udcff"),
        ("é猫 \u200d", "é猫 \u200d"),
    ):
        assert printable(name) == shown
        if "猫" not in name:
            assert drawable(name) == drawable_name(name, 1) == shown and caption(name) == caption(shown)
    assert printable_lines("a\x1b\nb\r") == "a\\x1b\nb\\r"


def test_names_of_the_data_on_the_terminal(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They may come from a stranger: pretrain.py, evaluate.py, predict.py and check_data.py show them escaped."""
    data, names = tmp_path / "data", [f"\x1b[31m{digit}" for digit in range(10)]
    (data / "annotations").mkdir(parents=True)
    (data / "images").symlink_to(demo / "images")
    for split in ("train", "val"):
        content = runs.read_json(demo / f"annotations/instances_{split}.json")
        for category, name in zip(content["categories"], names, strict=True):
            category["name"] = name
        (data / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    run = tmp_path / "run"
    runs.train("pretrain", "--data", data, *runs.TINY, *runs.EIGHT, "--max-steps", 1, "--output-dir", run)
    runs.call_script("evaluate", "--checkpoint", run, "--data", data, *runs.MACHINE)
    runs.call_script("check_data", "--data", data, "--output-dir", tmp_path / "report", "--num-workers", 0)
    photo = min((data / "images").iterdir())
    runs.call_script(
        "predict", photo, "--checkpoint", run, "--output-dir", tmp_path / "found", "--score-threshold", 0, *runs.MACHINE
    )
    printed = "".join(capsys.readouterr())
    assert "\x1b[31m" not in printed and printed.count("\\x1b[31m0") >= 3
    rows = runs.read_json(tmp_path / "found/predictions.json")
    assert rows and {row["category_name"] for row in rows} <= set(names)  # as they are, where programs read them
