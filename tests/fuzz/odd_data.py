"""Data sets in small, one of each kind, and what may stand in their files instead: nearly right, or damaged bytes.

An input is the files of a data set that are others than usual. Documents come from hypothesis, which makes the smallest
one that fails; bytes from changes at random places.
"""

import copy
import io
import json
import math
import random
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from xml.sax.saxutils import escape

import datasets
import numpy as np
import pyarrow as pa
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask


def words(text: str) -> list[str]:
    """Of a text."""
    return text.split()


Files = dict[str, bytes | None]  # content by path in the data set's folder; None: the file is not there
Draw = st.DrawFn
Json = Any
ORIENTATION_TAG = 0x0112
SIZES = {"a.png": (32, 48), "é.png": (20, 20), "sub/c.jpg": (40, 24), "d.webp": (1, 300)}  # (height, width)
HUGE = "9" * 5000  # digits that Python makes no number of
NAMES = ["", " ", "a\0b", "\ud800", "a" * 300, *words("cat dog é 图\U0001f600 \\ ~ null 3 a/b .. .")]
PATHS = [
    *words("../a.png /etc/passwd /etc / . .. a.png/x sub\\c.jpg sub/../a.png ./a.png sub//c.jpg images ~/a.png"),
    *("/proc/self/mem", "/dev/zero", "../" * 9 + "etc/passwd", "file:///etc/passwd", "x" * 300, "/".join(["x"] * 3000)),
]
NUMBERS = [
    *(0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e9, 1e15, 1e16, -1e15, 1e308, -1e308, math.nan, math.inf, -math.inf, 10**400),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, True, False),
]
LISTS: list[Any] = [[], [[]], {}, {"": 1}, [None] * 4, [1, 2, 3, 4], [[1, 2] * 3]]
ODD = [*NAMES, *PATHS, *NUMBERS, *LISTS, None, "1", "nan", "123456"]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """An image of `size` (height, width)."""
    rng = np.random.default_rng(0)
    if mode in ("F", "I;16", "I"):
        dtype, scale = {"F": (np.float32, 1), "I;16": (np.uint16, 65535), "I": (np.int32, 70000)}[mode]
        return Image.fromarray((rng.random(size) * scale).astype(dtype))
    return Image.fromarray(rng.integers(256, size=(*size, 4), dtype=np.uint8)).convert(mode)


def turned(orientation: int) -> Image.Exif:
    """An EXIF block."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return exif


def usual_images() -> dict[str, bytes]:
    """SIZES', the JPEG one with an EXIF orientation."""
    kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
    images = {name: encoded(noise(size), kinds[name.split(".")[1]]) for name, size in SIZES.items()}
    images["sub/c.jpg"] = encoded(noise((24, 40)), "JPEG", exif=turned(6))
    return images


def image_files() -> list[bytes]:
    """Small images in all formats that are read, of many modes and compressions."""
    size = (9, 13)
    plain = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    files = [encoded(noise(size, mode), "PNG") for mode in plain]
    files += [encoded(noise(size), "PNG", exif=turned(8)), encoded(noise(size, "P"), "PNG", transparency=3)]
    files += [encoded(noise(size, mode), "JPEG", exif=turned(5)) for mode in ("L", "RGB", "CMYK")]
    files += [encoded(noise(size), "JPEG", progressive=True), encoded(noise(size), "JPEG", subsampling=2, dpi=(72, 72))]
    files += [encoded(noise(size, mode), "WEBP", lossless=lossless) for mode, lossless in (("RGB", 0), ("RGBA", 1))]
    files += [encoded(noise(size, mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")]
    files += [encoded(noise(size, mode), "TIFF") for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")]
    compressions = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    files += [encoded(noise(size), "TIFF", compression=name, exif=turned(6)) for name in compressions]
    files += [encoded(noise(size, "1"), "TIFF", compression=name) for name in ("group3", "group4")]
    frames = [noise(size, "P"), noise(size, "P").rotate(180)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        files.append(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    return [*files, encoded(noise(size, "P"), "GIF", transparency=2, interlace=1)]


# Bytes


def damaged(rng: random.Random, content: bytes, tokens: Sequence[bytes]) -> bytes:
    """One to four changes: bits, bytes, stretches left out, doubled or moved, and `tokens` put in or in place."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 32))
        stretch = data[place : place + length]
        match rng.randrange(9):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(data):
                data[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = stretch * rng.choice((1, 2, 50))
            case 4:
                goal = rng.randrange(len(data) + 1)
                data[goal : goal + rng.choice((0, length))] = stretch
            case 5:
                del data[place:]
            case 6:
                data[place : place + length] = rng.randbytes(length)
            case _:
                data[place : place + rng.choice((0, 0, length))] = rng.choice(tokens)
    return bytes(data)


def other_word(rng: random.Random, content: bytes, tokens: Sequence[bytes]) -> bytes:
    """One word or number of a text changed, mostly to what may stand there."""
    found = list(re.finditer(rb"[\w.+-]+", content))
    if not found:
        return rng.choice(tokens)
    place = rng.choice(found)
    return content[: place.start()] + rng.choice((rng.choice(found)[0], rng.choice(tokens))) + content[place.end() :]


def damage_files(rng: random.Random, usual: Files, paths: Sequence[str], tokens: Sequence[bytes]) -> Files:
    """One of the files `paths` damaged, and now and then another one left out."""
    path = rng.choice(paths)
    change = rng.choice((damaged, other_word))
    files: Files = {path: change(rng, usual[path] or b"", tokens)}
    if rng.random() < 0.02:
        files[rng.choice(sorted(usual))] = None
    return files


def with_checksums(content: bytes) -> bytes:
    """A PNG whose damaged parts have the right checksums, so that the decoder looks at them."""
    data, place = bytearray(content), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(data)


IMAGE_WORDS = (
    *b"Exif\0\0 II*\0 MM\0* IHDR IDAT PLTE tRNS eXIf acTL fcTL fdAT iCCP zTXt RIFF WEBP VP8 VP8L VP8X ALPH".split(),
    *b"ANMF BM GIF89a \x21\xf9 \x2c \x12\x01\x03\0 \x01\x12\0\x03 \0\x01\0\0 \x06 \x03\x01 \x01\x03".split(),
    *b"\xff\xd8 \xff\xd9 \xff\xda \xff\xc0 \xff\xc2 \xff\xe1 \x7f\xff\xff\xff \0\0\x03\xe8".split(),
    *(b"VP8 ", bytes(4), b"\xff" * 4),
)


def damaged_images(files: Sequence[bytes], rng: random.Random) -> Files:
    """One image, damaged; in place of it sometimes the first part of one and the last part of another."""
    content = rng.choice(files)
    if rng.random() < 0.1:
        other = rng.choice(files)
        content = content[: rng.randrange(len(content))] + other[rng.randrange(len(other)) :]
    else:
        content = damaged(rng, content, IMAGE_WORDS)
    if content.startswith(b"\x89PNG") and rng.random() < 0.7:
        content = with_checksums(content)
    return {"image": content}


# JSON


def seldom(draw: Draw, times: int) -> bool:
    """Once in so many times. Not where an integer is 0, which hypothesis prefers."""
    return draw(st.integers(0, times - 1)) == times // 2


@st.composite
def spoilt(draw: Draw, document: Json) -> Json:
    """A document with up to four of its values changed, left out, doubled, or put in place of each other."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 1, 2, 4)))):
        node, depth = document, draw(st.integers(1, 5))
        for level in range(depth):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if level < depth - 1 and isinstance(node[key], dict | list):
                node = node[key]
                continue
            action = draw(st.sampled_from(("odd", "odd", "odd", "number", "text", "cut", "double", "other")))
            if action == "odd":
                node[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
            elif action == "number":
                node[key] = draw(st.one_of(st.integers(-100, 2000), st.floats(-100, 100), st.floats()))
            elif action == "text":
                node[key] = draw(st.text(max_size=5))
            elif action == "cut":
                del node[key]
            elif action == "other":
                node[key] = copy.deepcopy(node[draw(st.sampled_from(keys))])
            elif isinstance(node, list):
                node.append(copy.deepcopy(node[key]))
            else:
                node[draw(st.text(max_size=3))] = node[key]
            break
    return document


def json_text(value: Json, ascii_only: bool = True, **options: Any) -> bytes:
    """As Python writes it, with NaN, and halves of characters."""
    return json.dumps(value, ensure_ascii=ascii_only, **options).encode("utf-8", "surrogatepass")


JSON_WORDS = (
    *b'{ } [ ] , : " null true false NaN Infinity -Infinity -1 0 1e5 1E400 1e 01 - 0.5 // ""'.split(),
    *b'"id" "bbox" "images" "categories" "annotations" "segmentation" "counts" "file_name" "size" [[ ]] {} []'.split(),
    *rb"\u00e9 \ud800 \ud83d\ude00 \n \x".split(),
    *(
        b"9223372036854775808",
        HUGE.encode(),
        b"[" * 2000,
        b'{"a":' * 2000,
        b"\n",
        b"\xff",
        b"\xc3",
        b"\xef\xbb\xbf",
        b"\0",
        b"\xe2\x80\xa8",
    ),
)
SMALL_JSON = {"a": [1, -2.5, 1e3, "é\n\U0001f600", None, True], "b": {"c": [[]], "": [{}]}, "d": [], "e": "x", "f": 12}


def json_bytes(rng: random.Random) -> Files:
    """A damaged file in one of JSON's encodings."""
    documents = (SMALL_JSON, SMALL_JSON, [SMALL_JSON], 12, "text", {"a": [1.5, 2] * 20})
    text = json.dumps(rng.choice(documents), ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, None, 1)))
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"))
    change = rng.choice((damaged, damaged, other_word))
    return {"file.json": change(rng, text.encode(encoding), JSON_WORDS)}


def damaged_counts(rng: random.Random) -> Files:
    """Compressed run lengths of one to three masks, with | between them."""
    usual = (b"05d0a1", b"PP7000", b"0`3", b"o0", b"01Y1O0O0O0O0O0O0O0O0O0O0O0O0O0O0O0")
    tokens = (b"0", b"o", b"P", b"O", b"`", b"n", b"_", b"?", b"@", b"oooo", b"0000", b"/", b"p")
    parts = [damaged(rng, rng.choice(usual), tokens).replace(b"|", b"") for _ in range(rng.choice((1, 1, 2, 3)))]
    return {"counts": b"|".join(parts)}


# COCO

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog", "supercategory": "animal"}]
COORDINATES = st.one_of(st.integers(-5, 60), st.floats(-5, 60), st.integers(0, 20).map(lambda value: value / 4))
SIDES = st.one_of(st.integers(0, 60), st.floats(0, 60))
BOXES = st.tuples(COORDINATES, COORDINATES, SIDES, SIDES).map(list)
CORNERS = st.one_of(*[st.lists(COORDINATES, min_size=3, max_size=4).map(lambda values: values * 2)] * 3, BOXES)
POLYGONS = st.lists(st.one_of(CORNERS, CORNERS.map(lambda values: values[1:])), min_size=1, max_size=3)


@st.composite
def run_lengths(draw: Draw, size: tuple[int, int]) -> Json:
    """COCO's, of a mask of `size`: a list, or compressed, and then at times with some characters changed."""
    pixels = size[0] * size[1]
    ends = sorted(draw(st.lists(st.integers(0, pixels), max_size=5)))
    counts = np.diff([0, *ends, pixels]).tolist()
    if draw(st.booleans()):
        return {"size": list(size), "counts": counts}
    text = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"].decode()
    for _ in range(draw(st.sampled_from((0, 0, 1, 2)))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.text("0123@ABCOPQ_`abcnop", max_size=3)) + text[place + draw(st.integers(0, 2)) :]
    return {"size": list(size), "counts": text}


@st.composite
def annotations(draw: Draw, image_id: int, size: tuple[int, int]) -> Json:
    """One of an image."""
    record = {"id": draw(st.integers(1, 99)), "image_id": image_id, "category_id": draw(st.sampled_from((2, 7)))}
    record["bbox"] = draw(BOXES)
    extras = draw(st.integers(0, 7))
    if extras & 1:
        record["area"] = draw(SIDES)
    if extras & 2:
        record["iscrowd"] = draw(st.integers(0, 1))
    if extras & 4:
        record["segmentation"] = draw(st.one_of(POLYGONS, run_lengths(size), st.just([])))
    return record


@st.composite
def coco_documents(draw: Draw) -> Json:
    """Mostly right ones."""
    rows = list(enumerate(list(SIZES)[: draw(st.integers(1, 4))], start=1))
    stated = draw(st.booleans())
    sizes = {row: dict(zip(("height", "width"), SIZES[name], strict=True)) if stated else {} for row, name in rows}
    images = [{"id": row, "file_name": name, **sizes[row]} for row, name in rows]
    if seldom(draw, 30):
        images[-1]["file_name"] = draw(st.sampled_from(PATHS))
    some = [draw(st.sampled_from(rows)) for _ in range(draw(st.sampled_from((0, 1, 1, 2, 3, 10))))]
    objects = [draw(annotations(row, SIZES[name])) for row, name in some]
    return draw(spoilt({"images": images, "annotations": objects, "categories": CATEGORIES}))


COCO_FILE = "annotations/instances_train.json"


@st.composite
def coco_inputs(draw: Draw) -> Files:
    """The annotation file, and at times an image that is no image or not there."""
    files: Files = {COCO_FILE: json_text(draw(coco_documents()), draw(st.booleans()))}
    if seldom(draw, 20):
        files["images/a.png"] = draw(st.sampled_from((None, b"", b"\x89PNG\r\n\x1a\n")))
    return files


def usual_coco() -> Files:
    """A COCO tree."""
    images = [{"id": i, "file_name": n, "height": h, "width": w} for i, (n, (h, w)) in enumerate(SIZES.items())]
    images[1] = {"id": 1, "file_name": "é.png"}
    masks = [coco_mask.encode(np.asfortranarray(np.eye(20, dtype=np.uint8)))["counts"].decode(), [5, 10, 385]]
    outlines = [[[1, 2, 10, 2, 10, 12.5], [3, 3, 5, 5, 4, 9, 1, 1]], {"size": [20, 20], "counts": masks[0]}]
    outlines.append({"size": [20, 20], "counts": masks[1]})
    objects = [
        {"id": 10 + i, "image_id": min(i, 1), "category_id": 7, "bbox": [1, 2, 9, 10.5], "area": 40, "iscrowd": i % 2,
         "segmentation": outline} for i, outline in enumerate(outlines)
    ]  # fmt: skip
    content = json_text({"images": images, "annotations": objects, "categories": CATEGORIES}, ascii_only=False)
    return {COCO_FILE: content, **{f"images/{name}": image for name, image in usual_images().items()}}


# YOLO

YAML = b"path: .\ntrain: images/train\nval: [val.txt, images/val]\nnames:\n  0: cat\n  1: 'dog'\nnc: 2\n"
LINES = b"0 0.5 0.5 0.25 0.5\n1 .1 0.2 1e-1 0.2\r\n1 0 0 1 0 0.5 1 0.25 0.75\n\n"
YOLO_FILES = ("data.yaml", "labels/train/a.txt", "labels/val/c.txt", "val.txt")
YOLO_WORDS = (
    *b"path train val names nc kpt_shape : - ? | > { } [ ] , # ' \" & * ! % @ ` ~ <<: --- ... *x &x".split(),
    *b"!!python/object: 0 1 2 -1 nan inf 1e400 1_0 0x1 . .. / /etc ../ images labels".split(),
    *b"\xd9\xa1 \xff \xc3 \xef\xbb\xbf".split(),
    *(b"\n", b"\r", b"\t", b"\0", b"\x0b", b"\x1c", b"\xe2\x80\xa8", b" ", b"\n  ", HUGE.encode(), b"[" * 600),
)
RAW_YAML = [
    *words("~ *x 2020-01-01 '' << yes [a,[b]] {[a]:b} {0:cat,0:dog} - ? | > % @ ` ! & * # [ ] { }"),
    *(
        "&x [*x]",
        "&x {0: *x}",
        "{a: &x [cat], b: *x}",
        "!!python/object/apply:os.getcwd []",
        "!!set {a, b}",
        "[no, yes]",
    ),
    *("{[a]: b}", "{0: cat, 0: dog}", "{1: a, 2: b}", "{0: a, 2: b}", "{<<: {0: cat}}", "? a", "[cat, dog", "\t"),
    *("!!binary aGk=", "|\n  cat\n", "- a\n- b", "\n- cat\n- dog", "\n  0: cat", '"\\ud800"', '"\\0"'),
]
SHARES = st.one_of(
    st.integers(0, 4).map(lambda value: f"{value / 4:g}"), st.floats(0, 1).map(lambda value: f"{value:.3f}")
)
WORDS = st.one_of(
    st.sampled_from(words("nan inf -inf 1e400 -1 2 1.5 1e-9 -0.1 1_0 0x1 \uff11 é , #")),
    st.floats(-2, 3).map(str),
    st.text(max_size=2),
)


@st.composite
def label_lines(draw: Draw) -> str:
    """One object of a label file."""
    count = draw(st.sampled_from((3, 5, 7) if seldom(draw, 20) else (4, 6, 8)))
    words = [draw(st.sampled_from("01")), *(draw(SHARES) for _ in range(count))]
    if seldom(draw, 10):
        words[draw(st.integers(0, count))] = draw(WORDS)
    return " ".join(words)


@st.composite
def yaml_documents(draw: Draw) -> str:
    """JSON is YAML; some values are not JSON."""
    usual = {"path": ".", "train": "images/train", "val": ["val.txt", "images/val"], "names": ["cat", "dog"], "nc": 2}
    document = draw(spoilt(usual))
    lines = []
    for key, value in document.items() if isinstance(document, dict) else ():
        raw = draw(st.sampled_from(RAW_YAML)) if seldom(draw, 20) else json.dumps(value)
        if seldom(draw, 20) and key in ("path", "train", "val"):
            raw = json.dumps(draw(st.sampled_from(PATHS)))
        lines.append(f"{key if key.isalpha() else json.dumps(key)}: {raw}\n")
    return "".join(lines)


@st.composite
def yolo_inputs(draw: Draw) -> Files:
    """One to four of a data set's text files."""
    files: Files = {}
    which = draw(st.integers(1, 15))
    if which & 1:
        files["data.yaml"] = draw(yaml_documents()).encode("utf-8", "surrogatepass")
    for bit, path in ((2, "labels/train/a.txt"), (4, "labels/val/c.txt")):
        if which & bit:
            ends = draw(st.sampled_from(("\n", "\n", "\r\n", "\n\n", "\x0b", "\u2028")))
            files[path] = ends.join(draw(st.lists(label_lines(), max_size=4))).encode("utf-8", "surrogatepass")
    if which & 8:
        lines = st.sampled_from(PATHS if seldom(draw, 4) else ("images/val/c.webp", "./images/train/a.png", ""))
        files["val.txt"] = "\n".join(draw(st.lists(lines, max_size=3))).encode()
    if seldom(draw, 20):
        files["images/train/a.png"] = draw(st.sampled_from((None, b"", b"\x89PNG\r\n\x1a\n")))
    return files


def usual_yolo() -> Files:
    """A YOLO tree, with a label file outside of its folders."""
    images = usual_images()
    return {
        "data.yaml": YAML,
        "labels/train/a.txt": LINES,
        "labels/val/c.txt": b"",
        "val.txt": b"images/val/c.webp\n",
        "images/train/a.png": images["a.png"],
        "images/train/b.jpg": images["sub/c.jpg"],
        "images/val/c.webp": images["d.webp"],
    }


# Pascal VOC

FIELDS = {"width": "48", "height": "32", "depth": "3", "xmin": "9", "ymin": "5", "xmax": "24", "ymax": "20"}
VOC_FILES = ("Annotations/a.xml", "Annotations/b.xml", "ImageSets/Main/train.txt", "ImageSets/Main/val.txt")
TEXTS = ["", " ", " 5\n", HUGE, *words("0 1 -3 4.5 100 1e9 1e400 nan inf 0x1 \uff11\uff12 1_0 cat é")]
FILE_NAMES = ["a.png", "b.jpg", "c.webp", "", "a", "A.PNG", "a.jpg", "C:\\x\\a.png", "a.png\n", "\ta.png"]
XML_WORDS = (
    *b"< > </ /> & &amp; &lt; &#65; &#0; &#xd800; &x; <!DOCTYPE <!ENTITY <![CDATA[ ]]> <!-- --> <? ?> xmlns=".split(),
    *b"<object> </object> <name> </name> <bndbox> <xmin> <annotation> </annotation> <filename> <size>".split(),
    *b"<difficult> cat nan 1e400 -1 0 ../ / \xff \xc3 \xef\xbb\xbf \xff\xfe \xfe\xff".split(),
    *(b'<?xml version="1.0" encoding="%s"?>' % name for name in b"utf-16 latin-1 nonsense utf-7 idna cp932".split()),
    *(b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>', b"<x>" * 500, HUGE.encode()),
    *(b"\n", b"\r\n", b"\0", b" "),
)


def element(tag: str, *inner: str) -> str:
    """In XML."""
    return f"<{tag}>{''.join(inner)}</{tag}>"


def usual_xml(image: str, names: Sequence[str], texts: dict[str, str], more: str = "") -> str:
    """A VOC annotation; `more` goes into each object."""

    def field(tag: str) -> str:
        return element(tag, escape(texts[tag]))

    box = element("bndbox", *map(field, ("xmin", "ymin", "xmax", "ymax")))
    objects = [element("object", element("name", escape(name)), more, box) for name in names]
    size = element("size", *map(field, ("width", "height", "depth")))
    return element("annotation", element("filename", escape(image)), size, *objects)


@st.composite
def voc_inputs(draw: Draw) -> Files:
    """An XML file with some fields changed or left out, and at times a list of the files."""
    texts = dict(FIELDS)
    for _ in range(draw(st.sampled_from((0, 1, 1, 2)))):
        numbers = st.one_of(st.sampled_from(TEXTS), st.integers(-5, 60).map(str), st.floats(-5, 60).map(str))
        texts[draw(st.sampled_from(list(FIELDS)))] = draw(numbers)
    names = draw(st.lists(st.one_of(st.sampled_from(("cat", "dog")), st.sampled_from(NAMES)), max_size=3))
    image = draw(st.sampled_from(("a.png", "a.png", "a.png", *FILE_NAMES, *PATHS)))
    more = draw(
        st.sampled_from(("", "<difficult>1</difficult>", "<difficult>x</difficult>", "<part><name>x</name></part>"))
    )
    text = usual_xml(image, names, texts, more)
    if seldom(draw, 5):
        tag = draw(st.sampled_from(("filename", "object", "name", "size", "bndbox", *FIELDS)))
        text = text.replace(f"</{tag}>", "", 1).replace(f"<{tag}>", "", 1)
    files: Files = {draw(st.sampled_from(VOC_FILES[:2])): text.encode("utf-8", "surrogatepass")}
    if seldom(draw, 10):
        stems = st.lists(
            st.sampled_from(("a", "b", "c", "a 1", "b -1", "", "../a", "/etc/passwd", "é", "x" * 300)), max_size=3
        )
        files[draw(st.sampled_from(VOC_FILES[2:]))] = "\n".join(draw(stems)).encode()
    return files


def usual_voc() -> Files:
    """A VOC tree of two splits."""
    images = usual_images()
    files: Files = {"ImageSets/Main/train.txt": b"a\nc -1\n", "ImageSets/Main/val.txt": b"b 1\n"}
    for stem, name in (("a", "a.png"), ("b", "b.jpg"), ("c", "c.webp")):
        files[f"JPEGImages/{name}"] = images[{"b.jpg": "sub/c.jpg", "c.webp": "d.webp"}.get(name, name)]
        texts = FIELDS if stem == "a" else {**FIELDS, "width": "0", "height": "0"}
        files[f"Annotations/{stem}.xml"] = usual_xml(name, ["cat", "dog"][: "abc".index(stem)], texts).encode()
    return files


# The datasets library

SAVED = "data-00000-of-00001.arrow"
BOX_KINDS = [
    *(pa.list_(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float32(), 4), pa.float64(), pa.string()),
    *map(pa.list_, (pa.int64(), pa.string(), pa.bool_(), pa.list_(pa.float64()))),
    *(pa.struct([(name, pa.float64()) for name in names]) for names in ("xywh", ("x1", "y1", "x2", "y2"), "x")),
]
CATEGORY_KINDS = [*[pa.int64()] * 2, *map(pa.list_, (pa.int64(), pa.string())), pa.string(), pa.int8(), pa.float64()]
CATEGORY_KINDS += [pa.bool_(), pa.uint64(), pa.null()]
COUNTS_KINDS = (pa.string(), pa.list_(pa.int64()))
EXTRA_KINDS: dict[str, list[pa.DataType]] = {  # of an object
    "area": [pa.float64(), pa.int64(), pa.string()],
    "iscrowd": [pa.bool_(), pa.int64(), pa.string(), pa.float64()],
    "segmentation": [
        pa.list_(pa.list_(pa.float64())),
        *(pa.struct([("size", pa.list_(pa.int64())), ("counts", kind)]) for kind in COUNTS_KINDS),
        *(pa.list_(pa.list_(pa.int64())), pa.list_(pa.float64()), pa.string(), pa.binary()),
    ],
}
COLUMN_KINDS: dict[str, list[pa.DataType]] = {
    "image_id": [pa.int64(), pa.string(), pa.uint64(), pa.float64()],
    "width": [pa.int64(), pa.float64(), pa.string(), pa.int8()],
    "height": [pa.int64(), pa.float64(), pa.string(), pa.int8()],
    "file_name": [pa.string(), pa.int64(), pa.list_(pa.string()), pa.binary()],
    "id": [pa.int64()],
}


RANGES = {"category": (0, 1), "iscrowd": (0, 1)}  # of whole numbers that are usual, by field
RANGES |= dict.fromkeys(("low", "x", "y", "x1", "y1"), (0, 5)) | dict.fromkeys(("high", "w", "h", "x2", "y2"), (6, 20))


@st.composite
def cells(draw: Draw, kind: pa.DataType, name: str) -> Any:
    """A value of an Arrow type; at times an odd one, or null."""
    odd, usual = seldom(draw, 60), st.integers(*RANGES.get(name, (1, 20)))
    if pa.types.is_null(kind) or seldom(draw, 100):
        return None
    if pa.types.is_fixed_size_list(kind):
        return [draw(cells(kind.value_type, name)) for name in ("low", "low", "high", "high")]
    if pa.types.is_list(kind):
        count = {"bbox": 4, "segmentation": 6 if pa.types.is_primitive(kind.value_type) else 1, "size": 2}.get(name, 1)
        count = draw(st.sampled_from((0, 3, 5))) if odd else count if name else draw(st.sampled_from((1, 2, 3, 0)))
        names = [name] * count if name != "bbox" else ["low"] * 2 + ["high"] * (count - 2)
        return [draw(cells(kind.value_type, one)) for one in names]
    if pa.types.is_struct(kind):
        return {field.name: draw(cells(field.type, field.name)) for field in kind}
    if pa.types.is_integer(kind):
        bits, signed = kind.bit_width, not pa.types.is_unsigned_integer(kind)
        if odd:
            return draw(st.sampled_from((-(2 ** (bits - 1)), -1) if signed else (2**bits - 1,)))
        return draw(usual)
    if pa.types.is_floating(kind):
        return draw(st.sampled_from((math.nan, math.inf, -1.0, 0.5, 1e30))) if odd else float(draw(usual))
    if pa.types.is_boolean(kind):
        return draw(st.booleans())
    if pa.types.is_binary(kind):
        return draw(st.binary(max_size=4))
    return draw(st.sampled_from([text for text in NAMES + PATHS if "\ud800" not in text] if odd else ["cat", "dog"]))


def saved(table: pa.Table, features: datasets.Features) -> Files:
    """What save_to_disk leaves."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": SAVED}], "_fingerprint": "0", "_format_columns": None, "_format_kwargs": {}}
    state |= {"_format_type": None, "_output_all_columns": False, "_split": "train"}
    info = json_text({"features": features.to_dict(), "citation": "", "description": "", "homepage": "", "license": ""})
    return {SAVED: sink.getvalue().to_pybytes(), "state.json": json_text(state), "dataset_info.json": info}


@st.composite
def hub_inputs(draw: Draw, images: Sequence[bytes] = ()) -> Files:
    """A saved data set of some rows. Its columns have odd types at times, and any value may be null."""

    def kind_of(kinds: Sequence[pa.DataType]) -> pa.DataType:
        return draw(st.sampled_from(kinds if seldom(draw, 8) else kinds[:2]))

    fields = {"bbox": kind_of(BOX_KINDS), "category": kind_of(CATEGORY_KINDS)}
    fields |= {name: kind_of(kinds) for name, kinds in EXTRA_KINDS.items() if seldom(draw, 4)}
    if seldom(draw, 30):
        del fields[draw(st.sampled_from(list(fields)))]
    rows, lists = draw(st.integers(1, 3)), draw(st.booleans())
    paths = st.sampled_from(PATHS) if seldom(draw, 8) else st.none()
    image = st.fixed_dictionaries({"bytes": st.sampled_from((*images * 8, b"GIF89a", None)), "path": paths})
    arrays = {"image": pa.array([draw(image) for _ in range(rows)], datasets.Image().pa_type)}
    if lists:  # of one length, nearly always
        made = []
        for _ in range(rows):
            lengths = dict.fromkeys(fields, draw(st.sampled_from((1, 2, 3, 0))))
            if seldom(draw, 20):
                lengths[draw(st.sampled_from(list(fields)))] += 1
            made.append(
                {name: [draw(cells(kind, name)) for _ in range(lengths[name])] for name, kind in fields.items()}
            )
        arrays["objects"] = pa.array(made, pa.struct([(name, pa.list_(kind)) for name, kind in fields.items()]))
    else:
        objects = pa.list_(pa.struct(list(fields.items())))
        arrays["objects"] = pa.array([draw(cells(objects, "")) for _ in range(rows)], objects)
    for name, kinds in COLUMN_KINDS.items():
        if seldom(draw, 4):
            kind = kind_of(kinds)
            arrays[name] = pa.array([draw(cells(kind, name)) for _ in range(rows)], kind)
    features = datasets.Features.from_arrow_schema(pa.table(arrays).schema)
    features["image"] = datasets.Image()
    if draw(st.booleans()) and fields.get("category") == pa.int64():
        label = datasets.ClassLabel(names=["cat", "dog"])
        inner = features["objects"] if lists else features["objects"].feature
        inner["category"] = datasets.List(label) if lists else label
    return saved(pa.table(arrays, schema=features.arrow_schema), features)


def usual_hub() -> Files:
    """A saved data set of one row."""
    kind = datasets.Features(
        {"bbox": datasets.List(datasets.Value("float32")), "category": datasets.ClassLabel(names=["cat"])}
    )
    features = datasets.Features({"image": datasets.Image(), "objects": datasets.List(kind)})
    cell = {"bytes": usual_images()["a.png"], "path": None}
    rows = {"image": [cell], "objects": [[{"bbox": [1, 2, 3, 4], "category": 0}]]}
    return saved(pa.Table.from_pydict(rows, schema=features.arrow_schema), features)


def usual_imagefolder() -> Files:
    """A folder of images with a file about them."""
    lines = [{"file_name": name, "objects": {"bbox": [[1, 2, 3, 4]], "category": [0]}} for name in ("a.png", "é.png")]
    files: Files = {f"train/{name}": image for name, image in usual_images().items() if "/" not in name}
    return {**files, "train/metadata.jsonl": b"".join(json_text(line) + b"\n" for line in lines)}


@st.composite
def imagefolder_inputs(draw: Draw) -> Files:
    """The file about the images."""
    usual = (usual_imagefolder()["train/metadata.jsonl"] or b"").decode()
    lines = draw(spoilt([json.loads(line) for line in usual.splitlines()]))
    return {"train/metadata.jsonl": b"".join(json_text(line) + b"\n" for line in lines)}


Make = Callable[[random.Random], Files]


def damage(usual: Files, paths: Sequence[str], tokens: Sequence[bytes]) -> Make:
    """Inputs in which one of the files `paths` is damaged."""
    return partial(damage_files, usual=usual, paths=paths, tokens=tokens)
