"""A JSON file in pieces: the same values as json.loads, the same refusals, wherever a block of the file ends."""

import json
from pathlib import Path
from typing import Any

import pytest

from direct_pt.data.formats import json_stream
from direct_pt.data.formats.json_stream import NotAnObject, read_members

CONTENT: dict[str, Any] = {
    "info": {"year": 2017, "about": 'a "quoted" \\ string\twith é and 图 and \U0001f600'},
    "images": [{"id": 1, "file_name": "été.jpg"}, {"id": -2, "file_name": "图 1.png"}, {}],
    "empty": [],
    "numbers": [0, -1, 12.5, -1.5e-7, 1e300, 10**400, True, False, None, "text", [[1, [2]]], 12345],
    "last": -12.25e10,
    "": "no name",
}


def read(path: Path) -> dict[str, Any]:
    """The object, put together again."""
    found: dict[str, Any] = {}
    for key, start, value in read_members(path):
        if isinstance(value, list) and start:
            assert len(found[key]) == start and value
            found[key] += value
        else:
            assert start == 0
            found[key] = value
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.json"


@pytest.mark.parametrize("chunk", [1, 3, 4, 4096])
@pytest.mark.parametrize("indent", [None, 2])
def test_the_same_wherever_a_block_ends(
    chunk: int, indent: int | None, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    for ascii_only in (True, False):
        text = json.dumps(CONTENT, indent=indent, ensure_ascii=ascii_only)
        file.write_text(text, encoding="utf-8")
        for block in (*range(1, 40), 100, 2**20):
            monkeypatch.setattr(json_stream, "BLOCK", block)
            found = read(file)
            assert found == CONTENT and list(found) == list(CONTENT)


def test_constants_that_json_does_not_have(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python writes and reads them: NaN, Infinity. The messages about them are the annotations' own."""
    for block in range(1, 20):
        monkeypatch.setattr(json_stream, "BLOCK", block)
        file.write_text('{"a": [NaN, -Infinity, Infinity], "b": -Infinity}')
        assert str(read(file)) == "{'a': [nan, -inf, inf], 'b': -inf}"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(encoding: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(json.dumps(CONTENT, ensure_ascii=False).encode(encoding))
    for block in (1, 3, 7, 2**20):
        monkeypatch.setattr(json_stream, "BLOCK", block)
        assert read(file) == CONTENT


def test_lists_come_in_chunks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 2)
    file.write_text('{"a": [1, 2, 3], "b": [1, 2], "c": [], "d": {"e": [1, 2, 3]}, "c": [4]}')
    assert list(read_members(file)) == [
        ("a", 0, [1, 2]),
        ("a", 2, [3]),
        ("b", 0, [1, 2]),
        ("c", 0, []),
        ("d", 0, {"e": [1, 2, 3]}),
        ("c", 0, [4]),  # a key that stands there twice
    ]


def test_one_chunk_lives_at_a_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read as far as it must be, and no further."""
    monkeypatch.setattr(json_stream, "CHUNK", 10)
    monkeypatch.setattr(json_stream, "BLOCK", 100)
    file.write_text(json.dumps({"a": list(range(1000))})[:-100])
    members = read_members(file)
    assert next(members) == ("a", 0, list(range(10)))
    with pytest.raises(ValueError, match="line 1 column"):
        list(members)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        "{",
        '{"a"',
        '{"a": ',
        '{"a": 1',
        '{"a": 1\n "b": 2}',
        '{"a" 1}',
        '{"a": [1, 2',
        '{"a": [1\n, 2 3]}',
        '{"a": [1, ]}}',
        '{"a": [{"b": 1, "c"}]}',
        '{"a": [\n{"b": [1, 2}]}',
        '{"a": "text\nwith a line end"}',
        '{"a": "\\x"}',
        '{"a": "open}',
        '{"a": tru}',
        '{"a": [-]}',
        '{"a": 01}',
        '{"a": 1}\n\n x',
        '{"a": 1}{}',
        '{"a": [1]]',
        "{'a': 1}",
        "nonsense",
        '[1, 2, {"a": }]',
    ],
)
def test_malformed_json_gives_the_same_messages(text: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(text)
    with pytest.raises(ValueError) as expected:
        json.loads(text)
    if str(expected.value).startswith("Illegal trailing comma"):  # newer Pythons' own words for it
        pytest.skip("the standard library says it in other words")
    for block in (1, 2, 3, 5, 8, 13, 2**20):
        monkeypatch.setattr(json_stream, "BLOCK", block)
        with pytest.raises(ValueError) as found:
            list(read_members(file))
        assert str(found.value) == str(expected.value)


def test_bytes_that_are_not_utf8(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = '{"a": "é"}'.encode("latin-1")
    file.write_bytes(content)
    with pytest.raises(UnicodeDecodeError) as expected:
        json.loads(content)
    for block in (1, 3, 2**20):
        monkeypatch.setattr(json_stream, "BLOCK", block)
        with pytest.raises(ValueError) as found:
            list(read_members(file))
        assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("text", ["[1, 2]", "null", "3", '"text"', "[]"])
def test_the_top_level_is_not_an_object(text: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(NotAnObject):
        list(read_members(file))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '{"a": [' + "[" * 100_000])
def test_too_deep(text: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(RecursionError):
        list(read_members(file))
