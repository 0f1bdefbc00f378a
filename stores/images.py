"""Images on disk: sequences of them that stand for a video, and gray maps of recorded eyes.

Nothing here guesses at content: files are taken by their suffix, read by the decoder of that
format alone, and one that is not what it should be is an error that names it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from stores.errors import ImageError, VideoError

IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".bmp")
FORMATS: Final = ("PNG", "JPEG", "BMP")
MAX_PIXELS: Final = 2**26
"""Of one image; more is taken for damage, or for an attack on the memory."""
JUNK: Final = frozenset({"__MACOSX", "Thumbs.db", ".DS_Store"})
WIDE_FORMATS: Final = {"I;16": np.uint16, "I;16L": np.uint16, "I;16B": np.uint16}
PNG_HEAD: Final = b"\x89PNG\r\n\x1a\n"
PNG_TAIL: Final = b"IEND\xaeB`\x82"

GrayImage = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
"""One channel as it is stored, ``(height, width)``."""


class SequenceStamp(NamedTuple):
    """By what a folder of images is taken to be the same as before."""

    num_bytes: int
    modified_ns: int


def is_junk(name: str) -> bool:
    """Return whether a name is one of those that file browsers and archives leave behind."""
    return name in JUNK or name.startswith("._")


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return by what names are ordered as people count: ``img_9`` before ``img_10``.

    Names that count the same, as ``1`` and ``01``, are ordered as text.
    """
    parts = re.split(r"([0-9]+)", name)
    key = [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]
    return (*key, (-1, name))


def list_images(folder: Path) -> list[str]:
    """Return the names of a folder's images in natural order.

    Raises:
        VideoError: If the folder cannot be looked into.
    """
    return sorted((entry.name for entry in _image_entries(folder)), key=natural_key)


def stamp_images(folder: Path) -> SequenceStamp:
    """Return how large a folder's images are and when one of them, or their list, changed.

    Raises:
        VideoError: If the folder cannot be looked into.
    """
    num_bytes = 0
    try:
        modified_ns = folder.stat().st_mtime_ns
        for entry in _image_entries(folder):
            status = entry.stat()
            num_bytes += status.st_size
            modified_ns = max(modified_ns, status.st_mtime_ns)
    except OSError as error:
        raise VideoError(f"cannot read {folder}: {error.strerror}") from error
    return SequenceStamp(num_bytes, modified_ns)


def read_size(path: Path) -> tuple[int, int]:
    """Return height and width of an image, from its head.

    Raises:
        ImageError: If it is no image.
    """
    with _opened(path) as image:
        return image.height, image.width


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """Read an image as ``(height, width, 3)`` RGB; what it says of its orientation is ignored.

    Raises:
        ImageError: If it cannot be read whole.
    """
    return _read(path, _to_rgb)


def read_gray(path: Path) -> GrayImage:
    """Read one channel of an image: gray as it is, else channel 0 (red).

    Palettes are looked up, transparency is ignored, 16 bits are kept.

    Raises:
        ImageError: If it cannot be read whole.
    """
    return _read(path, _to_gray)


def read_sequence(folder: Path, start: int = 0) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield the images of a folder in natural order with their rank.

    Images that cannot be decoded are passed over, as damaged frames of videos are.

    Args:
        folder: Where they lie.
        start: Rank of the first.

    Raises:
        VideoError: If the folder cannot be looked into.
    """
    names = list_images(folder)
    for rank in range(start, len(names)):
        try:
            yield rank, read_rgb(folder / names[rank])
        except ImageError:
            continue


def check_png(path: Path) -> tuple[int, int]:
    """Return height and width of a PNG, after a look at its two ends, which is quick.

    Raises:
        ImageError: If it is empty, cut off, or no PNG.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise ImageError(f"{path} is no regular file")
        with path.open("rb", buffering=0) as file:
            head = file.read(24)
            if not head:
                raise ImageError(f"{path} is empty")
            if len(head) < 24 or not head.startswith(PNG_HEAD):
                raise ImageError(f"{path} is no PNG")
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - len(PNG_TAIL)))
            if file.read() != PNG_TAIL:
                raise ImageError(f"{path} is cut off")
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
    return int.from_bytes(head[20:24]), int.from_bytes(head[16:20])


def _image_entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [
                entry
                for entry in entries
                if entry.name.lower().endswith(IMAGE_SUFFIXES)
                and not is_junk(entry.name)
                and not entry.is_dir()
            ]
    except OSError as error:
        raise VideoError(f"cannot look into {folder}: {error.strerror}") from error


def _opened(path: Path) -> Image.Image:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise ImageError(f"{path} is no regular file")
        image = Image.open(path, formats=FORMATS)
    except OSError as error:
        what = error.strerror or "it is no image, or damaged"
        raise ImageError(f"cannot read {path}: {what}") from error
    except (
        *(ValueError, SyntaxError, Image.DecompressionBombError),
        Image.DecompressionBombWarning,  # where warnings are errors
    ) as error:
        raise ImageError(f"cannot read {path}: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ImageError(f"{path} says that it has {image.width}x{image.height} pixels")
    return image


def _read(path: Path, convert: Callable[[Image.Image], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    with _opened(path) as image:
        try:
            return convert(image)
        except (OSError, ValueError, SyntaxError, IndexError, EOFError) as error:
            raise ImageError(f"cannot decode {path}: {error}; is it damaged?") from error


def _to_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    if image.mode in WIDE_FORMATS or image.mode in ("I", "F"):
        gray = _to_gray(image)
        if gray.dtype == np.uint16:
            gray = np.right_shift(gray, 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    return np.array(_coloured(image).convert("RGB"))


def _to_gray(image: Image.Image) -> GrayImage:
    if image.mode in WIDE_FORMATS:
        return np.array(image).astype(np.uint16)
    if image.mode == "I":  # how older Pillows read 16 bits
        values = np.array(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("it has values beyond 16 bits")
        return values.astype(np.uint16)
    if image.mode == "L":
        return np.array(image)
    if image.mode in ("1", "LA", "La"):
        return np.array(image.convert("L") if image.mode == "1" else image.getchannel(0))
    if image.mode in ("RGB", "RGBA", "RGBX"):
        return np.array(image.getchannel(0))
    return np.array(_coloured(image).convert("RGB").getchannel(0))


def _coloured(image: Image.Image) -> Image.Image:
    """Look up a palette; with its transparency, which Pillow wants to be told of."""
    return image.convert("RGBA") if image.mode in ("P", "PA") else image
