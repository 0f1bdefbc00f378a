"""From scores of frames to scores of videos and of a data set, and how sure a difference is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLED_TOGETHER: Final = 2**22
"""Videos drawn at once by the bootstrap: 32 MiB of indices."""


class Average(NamedTuple):
    """Scores of a data set by one measure; NaN means undefined and is left out of every mean."""

    macro: float
    """Mean over the videos that have a score; every video counts the same."""
    micro: float
    """Mean over the frames that have a score; long videos count more."""
    per_video: Floats
    """``(V,)``, the mean over each video's frames; NaN where none has a score."""
    videos: int
    """Videos that have a score."""
    frames: int
    """Frames that have a score."""


class Difference(NamedTuple):
    """How much higher the mean of the first scores is, with an interval of confidence."""

    difference: float
    low: float
    high: float


def average_frames(scores: npt.ArrayLike, videos: npt.ArrayLike) -> Average:
    """Average scores of frames by one measure over videos and the data set.

    Args:
        scores: One for each frame, ``(F,)``; NaN where undefined.
        videos: The index of each frame's video from 0 to V - 1, ``(F,)``. An index that does not
            occur is a video without a score.

    Raises:
        ValueError: If there are not as many indices as scores, or an index is negative.
    """
    values, index = np.asarray(scores, np.float64), np.asarray(videos, np.int64)
    if values.ndim != 1 or values.shape != index.shape:
        raise ValueError(
            f"scores and videos must be (frame,), one for one, got {values.shape}, {index.shape}"
        )
    if len(index) and index.min() < 0:
        raise ValueError(f"indices of videos start at 0, got {index.min()}")
    valid = ~np.isnan(values)
    num_videos = int(index.max()) + 1 if len(index) else 0
    frames = np.bincount(index[valid], minlength=num_videos)
    totals = np.bincount(index[valid], values[valid], minlength=num_videos)
    per_video = np.divide(totals, frames, out=np.full(num_videos, np.nan), where=frames > 0)
    return Average(
        macro=_mean(per_video[frames > 0]),
        micro=_mean(values[valid]),
        per_video=per_video,
        videos=int((frames > 0).sum()),
        frames=int(valid.sum()),
    )


def paired_bootstrap(
    per_video_a: Sequence[float] | Floats,
    per_video_b: Sequence[float] | Floats,
    *,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Difference:
    """Say how sure it is that one model's videos score higher than another's (Efron, 1979).

    The same videos are drawn for both, with replacement; the interval is that of percentiles.
    Videos that lack one of the two scores are left out.

    Args:
        per_video_a: Scores ``(V,)`` of one model.
        per_video_b: Scores of another on the same videos.
        samples: Data sets that are drawn.
        seed: Of the draws.
        level: Share of them inside of the interval.

    Returns:
        The difference of means, a's less b's, and its interval; NaN where no video has both scores.

    Raises:
        ValueError: If there are not as many scores of both, ``samples`` is not positive or
            ``level`` not between 0 and 1.
    """
    a, b = np.asarray(per_video_a, np.float64), np.asarray(per_video_b, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"scores must be (video,), as many of both, got {a.shape}, {b.shape}")
    if samples < 1 or not 0 < level < 1:
        raise ValueError(
            f"samples must be positive and level between 0 and 1, got {samples} and {level}"
        )
    differences = a - b
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return Difference(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    step = max(1, RESAMPLED_TOGETHER // len(differences))
    for first in range(0, samples, step):
        rows = min(step, samples - first)
        drawn = rng.integers(0, len(differences), (rows, len(differences)))
        means[first : first + rows] = differences[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(differences.mean()), float(low), float(high))


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
