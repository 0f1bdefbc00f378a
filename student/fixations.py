"""Fixated pixels of all videos of a split, in memory: what shuffled AUC draws from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from stores.errors import GroundTruthError
from stores.ground_truth import GroundTruth, move_points
from stores.progress import Progress

Points = npt.NDArray[np.int32]
"""Pixels (row, column), ``(n, 2)``, each once."""
OTHER_VIDEOS: Final = 10
"""Videos of which a frame's other fixations are."""
READ_TOGETHER: Final = 64


@dataclass(frozen=True)
class VideoFixations:
    """The fixated pixels of one video."""

    size: tuple[int, int]
    """Height and width of its frames."""
    points: dict[int, Points]
    """By frame, of those whose fixations were recorded and could be read."""

    @cached_property
    def seen(self) -> list[int]:
        """Frames with at least one fixation."""
        return [frame for frame, points in self.points.items() if len(points)]


def load_fixations(
    truths: Sequence[GroundTruth],
    sizes: Sequence[tuple[int, int]],
    pool: Executor,
    *,
    frames: Sequence[Sequence[int]] | None = None,
    on_bad: Callable[[int, int, str], None] | None = None,
) -> list[VideoFixations]:
    """Read where eyes landed in videos.

    Args:
        truths: Recorded eyes of each video.
        sizes: Height and width of each.
        pool: Threads that read.
        frames: Frames of each video that are read; all that are recorded if not given.
        on_bad: Told number of the video, frame and reason of what cannot be read, and then is left
            out; an error if not given.

    Raises:
        GroundTruthError: If a file is damaged, and nobody is to be told.
    """
    wanted = frames if frames is not None else [truth.frames for truth in truths]
    parts = [
        (index, numbers[begin : begin + READ_TOGETHER])
        for index, numbers in enumerate(wanted)
        for begin in range(0, len(numbers), READ_TOGETHER)
    ]

    def read(part: tuple[int, Sequence[int]]) -> tuple[int, dict[int, Points]]:
        index, numbers = part
        return index, dict(_read(index, truths[index], numbers, on_bad))

    found: list[dict[int, Points]] = [{} for _ in truths]
    total = sum(map(len, wanted))
    with Progress(total, unit="frames", label="reading fixations") as progress:
        for (_, numbers), (index, points) in zip(parts, pool.map(read, parts), strict=True):
            found[index].update(points)
            progress.advance(len(numbers))
    return [VideoFixations(size, points) for size, points in zip(sizes, found, strict=True)]


def draw_others(
    pool: Sequence[VideoFixations],
    *,
    video: int,
    frame: int,
    seed: int,
    size: tuple[int, int],
    without: int | None,
    count: int = OTHER_VIDEOS,
) -> Points:
    """Draw the other fixations that shuffled AUC takes for a frame's negatives.

    They are those of one frame of each of some other videos. What is drawn depends on the
    arguments alone, not on the order in which frames are scored.

    Args:
        pool: Videos to draw from.
        video: Number of the scored video.
        frame: The scored frame.
        seed: Of the drawing.
        size: Height and width of the scored frame, to which points are moved.
        without: Number of the scored video in the pool, if it is in it.
        count: Videos that are drawn; all if there are fewer.

    Returns:
        Pixels, ``(n, 2)``; none if there is no other video.
    """
    candidates = [index for index, other in enumerate(pool) if index != without and other.seen]
    rng = np.random.default_rng([seed, video, frame])
    parts = [np.empty((0, 2), np.int64)]
    for index in rng.choice(len(candidates), min(count, len(candidates)), replace=False):
        other = pool[candidates[index]]
        chosen = other.seen[rng.integers(len(other.seen))]
        points = other.points[chosen].astype(np.int64)
        parts.append(np.stack(move_points(points[:, 0], points[:, 1], other.size, size), 1))
    drawn = np.concatenate(parts)
    drawn = drawn[((drawn >= 0) & (drawn < size)).all(1)]
    return np.unique(drawn, axis=0).astype(np.int32)


def _read(
    number: int,
    truth: GroundTruth,
    frames: Sequence[int],
    on_bad: Callable[[int, int, str], None] | None,
) -> Iterator[tuple[int, Points]]:
    for frame in frames:
        try:
            fixations = truth.read_fixations(frame)
        except GroundTruthError as error:
            if on_bad is None:
                raise
            on_bad(number, frame, str(error))
            continue
        if fixations is not None:
            yield frame, np.argwhere(fixations).astype(np.int32)
