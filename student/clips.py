"""Clips for training: which there are, which an epoch draws, and their frames and targets."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stores.shards import FrameSet, LabelSet
from stores.table import VideoRow
from stores.targets import TargetStore
from student.config import CLIP_FRAMES
from student.footage import Footage


class ClipKey(NamedTuple):
    """A clip: 16 consecutive frames of a video, known by the newest of them."""

    video: str
    last: int


class Batch(NamedTuple):
    """Clips and what the teacher says about the newest frame of each."""

    keys: list[ClipKey]
    frames: Tensor
    """uint8 ``(B, 16, H, W, 3)`` RGB"""
    planes: dict[str, Tensor]
    """Native planes by array, each ``(B, map, y, x)``"""


Spans = Mapping[str, Sequence[range]]
"""For each video, spans of newest frames that clips may have."""


@dataclass(frozen=True)
class ClipSplit:
    """Clips to train on and clips to validate on; they share no frame."""

    training: Spans
    validation: Spans


def split_clips(labels: LabelSet, *, holdout: float) -> ClipSplit:
    """Find the clips whose target is there and was made from a full window.

    Args:
        labels: The label set.
        holdout: Share of each video's frames, at its end, that is kept out of training.

    Raises:
        ValueError: If ``holdout`` is not in 0..1 or no clip is left to train on.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be at least 0 and less than 1, got {holdout}")
    first_last = max(CLIP_FRAMES, labels.window) - 1
    training: dict[str, list[range]] = {}
    validation: dict[str, list[range]] = {}
    for video in labels.store.videos:
        cut = video.frames - round(video.frames * holdout)
        for span in labels.coverage(video.id):
            early = range(max(span.start, first_last), min(span.stop, cut))
            late = range(max(span.start, first_last, cut + CLIP_FRAMES - 1), span.stop)
            for spans, clips in ((training, early), (validation, late)):
                if clips:
                    spans.setdefault(video.id, []).append(clips)
    if not training:
        raise ValueError(
            f"{labels.name} has no clip to train on: no video has {first_last + 1} labelled frames "
            f"outside the {holdout:.0%} that are held out"
        )
    return ClipSplit(training, validation)


def draw_clips(spans: Spans, *, per_video: int, seed: int, epoch: int) -> list[ClipKey]:
    """Draw an epoch: some random clips of each video, in random order.

    What is drawn depends on the arguments alone, not on workers or on what was drawn before.
    """
    clips = []
    for index, (video, choices) in enumerate(spans.items()):
        lasts = np.concatenate([np.arange(span.start, span.stop) for span in choices])
        draws = np.random.default_rng([seed, epoch, index]).integers(len(lasts), size=per_video)
        clips += [ClipKey(video, int(lasts[draw])) for draw in draws]
    order = np.random.default_rng([seed, epoch, len(spans)]).permutation(len(clips))
    return [clips[i] for i in order]


def spread_clips(spans: Spans, *, per_video: int) -> list[ClipKey]:
    """Return clips at even distances over each video, for validation; fewer where there are."""
    clips = []
    for video, choices in spans.items():
        lasts = np.concatenate([np.arange(span.start, span.stop) for span in choices])
        picks = np.unique(np.linspace(0, len(lasts) - 1, per_video).astype(int))
        clips += [ClipKey(video, int(lasts[pick])) for pick in picks]
    return clips


class ClipDataset(
    Dataset[tuple[ClipKey, npt.NDArray[np.uint8], dict[str, npt.NDArray[np.float32]]]]
):
    """Frames and targets of clips; the store is opened in the process that first reads.

    Frames come from the store where it keeps them at the wanted size, else from the videos, of
    which a group of pictures is then decoded for every clip.

    Args:
        store: Path or URL of the store.
        labels: Name of the label set.
        height: Rows of the frames.
        width: Columns of the frames.
        videos_root: Where the videos lie now, if not where they were labelled.
    """

    def __init__(
        self,
        store: str | Path,
        labels: str,
        *,
        height: int,
        width: int,
        videos_root: Path | None = None,
    ) -> None:
        self._path, self._name = store, labels
        self._height, self._width = height, width
        self._footage = Footage(height=height, width=width, root=videos_root)
        self._opened: tuple[TargetStore, LabelSet, FrameSet | None] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def __getitem__(
        self, key: ClipKey
    ) -> tuple[ClipKey, npt.NDArray[np.uint8], dict[str, npt.NDArray[np.float32]]]:
        _, labels, _ = self._open()
        return key, self._frames(key), labels.read(key.video, key.last, key.last + 1)

    def find_frames(self, videos: Sequence[str]) -> bool:
        """Find out where the frames of videos are, once, before they are read.

        Videos whose frames are not in the store are probed, or looked up in the cache of those that
        were.

        Returns:
            Whether all frames are in the store.

        Raises:
            VideoError: If a video has no frames in the store, and is gone or not the labelled one.
        """
        store, _, frames = self._open()
        decoded = [row for row in map(store.video, videos) if not _has_all(frames, row)]
        if decoded:
            self._footage.find(decoded)
        return not decoded

    def _frames(self, key: ClipKey) -> npt.NDArray[np.uint8]:
        store, _, frames = self._open()
        row = store.video(key.video)
        span = range(key.last + 1 - CLIP_FRAMES, key.last + 1)
        if frames is not None and _has_all(frames, row):
            return frames.read(key.video, span.start, span.stop)
        return self._footage.read(row, span)

    def _open(self) -> tuple[TargetStore, LabelSet, FrameSet | None]:
        if self._opened is None:
            store = TargetStore.open(self._path)
            frames = store.find_frame_set(height=self._height, width=self._width)
            self._opened = (store, store.label_set(self._name), frames)
        return self._opened


def load_batches(
    dataset: ClipDataset, clips: Sequence[ClipKey], *, batch_size: int, workers: int = 0
) -> Iterator[Batch]:
    """Read clips in the given order, ``batch_size`` at a time; the last batch may be smaller."""
    batches = [list(clips[i : i + batch_size]) for i in range(0, len(clips), batch_size)]
    return iter(
        DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_leave_signals_to_parent if workers else None,
        )
    )


def _leave_signals_to_parent(_: int) -> None:
    """Let a Ctrl-C end training after its step, not the workers in the middle of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(
    items: list[tuple[ClipKey, npt.NDArray[np.uint8], dict[str, npt.NDArray[np.float32]]]],
) -> Batch:
    keys, frames, planes = zip(*items, strict=True)
    stacked = {
        name: torch.from_numpy(np.concatenate([item[name] for item in planes]))
        for name in planes[0]
    }
    return Batch(list(keys), torch.from_numpy(np.stack(frames)), stacked)


def _has_all(frames: FrameSet | None, row: VideoRow) -> bool:
    return frames is not None and not frames.missing(row)
