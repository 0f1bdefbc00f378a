"""Images are read by content of their own format alone; what is none is one error with its path."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stores.errors import ImageError, VideoError
from stores.images import (
    check_png,
    is_junk,
    list_images,
    natural_key,
    read_gray,
    read_rgb,
    read_sequence,
    read_size,
    stamp_images,
)

GRAY = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8) * 5
COLOUR = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=2)
READERS: list[Callable[[Path], Any]] = [read_gray, read_rgb, read_size]


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)  # type: ignore[arg-type]
    return path


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """Return a PNG written by hand, as its specification says."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [png_chunk(b"IHDR", head), *more, png_chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + png_chunk(b"IEND", b"")


def test_gray_png_is_read_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", GRAY)
    gray = read_gray(path)
    assert gray.dtype == np.uint8
    np.testing.assert_array_equal(gray, GRAY)
    np.testing.assert_array_equal(read_rgb(path), np.stack([GRAY] * 3, axis=2))
    assert read_size(path) == check_png(path) == (6, 8)


def test_bmp_is_read_as_it_is(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_gray(save(tmp_path / "g.BMP", GRAY, format="BMP")), GRAY)
    path = save(tmp_path / "c.bmp", COLOUR)
    np.testing.assert_array_equal(read_gray(path), GRAY)
    np.testing.assert_array_equal(read_rgb(path), COLOUR)


def test_jpeg_is_read_nearly_as_it_was(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(20, 230, 64).astype(np.uint8), (48, 1))
    path = save(tmp_path / "a.jpg", ramp, quality=95)
    assert np.abs(read_gray(path).astype(int) - ramp).max() < 6
    assert read_rgb(path).shape == (48, 64, 3)
    colour = save(tmp_path / "b.jpeg", np.stack([ramp, ramp // 2, ramp // 3], 2), quality=95)
    assert np.abs(read_gray(colour).astype(int) - ramp).max() < 12


def test_jpeg_of_printers_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", COLOUR, "CMYK")
    assert read_rgb(path).shape == (6, 8, 3)
    assert read_gray(path).shape == (6, 8)


def test_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", np.zeros((10, 20), np.uint8), exif=exif)
    assert read_rgb(path).shape == (10, 20, 3)
    assert read_size(path) == (10, 20)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_first_channel_of_colours_is_the_map(tmp_path: Path, mode: str) -> None:
    pixels = COLOUR if mode == "RGB" else np.dstack([COLOUR, np.full((6, 8), 7, np.uint8)])
    path = save(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(read_gray(path), GRAY)
    np.testing.assert_array_equal(read_rgb(path), COLOUR)


def test_alpha_of_gray_is_ignored(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.dstack([GRAY, np.zeros_like(GRAY)]))
    with Image.open(path) as image:
        assert image.mode == "LA"
    np.testing.assert_array_equal(read_gray(path), GRAY)
    np.testing.assert_array_equal(read_rgb(path)[..., 1], GRAY)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(48))], ids=["none", "one", "many"])
def test_palette_is_looked_up(tmp_path: Path, transparency: int | bytes | None) -> None:
    """Indices 0..47 of a palette of (255 - i, i, 7)."""
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).convert("P")
    image.putpalette([value for i in range(256) for value in (255 - i, i, 7)])
    path = tmp_path / "a.png"
    if transparency is None:
        image.save(path)
    else:
        image.save(path, transparency=transparency)
    with Image.open(path) as saved:
        assert saved.mode == "P"
    index = np.arange(48).reshape(6, 8)
    np.testing.assert_array_equal(read_gray(path), 255 - index)
    np.testing.assert_array_equal(read_rgb(path), np.dstack([255 - index, index, index * 0 + 7]))


def test_transparent_gray_is_still_gray(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", GRAY, transparency=10)
    np.testing.assert_array_equal(read_gray(path), GRAY)
    np.testing.assert_array_equal(read_rgb(path)[..., 2], GRAY)


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    points = GRAY > 100
    path = save(tmp_path / "a.png", points)
    with Image.open(path) as image:
        assert image.mode == "1"
    np.testing.assert_array_equal(read_gray(path), np.where(points, 255, 0))
    np.testing.assert_array_equal(read_rgb(path)[..., 0], np.where(points, 255, 0))


def test_few_bits_are_spread_over_the_range(tmp_path: Path) -> None:
    """Two bits a pixel: 0 1 2 3 are 0 85 170 255 of 255."""
    (tmp_path / "a.png").write_bytes(raw_png(4, 1, 2, 0, b"\x00\x1b"))
    assert read_gray(tmp_path / "a.png").tolist() == [[0, 85, 170, 255]]


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    values = (np.arange(48).reshape(6, 8) * 1300).astype(np.uint16)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    (tmp_path / "a.png").write_bytes(raw_png(8, 6, 16, 0, rows))
    gray = read_gray(tmp_path / "a.png")
    assert gray.dtype == np.uint16
    np.testing.assert_array_equal(gray, values)
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png")[..., 0], values >> 8)


def test_sixteen_bit_colours_are_read(tmp_path: Path) -> None:
    values = np.array([[[65535, 0, 256], [512, 30000, 1]]], np.uint16)
    (tmp_path / "a.png").write_bytes(raw_png(2, 1, 16, 2, b"\x00" + values.astype(">u2").tobytes()))
    assert read_gray(tmp_path / "a.png").tolist() == [[255, 2]]
    assert read_rgb(tmp_path / "a.png").tolist() == [[[255, 0, 1], [2, 117, 0]]]


def damaged(folder: Path) -> dict[str, Path]:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)
    whole = save(folder / "whole.png", noise).read_bytes()
    made = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "head alone": whole[:33],
        "text": b"not a picture\n" * 20,
        "bad checksum": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "huge": raw_png(60000, 60000, 8, 0, b""),
        "large": raw_png(10000, 10000, 8, 0, b""),
        "rather large": raw_png(9000, 9000, 8, 0, b""),
        "no width": raw_png(0, 10, 8, 0, b""),
    }
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, "GIF")
    made["GIF"] = buffer.getvalue()
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, "TIFF")
    made["TIFF"] = buffer.getvalue()
    paths = {}
    for name, data in made.items():
        paths[name] = folder / f"{name}.png"
        paths[name].write_bytes(data)
    return paths


@pytest.mark.parametrize("reader", [read_gray, read_rgb])
def test_what_is_no_image_is_an_error_that_names_it(
    tmp_path: Path, reader: Callable[[Path], Any]
) -> None:
    for name, path in damaged(tmp_path).items():
        with pytest.raises(ImageError) as caught:
            reader(path)
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=r"gone\.png: No such file"):
        reader(tmp_path / "gone.png")


@pytest.mark.parametrize("name", ["huge", "large", "rather large"])
def test_huge_image_is_refused_by_its_head(tmp_path: Path, name: str) -> None:
    """A file of 70 bytes must not take gigabytes."""
    with pytest.raises(ImageError, match=name):
        read_size(damaged(tmp_path)[name])


def test_another_format_under_a_known_suffix_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "jpeg.png", GRAY, format="JPEG")
    assert read_gray(path).shape == (6, 8)


@pytest.mark.parametrize("name", ["empty", "cut", "head alone", "text", "GIF"])
def test_quick_look_at_a_png_sees_damage(tmp_path: Path, name: str) -> None:
    path = damaged(tmp_path)[name]
    with pytest.raises(ImageError) as caught:
        check_png(path)
    assert str(path) in str(caught.value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("reader", [*READERS, check_png])
def test_pipe_is_no_image_and_not_waited_for(tmp_path: Path, reader: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png is no regular file"):
        reader(tmp_path / "pipe.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_any_damage_is_an_image_error(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    whole = save(tmp_path / f"a.{suffix}", COLOUR.repeat(3, 0)).read_bytes()
    path = tmp_path / f"b.{suffix}"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.3 else data)
        for reader in READERS:
            with suppress(ImageError):  # any other error fails the test
                reader(path)


def test_order_is_that_of_people_who_count() -> None:
    names = ["img_10", "img_9", "img_1", "2", "10", "img", "a_2_10", "a_2_9", "a_10_1", "img_9b"]
    assert sorted(names, key=natural_key) == [
        *("2", "10", "a_2_9", "a_2_10", "a_10_1", "img", "img_1", "img_9", "img_9b", "img_10")
    ]


def test_order_does_not_depend_on_the_disk() -> None:
    """``1`` and ``01`` count the same."""
    names = ["01.png", "1.png", "001.png", "2.png"]
    orders = {tuple(sorted(names[i:] + names[:i], key=natural_key)) for i in range(4)}
    assert len(orders) == 1
    assert next(iter(orders))[-1] == "2.png"


def test_foreign_digits_do_not_break_the_order() -> None:
    assert len(sorted(["٣.png", "3.png", "²", "x²", "x2", "", "٣٣a"], key=natural_key)) == 7


def test_junk_of_browsers_and_archives_is_no_image(tmp_path: Path) -> None:
    for name in ("9.png", "10.PNG", "11.Jpg"):
        save(tmp_path / name, GRAY, format="PNG")
    for name in ("Thumbs.db", ".DS_Store", "._9.png", "notes.txt", "12.png.txt", "gif.gif"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "13.png").mkdir()
    assert list_images(tmp_path) == ["9.png", "10.PNG", "11.Jpg"]
    assert is_junk("__MACOSX")
    assert stamp_images(tmp_path).num_bytes == 3 * (tmp_path / "9.png").stat().st_size


def test_sequence_passes_over_damaged_images_but_counts_them(tmp_path: Path) -> None:
    for number in range(1, 12):
        save(tmp_path / f"f{number}.png", np.full((4, 4), number, np.uint8))
    (tmp_path / "f1.png").write_bytes(b"")
    cut = tmp_path / "f10.png"
    cut.write_bytes(cut.read_bytes()[:40])
    found = [(rank, int(picture[0, 0, 0])) for rank, picture in read_sequence(tmp_path)]
    assert found == [(rank, rank + 1) for rank in range(11) if rank not in (0, 9)]
    late = [(rank, int(picture[0, 0, 0])) for rank, picture in read_sequence(tmp_path, 8)]
    assert late == [(8, 9), (10, 11)]


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    for look in (list_images, stamp_images):
        with pytest.raises(VideoError, match="gone"):
            look(tmp_path / "gone")
