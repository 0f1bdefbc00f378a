"""Which clips there are, which of them validate, and which an epoch draws."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from stores.grid import ShardGrid
from stores.shards import LabelSet
from stores.table import VideoRow
from student.config import CLIP_FRAMES
from student.recipe import Sampling

FLIPS: Final = 1
SOURCES: Final = 2
UNLABELLED: Final = 3
"""Numbers by which draws of different things differ."""


class ClipKey(NamedTuple):
    """A clip: 16 consecutive frames of a video, known by the newest of them."""

    video: str
    last: int
    is_flipped: bool = False
    source: int = -1
    """Number of the label set whose targets are wanted; -1 for all."""


Spans = Mapping[str, Sequence[range]]
"""For each video, spans of newest frames that clips may have."""


@dataclass(frozen=True)
class ClipPools:
    """Clips to train on and clips to validate on; they share no frame."""

    training: Spans
    validation: Spans

    @property
    def num_training(self) -> int:
        """Number of clips that there are to train on."""
        return _count(self.training)

    def describe(self, videos: Sequence[VideoRow]) -> str:
        """Say how many clips there are, and of how many of these videos."""
        parts = [
            f"{_count(spans)} of {len(spans)} videos to {what}"
            for spans, what in ((self.training, "train on"), (self.validation, "validate on"))
        ]
        unused = len(videos) - len({*self.training, *self.validation})
        return ", ".join(parts) + (f"; {unused} videos have none" if unused else "")


@dataclass(frozen=True)
class Spares:
    """Clips of which some take the place of others that cannot be read."""

    spans: Spans
    seed: int

    def draw(self, key: ClipKey, attempt: int) -> ClipKey:
        """Draw a clip in the place of another: always the same, whoever draws and whenever."""
        video_number = zlib.crc32(key.video.encode())
        rng = np.random.default_rng([self.seed, video_number, key.last, attempt])
        video = list(self.spans)[rng.integers(len(self.spans))]
        lasts = _lasts(self.spans[video])
        return key._replace(video=video, last=int(lasts[rng.integers(len(lasts))]))


def find_pools(
    videos: Sequence[VideoRow],
    labels: Sequence[LabelSet],
    sampling: Sampling,
    *,
    target_frames: int,
    lag: int = 0,
    grids: Sequence[ShardGrid] = (),
) -> ClipPools:
    """Find the clips all of whose targets are there.

    Args:
        videos: Those of the store.
        labels: Label sets that have to cover a clip's targets.
        sampling: What is kept for validation, and whether targets need full windows.
        target_frames: Newest frames of a clip that have targets.
        lag: Frames by which targets lie before the frames that they are for.
        grids: Windows of teachers that label clips in the step.

    Raises:
        ValueError: If no clip is left to train on.
    """
    pools: tuple[dict[str, list[range]], dict[str, list[range]]] = ({}, {})
    by_video = sampling.holdout_of == "videos"
    validating = _choose_videos(videos, sampling.holdout) if by_video else set()
    for video in videos:
        lasts = _clips_of(video, labels, grids, sampling, target_frames, lag)
        if by_video:
            parts = (lasts, []) if video.id not in validating else ([], lasts)
        else:
            cut = video.frames - round(video.frames * sampling.holdout)
            first_late = cut + CLIP_FRAMES - 1 + lag
            parts = (
                [part for span in lasts if (part := range(span.start, min(span.stop, cut)))],
                [part for span in lasts if (part := range(max(span.start, first_late), span.stop))],
            )
        for pool, spans in zip(pools, parts, strict=True):
            if spans:
                pool[video.id] = spans
    training, validation = pools
    if not training:
        names = ", ".join(item.name for item in labels) or "the store"
        raise ValueError(
            f"{names} has no clip to train on: no video has targets for the {target_frames} newest "
            f"of {CLIP_FRAMES} frames outside the {sampling.holdout:.0%} that are held out"
        )
    return ClipPools(training, validation)


def draw_epoch(
    spans: Spans,
    sampling: Sampling,
    *,
    labelled: Collection[str] = (),
    seed: int,
    epoch: int,
) -> list[ClipKey]:
    """Draw an epoch's clips, in random order.

    What is drawn depends on the arguments alone, not on workers or on what was drawn before.

    Args:
        spans: Clips to choose from.
        sampling: How many of what.
        labelled: Videos with recorded eyes.
        seed: Of the run.
        epoch: Counted from 0.
    """
    mixes = sampling.unlabelled is not None
    clips = []
    for index, (video, choices) in enumerate(spans.items()):
        if mixes and video not in labelled:
            continue
        lasts = _lasts(choices)
        rng = np.random.default_rng([seed, epoch, index])
        draws = rng.integers(len(lasts), size=sampling.clips_per_video)
        clips += [ClipKey(video, int(lasts[draw])) for draw in draws]
    if sampling.unlabelled:
        others = {video: spans[video] for video in spans if video not in labelled}
        if not others:
            raise ValueError(
                f"sampling.unlabelled is {sampling.unlabelled:g}, and there is no video without "
                "recorded eyes to train on; set it to null"
            )
        wanted = round(sampling.unlabelled * len(clips))
        rng = np.random.default_rng([seed, epoch, len(spans), UNLABELLED])
        clips += _draw_any(others, wanted, rng)
    order = np.random.default_rng([seed, epoch, len(spans)]).permutation(len(clips))
    return [clips[i] for i in order]


def flip_some(clips: Sequence[ClipKey], *, seed: int, epoch: int) -> list[ClipKey]:
    """Mirror half of the clips, at random."""
    flips = np.random.default_rng([seed, epoch, FLIPS, len(clips)]).random(len(clips)) < 0.5
    return [key._replace(is_flipped=bool(flip)) for key, flip in zip(clips, flips, strict=True)]


def take_turns(
    clips: Sequence[ClipKey], *, sources: int, batch_size: int, seed: int, epoch: int
) -> list[ClipKey]:
    """Give each batch of clips one of several label sets, at random."""
    batches = -(-len(clips) // batch_size)
    rng = np.random.default_rng([seed, epoch, SOURCES, batches])
    turns = rng.integers(sources, size=batches)
    return [key._replace(source=int(turns[index // batch_size])) for index, key in enumerate(clips)]


def spread_clips(spans: Spans, *, per_video: int) -> list[ClipKey]:
    """Return clips at even distances over each video, for validation; fewer where there are.

    One of each video comes before the next of any: the first ones are shown in pictures.
    """
    clips = []
    for video, choices in spans.items():
        lasts = _lasts(choices)
        picks = np.unique(np.linspace(0, len(lasts) - 1, per_video).astype(int))
        clips += [(turn, ClipKey(video, int(lasts[pick]))) for turn, pick in enumerate(picks)]
    return [clip for _, clip in sorted(clips, key=lambda item: item[0])]


def _clips_of(
    video: VideoRow,
    labels: Sequence[LabelSet],
    grids: Sequence[ShardGrid],
    sampling: Sampling,
    target_frames: int,
    lag: int,
) -> list[range]:
    """Return the newest frames of clips whose targets are all there, as spans."""
    there = np.ones(video.frames, np.bool_)
    for item in labels:
        covered = np.zeros(video.frames, np.bool_)
        for span in item.coverage(video.id):
            covered[span.start : span.stop] = True
        there &= covered
    if sampling.full_windows:
        for grid in (*grids, *(item.grid for item in labels)):
            there[: grid.head_frames] = False
            there[video.frames - grid.tail_frames :] = False
    # A clip is good where the targets of its newest frames are, each lag frames before.
    missing = np.concatenate([[0], np.cumsum(~there)])
    lasts = np.arange(max(CLIP_FRAMES - 1, target_frames - 1 + lag), video.frames)
    is_good = missing[lasts + 1 - lag] == missing[lasts + 1 - lag - target_frames]
    return _spans(lasts[is_good])


def _spans(numbers: npt.NDArray[np.int64]) -> list[range]:
    """Return ascending numbers as ranges without gaps."""
    if not len(numbers):
        return []
    parts = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]


def _choose_videos(videos: Sequence[VideoRow], share: float) -> set[str]:
    """Choose a share of the videos by their content: the same for every run, stage and seed."""

    def order(video: VideoRow) -> bytes:
        return hashlib.sha256(video.content_hash).digest()

    contents = {video.content_hash: order(video) for video in videos}
    ranked = sorted(contents, key=contents.__getitem__)
    count = min(round(share * len(ranked)) or bool(share), len(ranked) - 1)
    chosen = set(ranked[:count])  # copies of a video go with it
    return {video.id for video in videos if video.content_hash in chosen}


def _draw_any(spans: Spans, count: int, rng: np.random.Generator) -> list[ClipKey]:
    """Draw clips of any videos, none twice as long as there are others."""
    videos = list(spans)
    lengths = np.array([sum(map(len, spans[video])) for video in videos], np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        return []
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += rng.choice(total, min(total, count - len(drawn)), replace=False).tolist()
    clips = []
    for number in drawn:
        index = int(np.searchsorted(ends, number, side="right"))
        lasts = _lasts(spans[videos[index]])
        clips.append(ClipKey(videos[index], int(lasts[number - (ends[index] - lengths[index])])))
    return clips


def _count(spans: Spans) -> int:
    return sum(len(span) for parts in spans.values() for span in parts)


def _lasts(spans: Sequence[range]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.arange(span.start, span.stop) for span in spans])
