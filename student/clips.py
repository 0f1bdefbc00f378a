"""Clips as they are read for training: frames, targets of teachers, and recorded eyes."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stores.catalogue import CatalogueVideo
from stores.errors import TargetStoreError, TinyHDError, VideoError
from stores.ground_truth import GroundTruth, resize_fixations
from stores.shards import FrameSet, LabelSet
from stores.table import VideoRow
from stores.targets import TargetStore
from student.config import CLIP_FRAMES
from student.footage import Footage
from student.online import TeacherEyes, TeacherView
from student.pools import ClipKey, Spares

MAX_TRIES: Final = 10
"""Clips that are tried to be read for one that is wanted."""
TRUTHS_KEPT: Final = 64
"""Videos whose labels' names are kept in mind."""

Planes = dict[str, npt.NDArray[np.float32]]
"""Native planes by array, each ``(T, map, y, x)``."""


class ClipError(TinyHDError):
    """A clip cannot be read, and nor can any that was drawn in its place."""


class BadClip(NamedTuple):
    """A clip that could not be read."""

    key: ClipKey
    source: str
    """The video whose frames cannot be had, or what of the store cannot be read."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClipContent:
    """What is read of a clip."""

    height: int
    width: int
    labels: tuple[str, ...] = ()
    """Names of label sets."""
    flipped: tuple[str, ...] = ()
    """For each, the name of its twin of mirrored frames; empty where targets are mirrored."""
    target_frames: int = 1
    """Newest frames of the clip that have targets."""
    lag: int = 0
    """Frames by which targets lie before the frames that they are for."""
    recorded: Mapping[str, CatalogueVideo] = field(default_factory=dict)
    """By the store's id, the videos with recorded eyes."""
    with_fixations: bool = False
    """Whether fixations are read, too."""
    eyes: TeacherEyes | None = None
    """Of a teacher that labels clips in the step. All frames are then decoded from the videos, at
    their own size, as its input is made of these."""


class Sample(NamedTuple):
    """What is read of one clip."""

    key: ClipKey
    frames: npt.NDArray[np.uint8]
    planes: tuple[Planes, ...]
    """Of each label set; empty for those that are not wanted."""
    density: npt.NDArray[np.float32] | None
    fixations: npt.NDArray[np.bool_] | None
    view: TeacherView | None = None
    bad: Sequence[BadClip] = ()


class Batch(NamedTuple):
    """Clips, and what is said of the newest T frames of each."""

    keys: list[ClipKey]
    frames: Tensor
    """uint8 ``(B, 16, H, W, 3)`` RGB"""
    planes: tuple[dict[str, Tensor], ...]
    """For each label set its native planes by array, ``(B, T, map, y, x)``; empty where they are
    not wanted."""
    density: Tensor | None
    """Maps of recorded eyes at the student's size, ``(B, T, H, W)`` in 0..1; zero where there are
    none. Nothing if none were asked for."""
    fixations: Tensor | None
    """``(B, T, H, W)``, bool."""
    views: Sequence[TeacherView] = ()
    """What a teacher in the step sees of each clip, if there is one."""
    bad: Sequence[BadClip] = ()
    """Clips that others among ``keys`` take the place of."""


class ClipDataset(Dataset[Sample]):
    """Reads clips; the store is opened in the process that first reads.

    Frames come from the store where it keeps them at the wanted size, else from the videos, of
    which a group of pictures is then decoded for every clip.

    Args:
        store: Path or URL of the store.
        content: What is read.
        videos_root: Where the videos lie now, if not where they were labelled.
    """

    def __init__(
        self, store: str | Path, content: ClipContent, *, videos_root: Path | None = None
    ) -> None:
        self._path, self._content = store, content
        self._footage = Footage(height=content.height, width=content.width, root=videos_root)
        self._opened: tuple[TargetStore, dict[str, LabelSet], FrameSet | None] | None = None
        self._truth = lru_cache(TRUTHS_KEPT)(self._open_truth)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None, "_truth": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._truth = lru_cache(TRUTHS_KEPT)(self._open_truth)

    def __getitem__(self, key: ClipKey) -> Sample:
        density, fixations = self._recorded(key)
        frames, view = self._frames(key)
        return Sample(key, frames, self._planes(key), density, fixations, view)

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
            Whether all frames are taken from the store.

        Raises:
            VideoError: If a video has no frames in the store, and is gone or not the labelled one.
        """
        store, _, frames = self._open()
        rows = map(store.video, videos)
        decoded = [row for row in rows if self._content.eyes or not _has_all(frames, row)]
        if decoded:
            self._footage.find(decoded)
        return not decoded

    def _planes(self, key: ClipKey) -> tuple[Planes, ...]:
        _, sets, _ = self._open()
        content, span = self._content, self._targets_of(key)
        found: list[Planes] = []
        for number, name in enumerate(content.labels):
            if key.source not in (-1, number):
                found.append({})
                continue
            twin = content.flipped[number] if content.flipped else ""
            labels = sets[twin if key.is_flipped and twin else name]
            planes = labels.read(key.video, span.start, span.stop)
            if key.is_flipped and not twin:
                planes = {name: values[..., ::-1].copy() for name, values in planes.items()}
            found.append(planes)
        return tuple(found)

    def _targets_of(self, key: ClipKey) -> range:
        """Return the frames whose targets are read."""
        stop = key.last + 1 - self._content.lag
        return range(stop - self._content.target_frames, stop)

    def _frames(self, key: ClipKey) -> tuple[npt.NDArray[np.uint8], TeacherView | None]:
        """Return a clip's frames, and what a teacher in the step sees of it."""
        store, _, frames = self._open()
        row, view = store.video(key.video), None
        span = range(key.last + 1 - CLIP_FRAMES, key.last + 1)
        if self._content.eyes is not None:
            pictures, view = self._look(row, span, key, self._content.eyes)
        elif frames is not None and _has_all(frames, row):
            pictures = frames.read(key.video, span.start, span.stop)
        else:
            pictures = self._footage.read(row, span)
        if key.is_flipped:
            pictures = np.ascontiguousarray(pictures[:, :, ::-1])
        return pictures, view

    def _look(
        self, row: VideoRow, span: range, key: ClipKey, eyes: TeacherEyes
    ) -> tuple[npt.NDArray[np.uint8], TeacherView]:
        """Decode once what the student sees of a clip, and what a teacher does."""
        targets = self._targets_of(key)
        context = eyes.context_of(targets, row.frames)
        both = range(min(span.start, context.start), max(span.stop, context.stop))
        pictures, seen = [], []
        for number, frame in self._footage.decode(row, both):
            if number in span:
                pictures.append(self._footage.resize(frame))
            if number in context:
                seen.append(
                    eyes.resize(np.ascontiguousarray(frame[:, ::-1]) if key.is_flipped else frame)
                )
        view = TeacherView(np.stack(seen), context.start, targets, row.frames)
        return np.stack(pictures), view

    def _recorded(
        self, key: ClipKey
    ) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.bool_] | None]:
        """Return what recorded eyes say, at the student's size; zeros where a clip has none."""
        content = self._content
        if not content.recorded:
            return None, None
        shape = (content.target_frames, content.height, content.width)
        density = np.zeros(shape, np.float32)
        fixations = np.zeros(shape, np.bool_) if content.with_fixations else None
        if key.video in content.recorded:
            truth = self._truth(key.video)
            for row, frame in enumerate(range(key.last + 1 - shape[0], key.last + 1)):
                if (native := truth.read_density(frame)) is not None:
                    density[row] = _shrink(native, shape[1], shape[2])
                if fixations is not None and (seen := truth.read_fixations(frame)) is not None:
                    fixations[row] = resize_fixations(seen, shape[1], shape[2])
        if key.is_flipped:
            density = np.ascontiguousarray(density[..., ::-1])
            fixations = None if fixations is None else np.ascontiguousarray(fixations[..., ::-1])
        return density, fixations

    def _open_truth(self, video: str) -> GroundTruth:
        return self._content.recorded[video].ground_truth()

    def _source(self, key: ClipKey, error: TargetStoreError) -> str:
        if not isinstance(error, VideoError):
            return str(error)
        store, _, _ = self._open()
        return str(self._footage.path_of(store.video(key.video)))

    def _open(self) -> tuple[TargetStore, dict[str, LabelSet], FrameSet | None]:
        if self._opened is None:
            content = self._content
            store = TargetStore.open(self._path)
            frames = store.find_frame_set(height=content.height, width=content.width)
            names = {*content.labels, *filter(None, content.flipped)}
            self._opened = (store, {name: store.label_set(name) for name in names}, frames)
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
        generator=torch.Generator(),  # else every loader takes a number of PyTorch's own
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
    first = samples[0]
    planes = tuple(
        {
            name: torch.from_numpy(np.stack([sample.planes[number][name] for sample in samples]))
            for name in first.planes[number]
        }
        for number in range(len(first.planes))
    )
    return Batch(
        [sample.key for sample in samples],
        torch.from_numpy(np.stack([sample.frames for sample in samples])),
        planes,
        _stack([sample.density for sample in samples]),
        _stack([sample.fixations for sample in samples]),
        [sample.view for sample in samples if sample.view is not None],
        [bad for sample in samples for bad in sample.bad],
    )


def _stack(arrays: Sequence[npt.NDArray[Any] | None]) -> Tensor | None:
    there = [array for array in arrays if array is not None]
    return torch.from_numpy(np.stack(there)) if there else None


def _shrink(density: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[np.float32]:
    """Bring a recorded map to the student's size, in 0..1."""
    scaled = density.astype(np.float32) / np.iinfo(density.dtype).max
    maps = torch.from_numpy(scaled)[None, None]
    resized = F.interpolate(maps, (height, width), mode="bilinear", antialias=True)
    return np.asarray(resized[0, 0].numpy())


def _has_all(frames: FrameSet | None, row: VideoRow) -> bool:
    return frames is not None and not frames.missing(row)
