"""Hugging Face sets that are malformed. Tables, in which one argument a line would hide what belongs together."""

from collections.abc import Callable
from typing import Any

import datasets
import pyarrow as pa
from malformed import add, all_of, file, folder, swap, text
from malformed_coco import BOX, CUT, EMPTY, LONGER, NO_IMAGE, SHARES
from malformed_sets import BOXES, FINE, GOOD, PICTURE, UNREADABLE, HubTree, Json, ParquetTree, Tree, features
from pyarrow import parquet

from direct_pt.data.problems import ERROR

# fmt: off
# Hugging Face: image folders with metadata.jsonl

LIBRARY = "cannot be loaded by the datasets library"


def objects(row: int, **fields: Any) -> Callable[[HubTree], None]:
    """Other fields of a row's objects."""
    return lambda tree: tree.rows[row]["objects"].update(fields)


def one_value(row: int, name: str, number: int, one: Any) -> Callable[[HubTree], None]:
    """Another value of one object."""
    return lambda tree: tree.rows[row]["objects"][name].__setitem__(number, one)


def every(**fields: Any) -> Callable[[HubTree], None]:
    """Other fields of all rows' objects, each value again and again."""

    def change(tree: HubTree) -> None:
        for row in tree.rows:
            count = len(row["objects"]["category"])
            row["objects"].update({name: [one] * count for name, one in fields.items()})

    return change


add("metadata good", FINE)
add("metadata absent file", ERROR, lambda tree: tree.drop("train/a.png"), left=GOOD[2:],
    message="SET (train): image 1 states no width and height, and its file SET/train/a.png: No such file or directory"
    "; put the image there, or leave its row out")
LEADING_OUT = {"outside": "../../secret.jpg", "absolute": "/etc/hostname", "of a URL": "file:///etc/hostname"}
for what, name in LEADING_OUT.items():
    add(f"metadata name {what}", ERROR, lambda tree, name=name: tree.rows[0].update(file_name=name),
        f"--data SET: {LIBRARY} (ValueError: Invalid metadata file_name '{name}': `file_name` must be ...")
add("metadata name null", ERROR, lambda tree: tree.rows[0].update(file_name=None), left=GOOD[2:],
    message="SET (train): image 1 states no width and height, and there is no image; leave the row out")
add("metadata name twice", ERROR, lambda tree: tree.rows[0].update(file_name="b.png"),
    "FILE:2: names 'b.png' again, after line 1; join their objects on one line")
add("metadata name longer", ERROR, lambda tree: tree.rows[0].update(file_name=LONGER), left=GOOD[2:],
    message="SET (train): image 1 states no width and height, and its file SET/train/xxxxx...")
add("metadata no names", ERROR, lambda tree: [row.pop("file_name") for row in tree.rows],
    f"--data SET: {LIBRARY} (ValueError: `file_name`, ...")
add("metadata no images", ERROR, lambda tree: [tree.drop(f"train/{name}.png") for name in "ab"],
    "--data SET: has no image column (its columns are objects, file_name); put the images beside the file that ...")
add("metadata no objects", ERROR, lambda tree: [row.pop("objects") for row in tree.rows],
    "--data SET: has no column 'objects' with 'bbox' and 'category' (its columns are image)")
add("metadata objects a text", ERROR, lambda tree: [row.update(objects="x") for row in tree.rows],
    "--data SET: its 'objects' lack 'bbox'; they have nothing")
add("metadata objects null", FINE, lambda tree: tree.rows[0].update(objects=None), left=GOOD[2:])
add("metadata too few classes", ERROR, objects(0, category=["cat"]), annotation=2, left=[GOOD[0], GOOD[2]],
    message="SET (train): annotations[1] (id 2) has category_id None; it must be a whole number")
add("metadata too few boxes", ERROR, objects(0, bbox=BOXES[:1]), annotation=2, left=[GOOD[0], GOOD[2]],
    message=f"SET (train): annotation 2 has bbox None{BOX}")
NULL = "has a list that begins with null, which is not read as such; leave that object out"
add("metadata class null, first", ERROR, one_value(0, "category", 0, None), f"FILE:1: {NULL}")
add("metadata box null, first", ERROR, one_value(1, "bbox", 0, None), f"FILE:2: {NULL}")
add("metadata class null, second", ERROR, one_value(0, "category", 1, None), annotation=2, left=[GOOD[0], GOOD[2]],
    message="SET (train): annotations[1] (id 2) has category_id None; it must be a whole number")
add("metadata classes of numbers, one -1", ERROR, annotation=1,
    spoil=all_of(every(category=0), one_value(0, "category", 0, -1)),
    message="SET (train): annotation 1 has category_id -1, which 'categories' does not list; correct one of them",
    left=[("a", "0", BOXES[1]), ("b", "0", BOXES[2])])
for what, one, kind in (("fractions", 0.5, "float64"), ("true", True, "bool")):
    add(f"metadata classes of {what}", ERROR, every(category=one),
        f"--data SET: 'objects.category' is of the type Value('{kind}'); classes are whole numbers or names")
add("metadata classes in lists", ERROR, every(category=["cat"]), "--data SET: 'objects.category' is of the type ...")
add("metadata classes blank", ERROR, every(category=" "),
    "--data SET: 'objects.category' has no class in any row: whole numbers from 0 on, or names")
add("metadata classes mixed", ERROR, one_value(0, "category", 0, 5),
    f"--data SET: {LIBRARY} (ArrowInvalid: JSON parse error: ...")
add("metadata box of three", ERROR, one_value(0, "bbox", 0, [8, 6, 16]),
    f"SET (train): annotation 1 has bbox [8, 6, 16]{BOX}",
    annotation=1, left=GOOD[1:])
add("metadata boxes in shares", ERROR, every(bbox=[0.1, 0.2, 0.3, 0.4]), f"SET (train): {SHARES}")
add("metadata image id twice", ERROR, lambda tree: [row.update(image_id=5) for row in tree.rows],
    "SET (train): images[].id 5 is used twice; ids must be unique", left=[*GOOD[:2], ("a", "dog", BOXES[2])])
add("metadata size of another image", UNREADABLE, lambda tree: [row.update(width=64, height=50) for row in tree.rows],
    "SET (train): row 0, a.png: is 64x48 pixels, but its annotation says 64x50; put the image in place ...")
BAD_METADATA: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "empty file": (lambda s: "\n", ": is empty; write an object for each image, on a line of its own"),
    "cut short": (lambda s: s[: s.index("\n") + 20], ":2: is no JSON object (..."),
    "Latin-1": (lambda s: s.replace("cat", "c\xe4t").encode("latin-1"),
    ":1: is no JSON object ('utf-8' codec can't ..."),
    "UTF-16": (lambda s: s.encode("utf-16"), ":1: is no JSON object ('utf-8' codec can't decode byte 0xff in ..."),
    "array": (lambda s: f"[{s.strip().replace(chr(10), ',')}]", ":1: is no JSON object (it is something else); ..."),
    "deep nesting": (lambda s: '{"x": ' + "[" * 100_000, ":1: is no JSON object (it is nested more than ..."),
}
for what, (change, reason) in BAD_METADATA.items():
    add(f"metadata {what}", ERROR, text(change), f"FILE{reason}")
add("metadata byte order mark", FINE, text(lambda s: s.encode("utf-8-sig")))
add("metadata blank lines", FINE, text(lambda s: s.replace("\n", "\r\n\r\n")))
add("metadata NaN", ERROR, swap("[[8, 6", "[[NaN, 6"),
    f"SET (train): annotation 1 has bbox [nan, 6.0, 16.0, 12.0]{BOX}",
    annotation=1, left=GOOD[1:])
add("metadata 1e400", ERROR, swap("[[8, 6", "[[1e400, 6"),
    f"--data SET: {LIBRARY} (ArrowInvalid: JSON parse error: ...")
add("metadata image empty", ERROR, file("train/a.png", b""), left=GOOD[2:],
    message=f"SET (train): image 1 states no width and height, and row 0, a.png: {EMPTY}")
add("metadata image cut short", UNREADABLE, file("train/a.png", PICTURE[:2000]), f"SET (train): row 0, a.png: {CUT}")
add("metadata image a folder", ERROR, folder("train/a.png"), left=GOOD[2:],
    message="SET (train): image 1 states no width and height, and its file SET/train/a.png: Is a directory"
    "; put the image there, or leave its row out")
add("metadata folder in itself", FINE, lambda tree: (tree.folder / "train/again").symlink_to(tree.folder / "train"))


def through_a_link(tree: Tree) -> Json:
    """The set's folder under another name."""
    (tree.folder.parent / "link").symlink_to(tree.folder)
    return {"data": tree.folder.parent / "link"}


add("metadata through a link", FINE, flags=through_a_link)
README = "---\nconfigs:\n- config_name: default\n  {}\n---\n"
ELSEWHERE = "which does not lie in SET; nothing else is read: remove it there"
for what, field, place, name in (
    ("above", "data_files: ../secret.jpg", "data_files", "../secret.jpg"),
    ("above, below a folder", "data_files: train/../../*", "data_files", "train/../../*"),
    ("absolute", "data_files: /etc/*", "data_files", "/etc/*"),
    ("on the whole disk", "data_files: [{split: train, path: '/**'}]", "data_files[0].path", "/**"),
    ("of a URL", "data_files: [train/*, 'https://127.0.0.1:9/a.parquet']", "data_files[1]",
     "https://127.0.0.1:9/a.parquet"),
    ("of the hub", "data_files: [{split: train, path: ['hf://datasets/a/b/c.parquet']}]", "data_files[0].path[0]",
     "hf://datasets/a/b/c.parquet"),
    ("of a bucket", "data_files: 's3://bucket/*.parquet'", "data_files", "s3://bucket/*.parquet"),
    ("of a local URL", "data_files: 'local:///etc/hostname'", "data_files", "local:///etc/hostname"),
    ("of a file URL without slashes", "data_files: 'file:/etc/hostname'", "data_files", "file:/etc/hostname"),
    ("of a chain", "data_files: 'zip://*.parquet::a.zip'", "data_files", "zip://*.parquet::a.zip"),
    ("of a host", "data_files: '//127.0.0.1/share/*'", "data_files", "//127.0.0.1/share/*"),
    ("of home", "data_files: ~/*.parquet", "data_files", "~/*.parquet"),
    ("by split", "data_files: {train: ['ftp://127.0.0.1/*']}", "data_files.train[0]", "ftp://127.0.0.1/*"),
    ("in a folder", "data_dir: ../other", "data_dir", "../other"),
):
    for card in ("README.md", ".huggingface.yaml"):
        content = README.format(field)
        add(f"metadata {card} names files {what}", ERROR,
            file(card, content if card == "README.md" else content.replace("---\n", "")),
            f"SET/{card}: configs[0].{place} names '{name}', {ELSEWHERE}")
add("metadata README names a number", ERROR, file("README.md", README.format("data_files: [7]")),
    "SET/README.md: configs[0].data_files[0] is 7: write the name of a file in SET, or a pattern")
add("metadata README names its files", FINE, file("README.md", README.format("data_files: train/**")))

# Hugging Face: parquet files and save_to_disk


def cell(content: bytes | None, path: str | None = None) -> Callable[[ParquetTree], None]:
    """Another image in the first row; `path` may begin with ROOT or SET."""

    def change(tree: ParquetTree) -> None:
        place = None if path is None else path.replace("SET", "ROOT/set").replace("ROOT", str(tree.folder.parent))
        tree.rows[0]["image"] = None if content is None and path is None else {"bytes": content, "path": place}

    return change


def columns(**more: Any) -> Callable[[ParquetTree], None]:
    """Other columns, or none of that name."""

    def change(tree: ParquetTree) -> None:
        kept = {**tree.features, **more}
        tree.features = datasets.Features({name: kind for name, kind in kept.items() if kind is not None})

    return change


NO_SIZE = "SET (train): image 1 states no width and height, and "
NOT_IN = "its file {} does not lie in the data set; store the images' bytes there"
for kind in ("parquet", "saved"):
    add(f"{kind} good", FINE)
    add(f"{kind} no image column", ERROR, columns(image=None),
        "--data SET: has no image column (its columns are objects); cast one to Image()")
    add(f"{kind} no objects column", ERROR, columns(objects=None),
        "--data SET: has no column 'objects' with 'bbox' and 'category' (its columns are image)")
    add(f"{kind} image null", ERROR, cell(None), NO_SIZE + "there is no image; leave the row out", left=GOOD[2:])
    add(f"{kind} image no image", ERROR, cell(b"xx", "a.png"), f"{NO_SIZE}row 0, a.png: {NO_IMAGE}", left=GOOD[2:])
    add(f"{kind} image cut short", UNREADABLE, cell(PICTURE[:2000], "a.png"), f"SET (train): row 0, a.png: {CUT}")
    add(f"{kind} class -1", ERROR, one_value(0, "category", 0, -1), annotation=1, left=GOOD[1:],
        message="SET (train): annotation 1 has category_id -1, which 'categories' does not list; correct one of them")
    add(f"{kind} class too high", ERROR, one_value(0, "category", 0, 2), annotation=1, left=GOOD[1:],
        message="SET (train): annotation 1 has category_id 2, which 'categories' does not list; correct one of them")
    add(f"{kind} class null", ERROR, one_value(0, "category", 0, None), annotation=1, left=GOOD[1:],
        message="SET (train): annotations[0] (id 1) has category_id None; it must be a whole number")
    add(f"{kind} box null", ERROR, one_value(0, "bbox", 0, None), f"SET (train): annotation 1 has bbox None{BOX}",
        annotation=1, left=GOOD[1:])
    add(f"{kind} box of three", ERROR, one_value(0, "bbox", 0, [8, 6, 16]), annotation=1, left=GOOD[1:],
        message=f"SET (train): annotation 1 has bbox [8.0, 6.0, 16.0]{BOX}")
    add(f"{kind} box negative", ERROR, one_value(0, "bbox", 0, [8, 6, -16, 12]), annotation=1, left=GOOD[1:],
        message=f"SET (train): annotation 1 has bbox [8.0, 6.0, -16.0, 12.0]{BOX}")
    add(f"{kind} lists of unequal length", ERROR, objects(0, category=[0]), annotation=2, left=[GOOD[0], GOOD[2]],
        message="SET (train): annotations[1] (id 2) has category_id None; it must be a whole number")
for what, path in {"outside": "ROOT/secret.jpg", "above": "SET/../secret.jpg", "relative": "a.png",
                   "on the net": "http://127.0.0.1:9/a.png"}.items():
    add(f"parquet image file {what}", ERROR, cell(None, path), NO_SIZE + NOT_IN.format(path), left=GOOD[2:])
NUMBERS = features(datasets.Value("int64"))
add("parquet class -1, not named", ERROR, annotation=1, left=[("a", "1", BOXES[1]), ("b", "1", BOXES[2])],
    spoil=all_of(one_value(0, "category", 0, -1), lambda tree: setattr(tree, "features", NUMBERS)),
    message="SET (train): annotation 1 has category_id -1, which 'categories' does not list; correct one of them")
MAGIC = "Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file."
SAVE = "mend it, or save the set anew"
PIECE = "train-00000-of-00001.parquet"
add("parquet no parquet", ERROR, after=file(PIECE, "PAR1 nonsense"),
    message=f"FILE: {LIBRARY} (ArrowInvalid: {MAGIC}); {SAVE}")
add("parquet empty file", ERROR, after=file(PIECE, ""),
    message=f"FILE: {LIBRARY} (ArrowInvalid: Parquet file size is 0 bytes); {SAVE}")
add("parquet cut short", ERROR, after=lambda tree: tree.put(PIECE, (tree.folder / PIECE).read_bytes()[:-500]),
    message=f"FILE: {LIBRARY} (ArrowInvalid: {MAGIC}); {SAVE}")
add("parquet other columns in a second file", ERROR,
    after=lambda tree: parquet.write_table(pa.table({"x": [1]}), tree.folder / "train-00001-of-00002.parquet"),
    message=f"--data SET: {LIBRARY} (CastError: Couldn't cast x: int64 ...")
add("saved no split of training", ERROR, lambda tree: setattr(tree, "split", "holiday"),
    "--data SET: has the splits holiday, and none called train or validation")
ARROW = "data-00000-of-00001.arrow"
add("saved no arrow", ERROR, after=file(f"train/{ARROW}", "nonsense"),
    message=f"--data SET: {LIBRARY} (ArrowInvalid: ...")
add("saved cut short", ERROR,
    after=lambda tree: tree.put(f"train/{ARROW}", (tree.folder / "train" / ARROW).read_bytes()[:3000]),
    message=f"--data SET: {LIBRARY} (OSError: Expected to be able to read ...")
add("saved arrow missing", ERROR, after=lambda tree: tree.drop(f"train/{ARROW}"),
    message=f"--data SET: {LIBRARY} (FileNotFoundError: [Errno 2] No such file or directory: 'SET/train/{ARROW}...")
add("saved state no JSON", ERROR, after=file("train/state.json", "{"),
    message=f"--data SET: {LIBRARY} (JSONDecodeError: ...")
add("saved split missing", ERROR, after=file("dataset_dict.json", '{"splits": ["train", "test"]}'),
    message=f"--data SET: {LIBRARY} (FileNotFoundError: No such files: 'SET/test/dataset_info.json', nor ...")


def arrow_outside(tree: Tree) -> None:
    """The rows lie beside the set's folder, where state.json says they are."""
    (tree.folder / "train" / ARROW).rename(tree.folder.parent / "rows.arrow")
    state = (tree.folder / "train/state.json").read_text()
    tree.put("train/state.json", state.replace(ARROW, "../../rows.arrow"))


add("saved rows outside", ERROR, after=arrow_outside,
    message="SET/train/state.json: _data_files[0].filename names '../../rows.arrow', which does not lie in SET; ...")
add("saved split outside", ERROR, after=file("dataset_dict.json", '{"splits": ["train", "../other"]}'),
    message=f"SET/dataset_dict.json: splits[1] names '../other', {ELSEWHERE}")
add("saved split on the net", ERROR, after=file("dataset_dict.json", '{"splits": ["http://127.0.0.1:9/a"]}'),
    message=f"SET/dataset_dict.json: splits[0] names 'http://127.0.0.1:9/a', {ELSEWHERE}")
