"""COCO sets that are malformed. Tables, in which one argument a line would hide what belongs together."""

import shutil
from typing import Any

import numpy as np
from malformed import add, all_of, cut, file, folder, loop, put, swap, text
from malformed_sets import (
    AGAIN,
    AREA,
    BOMB,
    CLIPPED,
    COCO,
    FINE,
    GOOD,
    HEIGHT,
    PARTS,
    PICTURE,
    SIZES,
    SMALL,
    SQUARE,
    TWICE,
    UNREADABLE,
    WIDTH,
    CocoTree,
    picture,
    runs,
    turned,
)

from direct_pt.data.problems import ERROR, NOTE, REPAIRED

# fmt: off
# COCO: the file

JSON = "cannot be read as JSON"
ANEW = "; write it anew, in UTF-8"
NO_COCO = "FILE: is no COCO file: expected an object with 'images', 'annotations', 'categories'"
DEEP = "maximum recursion depth exceeded while decoding a JSON array from a unicode string"
for layout in COCO:
    add(f"{layout} good", FINE)
    add(f"{layout} cut short", ERROR, text(lambda s: s[:300]), f"FILE: {JSON} (...")
for layout in ("explicit", "plain", "coco2017"):
    add(f"{layout} no image folder", ERROR, after=lambda tree: tree.images.rename(tree.folder / "elsewhere"),
        message="IMAGES: no such image folder (the images of FILE)",
        also=() if layout == "coco2017" else ("IMAGES: no such image folder (the images of VAL)",))
add("plain empty file", ERROR, text(lambda s: ""), f"FILE: {JSON} (Expecting value: line 1 column 1 (char 0)){ANEW}")
add("plain list", ERROR, text(lambda s: "[1, 2]"), NO_COCO)
add("plain null", ERROR, text(lambda s: "null"), NO_COCO)
add("plain results file", ERROR, lambda tree: setattr(tree, "train", tree.train["annotations"]), NO_COCO)
add("plain byte order mark", FINE, text(lambda s: s.encode("utf-8-sig")))
add("plain UTF-16", FINE, text(lambda s: s.encode("utf-16")))
add("plain Latin-1", ERROR, text(lambda s: s.replace("cat", "c\xe4t").encode("latin-1")),
    f"FILE: {JSON} ('utf-8' codec can't decode byte 0xe4 in position ...")
add("plain gzip", ERROR, text(lambda s: b"\x1f\x8b\x08" + s.encode()),
    f"FILE: {JSON} ('utf-8' codec can't decode byte 0x8b in position 1: invalid start byte){ANEW}")
add("plain one quote", ERROR, text(lambda s: s.replace('"', "'")),
    f"FILE: {JSON} (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)){ANEW}")
add("plain something behind", ERROR, text(lambda s: s + "\n" + s),
    f"FILE: {JSON} (Extra data: line 2 column 1 (char ...")
add("plain 1e400", ERROR, swap("[8, 6", "[1e400, 6"), annotation=11, left=GOOD[1:],
    message="FILE: annotation 11 has bbox [inf, 6, 16, 12]; expected [x, y, width, height] in pixels, finite, ...")
add("plain NaN", ERROR, swap("[8, 6", "[NaN, 6"), annotation=11, left=GOOD[1:],
    message="FILE: annotation 11 has bbox [nan, 6, 16, 12]; expected [x, y, width, height] in pixels, finite, ...")
add("plain 4,001 digits", ERROR, swap("[8, 6", f"[{10**4000}, 6"), annotation=11, left=GOOD[1:],
    message=f"FILE: annotation 11 has bbox [{10**98}; expected [x, y, width, height] in pixels, ...")
add("plain 5,000 digits", ERROR, swap("[8, 6", f"[{'9' * 5000}, 6"),
    f"FILE: {JSON} (Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits){ANEW}")
add("plain deep nesting", ERROR, swap('"year": 2024', '"year": ' + "[" * 100_000), f"FILE: {JSON} ({DEEP}){ANEW}")
add("plain deep nesting, closed", ERROR, swap('"year": 2024', '"year": ' + "[" * 100_000 + "]" * 100_000),
    f"FILE: {JSON} ({DEEP}){ANEW}")
add("plain much white space", FINE, text(lambda s: " " * 10**7 + s.replace("[", "[" + "\n" * 10**7, 1)))
add("plain a key twice", FINE, swap('"info"', '"images": [], "info"'))  # the last one counts
add("plain a field twice", FINE, swap('"id": 11', '"category_id": 3, "id": 11'))
add("explicit annotations are a folder", ERROR, after=folder("labels.json"),
    message="FILE: no such annotation file (a folder)")
add("explicit annotations link to themselves", ERROR, after=loop("labels.json"),
    message="FILE: no such annotation file (Too many levels of symbolic links)")
add("explicit images are a file", ERROR, after=file("pictures", ""),
    message="IMAGES: no such image folder (the images of ...",
    also=("IMAGES: no such image folder (the images of VAL)",))
add("plain images link to themselves", ERROR, after=loop("images"),
    message="IMAGES: no such image folder (the images of FILE)",
    also=("IMAGES: no such image folder (the images of VAL)",))

# COCO: lists and records

for key in ("images", "annotations", "categories"):
    needs = f"FILE: needs the key '{key}' with a list; a COCO detection file has one"
    add(f"plain no {key}", ERROR, lambda tree, key=key: tree.train.pop(key), needs)
    add(f"plain {key} an object", ERROR, lambda tree, key=key: tree.train.update({key: {"1": {}}}), needs)
    first = "image_id" if key == "annotations" else "id"
    add(f"roboflow {key} with null", ERROR, lambda tree, key=key: tree.train[key].append(None),
        f"FILE: {key}[{2 + (key == 'annotations')}] lacks '{first}'", left=GOOD)
add("plain images empty", ERROR, lambda tree: tree.train["images"].clear(),
    "FILE: 'images' is empty; there is nothing to read")
add("plain categories empty", ERROR, lambda tree: tree.train["categories"].clear(),
    "FILE: 'categories' is empty; list the classes there")
add("plain annotations empty", FINE, lambda tree: tree.train["annotations"].clear(), left=[])
add("plain captions", ERROR, lambda tree: [record.pop("bbox") for record in tree.train["annotations"]],
    "FILE: annotations[0] (id 11) lacks 'bbox'", annotation=11, left=[],
    also=tuple(f"FILE: annotations[{row}] (id {12 + row - 1}) lacks 'bbox'" for row in (1, 2)))
for name in ("image_id", "category_id", "bbox"):
    add(f"coco2017 no {name}", ERROR, cut("annotations", 0, name), f"FILE: annotations[0] (id 11) lacks '{name}'",
        annotation=11, left=GOOD[1:])
add("plain no annotation id", FINE, cut("annotations", 0, "id"))
add("plain no file_name", ERROR, cut("images", 0, "file_name"), "FILE: images[0] (id 1) lacks 'file_name'",
    left=GOOD[2:])
add("plain no class name", ERROR, cut("categories", 1, "name"), "FILE: categories[1] (id 1) lacks 'name'",
    left=GOOD[1:])

WHOLE = "; it must be a whole number"
UNLISTED = "has image_id 1, which 'images' does not list; correct one of them"
UNKNOWN = (f"FILE: annotation 11 {UNLISTED}", f"FILE: annotation 12 {UNLISTED}")
UNNAMED = ("FILE: annotation 11 has category_id 1, which 'categories' does not list; correct one of them",)
for what, value in {"text": "1", "a fraction": 1.0, "true": True, "null": None, "huge": 2**63, "a list": [1]}.items():
    told = f"(id {value!r}) has id {value!r}{WHOLE}"
    add(f"explicit image id {what}", ERROR, put("images", 0, "id", value), f"FILE: images[0] {told}", left=GOOD[2:],
        also=UNKNOWN)
    add(f"plain category id {what}", ERROR, put("categories", 1, "id", value), f"FILE: categories[1] {told}",
        left=GOOD[1:], also=UNNAMED)
    add(f"roboflow annotation id {what}", ERROR, put("annotations", 0, "id", value), f"FILE: annotations[0] {told}",
        left=GOOD[1:], annotation=value if what == "huge" else None)
    for name in ("image_id", "category_id"):
        add(f"coco2017 {name} {what}", ERROR, put("annotations", 0, name, value), annotation=11, left=GOOD[1:],
            message=f"FILE: annotations[0] (id 11) has {name} {value!r}{WHOLE}")
add("plain unknown image", ERROR, put("annotations", 0, "image_id", 99), annotation=11, left=GOOD[1:],
    message="FILE: annotation 11 has image_id 99, which 'images' does not list; correct one of them")
add("plain unknown class", ERROR, put("annotations", 0, "category_id", 99), annotation=11, left=GOOD[1:],
    message="FILE: annotation 11 has category_id 99, which 'categories' does not list; correct one of them")
add("plain image id twice", ERROR, put("images", 1, "id", 1), "FILE: images[].id 1 is used twice; ids must be unique",
    left=GOOD[:2], also=("FILE: annotation 13 has image_id 2, which 'images' does not list; correct one of them",))
add("plain file name twice", ERROR, put("images", 1, "file_name", "a.png"), left=GOOD[:2],
    message="FILE: images[].file_name a.png is used twice; join the annotations of the two records")
add("plain category id twice", ERROR, put("categories", 1, "id", 3), left=GOOD[1:],
    message="FILE: categories[].id 3 is used twice; ids must be unique", also=UNNAMED)
add("plain class name twice", ERROR, put("categories", 1, "name", "dog"), left=GOOD[1:],
    message="FILE: categories[].name dog is used twice; rename one, or give both one id")
for what, value in {"null": None, "a list": ["cat"], "true": True, "empty": ""}.items():
    add(f"plain class name {what}", ERROR, put("categories", 1, "name", value), left=GOOD[1:],
        message=f"FILE: categories[1] (id 1) has name {value!r}; it must be text")
add("plain annotation id twice", NOTE, put("annotations", 1, "id", 11), annotation=11, counts={AGAIN: 1})
add("plain annotated twice", NOTE,
    lambda tree: tree.train["annotations"].append({**tree.train["annotations"][0], "id": 14}),
    annotation=14, counts={TWICE: 1}, left=[*GOOD[:2], GOOD[0], GOOD[2]])
OTHER = "VAL: its categories differ from those of FILE: of ..."
add("plain other classes in val", ERROR, lambda tree: tree.val["categories"].pop(0), OTHER, split="val", left=GOOD)
add("coco2017 renamed class in val", ERROR, lambda tree: tree.val["categories"][0].update(name="Cat"), OTHER,
    split="val", left=GOOD)
add("plain fault in val", ERROR, lambda tree: tree.val["annotations"][0].update(bbox=None), split="val", left=GOOD,
    annotation=21, message="VAL: annotation 21 has bbox None; expected [x, y, width, height] in pixels, ...")
add("plain unknown --classes", ERROR, message="--classes dgo: FILE has no such class; near ones: dog",
    flags=lambda tree: {"classes": ("dgo",)})
add("explicit two files of the same images", ERROR,
    after=lambda tree: shutil.copy(tree.file, tree.folder / "more.json"),
    message="SET/more.json: lists a.png, as does FILE; join its objects in one file",
    flags=lambda tree: {"train_annotations": (tree.file, tree.folder / "more.json")})

# COCO: boxes, areas, crowds, sizes

BOX = "; expected [x, y, width, height] in pixels, finite, no side negative"
BAD_BOXES: dict[str, Any] = {
    "negative width": [8, 6, -16, 12], "negative height": [8, 6, 16, -0.5], "infinite": [8, float("-inf"), 16, 12],
    "beyond all images": [8, 6, 1e300, 12], "of three": [8, 6, 16], "of five": [8, 6, 16, 12, 1], "text": "8 6 16 12",
    "of texts": ["8", "6", "16", "12"], "null": None, "of null": [8, 6, None, 12], "true": True, "empty": [],
    "of true": [True, 6, 16, 12], "an object": {"x": 8, "y": 6}, "nested": [[8, 6, 16, 12]],
}
for what, value in BAD_BOXES.items():
    add(f"plain box {what}", ERROR, put("annotations", 0, "bbox", value),
        f"FILE: annotation 11 has bbox {value!r}{BOX}", annotation=11, left=GOOD[1:])
MENDED_BOXES = {
    "without area": ([8, 6, 0, 0], {SMALL: 1}),
    "outside": ([70, 6, 16, 12], {SMALL: 1, CLIPPED: 1}),
    "over the edges": ([-5, -5, 80, 60], {CLIPPED: 1}),
    "in shares, one": ([0.1, 0.2, 0.3, 0.4], {SMALL: 1}),
}
for what, (box, counts) in MENDED_BOXES.items():
    add(f"plain box {what}", REPAIRED, put("annotations", 0, "bbox", box), annotation=11, counts=counts,
        left=[("a", "cat", box), *GOOD[1:]])
SHARES = "all its boxes lie within 1 pixel: they look like shares of the image's sides; boxes are in pixels"


def in_shares(tree: CocoTree) -> None:
    """All boxes in shares of the images' sides."""
    for record in tree.train["annotations"]:
        record["bbox"] = (np.array(record["bbox"]) / (WIDTH, HEIGHT, WIDTH, HEIGHT)).tolist()


def as_corners(tree: CocoTree) -> None:
    """Ten boxes as (x1, y1, x2, y2)."""
    boxes = [[20 + number, 25, 50 + number, 40] for number in range(10)]
    tree.train["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": box} for box in boxes]


add("coco2017 boxes in shares", ERROR, in_shares, f"FILE: {SHARES}")
add("roboflow boxes as corners", ERROR, as_corners,
    "FILE: its boxes look like [x1, y1, x2, y2]: most leave their images as [x, y, width, height], none as corners; "
    "rewrite them, or for a hub data set give --bbox-format voc")
BAD_AREAS: dict[str, Any] = {
    "negative": -192,
    "null": None, "text": "192", "true": True, "NaN": float("nan"), "1e400": 1e400, "401 digits": 10**400,
}
for what, value in BAD_AREAS.items():
    add(f"plain area {what}", REPAIRED, put("annotations", 0, "area", value), annotation=11, counts={AREA: 1})
add("plain no area", REPAIRED, cut("annotations", 0, "area"), annotation=11, counts={AREA: 1})
for what, value in {"2": 2, "text": "0", "a half": 0.5, "NaN": float("nan"), "a list": [0]}.items():
    add(f"plain iscrowd {what}", ERROR, put("annotations", 0, "iscrowd", value), annotation=11, left=GOOD[1:],
        message=f"FILE: annotation 11 has iscrowd {value!r}; expected 0 or 1")
for what, value in {"true": True, "null": None}.items():
    add(f"plain iscrowd {what}", FINE, put("annotations", 0, "iscrowd", value))
BAD_HEIGHTS = {"0": 0, "-1": -1, "text": "48", "a fraction": 48.5, "null": None, "2**31": 2**31, "true": True}
for what, value in BAD_HEIGHTS.items():
    add(f"plain height {what}", REPAIRED, put("images", 0, "height", value), counts={SIZES: 1})
add("plain no width", REPAIRED, cut("images", 0, "width"), counts={SIZES: 1})
add("plain height of another image", UNREADABLE, put("images", 0, "height", 50),
    "IMAGES/a.png: is 64x48 pixels, but its annotation says 64x50; put the image in place that was annotated, or ...")
add("plain sides swapped", UNREADABLE, lambda tree: tree.train["images"][0].update(height=WIDTH, width=HEIGHT),
    "IMAGES/a.png: is 64x48 pixels, but its annotation says 48x64; put the image in place that was annotated, or ...")

# COCO: outlines

NO_OUTLINE = "has a 'segmentation' that is neither polygons [[x1, y1, x2, y2, ...], ...] nor COCO run lengths"
FAR = f"it has a corner far outside of its image of {WIDTH}x{HEIGHT} pixels"
COUNTED = f"its counts do not sum to the {WIDTH * HEIGHT} pixels of its size"
PACKED = runs()["counts"]
OF_SIZE = {"size": [HEIGHT, WIDTH]}
SUM = "its counts do not sum to the pixels of its size"
BAD_OUTLINES: dict[str, tuple[Any, str]] = {
    "with an x too many": ([[24, 12, 40, 12, 40, 36, 24]], "it has an x without a y"),
    "not nested": (SQUARE[0], "..."),
    "of points": ([[[24, 12], [40, 12], [40, 36]]], "it has a coordinate that is no number"),
    "a text": ("24,12,40,12,40,36", "it has a coordinate that is no number"),
    "of texts": (["24 12 40 12 40 36"], "it has a coordinate that is no number"),
    "of NaN": ([[24, 12, 40, 12, 40, float("nan")]], "it has a coordinate that is not finite"),
    "of 401 digits": ([[24, 12, 40, 12, 40, 10**400]], "int too large to convert to float"),
    "far away": ([[24, 12, 1e9, 12, 40, 36]], FAR),
    "far above": ([[24, 12, 40, -5000, 40, 36]], FAR),
    "a number": (5, "..."),
    "true": (True, "..."),
    "an empty object": ({}, "..."),
    "run lengths turned": (runs(WIDTH, HEIGHT), "its size [64, 48] is not the image's [48, 64]"),
    "run lengths of a smaller image": (runs(40, 50), "its size [40, 50] is not the image's [48, 64]"),
    "run lengths without size": ({"counts": PACKED}, "..."),
    "run lengths of size null": ({"counts": PACKED, "size": None}, "..."),
    "run lengths of size 1e400": ({"counts": PACKED, "size": [1e400, 1]}, "..."),
    "run lengths of nonsense": ({"counts": "hello world", **OF_SIZE}, SUM),
    "run lengths not ASCII": ({"counts": "\u00e9\u00e9", **OF_SIZE}, SUM),
    "run lengths cut short": ({"counts": PACKED[:-1], **OF_SIZE}, SUM),
    "run lengths cut in the middle": ({"counts": PACKED[:-4], **OF_SIZE}, SUM),
    "run lengths empty": ({"counts": "", **OF_SIZE}, SUM),
    "counts negative": ({"counts": [-5, WIDTH * HEIGHT + 5], **OF_SIZE}, COUNTED),
    "counts too few": ({"counts": [5, 10], **OF_SIZE}, COUNTED),
    "counts too many": ({"counts": [5, WIDTH * HEIGHT], **OF_SIZE}, COUNTED),
    "counts of fractions": ({"counts": [5.5, WIDTH * HEIGHT - 5.5], **OF_SIZE}, SUM),
    "counts of texts": ({"counts": ["5"], **OF_SIZE}, "..."),
    "counts null": ({"counts": None, **OF_SIZE}, "..."),
    "counts of 30 digits": ({"counts": [10**30], **OF_SIZE}, COUNTED),
}
for what, (value, reason) in BAD_OUTLINES.items():
    end = "" if reason == "..." else ")"
    add(f"plain outline {what}", ERROR, put("annotations", 1, "segmentation", value), annotation=12,
        message=f"FILE: annotation 12 {NO_OUTLINE} ({reason}{end}", left=[GOOD[0], GOOD[2]])
LINE_ONLY = [24, 12, 40, 36]
for what, value in {"of two corners": [LINE_ONLY], "partly of two": [LINE_ONLY, *SQUARE], "empty part": [[]]}.items():
    add(f"plain outline {what}", REPAIRED, put("annotations", 1, "segmentation", value), annotation=12,
        counts={PARTS: 1})
for what, value in {"null": None, "empty": [], "counted": {"counts": [1170, 10, 1892], **OF_SIZE}}.items():
    add(f"plain outline {what}", FINE, put("annotations", 1, "segmentation", value))

# COCO: names of image files, and the files

LIES = "it must lie in the image folder: give it relative to that, without '..'"
SPELLING = "images of other spelling taken"
GONE = "listed in FILE but not there (1 of 2 images are missing); check the image folder"
LONG, LONGER = "x" * 300 + ".png", "x" * 5000
for what, value in {"above": "../secret.jpg", "outside": "../../secret.jpg", "aside": "x/../../../secret.jpg",
                    "absolute": "/etc/hostname"}.items():
    add(f"plain name {what}", ERROR, put("images", 0, "file_name", value), left=GOOD[2:],
        message=f"FILE: images[0] (id 1) has file_name {value!r}; {LIES}")
add("roboflow name outside", ERROR, put("images", 0, "file_name", "../../secret.jpg"), left=GOOD[2:],
    message=f"FILE: images[0] (id 1) has file_name '../../secret.jpg'; {LIES}")
for what, value in {"null": None, "a number": 5, "a list": ["a.png"], "empty": ""}.items():
    add(f"plain name {what}", ERROR, put("images", 0, "file_name", value), left=GOOD[2:],
        message=f"FILE: images[0] (id 1) has file_name {value!r}; {LIES}")
add("plain name with NUL", ERROR, put("images", 0, "file_name", "a.png\0"), left=GOOD[2:],
    message="FILE: images[0] (id 1) has file_name 'a.png\\x00'; ...")
def no_file(what: str) -> str:
    """GONE, with what is in its place."""
    return GONE.replace("but not there", f"but not a file that can be read: {what}")


MISSING_NAMES = {
    "of no file": "c.png", "long": LONG, "longer": LONGER, "half a character": "\ud800.png",
    "a drive's": "C:\\pictures\\a.png", "with backslashes": "sub\\a.png",
}
add("plain name with other case", REPAIRED, put("images", 0, "file_name", "A.PNG"), counts={SPELLING: 1}, left=GOOD)
add("coco2017 name with other case, no size", REPAIRED, counts={SPELLING: 1, SIZES: 1}, left=GOOD,
    spoil=all_of(put("images", 0, "file_name", "A.PNG"), cut("images", 0, "height")))
for what, value in MISSING_NAMES.items():
    gone = f"IMAGES/{value}: {no_file('File name too long') if 'long' in what else GONE}"
    add(f"plain name {what}", ERROR, put("images", 0, "file_name", value), gone, left=GOOD[2:])
    add(f"coco2017 name {what}, no size", ERROR, left=GOOD[2:], message=gone,
        spoil=all_of(put("images", 0, "file_name", value), cut("images", 0, "height")))


def into_a_folder(tree: CocoTree) -> None:
    """The file is there, under a name with another slash."""
    (tree.images / "sub").mkdir()
    (tree.images / "a.png").rename(tree.images / "sub/a.png")
    tree.train["images"][0]["file_name"] = "sub\\a.png"


add("plain name with backslashes for slashes", ERROR, into_a_folder, left=GOOD[2:],
    message="IMAGES/sub\\a.png: listed in FILE but not there (1 of 2 images are missing); write its name with / in "
    "place of \\")
add("plain image missing", ERROR, lambda tree: tree.drop("images/a.png"), f"IMAGES/a.png: {GONE}", left=GOOD[2:])
add("roboflow all images missing", ERROR, lambda tree: [tree.drop(f"train/{name}.png") for name in "ab"],
    message="IMAGES/a.png: listed in FILE but not there (2 of 2 images are missing); check the image folder",
    also=("IMAGES/b.png: listed in FILE but not there (2 of 2 images are missing); check the image folder",))
add("plain image a folder", ERROR, folder("images/a.png"), f"IMAGES/a.png: {no_file('a folder')}", left=GOOD[2:])
add("plain image a link to itself", ERROR, loop("images/a.png"),
    f"IMAGES/a.png: {no_file('Too many levels of symbolic links')}", left=GOOD[2:])
add("plain folder in itself", FINE, all_of(lambda tree: (tree.images / "again").symlink_to(tree.images),
    put("images", 0, "file_name", "again/again/again/a.png")))
NO_IMAGE = "is no JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, AVIF or JPEG 2000 image, or its header is damaged; ..."
EMPTY = "is empty; replace or convert it, or leave it out"
TOO_LARGE = "has 60000x60000 = 3600000000 pixels, more than the ..."
BAD_IMAGES = {
    "empty": (b"", EMPTY), "a web page": (b"<html>404</html>", NO_IMAGE), "zeros": (bytes(1000), NO_IMAGE),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NO_IMAGE), "a bomb": (BOMB, TOO_LARGE),
    "a header": (PICTURE[:20], "cannot be read as an image (Truncated File Read); replace the file or leave it out"),
}
CUT = "cannot be read as an image (image file is truncated); replace the file or leave it out"
for what, (value, reason) in BAD_IMAGES.items():
    add(f"plain image {what}", UNREADABLE, file("images/a.png", value), f"IMAGES/a.png: {reason}")
    add(f"plain image {what}, no size", ERROR, all_of(file("images/a.png", value), cut("images", 0, "width")),
        f"FILE: image 1 states no width and height, and IMAGES/a.png: {reason}", left=GOOD[2:])
add("plain image cut short", UNREADABLE, file("images/a.png", PICTURE[:2000]), f"IMAGES/a.png: {CUT}")
add("plain image of another format", FINE, file("images/a.png", picture(format="JPEG")))
add("plain image turned, annotated as stored", FINE, file("images/a.png", turned()))
UPRIGHT = all_of(file("images/a.png", turned()), put("images", 0, "height", WIDTH), put("images", 0, "width", HEIGHT))
add("plain image turned, annotated upright", FINE, UPRIGHT)
add("plain image turned, annotated upright, exif ignored", UNREADABLE, UPRIGHT, flags=lambda tree: {"exif": "ignore"},
    message="IMAGES/a.png: is 64x48 pixels, but its annotation says 48x64, as it is once its EXIF ...")
