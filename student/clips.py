"""Clips for training: which there are, which an epoch draws, and their frames and targets."""

from __future__ import annotations

import signal
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stores.errors import TargetStoreError, TinyHDError, VideoError
from stores.shards import FrameSet, LabelSet
from stores.table import VideoRow
from stores.targets import TargetStore
from student.config import CLIP_FRAMES
from student.footage import Footage

MAX_TRIES: Final = 10
"""Clips that are tried to be read for one that is wanted."""


class ClipError(TinyHDError):
    """A clip cannot be read, and nor can any that was drawn in its place."""


class ClipKey(NamedTuple):
    """A clip: 16 consecutive frames of a video, known by the newest of them."""

    video: str
    last: int


class BadClip(NamedTuple):
    """A clip that could not be read."""

    key: ClipKey
    source: str
    """The video whose frames cannot be had, or what of the store cannot be read."""
    reason: str


class Batch(NamedTuple):
    """Clips and what the teacher says about the newest frame of each."""

    keys: list[ClipKey]
    frames: Tensor
    """uint8 ``(B, 16, H, W, 3)`` RGB"""
    planes: dict[str, Tensor]
    """Native planes by array, each ``(B, map, y, x)``"""
    bad: Sequence[BadClip] = ()
    """Clips that others among ``keys`` take the place of."""


Spans = Mapping[str, Sequence[range]]
"""For each video, spans of newest frames that clips may have."""


@dataclass(frozen=True)
class ClipSplit:
    """Clips to train on and clips to validate on; they share no frame."""

    training: Spans
    validation: Spans


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
        return ClipKey(video, int(lasts[rng.integers(len(lasts))]))


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
        lasts = _lasts(choices)
        draws = np.random.default_rng([seed, epoch, index]).integers(len(lasts), size=per_video)
        clips += [ClipKey(video, int(lasts[draw])) for draw in draws]
    order = np.random.default_rng([seed, epoch, len(spans)]).permutation(len(clips))
    return [clips[i] for i in order]


def spread_clips(spans: Spans, *, per_video: int) -> list[ClipKey]:
    """Return clips at even distances over each video, for validation; fewer where there are."""
    clips = []
    for video, choices in spans.items():
        lasts = _lasts(choices)
        picks = np.unique(np.linspace(0, len(lasts) - 1, per_video).astype(int))
        clips += [ClipKey(video, int(lasts[pick])) for pick in picks]
    return clips


class Sample(NamedTuple):
    """What is read of one clip."""

    key: ClipKey
    frames: npt.NDArray[np.uint8]
    planes: dict[str, npt.NDArray[np.float32]]
    bad: Sequence[BadClip] = ()


class ClipDataset(Dataset[Sample]):
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

    def __getitem__(self, key: ClipKey) -> Sample:
        _, labels, _ = self._open()
        planes = labels.read(key.video, key.last, key.last + 1)
        return Sample(key, self._frames(key), planes)

    def read_or_replace(self, key: ClipKey, spares: Spares) -> Sample | list[BadClip]:
        """Return a clip, or another if it cannot be read; or, after some tries, what was tried."""
        bad: list[BadClip] = []
        wanted = key
        while len(bad) < MAX_TRIES:
            try:
                return self[key]._replace(bad=bad)
            except TargetStoreError as error:
                bad.append(BadClip(key, self._source(key, error), str(error)))
            key = spares.draw(wanted, len(bad))
        return bad

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

    def _source(self, key: ClipKey, error: TargetStoreError) -> str:
        if not isinstance(error, VideoError):
            return str(error)
        store, _, _ = self._open()
        return str(self._footage.path_of(store.video(key.video)))

    def _open(self) -> tuple[TargetStore, LabelSet, FrameSet | None]:
        if self._opened is None:
            store = TargetStore.open(self._path)
            frames = store.find_frame_set(height=self._height, width=self._width)
            self._opened = (store, store.label_set(self._name), frames)
        return self._opened


class _Replaced(Dataset[Sample | list[BadClip]]):
    """Clips, or others in their place."""

    def __init__(self, dataset: ClipDataset, spares: Spares) -> None:
        self._dataset, self._spares = dataset, spares

    def __getitem__(self, key: ClipKey) -> Sample | list[BadClip]:
        return self._dataset.read_or_replace(key, self._spares)


def load_batches(
    dataset: ClipDataset,
    clips: Sequence[ClipKey],
    *,
    batch_size: int,
    workers: int = 0,
    spares: Spares | None = None,
) -> Iterator[Batch]:
    """Read clips in the given order, ``batch_size`` at a time; the last batch may be smaller.

    Args:
        dataset: Reads them.
        clips: Which.
        batch_size: How many at a time.
        workers: Processes that read; 0 to read in this one.
        spares: Take the place of clips that cannot be read, which are an error without.

    Raises:
        TargetStoreError: If a clip cannot be read and there are no spares.
        ClipError: If a clip cannot be read, and nor can any that is drawn in its place.
    """
    batches = [list(clips[i : i + batch_size]) for i in range(0, len(clips), batch_size)]
    loader: DataLoader[Any] = DataLoader(
        dataset if spares is None else _Replaced(dataset, spares),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_leave_signals_to_parent if workers else None,
    )
    for batch in loader:
        if not isinstance(batch, Batch):
            raise ClipError(
                f"{len(batch)} clips were tried one after the other, and none can be read; "
                f"at last: {batch[-1].reason}"
            )
        yield batch


def _leave_signals_to_parent(_: int) -> None:
    """Let a Ctrl-C end training after its step, not the workers in the middle of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(items: list[Sample | list[BadClip]]) -> Batch | list[BadClip]:
    samples = []
    for item in items:
        if not isinstance(item, Sample):
            return item
        samples.append(item)
    stacked = {
        name: torch.from_numpy(np.concatenate([sample.planes[name] for sample in samples]))
        for name in samples[0].planes
    }
    return Batch(
        [sample.key for sample in samples],
        torch.from_numpy(np.stack([sample.frames for sample in samples])),
        stacked,
        [bad for sample in samples for bad in sample.bad],
    )


def _lasts(spans: Sequence[range]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.arange(span.start, span.stop) for span in spans])


def _has_all(frames: FrameSet | None, row: VideoRow) -> bool:
    return frames is not None and not frames.missing(row)
