"""YOLO and Pascal VOC sets that are malformed. In tables: one argument a line would hide what belongs together."""

from collections.abc import Callable

from malformed import add, all_of, file, folder, loop
from malformed_coco import BAD_IMAGES, CUT, EMPTY, LONGER, TOO_LARGE
from malformed_sets import (
    BOMB,
    BOXES,
    CLIPPED,
    FINE,
    GOOD,
    PICTURE,
    SECOND,
    SIZE,
    SIZES,
    SMALL,
    UNREADABLE,
    Object,
    Tree,
    voc_file,
    voc_object,
)

from direct_pt.data.problems import ERROR, NOTE, REPAIRED

# fmt: off
# YOLO: label lines

LINE = "SET/labels/train/a.txt:1: "
FIELDS = "expected 'class x_center y_center width height', or a class and 3 or more points 'x y' of a polygon"
NO_NUMBER = f"has a field that is no number (could not convert string to float: {{!r}}); {FIELDS}"
NOT_FINITE = "has a number that is not finite; annotate the object anew, or remove the line"
KNOWN = "expected a whole number from 0 to 1, as in 'names': correct it, or add a name"
PIXELS = "expected shares from 0 to 1: divide by the image's width and height"
BAD_LINES = {
    "class too high": ("2 .5 .5 .5 .5", "has the class 2; " + KNOWN),
    "class -1": ("-1 .5 .5 .5 .5", "has the class -1; " + KNOWN),
    "class between": ("0.5 .5 .5 .5 .5", "has the class 0.5; " + KNOWN),
    "class name": ("cat .5 .5 .5 .5", NO_NUMBER.format("cat")),
    "pixels": ("0 32 24 16 12", f"has 32, {PIXELS}"),
    "four numbers": ("0 .5 .5 .5", f"has 4 fields; {FIELDS}"),
    "six numbers": ("0 .5 .5 .5 .5 .9", f"has 6 fields; {FIELDS}"),
    "polygon with an x too many": ("0 .1 .1 .9 .1 .9 .9 .5", f"has 8 fields; {FIELDS}"),
    "commas between": ("0,.5,.5,.5,.5", f"has 1 fields; {FIELDS}"),
    "decimal commas": ("0 0,5 0,5 0,5 0,5", NO_NUMBER.format("0,5")),
    "header": ("class x y w h\n0 .5 .5 .5 .5", NO_NUMBER.format("class")),
    "NUL": ("0 .5 .5\0 .5 .5", NO_NUMBER.format(".5\0")),
    "NaN": ("0 nan .5 .5 .5", NOT_FINITE),
    "1e400": ("0 .5 .5 1e400 .5", NOT_FINITE),
    "5,000 digits": ("9" * 5000 + " .5 .5 .5 .5", NOT_FINITE),
    "negative width": ("0 .5 .5 -.5 .5", "has the negative width or height -0.5; write it without sign"),
}
for what, (value, reason) in BAD_LINES.items():
    left = [("a", "cat", [16, 12, 32, 24]), GOOD[2]] if what == "header" else GOOD[2:]
    add(f"yolo {what}", ERROR, file("labels/train/a.txt", value), LINE + reason, left=left)
NO_TEXT = "cannot be read as UTF-8 text ('utf-8' codec can't decode byte {} in position {}: ..."
for what, content, reason in (
    ("UTF-16", "0 .5 .5 .5 .5".encode("utf-16"), NO_TEXT.format("0xff", 0)),
    ("Latin-1", b"0 .5 .5 .5 .5 \xe4", NO_TEXT.format("0xe4", 14)),
):
    add(f"yolo {what}", ERROR, file("labels/train/a.txt", content), f"SET/labels/train/a.txt: {reason}", left=GOOD[2:])
add("yolo label a folder", ERROR, folder("labels/train/a.txt"), left=GOOD[2:],
    message="SET/labels/train/a.txt: cannot be read as UTF-8 text ([Errno 21] Is a directory: ...")
add("yolo label a link to itself", ERROR, loop("labels/train/a.txt"), left=GOOD[2:],
    message="SET/labels/train/a.txt: cannot be read as UTF-8 text ([Errno 40] Too many levels of symbolic links: ...")
WHOLE_A = ("a", "cat", [16, 12, 32, 24])
MENDED_LINES: dict[str, tuple[str, dict[str, int], list[Object]]] = {
    "without area": ("0 .5 .5 0 0", {SMALL: 1}, [("a", "cat", [32, 24, 0, 0])]),
    "over the edge": ("0 1 .5 .5 .5", {CLIPPED: 1}, [("a", "cat", [48, 12, 32, 24])]),
    "line twice": ("0 .5 .5 .5 .5\n0 .5 .5 .5 .5", {"label lines that repeat one left out": 1}, [WHOLE_A]),
}
for what, (value, counts, found) in MENDED_LINES.items():
    add(f"yolo {what}", REPAIRED, file("labels/train/a.txt", value), counts=counts, left=[*found, GOOD[2]])
FINE_LINES: dict[str, tuple[str, list[Object]]] = {
    "byte order mark": ("\ufeff0 .5 .5 .5 .5", [WHOLE_A]),
    "class with a point": ("0.0 .5 .5 .5 .5", [WHOLE_A]),
    "polygon": ("0 .25 .25 .75 .25 .75 .75", [WHOLE_A]),
    "line ends of Windows": ("0 .5 .5 .5 .5\r\n\r\n", [WHOLE_A]),
    "empty": ("", []),
    "blank": (" \n\n\t", []),
}
for what, (value, found) in FINE_LINES.items():
    add(f"yolo {what}", FINE, file("labels/train/a.txt", value), left=[*found, GOOD[2]])
add("yolo no label file", NOTE, lambda tree: tree.drop("labels/train/a.txt"), left=GOOD[2:],
    counts={"images without a label file": 1})
add("yolo no label files", NOTE, lambda tree: tree.drop("labels/train"), left=[],
    counts={"splits without a label file": 1})

# YOLO: data.yaml and images

NAMES = "needs 'names', a list of the classes or a mapping {index: name}"
ELSEWHERE = "its 'train' {!r} is no folder and no .txt file in SET; write a path relative to it"
BAD_YAMLS = {
    "no names": ("train: images/train", NAMES),
    "names a text": ("names: cat\ntrain: images/train", NAMES),
    "name twice": ("names: [cat, cat]\ntrain: images/train",
                   "its 'names' has 'cat' 2 times; give every class a name of its own"),
    "names with a gap": ("names: {0: cat, 2: dog}\ntrain: images/train",
                         "its 'names' must number its 2 classes from 0 without gaps; found '2'"),
    "another nc": ("nc: 3\nnames: [cat, dog]\ntrain: images/train",
                   "its 'nc' is '3', but 'names' lists 2 classes; correct one of them"),
    "keypoints": ("names: [cat, dog]\ntrain: images/train\nkpt_shape: [17, 3]",
                  "has 'kpt_shape': its labels hold keypoints, which are not supported; export boxes or polygons"),
    "a list": ("- cat", "must hold a mapping with the keys 'names', 'train' and 'val'"),
    "no file of YAML": ("names: [cat", "cannot be read as YAML (while parsing a flow sequence ..."),
    "yaml of Latin-1": (b"names: [c\xe4t]\ntrain: images/train",
                        "cannot be read as YAML (unacceptable character #x00e4: ..."),
    "deep yaml": ("names: " + 500 * "[", "cannot be read as YAML (maximum recursion depth exceeded..."),
}
for what, (content, reason) in BAD_YAMLS.items():
    add(f"yolo {what}", ERROR, file("data.yaml", content), f"SET/data.yaml: {reason}")
BAD_PATHS = {
    "absent": "images/trane", "outside": "/etc", "above": "../../etc", "one up": "../",
    "with backslashes": "images\\train", "on the net": "https://x.org/a.zip",
}
for what, value in BAD_PATHS.items():
    add(f"yolo train {what}", ERROR, file("data.yaml", f"names: [cat, dog]\ntrain: {value}\nval: images/val\n"),
        f"SET/data.yaml: {ELSEWHERE.format(value)}")
add("yolo path above", ERROR, file("data.yaml", "path: ../\nnames: [cat, dog]\ntrain: images/train"),
    message="SET/data.yaml: its 'path' '../' lies outside of SET, where nothing is read; copy the file into "
    "ROOT, and give that folder as --data")
add("yolo path ignored", NOTE, counts={"YAML 'path' that is not there": 1},
    spoil=file("data.yaml", "path: /datasets/mine\nnames: [cat, dog]\ntrain: images/train\nval: images/val\n"))
add("yolo yaml with byte order mark", FINE,
    file("data.yaml", "\ufeffnames: [cat, dog]\ntrain: images/train\nval: images/val"))
add("yolo yaml with a command", FINE, file("data.yaml", "names: [cat, dog]\ntrain: images/train\nval: images/val\n"
    "download: !!python/object/apply:os._exit [1]"))


def listed(*lines: str) -> Callable[[Tree], None]:
    """train is a list of images."""
    yaml = "names: [cat, dog]\ntrain: train.txt\nval: images/val\n"
    return all_of(file("data.yaml", yaml), file("train.txt", "\n".join(lines)))


NO_FILE = "SET/train.txt:1: lists {!r}, which is no file in SET; write paths relative to SET"
for what, value in {"outside": "../secret.jpg", "absolute": "/etc/hostname", "absent": "images/train/c.png",
                    "with NUL": "images/train/b.png\0", "longer": LONGER}.items():
    add(f"yolo listed image {what}", ERROR, listed(value, "images/train/b.png"), NO_FILE.format(value), left=GOOD[2:])
add("yolo listed image twice", REPAIRED, listed("images/train/b.png", "./images/train/b.png"),
    counts={"images listed again left out": 1}, left=GOOD[2:])
for what, (value, reason) in BAD_IMAGES.items():
    add(f"yolo image {what}", ERROR, file("images/train/a.png", value), f"SET/images/train/a.png: {reason}",
        left=GOOD[2:])
add("yolo image cut short", UNREADABLE, file("images/train/a.png", PICTURE[:2000]), f"SET/images/train/a.png: {CUT}")
add("yolo image a link to itself", ERROR, loop("images/train/a.png"), left=GOOD[2:],
    message="SET/images/train/a.png: cannot be read as an image (Too many levels of symbolic links); ...")
add("yolo folder in itself", NOTE, counts={"links to folders left out": 1},
    spoil=lambda tree: (tree.folder / "images/train/again").symlink_to(tree.folder / "images"))
add("yolo folder with an image's name", FINE, file("images/train/c.png/notes", "no image"))

# Pascal VOC

FIRST = "SET/Annotations/a.xml: object 1 "
ABOUT = "xmin and ymin must be the smaller ones"
NO_BOX = "has no <xmin> in a <bndbox>; annotate it with a box, or remove it"
BAD_OBJECTS = {
    "corners swapped": (voc_object(corners=(24, 18, 9, 7)), f"has the corners (24, 18) and (9, 7); {ABOUT}"),
    "NaN": (voc_object(corners=("nan", 7, 24, 18)), "has the <xmin> 'nan'; expected a number of pixels"),
    "text": (voc_object(corners=(9, "top", 24, 18)), "has the <ymin> 'top'; expected a number of pixels"),
    "decimal comma": (voc_object(corners=(9, 7, "24,5", 18)), "has the <xmax> '24,5'; expected a number of pixels"),
    "1e400": (voc_object(corners=(9, 7, 24, "1e400")), "has the <ymax> '1e400'; expected a number of pixels"),
    "width and height": (voc_object().replace("xmin", "x"), NO_BOX),
    "5,000 digits": (voc_object(corners=(9, 7, 24, "9" * 5000)),
                     f"has the <ymax> '{'9' * 59}; expected a number of pixels"),
    "shares": (voc_object(corners=(0.125, 0.125, 0.375, 0.375)),
               "has corners within 1 pixel, which look like shares of the image's sides; write pixels"),
    "no box": ("<object><name>cat</name></object>", NO_BOX),
    "no name": ("<object/>", "has no <name>; write its class there"),
    "blank name": (voc_object(" "), "has no <name>; write its class there"),
    "difficult 2": (voc_object(more="<difficult>2</difficult>"), "has <difficult> '2'; expected 0 or 1"),
}
for what, (value, reason) in BAD_OBJECTS.items():
    add(f"voc {what}", ERROR, file("Annotations/a.xml", voc_file("a.png", value, SECOND)), FIRST + reason,
        left=GOOD[1:])
ENTITIES = "".join(f'<!ENTITY e{n} "{10 * f"&e{n - 1};"}">' for n in range(1, 10))
DOCTYPE = "it declares a document type; remove the line <!DOCTYPE ...>"
BAD_XMLS: dict[str, tuple[str | bytes, str]] = {
    "billion laughs": (f'<!DOCTYPE x [<!ENTITY e0 "ha">{ENTITIES}]><annotation>&e9;</annotation>', DOCTYPE),
    "file read by an entity": ('<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>',
                               DOCTYPE),
    "tags left open": ("<annotation>\n<filename>a.png", "no element found: line 2, column 15"),
    "tags crossed": ("<annotation></object>", "mismatched tag: line 1, column 14"),
    "empty": ("", "no element found: line 1, column 0"),
    "bare ampersand": (voc_file("a.png", voc_object("cat & dog")), "not well-formed (invalid token): line 1, ..."),
    "Latin-1": (voc_file("a.png", voc_object("\xe4")).encode("latin-1"), "not well-formed (invalid token): line 1..."),
    "JSON": ("{}", "not well-formed (invalid token): line 1, column 0"),
    "two documents": (2 * voc_file("a.png"), "junk after document element: line 1, ..."),
    "deep": (10**4 * "<annotation>", "..."),
}
for what, (content, reason) in BAD_XMLS.items():
    end = "" if reason.endswith("...") else "); mend it, or save it anew in UTF-8"
    add(f"voc {what}", ERROR, file("Annotations/a.xml", content), left=GOOD[2:],
        message=f"SET/Annotations/a.xml: cannot be read as XML ({reason}{end}")
add("voc another document", ERROR, file("Annotations/a.xml", "<html/>"), left=GOOD[2:],
    message="SET/Annotations/a.xml: is no VOC annotation: its outermost element is <html>, not <annotation>")
for what, value in {"of text": "wide", "negative": "-64", "of fractions": "64.5", "of 10 digits": "1234567890"}.items():
    size = SIZE.replace("64", value)
    add(f"voc size {what}", ERROR, file("Annotations/a.xml", voc_file("a.png", voc_object(), size=size)), left=GOOD[2:],
        message=f"SET/Annotations/a.xml: its <size> is {value} x 48; expected whole numbers of pixels, or 0")
for what, size in {"none": "", "0": "<size><width>0</width><height>0</height></size>"}.items():
    spoil = file("Annotations/a.xml", voc_file("a.png", voc_object(), SECOND, size=size))
    add(f"voc size {what}", REPAIRED, spoil, counts={SIZES: 1})
add("voc size of another image", UNREADABLE,
    message="SET/JPEGImages/a.png: is 64x48 pixels, but its annotation says 64x50; ...",
    spoil=file("Annotations/a.xml", voc_file("a.png", voc_object(), SECOND, size=SIZE.replace("48", "50"))))
FINE_XMLS = {
    "byte order mark": ("\ufeff" + voc_file("a.png", voc_object(), SECOND)).encode(),
    "UTF-16": voc_file("a.png", voc_object(), SECOND).encode("utf-16"),
    "file name of another set": voc_file("000001.jpg", voc_object(), SECOND).encode(),
}
for what, content in FINE_XMLS.items():
    add(f"voc {what}", FINE, file("Annotations/a.xml", content))
PATHS = {"outside": "../../secret.jpg", "absolute": "/etc/passwd", "on a drive": "C:\\pictures\\a.png"}
for what, value in PATHS.items():
    spoil = file("Annotations/a.xml", voc_file(value, voc_object(), SECOND))
    add(f"voc file name {what}", NOTE, spoil, counts={"filename is a path": 1})
add("voc file name of another", ERROR, file("Annotations/a.xml", voc_file("b.png", voc_object())),
    left=[("b", "cat", BOXES[0])],
    message="SET/Annotations/b.xml: is of the image b.png, as is SET/Annotations/a.xml; correct its ...")
add("voc box over the edges", REPAIRED, counts={CLIPPED: 1}, left=[("a", "cat", [-6, -6, 86, 66]), GOOD[2]],
    spoil=file("Annotations/a.xml", voc_file("a.png", voc_object(corners=(-5, -5, 80, 60)))))
add("voc XML missing", ERROR, lambda tree: tree.drop("Annotations/a.xml"), left=GOOD[2:],
    message="SET/ImageSets/Main/train.txt:1: lists 'a', but SET/Annotations has no a.xml; add it or remove the line")
add("voc XML a link to itself", ERROR, loop("Annotations/a.xml"), left=GOOD[2:],
    message="SET/Annotations/a.xml: cannot be read as XML ([Errno 40] Too many levels of symbolic links: ...")
add("voc image missing", ERROR, lambda tree: tree.drop("JPEGImages/a.png"), left=GOOD[2:],
    message="SET/Annotations/a.xml: its <filename> 'a.png' is not in SET/JPEGImages, and no a.jpg or the like ...")
add("voc image a folder", ERROR, folder("JPEGImages/a.png"), left=GOOD[2:],
    message="SET/Annotations/a.xml: its <filename> 'a.png' is not in SET/JPEGImages, and no a.jpg or the like ...")
add("voc image empty", UNREADABLE, file("JPEGImages/a.png", b""), f"SET/JPEGImages/a.png: {EMPTY}")
add("voc image a bomb", UNREADABLE, file("JPEGImages/a.png", BOMB), f"SET/JPEGImages/a.png: {TOO_LARGE}")
add("voc name listed twice", ERROR, file("ImageSets/Main/train.txt", "b\na\nb\n"), left=GOOD,
    message="SET/ImageSets/Main/train.txt:3: lists 'b' again, after line 1; remove one")
add("voc name listed outside", ERROR, file("ImageSets/Main/train.txt", "../../secret\nb\n"), left=GOOD[2:],
    message="SET/ImageSets/Main/train.txt:1: lists '../../secret', but SET/Annotations has no ...")
add("voc list empty", ERROR, file("ImageSets/Main/train.txt", "\n"),
    message="SET/ImageSets/Main/train.txt: lists no images; write a name without suffix on each line")
