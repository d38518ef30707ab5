"""From image files of every kind to RGB pixels, and files that give none."""

import io
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin

from direct_pt.images.decoding import (
    MAX_PIXELS,
    Decoding,
    UnreadableImage,
    decode_image,
    encoded_size,
    header_sizes,
    image_size,
    read_image,
)

HEIGHT, WIDTH = 24, 32
ORIENTATION_TAG = 0x0112
# What a format is saved with, so that it keeps the pixels, or nearly.
EXACT: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 100, "subsampling": 0},
    "webp": {"lossless": True, "exact": True},
}
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


@pytest.fixture(autouse=True)
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing warns, nothing is written, and Pillow's settings stay as they were."""
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        filters = list(warnings.filters)
        yield
        assert warnings.filters == filters
    assert capfd.readouterr().err == ""
    assert limit == Image.MAX_IMAGE_PIXELS


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


def ycck_jpeg(path: Path) -> None:
    """As image editors write them: inks as brightness and colour, all inverted."""
    inks = np.asarray(cmyk())
    coded = np.asarray(Image.fromarray(inks[:, :, :3]).convert("YCbCr"))  # cyan in the place of red, and so on
    values = np.concatenate([255 - coded, inks[:, :, 3:]], axis=2)  # written inverted: brightness as it is, black not
    file = io.BytesIO()
    Image.frombytes("CMYK", (48, 8), values.tobytes()).save(file, "JPEG", quality=100, subsampling=0)
    marker = b"Adobe\0\x64\0\0\0\0"
    assert file.getvalue().count(marker + b"\0") == 1  # plain CMYK; 2 is YCCK
    path.write_bytes(file.getvalue().replace(marker + b"\0", marker + b"\2"))


def palette(alphas: bytes | int | None = None) -> Image.Image:
    image = Image.fromarray(colours()).quantize(8)
    if alphas is not None:
        image.info["transparency"] = alphas
    return image


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(grey() if mode == "LA" else colours())
    image.putalpha(Image.fromarray(grey()))
    assert image.mode == mode
    return image


def over_black(values: np.ndarray) -> np.ndarray:
    """RGB values under `with_alpha`'s alpha."""
    return (values * (grey()[:, :, None] / 255)).round().astype(np.uint8)


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    changed = ImageCms.profileToProfile(Image.fromarray(colours()), *profiles, outputMode="LAB")
    assert changed is not None
    return changed


def save_tiff(path: Path, values: bytes, bits: int, photometric: int, samples: int = 1, extra: int = -1) -> None:
    """An uncompressed TIFF of a kind that Pillow does not write. `extra` says what a pixel's last sample is."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[256], tags[257], tags[258], tags[262] = WIDTH, HEIGHT, (bits,) * samples, photometric
    tags[273], tags[277], tags[278], tags[279] = 0, samples, HEIGHT, len(values)  # at once behind the tags
    if extra >= 0:
        tags[338] = extra
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + tags.tobytes(8) + values)


def twelve_bits(values: np.ndarray) -> bytes:
    """Two of them in three bytes."""
    first, second = values.reshape(-1, 2).astype(int).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()


WIDE = grey().astype(np.uint16) * 257  # 16 bits: 65535 is white
KINDS: dict[str, tuple[str, Callable[[], Image.Image], np.ndarray, dict[str, Any], int]] = {
    # file, image, its RGB values, how it is saved, by how much values may differ
    "grey png": ("a.png", lambda: Image.fromarray(grey()), as_rgb(grey()), {}, 0),
    "grey jpeg": ("a.jpg", lambda: Image.fromarray(grey()), as_rgb(grey()), {"quality": 100}, 2),
    "grey with alpha": ("a.png", lambda: with_alpha("LA"), over_black(as_rgb(grey())), {}, 1),
    "one bit": ("a.png", lambda: Image.fromarray(grey() > 99), as_rgb((grey() > 99) * np.uint8(255)), {}, 0),
    "16 bits png": ("a.png", lambda: Image.fromarray(WIDE), as_rgb(grey()), {}, 0),
    "16 bits tiff": ("a.tiff", lambda: Image.fromarray(WIDE), as_rgb(grey()), {}, 0),
    "16 bits, rounded": ("a.png", lambda: Image.fromarray(np.minimum(WIDE, 65000) + np.uint16(100)),
                         as_rgb(np.minimum(grey(), 253)), {}, 0),
    "32 bits tiff": ("a.tif", lambda: Image.fromarray(WIDE.astype(np.int32)), as_rgb(grey()), {}, 0),
    "16 bits, big-endian": ("a.tif", lambda: Image.frombytes("I;16B", (WIDTH, HEIGHT), WIDE.astype(">u2").tobytes()),
                            as_rgb(grey()), {}, 0),
    "16 bits, packed": ("a.tif", lambda: Image.fromarray(WIDE), as_rgb(grey()), {"compression": "tiff_lzw"}, 0),
    "16 bits, dark": ("a.png", lambda: Image.fromarray(WIDE // 16), as_rgb((grey() / 16).round().astype(np.uint8)), {},
                      1),
    "16 bits, white is zero": ("a.tif", lambda: Image.fromarray(65535 - WIDE), as_rgb(grey()), {"tiffinfo": {262: 0}},
                               0),
    "32 bits, out of range": ("a.tif", lambda: Image.fromarray(WIDE.astype(np.int32) * 3 - 65535),
                              as_rgb((grey() * 3.0 - 255).clip(0, 255).astype(np.uint8)), {}, 0),
    "float, 0 to 1": ("a.tif", lambda: Image.fromarray(grey().astype(np.float32) / 255), as_rgb(grey()), {}, 0),
    "float, 0 to 255": ("a.tif", lambda: Image.fromarray(grey().astype(np.float32)), as_rgb(grey()), {}, 0),
    "float, out of range": ("a.tif", lambda: Image.fromarray(grey().astype(np.float32) * 3 - 255),
                            as_rgb((grey() * 3.0 - 255).clip(0, 255).astype(np.uint8)), {}, 0),
    "palette": ("a.png", palette, colours(), {}, 0),
    "palette tiff": ("a.tif", palette, colours(), {}, 0),
    "palette bmp": ("a.bmp", palette, colours(), {}, 0),
    "gif": ("a.gif", palette, colours(), {}, 0),
    "one bit bmp": ("a.bmp", lambda: Image.fromarray(grey() > 99), as_rgb((grey() > 99) * np.uint8(255)), {}, 0),
    "one bit tiff": ("a.tif", lambda: Image.fromarray(grey() > 99), as_rgb((grey() > 99) * np.uint8(255)),
                     {"compression": "group4"}, 0),
    "rgba": ("a.png", lambda: with_alpha("RGBA"), over_black(colours()), {}, 1),
    "rgba webp": ("a.webp", lambda: with_alpha("RGBA"), over_black(colours()), {"lossless": True, "exact": True}, 1),
    "rgba tiff": ("a.tif", lambda: with_alpha("RGBA"), over_black(colours()), {"tiffinfo": {338: 2}}, 1),
    "palette with alpha tiff": ("a.tif", lambda: with_alpha("RGBA").convert("PA"), over_black(colours()), {}, 1),
    "ycbcr tiff": ("a.tif", lambda: Image.fromarray(colours()).convert("YCbCr"), colours(), {}, 2),
    "lab tiff": ("a.tif", lab, colours(), {}, 24),
    "cmyk tiff": ("a.tif", cmyk, CYAN_AS_RGB.repeat(8, axis=0).repeat(8, axis=1), {}, 1),
    "cmyk jpeg": ("a.jpg", cmyk, CYAN_AS_RGB.repeat(8, axis=0).repeat(8, axis=1), {"quality": 100}, 4),
    "rgb png": ("a.png", lambda: Image.fromarray(colours()), colours(), {}, 0),
    "tiff": ("a.tif", lambda: Image.fromarray(colours()), colours(), {}, 0),
    "tiff, packed": ("a.tif", lambda: Image.fromarray(colours()), colours(), {"compression": "tiff_lzw"}, 0),
    "webp": ("a.webp", lambda: Image.fromarray(colours()), colours(), {"lossless": True}, 0),
    "bmp": ("a.bmp", lambda: Image.fromarray(colours()), colours(), {}, 0),
    "ppm": ("a.ppm", lambda: Image.fromarray(colours()), colours(), {}, 0),
    "jpeg 2000": ("a.jp2", lambda: Image.fromarray(colours(16, 24)), colours(16, 24), {}, 0),
    "avif": ("a.avif", lambda: Image.fromarray(colours(16, 24)), colours(16, 24),
             {"quality": 100, "subsampling": "4:4:4"}, 3),
    "jfif": ("a.jfif", lambda: Image.fromarray(colours(16, 24)), colours(16, 24),
             {"quality": 100, "subsampling": 0}, 3),
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


def test_tiffs_that_pillow_does_not_write(tmp_path: Path) -> None:
    path, alpha = tmp_path / "a.tif", grey()[:, :, None]
    save_tiff(path, twelve_bits(np.round(grey() / 255 * 4095)), 12, photometric=1)
    np.testing.assert_array_equal(pixels(path), as_rgb(grey()))
    wide = (colours().astype("<u2") * 257).tobytes()
    save_tiff(path, wide, 16, photometric=2, samples=3)
    np.testing.assert_array_equal(pixels(path), colours())
    for values, photometric in ((colours(), 2), (grey()[:, :, None], 1)):  # multiplied by alpha: as they are over black
        weighted = np.concatenate([(values * (alpha / 255)).round().astype(np.uint8), alpha], axis=2)
        samples = weighted.shape[2]
        save_tiff(path, weighted.tobytes(), 8, photometric, samples, extra=1)
        difference = pixels(path).astype(int) - weighted[:, :, :-1]
        assert np.abs(difference).max() <= 1
    save_tiff(path, np.concatenate([colours(), alpha], axis=2).tobytes(), 8, photometric=2, samples=4, extra=0)
    np.testing.assert_array_equal(pixels(path), colours())  # the fourth sample, perhaps infrared, is no alpha


def test_wide_colour_pngs(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), colours()[:, :, ::-1].astype(np.uint16) * 257)
    np.testing.assert_array_equal(pixels(path), colours())
    values = np.concatenate([colours()[:, :, ::-1], grey()[:, :, None]], axis=2)
    cv2.imwrite(str(path), values.astype(np.uint16) * 257)
    assert np.abs(pixels(path).astype(int) - over_black(colours())).max() <= 1


def test_inverted_inks(tmp_path: Path) -> None:
    ycck_jpeg(tmp_path / "a.jpg")
    expected = CYAN_AS_RGB.repeat(8, axis=0).repeat(8, axis=1)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - expected).max() <= 6
    half = read_image(tmp_path / "a.jpg", least=(4, 24))
    assert np.abs(half.astype(int) - expected[::2, ::2]).max() <= 6


def test_floats_that_are_not_finite(tmp_path: Path) -> None:
    """NaN is black, infinity is white, and neither decides on the scale."""
    values = grey().astype(np.float32) / 255
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    expected = grey()
    expected[0, :3] = 0, 255, 0
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif"), as_rgb(expected))
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "b.tif")
    assert not pixels(tmp_path / "b.tif").any()


# Transparency


def two_halves(mode: str) -> Image.Image:
    """Left: a hidden colour. Right: another one, without transparency."""
    if mode == "I;16":
        values = np.repeat(np.array([[40_000] * 8 + [20_046] * 8], np.uint16), 8, axis=0)
        return Image.fromarray(values)
    image = Image.new("RGB", (16, 8), (200, 10, 90))
    image.paste((78, 78, 78), (8, 0, 16, 8))
    if mode in ("LA", "RGBA", "PA"):
        alpha = Image.new("L", (16, 8))
        alpha.paste(255, (8, 0, 16, 8))
        image.putalpha(alpha)
    return image.quantize(2) if mode == "P" else image.convert(mode)


HIDDEN: dict[str, tuple[str, str, Callable[[Image.Image], object]]] = {
    # file, mode, what of it is transparent
    "png": ("a.png", "RGBA", lambda image: None),
    "webp": ("a.webp", "RGBA", lambda image: None),
    "tiff": ("a.tif", "RGBA", lambda image: None),
    "grey png": ("a.png", "LA", lambda image: None),
    "palette tiff": ("a.tif", "PA", lambda image: None),
    "palette": ("a.png", "P", lambda image: image.getpixel((0, 0))),
    "palette gif": ("a.gif", "P", lambda image: image.getpixel((0, 0))),
    "palette with alpha": ("a.png", "P", lambda image: bytes([0, 255] if image.getpixel((0, 0)) == 0 else [255, 0])),
    "one colour": ("a.png", "RGB", lambda image: image.getpixel((0, 0))),
    "one grey": ("a.png", "L", lambda image: image.getpixel((0, 0))),
    "one grey, 16 bits": ("a.png", "I;16", lambda image: image.getpixel((0, 0))),
}


@pytest.mark.parametrize("alpha", ["black", "white"])
@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_colours_stay_hidden(tmp_path: Path, kind: str, alpha: str) -> None:
    name, mode, transparent = HIDDEN[kind]
    image = two_halves(mode)
    seen = transparent(image)
    options: dict[str, Any] = {} if seen is None else {"transparency": seen}
    image.save(tmp_path / name, **options, **EXACT.get(kind, {}))
    found = read_image(tmp_path / name, decoding=Decoding(alpha=alpha))
    assert (found[:, :8] == {"black": 0, "white": 255}[alpha]).all()
    assert (found[:, 8:] == 78).all()


def test_half_transparent_colours(tmp_path: Path) -> None:
    with_alpha("RGBA").save(tmp_path / "a.png")
    weight = grey()[:, :, None] / 255
    for alpha, ground in {"black": 0, "white": 255}.items():
        found = read_image(tmp_path / "a.png", decoding=Decoding(alpha=alpha))
        assert np.abs(found - (colours() * weight + ground * (1 - weight))).max() <= 1


# Several images in a file


@pytest.mark.parametrize("suffix", ["tif", "webp", "png", "gif", "jpg"])
def test_the_first_image_counts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    options = EXACT.get(suffix, {}) | ({"format": "MPO"} if suffix == "jpg" else {})
    others = [Image.fromarray(255 - colours()), Image.fromarray(colours()[::-1])]
    Image.fromarray(colours()).save(path, save_all=True, append_images=others, **options)
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert np.abs(pixels(path).astype(int) - colours()).max() <= (3 if suffix == "jpg" else 0)
    assert image_size(path) == (HEIGHT, WIDTH)
    half = read_image(path, least=(HEIGHT // 2, WIDTH // 2))
    assert half.shape == (HEIGHT // 2, WIDTH // 2, 3)


# EXIF


def save_turned(path: Path, upright: np.ndarray, orientation: int) -> np.ndarray:
    """Write the file as a turned camera does; return the pixels as they are stored."""
    stored = np.ascontiguousarray(STORED[orientation](upright))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    Image.fromarray(stored).save(path, exif=exif, **EXACT.get(path.suffix[1:], {}))
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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_ignored(tmp_path: Path, suffix: str, orientation: int) -> None:
    path, ignoring = tmp_path / f"a.{suffix}", Decoding(exif=False)
    stored = save_turned(path, colours(), orientation)
    tolerance = 3 if suffix == "jpg" else 0
    for size in (None, stored.shape[:2]):
        found = read_image(path, size, decoding=ignoring)
        assert found.shape == stored.shape and np.abs(found.astype(int) - stored).max() <= tolerance
    assert image_size(path, ignoring) == encoded_size(path.read_bytes(), "a", ignoring) == stored.shape[:2]
    assert image_size(path) == encoded_size(path.read_bytes(), "a") == (HEIGHT, WIDTH)
    for sizes in (header_sizes(path, "a"), header_sizes(path.read_bytes(), "a")):
        assert sizes == (stored.shape[:2], (HEIGHT, WIDTH), orientation)
    half = stored.shape[0] // 2, stored.shape[1] // 2
    assert read_image(path, least=half, decoding=ignoring).shape == (*half, 3)
    if stored.shape != colours().shape:
        reason = r"^/.*: is 24x32 pixels, but .* says 32x24.* orientation .*--exif ignore.*leave that option out$"
        with pytest.raises(UnreadableImage, match=reason):
            read_image(path, (HEIGHT, WIDTH), decoding=ignoring)
    with pytest.raises(UnreadableImage, match="annotation says 31x24") as error:
        read_image(path, (HEIGHT, WIDTH - 1), decoding=ignoring)
    assert "--exif" not in str(error.value)


def test_exif_after_the_pixels(tmp_path: Path) -> None:
    """Where some editors put a PNG's."""
    path = tmp_path / "a.png"
    stored = save_turned(path, colours(), 6)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    assert header_sizes(path, "a") == (stored.shape[:2], (HEIGHT, WIDTH), 6)
    np.testing.assert_array_equal(pixels(path), colours())
    np.testing.assert_array_equal(read_image(path, decoding=Decoding(exif=False)), stored)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_sizes_come_from_the_header(tmp_path: Path, suffix: str) -> None:
    """Nothing is decoded: not even damage to the pixels is found."""
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **({"tiffinfo": {274: 6}} if suffix == "tif" else EXACT.get(suffix, {})))
    content = path.read_bytes()
    kept = len(content) * 3 // 4
    path.write_bytes(content[:kept] + bytes(len(content) - kept))
    stored, upright = (HEIGHT, WIDTH), (WIDTH, HEIGHT) if suffix == "tif" else (HEIGHT, WIDTH)
    assert header_sizes(path, "a")[:2] == header_sizes(path.read_bytes(), "a")[:2] == (stored, upright)


def exif_block(**changes: int) -> bytes:
    """Of a camera: orientation 6, the resolution a fraction; `changes` name tags and give them another type."""
    types = {"orientation": 3, "resolution": 5, "unit": 3} | changes
    entries = [(274, types["orientation"], 1, 6), (282, types["resolution"], 1, 50), (296, types["unit"], 1, 2)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + struct.pack("<II", 72, 1)


BROKEN_EXIF = {
    "noise": b"Exif\0\0" + np.random.default_rng(0).bytes(200),
    "nothing": b"Exif\0\0",
    "cut short": exif_block()[:20],
    "circular": exif_block()[:10] + struct.pack("<I", 0) + exif_block()[14:],
    "resolution of another type": exif_block(resolution=2),
    "orientation of another type": exif_block(orientation=2),
    "orientation 9": exif_block().replace(struct.pack("<HHII", 274, 3, 1, 6), struct.pack("<HHII", 274, 3, 1, 9)),
    "huge count": exif_block().replace(struct.pack("<HHI", 282, 5, 1), struct.pack("<HHI", 282, 5, 2**31)),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("damage", BROKEN_EXIF)
def test_broken_exif_does_not_matter(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(colours()).save(path, exif=exif_block(), **EXACT.get(suffix, {}))
    assert header_sizes(path, "a").orientation == 6
    Image.fromarray(colours()).save(path, exif=BROKEN_EXIF[damage], **EXACT.get(suffix, {}))
    found = pixels(path, (HEIGHT, WIDTH))
    assert np.abs(found.astype(int) - colours()).max() <= (3 if suffix == "jpg" else 0)
    sizes = header_sizes(path, "a")
    assert sizes.stored == (HEIGHT, WIDTH)
    assert sizes.orientation == 1 or (sizes.orientation == 6 and damage in ("resolution of another type", "huge count"))


# Files that give no pixels


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
    "drawing": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
    "another format": lambda path: Image.fromarray(colours()).save(path, "TGA"),
    "tiff of thirteen colours": lambda path: save_tiff(path, bytes(13 * HEIGHT * WIDTH), 8, 1, samples=13),
    "jpeg's first bytes only": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"),
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
    "link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, case: str) -> None:
    path = tmp_path / "picture.jpg"
    DAMAGED[case](path)
    for size in (None, (64, 64)):
        with pytest.raises(UnreadableImage) as error:
            read_image(path, size)
        assert str(path) in str(error.value)


def test_pillow_logs_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the handlers of pytest, unhandled records are written to the terminal: see `quiet`."""
    path = tmp_path / "a.tif"
    DAMAGED["tiff of thirteen colours"](path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(UnreadableImage):
        read_image(path)


@pytest.mark.parametrize("case", ["zero bytes", "text", "another format", "folder", "missing", "link to itself"])
def test_size_of_damaged_files(tmp_path: Path, case: str) -> None:
    path = tmp_path / "picture.jpg"
    DAMAGED[case](path)
    for ask in (image_size, lambda path: header_sizes(path, str(path))):
        with pytest.raises(UnreadableImage) as error:
            ask(path)
        assert str(error.value).startswith(f"{path}: ")


def test_messages_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a\0.jpg"
    for content, words in {
        b"": "is empty",
        b"text": "is no JPEG, PNG, WebP, TIFF, BMP, GIF, PPM, AVIF or JPEG 2000 image",
        png(HEIGHT, WIDTH): "cannot be read as an image",
    }.items():
        with pytest.raises(UnreadableImage, match=f"^table.arrow row 7: {words}.*leave it out$"):
            decode_image(content, "table.arrow row 7")
    for read in (read_image, image_size):
        with pytest.raises(UnreadableImage, match=r"null byte.*leave it out"):
            read(path)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png(height: int, width: int, rows: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00")
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [20_001, 65_536])
def test_an_image_over_the_limit(tmp_path: Path, side: int) -> None:
    """Known from its header, without decoding."""
    path = tmp_path / "large.png"
    path.write_bytes(png(20_000, side))
    for read in (read_image, image_size, lambda path: decode_image(path.read_bytes(), path.name)):
        with pytest.raises(UnreadableImage, match=f"large.png: has {side}x20000 = {20_000 * side} pixels") as error:
            read(path)
        assert f"{MAX_PIXELS}" in str(error.value) and "tiles" in str(error.value)


def test_the_largest_image(tmp_path: Path) -> None:
    """Pillow's own limit is lower, and it would warn much sooner."""
    path = tmp_path / "large.png"
    path.write_bytes(png(20_000, 20_000))
    assert image_size(path) == (20_000, 20_000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)


def test_threads_share_pillows_settings(tmp_path: Path) -> None:
    """They are put back by the last of them; until then no thread meets Pillow's own limit."""
    content, failures = png(20_000, 20_000), []

    def read() -> None:
        try:
            for _ in range(200):
                assert encoded_size(content, "a") == (20_000, 20_000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (8, 400), (400, 8), (1, 300), (8, 16_000), (16_000, 8)])
def test_tiny_and_elongated_images(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", size[::-1], (200, 10, 90)).save(path, **EXACT.get(suffix, {}))
    assert image_size(path) == size
    for least in (None, size, (4, 4), (1, 448), (448, 448), (1, 1)):
        found = read_image(path, size, least)
        assert found.shape[0] >= min(size[0], least[0] if least else size[0])
        assert found.shape[1] >= min(size[1], least[1] if least else size[1])
        assert np.abs(found.astype(int) - [200, 10, 90]).max() <= 3


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
def test_reduced_decoding(tmp_path: Path, kind: str) -> None:
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
def test_reduced_decoding_of_a_rotated_image(tmp_path: Path, suffix: str, orientation: int) -> None:
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


def test_corrupt_jpegs_are_read_as_by_pillow(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
    capfd.readouterr()  # the fast decoder says what it puts up with
