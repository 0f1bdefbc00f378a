"""Pictures of saliency maps: colours, overlays, contact sheets and videos."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Picture = npt.NDArray[np.uint8]
"""RGB, ``(height, width, 3)``."""
Map = npt.NDArray[np.float32]
"""Saliency map, ``(height, width)``, non-negative."""

# Black, red, yellow, white at even distances; brightness rises all the way.
COLOUR_STOPS: Final = ((0, 0, 0), (190, 20, 30), (255, 190, 40), (255, 255, 255))
OVERLAY_OPACITY: Final = 0.75
CAPTION_HEIGHT: Final = 24


def colour_map(saliency: Map) -> Picture:
    """Colour a map between its minimum and its maximum; a constant map is black."""
    values = _stretch(saliency)
    stops = np.linspace(0, 1, len(COLOUR_STOPS))
    channels = [np.interp(values, stops, channel) for channel in zip(*COLOUR_STOPS, strict=True)]
    return np.stack(channels, -1).round().astype(np.uint8)


def overlay_map(frame: Picture, saliency: Map) -> Picture:
    """Lay a map over its frame: the more salient, the less of the frame shows through."""
    resized = resize_map(saliency, *frame.shape[:2])
    opacity = OVERLAY_OPACITY * _stretch(resized)[..., None]
    return (frame * (1 - opacity) + colour_map(resized) * opacity).round().astype(np.uint8)


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
    import av

    partial = path.with_name(f"partial.{path.name}")
    with av.open(str(partial), "w") as container:
        stream = None
        for picture in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=fps, options={"crf": "20"})
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())
    partial.replace(path)


def _stretch(saliency: Map) -> Map:
    low, high = float(saliency.min()), float(saliency.max())
    return (saliency - low) / (high - low) if high > low else np.zeros_like(saliency)
