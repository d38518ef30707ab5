"""From image files of every kind to RGB pixels, and files that give none."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from direct_pt.data.images import UnreadableImage, image_size, read_image

HEIGHT, WIDTH = 24, 32
ORIENTATION_TAG = 0x0112
# How pixels are stored for each EXIF orientation, from the upright ones.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}


def grey() -> np.ndarray:
    """[h, w] uint8, every value from 0 to 255 among them."""
    return np.linspace(0, 255, HEIGHT * WIDTH).round().astype(np.uint8).reshape(HEIGHT, WIDTH)


def colours(rows: int = HEIGHT, columns: int = WIDTH) -> np.ndarray:
    """[rows, columns, 3] uint8: six flat patches, so that lossy formats keep them, no two alike in any direction."""
    patches = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[250, 240, 10], [40, 40, 40], [200, 100, 220]]])
    return patches.repeat(rows // 2, axis=0).repeat(-(-columns // 3), axis=1)[:, :columns].astype(np.uint8)


def as_rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, axis=2)


def pixels(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """What is read, after a look at its form."""
    found = read_image(path, size)
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    return found


CYAN = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [100, 50, 0, 0], [0, 0, 0, 255]]])
CYAN_AS_RGB = np.array([[[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [155, 205, 255], [0, 0, 0]]])


def cmyk() -> Image.Image:
    values = CYAN.repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
    return Image.frombytes("CMYK", (48, 8), values.tobytes())


def palette(transparent: bool) -> Image.Image:
    image = Image.fromarray(colours()).quantize(8)
    if transparent:
        image.info["transparency"] = 0
    return image


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(grey() if mode == "LA" else colours())
    image.putalpha(Image.fromarray(grey()))
    assert image.mode == mode
    return image


WIDE = grey().astype(np.uint16) * 257  # 16 bits: 65535 is white
KINDS: dict[str, tuple[str, Callable[[], Image.Image], np.ndarray, dict[str, Any], int]] = {
    # file, image, its RGB values, how it is saved, by how much values may differ
    "grey png": ("a.png", lambda: Image.fromarray(grey()), as_rgb(grey()), {}, 0),
    "grey jpeg": ("a.jpg", lambda: Image.fromarray(grey()), as_rgb(grey()), {"quality": 100}, 2),
    "grey with alpha": ("a.png", lambda: with_alpha("LA"), as_rgb(grey()), {}, 0),
    "one bit": ("a.png", lambda: Image.fromarray(grey() > 99), as_rgb((grey() > 99) * np.uint8(255)), {}, 0),
    "16 bits png": ("a.png", lambda: Image.fromarray(WIDE), as_rgb(grey()), {}, 0),
    "16 bits tiff": ("a.tiff", lambda: Image.fromarray(WIDE), as_rgb(grey()), {}, 0),
    "16 bits, rounded": ("a.png", lambda: Image.fromarray(np.minimum(WIDE, 65000) + np.uint16(100)),
                         as_rgb(np.minimum(grey(), 253)), {}, 0),
    "32 bits tiff": ("a.tif", lambda: Image.fromarray(WIDE.astype(np.int32)), as_rgb(grey()), {}, 0),
    "palette": ("a.png", lambda: palette(False), colours(), {}, 0),
    "palette, transparent": ("a.png", lambda: palette(True), colours(), {}, 0),
    "palette bmp": ("a.bmp", lambda: palette(False), colours(), {}, 0),
    "rgba": ("a.png", lambda: with_alpha("RGBA"), colours(), {}, 0),
    "cmyk tiff": ("a.tif", cmyk, CYAN_AS_RGB.repeat(8, axis=0).repeat(8, axis=1), {}, 1),
    "cmyk jpeg": ("a.jpg", cmyk, CYAN_AS_RGB.repeat(8, axis=0).repeat(8, axis=1), {"quality": 100}, 4),
    "rgb png": ("a.png", lambda: Image.fromarray(colours()), colours(), {}, 0),
    "tiff": ("a.tif", lambda: Image.fromarray(colours()), colours(), {}, 0),
    "tiff, packed": ("a.tif", lambda: Image.fromarray(colours()), colours(), {"compression": "tiff_lzw"}, 0),
    "webp": ("a.webp", lambda: Image.fromarray(colours()), colours(), {"lossless": True}, 0),
    "bmp": ("a.bmp", lambda: Image.fromarray(colours()), colours(), {}, 0),
    "capital suffix": ("A.JPG", lambda: Image.fromarray(colours(16, 24)), colours(16, 24),
                       {"quality": 100, "subsampling": 0}, 3),
    "another format than its name says": ("a.jpg", lambda: Image.fromarray(colours()), colours(), {"format": "PNG"}, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_rgb(tmp_path: Path, kind: str) -> None:
    name, make, expected, options, tolerance = KINDS[kind]
    make().save(tmp_path / name, **options)
    found = pixels(tmp_path / name, expected.shape[:2])
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= tolerance
    assert image_size(tmp_path / name) == expected.shape[:2]


def save_turned(path: Path, upright: np.ndarray, orientation: int) -> np.ndarray:
    """Write the file as a turned camera does; return the pixels as they are stored."""
    stored = np.ascontiguousarray(STORED[orientation](upright))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(path.suffix, {})
    Image.fromarray(stored).save(path, exif=exif, **options)
    return stored


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = colours()
    stored = save_turned(tmp_path / "a.png", upright, orientation)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), upright)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png", (HEIGHT, WIDTH)), upright)
    assert image_size(tmp_path / "a.png") == (HEIGHT, WIDTH)
    if stored.shape != upright.shape:  # the annotation was made without regard to EXIF
        np.testing.assert_array_equal(pixels(tmp_path / "a.png", (WIDTH, HEIGHT)), stored)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif"])
def test_orientation_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    save_turned(path, colours(), 6)
    tolerance = 3 if suffix == "jpg" else 0
    assert np.abs(pixels(path).astype(int) - colours()).max() <= tolerance
    assert np.abs(pixels(path, (HEIGHT, WIDTH)).astype(int) - colours()).max() <= tolerance
    assert image_size(path) == (HEIGHT, WIDTH)


def test_square_images_are_turned_upright(tmp_path: Path) -> None:
    upright = colours(24, 24)
    save_turned(tmp_path / "a.png", upright, 8)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png", (24, 24)), upright)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_another_size_than_annotated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(colours()).save(path)
    for size in ((HEIGHT, WIDTH + 1), (WIDTH, HEIGHT)):  # without EXIF, turning is no excuse
        with pytest.raises(UnreadableImage) as error:
            read_image(path, size)
        for word in (str(path), f"is {WIDTH}x{HEIGHT}", f"annotation says {size[1]}x{size[0]}"):
            assert word in str(error.value)


def cut_short(suffix: str, **options: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
        whole = path.with_name(f"whole.{suffix}")
        Image.fromarray(noise).save(whole, **options)
        assert read_image(whole).shape == (64, 64, 3)
        content = whole.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return make


DAMAGED: dict[str, Callable[[Path], object]] = {
    "jpeg cut short": cut_short("jpg"),
    "png cut short": cut_short("png"),
    "webp cut short": cut_short("webp"),
    "bmp cut short": cut_short("bmp"),
    "tiff cut short": cut_short("tif", compression="tiff_adobe_deflate"),
    "zero bytes": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "text": lambda path: path.write_text("<html>404 Not Found</html>"),
    "jpeg's first bytes only": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"),
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, case: str) -> None:
    path = tmp_path / "picture.jpg"
    DAMAGED[case](path)
    for size in (None, (64, 64)):
        with pytest.raises(UnreadableImage) as error:
            read_image(path, size)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("case", ["zero bytes", "text", "missing"])
def test_size_of_damaged_files(tmp_path: Path, case: str) -> None:
    path = tmp_path / "picture.jpg"
    DAMAGED[case](path)
    with pytest.raises(UnreadableImage, match=r"picture\.jpg"):
        image_size(path)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_an_image_too_large_to_be_meant(tmp_path: Path) -> None:
    header = png_chunk(b"IHDR", (65_536).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b""))
    for read in (read_image, image_size):
        with pytest.raises(UnreadableImage, match=r"bomb.png.*4294967296 pixels"):
            read(tmp_path / "bomb.png")


# At least as many pixels as are needed


PHOTO = (203, 301)
SHRUNK: dict[str, tuple[str, Callable[[Image.Image], Image.Image], dict[str, Any]]] = {
    "jpeg": ("a.jpg", lambda image: image, {"quality": 95}),
    "progressive jpeg": ("a.jpg", lambda image: image, {"quality": 95, "progressive": True}),
    "grey jpeg": ("a.jpg", lambda image: image.convert("L"), {"quality": 95}),
    "cmyk jpeg": ("a.jpg", lambda image: image.convert("CMYK"), {"quality": 95}),
    "png": ("a.png", lambda image: image, {}),
    "16 bits": ("a.png", lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), {}),
    "palette": ("a.png", lambda image: image.quantize(256), {}),
    "webp": ("a.webp", lambda image: image, {"lossless": True}),
    "tiff": ("a.tif", lambda image: image, {}),
}


def photo() -> Image.Image:
    """Smooth, [203, 301]."""
    few = np.random.default_rng(0).integers(60, 200, size=(5, 6, 3), dtype=np.uint8)
    return Image.fromarray(few).resize(PHOTO[::-1], Image.Resampling.BICUBIC)


def assert_area_means(found: np.ndarray, whole: np.ndarray) -> None:
    """Every pixel stands for its share of the whole image; those of the last row and column may for less."""
    rows, columns = (-(-whole.shape[axis] // found.shape[axis]) for axis in (0, 1))
    assert found.shape[:2] == (-(-whole.shape[0] // rows), -(-whole.shape[1] // columns))
    exact = np.asarray(Image.fromarray(whole).reduce((columns, rows)))
    difference = np.abs(found.astype(int) - exact)
    assert difference.mean() < 1.5 and difference[:-1, :-1].max() < 12


@pytest.mark.parametrize("kind", SHRUNK)
def test_fewer_pixels_will_do(tmp_path: Path, kind: str) -> None:
    """At the borders too: what is asked for is half of the image, or one pixel more."""
    name, change, options = SHRUNK[kind]
    change(photo()).save(tmp_path / name, **options)
    whole = pixels(tmp_path / name, PHOTO)
    height, width = PHOTO
    for least, by_at_most in {
        PHOTO: 1,
        (height + 50, width + 50): 1,
        (height // 2, width // 2): 2,
        (height // 2 + 1, width // 2): 1,
        (height // 2, width // 2 + 1): 1,
        (height // 4, width // 4): 4,
        (height // 4 + 1, width // 4 + 1): 3,
        (height // 8, width // 8): 8,
        (20, 30): 10,
        (20, width): 1,
        (1, 1): 203,
    }.items():
        found = read_image(tmp_path / name, PHOTO, least)
        assert found.dtype == np.uint8
        assert found.shape[0] >= min(least[0], height) and found.shape[1] >= min(least[1], width)
        if by_at_most == 1:
            np.testing.assert_array_equal(found, whole)
            continue
        if name == "a.jpg":  # the decoder halves, up to three times
            by_at_most = max(step for step in (1, 2, 4, 8) if step <= by_at_most)
        assert found.shape == (-(-height // by_at_most), -(-width // by_at_most), 3)
        if by_at_most <= 10:
            assert_area_means(found, whole)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", STORED)
def test_fewer_pixels_of_a_turned_image(tmp_path: Path, suffix: str, orientation: int) -> None:
    """In both readings: upright, and as stored, where the annotation disregards EXIF."""
    path, upright = tmp_path / f"a.{suffix}", np.asarray(photo())
    stored = save_turned(path, upright, orientation)
    for size, expected in {PHOTO: upright, stored.shape[:2]: stored if orientation >= 5 else upright}.items():
        for divisor in (2, 4):
            least = size[0] // divisor, size[1] // divisor
            found = read_image(path, size, least)
            assert found.shape[0] >= least[0] and found.shape[1] >= least[1]
            exact = np.asarray(Image.fromarray(expected).resize(found.shape[1::-1], Image.Resampling.BOX))
            assert np.abs(found.astype(int) - exact).mean() < 2
        one_side = read_image(path, size, (size[0], size[1] // 4))
        assert one_side.shape[:2] == size


def test_jpegs_are_decoded_as_by_pillow(tmp_path: Path) -> None:
    """To the pixel, at full size."""
    noise = np.random.default_rng(0).integers(256, size=(67, 51, 3), dtype=np.uint8)
    for row, (image, options) in enumerate(
        (image, {"quality": quality, "subsampling": subsampling, "progressive": progressive})
        for image in (photo(), Image.fromarray(noise))
        for quality in (30, 95)
        for subsampling in (0, 1, 2)
        for progressive in (False, True)
    ):
        path = tmp_path / f"{row}.jpg"
        image.save(path, **options)
        with Image.open(path) as expected:
            np.testing.assert_array_equal(read_image(path), np.asarray(expected.convert("RGB")))


def test_corrupt_jpegs_are_read_as_by_pillow(tmp_path: Path) -> None:
    """Damage that it puts up with, and damage that it refuses, wherever the file is cut off or overwritten."""
    path, outcomes = tmp_path / "a.jpg", set()
    photo().save(path, quality=90)
    content = path.read_bytes()
    for place in range(100, len(content), len(content) // 40):
        for damaged in (content[:place], content[:place] + b"\x55" * 20 + content[place + 20 :]):
            path.write_bytes(damaged)
            for least in (None, (PHOTO[0] // 2, PHOTO[1] // 2)):
                try:
                    with Image.open(path) as image:
                        if least is not None:
                            image.draft(None, least[::-1])
                        expected = np.asarray(image.convert("RGB"))
                except (OSError, SyntaxError, ValueError):
                    with pytest.raises(UnreadableImage, match=r"a\.jpg"):
                        read_image(path, None, least)
                    outcomes.add("refused")
                else:
                    np.testing.assert_array_equal(read_image(path, None, least), expected)
                    outcomes.add("read")
    assert outcomes == {"refused", "read"}
