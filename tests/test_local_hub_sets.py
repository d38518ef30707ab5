"""Hugging Face sets in a folder ask nothing of the net: not of the hub, not of what their files name."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import small_runs as runs
from PIL import Image
from pyarrow import parquet

from direct_pt.data.formats.hub_folder import check_named_files
from direct_pt.data.problems import DataError

# Put before everything else on the path of the process: what it asks of the net is written down, and fails.
WATCH = """
import os, socket

def note(what):
    with open(os.environ["ASKED"], "a") as file:
        file.write(f"{what}\\n")
    if "END_THEN" in os.environ:
        os._exit(3)  # the libraries would try again for a while
    raise OSError(f"asked for {what}")

resolve, connect = socket.getaddrinfo, socket.socket.connect
socket.getaddrinfo = lambda *place, **more: note(place)
socket.gethostbyname = note
socket.socket.connect = lambda self, place: connect(self, place) if self.family == socket.AF_UNIX else note(place)
socket.socket.connect_ex = socket.socket.connect
"""
# The program of the tests: each split's objects, or a few samples of a stream.
READ = """
import sys
from pathlib import Path
from direct_pt.data.sources import DataOptions, load_tables
from direct_pt.data.stream import open_stream
from direct_pt.program.run import run_program
from direct_pt.images.decoding import DEFAULT_DECODING

def main():
    data = Path(sys.argv[1])
    if sys.argv[2] == "streaming":
        stream = open_stream(data, "coco", DEFAULT_DECODING, 10)
        place, window = next(stream.windows(__import__("direct_pt.data.stream").data.stream.Place(), 0, 0, 1))
        table, wrong = window.table(False)
        print(len(table), wrong)
        load_tables(DataOptions(data=data, streaming=True), ["val"])
    else:
        tables = load_tables(DataOptions(data=data, val_share=0))
        for table in tables.values():
            for row in range(len(table)):
                table.read_image(row)
        print({split: len(table) for split, table in tables.items()})

run_program(main)
"""
OBJECTS = datasets.Sequence({"bbox": datasets.Sequence(datasets.Value("float32")), "category": datasets.ClassLabel(names=["cat"])})  # fmt: skip  # noqa: E501


def rows(folder: Path, count: int) -> datasets.Dataset:
    """Rows with an image and an object each."""
    folder.mkdir(exist_ok=True)
    images = []
    for number in range(count):
        images.append(folder / f"{number}.png")
        Image.new("RGB", (32, 24), (number, 80, 9)).save(images[-1])
    objects = [{"bbox": [[2, 3, 8, 9]], "category": [0]}] * count
    features = datasets.Features({"image": datasets.Image(), "objects": OBJECTS})
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in images]
    return datasets.Dataset.from_dict({"image": cells, "objects": objects}, features=features)


def make(kind: str, folder: Path) -> Path:
    """A set of two splits."""
    splits = {"train": rows(folder.parent / "a", 4), "validation": rows(folder.parent / "b", 2)}
    if kind == "saved":
        datasets.DatasetDict(splits).save_to_disk(folder)
        return folder
    for split, part in splits.items():
        if kind == "parquet":
            folder.mkdir(exist_ok=True)
            part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
            continue
        (folder / split).mkdir(parents=True)
        with (folder / split / "metadata.jsonl").open("w") as file:
            for number in range(len(part)):
                shutil.copy(folder.parent / ("a" if split == "train" else "b") / f"{number}.png", folder / split)
                objects = {"bbox": [[2, 3, 8, 9]], "category": ["cat"]}
                file.write(json.dumps({"file_name": f"{number}.png", "objects": objects}) + "\n")
    return folder


def read(data: Path, how: str, scratch: Path, **more: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """The program's end, and what it asked of the net. The libraries are not told to stay offline."""
    (scratch / "watch").mkdir(exist_ok=True)
    (scratch / "watch/sitecustomize.py").write_text(WATCH)
    (scratch / "read.py").write_text(READ)
    path = os.pathsep.join(filter(None, (str(scratch / "watch"), os.environ.get("PYTHONPATH"))))
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
    environment = {name: value for name, value in runs.ENVIRONMENT.items() if name not in offline}
    environment |= {"PYTHONPATH": path, "ASKED": str(scratch / "asked"), "HF_HOME": str(scratch / "home"), **more}
    command = [sys.executable, str(scratch / "read.py"), str(data), how]
    end = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=scratch)
    asked = scratch / "asked"
    return end, asked.read_text() if asked.exists() else ""


@pytest.mark.parametrize(
    ("kind", "how"), [("parquet", "whole"), ("parquet", "streaming"), ("saved", "whole"), ("folder", "whole")]
)
def test_a_sound_set_asks_nothing(kind: str, how: str, tmp_path: Path) -> None:
    """Not even to be counted: the library reports each set that it loads."""
    end, asked = read(make(kind, tmp_path / "set"), how, tmp_path)
    assert asked == "" and end.returncode == 0, end.stderr
    assert end.stdout.strip() == ("4 {}" if how == "streaming" else "{'train': 4, 'val': 2}")


def test_a_folder_of_the_name_of_a_format(tmp_path: Path) -> None:
    """The library's own names come first, where a path is relative."""
    make("parquet", tmp_path / "parquet")
    end, asked = read(Path("parquet"), "whole", tmp_path)
    assert asked == "" and end.stdout.strip() == "{'train': 4, 'val': 2}", end.stderr


@pytest.fixture
def server() -> Iterator[tuple[int, list[object]]]:
    """The port of one that counts who comes."""
    visitors: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                try:
                    connection, place = listener.accept()
                except TimeoutError:
                    continue
                visitors.append(place)
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], visitors
        ended.set()
        thread.join()


def test_a_card_of_megabytes_is_refused_at_once(tmp_path: Path) -> None:
    data = make("parquet", tmp_path / "set")
    configs = "".join(f"- config_name: c{number}\n  data_files: a.parquet\n" for number in range(10_000))
    for name, text in (("README.md", f"---\nconfigs:\n{configs}---\n"), (".huggingface.yaml", f"configs:\n{configs}")):
        (data / name).write_text(text)
        with pytest.raises(DataError, match=rf"{name}: its YAML has [0-9,]+ bytes, and at most 262,144 are read"):
            check_named_files(data)
        (data / name).unlink()
    (data / "README.md").write_text("# A set\n" + "long text " * 100_000)
    check_named_files(data)


@pytest.mark.parametrize("how", ["whole", "streaming"])
def test_what_a_readme_names_is_not_asked_for(how: str, server: tuple[int, list[object]], tmp_path: Path) -> None:
    port, visitors = server
    data = make("parquet", tmp_path / "set")
    names = (f"http://127.0.0.1:{port}/a.parquet", "hf://datasets/someone/something/a.parquet", "/**/*.parquet")
    for name in names if how == "whole" else names[:1]:
        card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{name}'\n---\n"
        (data / "README.md").write_text(card)
        end, asked = read(data, how, tmp_path)
        text = f"error: {data}/README.md: configs[0].data_files[0].path names '{name}', which does not lie in {data}; "
        assert end.stderr.startswith(text) and end.stderr.count("\n") == 1
        assert (end.returncode, asked, visitors) == (2, "", [])


def test_images_on_the_net_are_not_asked_for(server: tuple[int, list[object]], tmp_path: Path) -> None:
    """Paths in the rows of parquet files."""
    port, visitors = server
    (tmp_path / "set").mkdir()
    cells = [{"bytes": None, "path": f"http://127.0.0.1:{port}/a.png"}]
    objects = [{"bbox": [[2, 3, 8, 9]], "category": [0]}]
    features = datasets.Features({"image": datasets.Image(decode=False), "objects": OBJECTS})
    part = datasets.Dataset.from_dict({"image": cells, "objects": objects}, features=features)
    parquet.write_table(part.data.table, tmp_path / "set/train-00000-of-00001.parquet")  # the library would read it
    end, asked = read(tmp_path / "set", "whole", tmp_path)
    assert (end.returncode, asked, visitors) == (2, "", []), end.stderr
    assert f"its file http://127.0.0.1:{port}/a.png does not lie in the data set" in end.stderr.splitlines()[-1]


def test_the_watch_sees_what_is_asked(tmp_path: Path) -> None:
    """A name on the hub is looked up: the tests above could fail."""
    end, asked = read(Path("someone/something"), "whole", tmp_path, END_THEN="1")
    assert "huggingface.co" in asked and end.returncode == 3
