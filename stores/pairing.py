"""Which label is about which frame: by name, or by number with one offset for a whole video."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

OFFSETS: Final = (0, 1, -1)
"""By which labels may be numbered higher than images, the likeliest first."""
VIDEO_OFFSETS: Final = (1, 0)
"""The same for the frames of a video file, which are counted from 0."""


def pair_labels(
    stems: Sequence[str], frames: int, names: Sequence[str] | None, offset: int | None = None
) -> list[int | None]:
    """Return for each label the frame it is about, or nothing if there is none.

    Labels of images have the images' names. Where all images are numbered, only the numbers count,
    with an offset; where no name fits, and there are as many labels as images, they are paired in
    their order. Labels of a video file are numbered from 1, or with another offset.

    Args:
        stems: File names of labels without suffix, in natural order.
        frames: Number of frames.
        names: File names of the frames, where they are images.
        offset: By which labels are numbered higher than frames; found out if not given.
    """
    numbers = _frame_numbers(frames, names)
    if numbers is None:
        index = {Path(name).stem: number for number, name in enumerate(names or ())}
        found = [index.get(stem) for stem in stems]
        is_in_order = len(stems) == frames and found.count(None) == frames
        return list(range(frames)) if is_in_order else found
    if offset is None:
        offset = find_offset(stems, frames, names)
    if offset is None:
        offset = (OFFSETS if names is not None else VIDEO_OFFSETS)[0]
    frame_of = {number: frame for frame, number in enumerate(numbers)}
    return [None if label is None else frame_of.get(label - offset) for label in _numbers(stems)]


def find_offset(stems: Iterable[str], frames: int, names: Sequence[str] | None) -> int | None:
    """Return by how much labels are numbered higher than frames; nothing if that is not certain.

    It is certain where one offset alone gives a frame to every label, or there is a label for every
    image. A label that is missing at
    either end makes it uncertain; other labels, or other videos, then have to tell.

    Args:
        stems: File names, without suffix, of all labels of a video.
        frames: Number of frames.
        names: File names of the frames, where they are images.
    """
    numbers = _frame_numbers(frames, names)
    labels = {label for label in _numbers(stems) if label is not None}
    if numbers is None or not labels:
        return None
    there = set(numbers)
    if len(labels) == len(there) and names is not None:  # complete: any offset may be
        offset = min(labels) - min(there)
        return offset if {label - offset for label in labels} == there else None
    offsets = OFFSETS if names is not None else VIDEO_OFFSETS
    fitting = [offset for offset in offsets if {label - offset for label in labels} <= there]
    return fitting[0] if len(fitting) == 1 else None


def _frame_numbers(frames: int, names: Sequence[str] | None) -> Sequence[int] | None:
    """Return the numbers of frames; nothing where images have names that are no numbers."""
    if names is None:
        return range(frames)
    numbers = _numbers(Path(name).stem for name in names)
    found = [number for number in numbers if number is not None]
    return found if len(found) == len(numbers) and len(set(found)) == len(found) else None


def _numbers(stems: Iterable[str]) -> list[int | None]:
    return [int(stem) if stem.isdecimal() and stem.isascii() else None for stem in stems]
