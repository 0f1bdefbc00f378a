"""Pictures of saliency maps: colours, overlays, contact sheets and videos."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from stores.errors import VideoError

Picture = npt.NDArray[np.uint8]
"""RGB, ``(height, width, 3)``."""
Map = npt.NDArray[np.float32]
"""Saliency map, ``(height, width)``, non-negative."""

GrayMap = npt.NDArray[np.uint8]
"""Saliency map as gray values, ``(height, width)``."""
PostProcessing = Literal["plain", "paper"]
"""How maps become pictures; see :func:`finish_map`."""

# Black, red, yellow, white at even distances; brightness rises all the way.
COLOUR_STOPS: Final = ((0, 0, 0), (190, 20, 30), (255, 190, 40), (255, 255, 255))
OVERLAY_OPACITY: Final = 0.75
COLOURS: Final[Picture] = (
    np.stack(
        [
            np.interp(np.arange(256), np.linspace(0, 255, len(COLOUR_STOPS)), channel)
            for channel in zip(*COLOUR_STOPS, strict=True)
        ],
        -1,
    )
    .round()
    .astype(np.uint8)
)
"""Colour of each gray value."""
OPACITIES: Final[GrayMap] = (OVERLAY_OPACITY * np.arange(256)).round().astype(np.uint8)
CAPTION_HEIGHT: Final = 24
MBTREE_WIDTH: Final = 128
"""Pixels; x264's macroblock tree is not deterministic in narrower rows where it uses AVX-512."""


def colour_map(saliency: Map) -> Picture:
    """Colour a map between its minimum and its maximum; a constant map is black."""
    return COLOURS[gray_map(saliency)]


def gray_map(saliency: Map) -> GrayMap:
    """Scale a map from its minimum, black, to its maximum, white; a constant map is black."""
    low, high = float(saliency.min()), float(saliency.max())
    scale = 255 / (high - low) if high > low else 0.0
    return ((saliency - low) * scale).round().astype(np.uint8)


def finish_map(saliency: Map, height: int, width: int, how: PostProcessing) -> GrayMap:
    """Make a map of the network visible at a video's size.

    ``paper`` follows TinyHD's published evaluation: scaled between minimum and maximum, cut to 8
    bits, resized bicubically (a = -0.75), blurred with a Gaussian of 5x5 pixels and sigma 1.1.

    Args:
        saliency: ``(h, w)``.
        height: Rows of the result.
        width: Columns of the result.
        how: ``plain`` or ``paper``.

    Returns:
        ``(height, width)``; a constant map is black.
    """
    if how == "plain":
        return gray_map(resize_map(saliency, height, width))
    low, high = float(saliency.min()), float(saliency.max())
    scaled = (saliency - low) / (high - low) * 255 if high > low else np.zeros_like(saliency)
    gray = torch.from_numpy(np.floor(scaled))[None, None]
    resized = F.interpolate(gray, (height, width), mode="bicubic").round().clamp(0, 255)
    offsets = torch.arange(-2, 3, dtype=torch.float32)
    kernel = torch.exp(-offsets.square() / (2 * 1.1**2))
    kernel = kernel / kernel.sum()
    border = "reflect" if min(height, width) > 2 else "replicate"  # too small to reflect in
    padded = F.pad(resized, (2, 2, 2, 2), mode=border)
    blurred = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 5, 1)), kernel.view(1, 1, 1, 5))
    return blurred.round().clamp(0, 255)[0, 0].numpy().astype(np.uint8)


def overlay_map(frame: Picture, saliency: Map) -> Picture:
    """Lay a map over its frame: the more salient, the less of the frame shows through."""
    return overlay_gray(frame, gray_map(resize_map(saliency, *frame.shape[:2])))


def overlay_gray(frame: Picture, gray: GrayMap) -> Picture:
    """Lay a map of the frame's size, as :func:`gray_map` gives it, over the frame."""
    shades = Image.fromarray(gray)
    coloured = shades.copy()
    coloured.putpalette(COLOURS.tobytes())  # several times faster than looking up in an array
    opacity = shades.point(OPACITIES.tolist())
    overlay = Image.composite(coloured.convert("RGB"), Image.fromarray(frame), opacity)
    return np.asarray(overlay)


def resize_map(saliency: Map, height: int, width: int) -> Map:
    """Resize a map bilinearly; the aspect is not kept."""
    resized = Image.fromarray(saliency).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def fit_picture(picture: Picture, height: int, width: int) -> Picture:
    """Scale a picture into a black panel, keeping its aspect."""
    scale = min(height / picture.shape[0], width / picture.shape[1])
    rows, columns = (max(1, round(length * scale)) for length in picture.shape[:2])
    resized = Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC)
    panel = np.zeros((height, width, 3), np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    panel[top : top + rows, left : left + columns] = np.asarray(resized)
    return panel


def contact_sheet(
    rows: Sequence[Sequence[Picture]], *, titles: Sequence[str], captions: Sequence[str]
) -> Picture:
    """Put pictures into a table; all have one width, and those of a row one height.

    Args:
        rows: Pictures from left to right, row by row.
        titles: One above each column.
        captions: One below each row.
    """
    width = rows[0][0].shape[1]
    heights = [row[0].shape[0] for row in rows]
    total = CAPTION_HEIGHT + sum(height + CAPTION_HEIGHT for height in heights)
    sheet = Image.new("RGB", (width * len(titles), total))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((column * width + 6, 3), title, fill="white", font=font)
    top = CAPTION_HEIGHT
    for row, height, caption in zip(rows, heights, captions, strict=True):
        for column, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (column * width, top))
        top += height
        draw.text((6, top + 3), caption, fill="white", font=font)
        top += CAPTION_HEIGHT
    return np.asarray(sheet)


def save_picture(path: Path, picture: Picture) -> None:
    """Write a picture in the format of its suffix, whole or not at all."""
    partial = path.with_name(f"partial.{path.name}")
    Image.fromarray(picture).save(partial)
    partial.replace(path)


def save_video(path: Path, frames: Iterable[Picture], *, fps: Fraction | int = 25) -> None:
    """Write frames of one even size as H.264, whole or not at all."""
    with VideoWriter(path, fps=fps) as writer:
        for picture in frames:
            writer.write(picture)


class VideoWriter:
    """Write frames of one even size as H.264, whole or not at all. Use in a ``with``.

    Args:
        path: The file; an older one is replaced when all is written.
        fps: Frames per second.
    """

    def __init__(self, path: Path, *, fps: Fraction | int) -> None:
        self._path, self._fps = path, fps
        self._partial = path.with_name(f"partial.{path.name}")

    def __enter__(self) -> VideoWriter:
        import av

        self._container = av.open(str(self._partial), "w")
        self._stream: Any = None
        return self

    def write(self, picture: Picture) -> None:
        """Append a frame."""
        import av

        if self._stream is None:
            options = {"crf": "20", "preset": "veryfast"}
            if picture.shape[1] < MBTREE_WIDTH:
                options["mbtree"] = "0"
            self._stream = self._container.add_stream("libx264", rate=self._fps, options=options)
            self._stream.height, self._stream.width = picture.shape[:2]
            self._stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        try:
            self._container.mux(self._stream.encode(frame))
        except av.error.ExternalError as error:
            size = "x".join(map(str, picture.shape[:2]))
            raise VideoError(f"H.264 frames of {size} cannot be written to {self._path}") from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._container.close()
            self._partial.unlink(missing_ok=True)
            return
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()
        self._partial.replace(self._path)
