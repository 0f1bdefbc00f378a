"""Score the maps of one video, several batches at a time."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stores.errors import VideoError
from stores.images import GrayImage
from stores.progress import Progress
from student.baselines import (
    observer_maps,
)
from student.fixations import Points, draw_others
from student.metrics import score_batch
from student.pictures import finish_map
from student.protocols import ON_DENSITIES, PROTOCOLS, Measure
from student.scored_set import ScoredSet
from student.scores import Skipped, VideoScores
from student.sources import AnyMap, MapBatch, Source, SourceError

BATCHES_WAITING: Final = 3
"""Batches of maps that may wait for each thread that scores."""

Scores = dict[Measure, float]
"""Of one frame."""
Scored = Scores | str
"""The same, or why a frame was left out."""


class _Case(NamedTuple):
    """A frame that is scored."""

    frame: int
    saliency: AnyMap
    density: GrayImage | None
    points: Points | None


class VideoScorer:
    """Scores the maps of one video, several batches at a time."""

    def __init__(
        self,
        scored: ScoredSet,
        number: int,
        source: Source | None,
        progress: Progress,
        *,
        note: str,
    ) -> None:
        self._set, self._settings = scored, scored.settings
        self._number, self._source = number, source
        self._video, self._truth = scored.videos[number], scored.truths[number]
        self._size = scored.sizes[number]
        self._progress, self._note = progress, note
        self._skipped: list[Skipped] = []
        self._scores: dict[int, Scores] = {}

    def score(self, frames: Sequence[int], stamp: str) -> VideoScores:
        """Score frames.

        Raises:
            TinyHDError: If something is missing or damaged and that is not to be left out.
        """
        id_ = self._video.record.id
        waiting: deque[tuple[int, Future[dict[int, Scored]]]] = deque()
        try:
            left = self._available(frames)
            with closing(self._batches(left)) as batches:
                for batch in batches:
                    future = self._set.pool.submit(self._score_batch, batch)
                    waiting.append((len(batch.frames), future))
                    while len(waiting) > BATCHES_WAITING * self._set.workers:
                        self._take(*waiting.popleft())
            while waiting:
                self._take(*waiting.popleft())
        except (SourceError, VideoError) as error:
            for _, future in waiting:
                future.cancel()
            if not self._settings.skip_bad:
                raise
            # What was scored of it goes, too: how much that is would depend on the threads.
            told = len(self._scores) + len(self._skipped)
            self._scores.clear()
            self._skipped = [Skipped(id_, None, str(error))]
            self._progress.advance(max(0, len(frames) - told), note=self._note)
        numbers = tuple(sorted(self._scores))
        values = {
            measure: np.array([self._scores[number][measure] for number in numbers], np.float64)
            for measure in self._settings.measures
        }
        return VideoScores(id_, numbers, values, tuple(self._skipped), stamp)

    def _available(self, frames: Sequence[int]) -> list[int]:
        """Return the frames that can be scored; what cannot is left out, if that is wanted."""
        if self._source is None or not self._settings.skip_bad:
            return list(frames)
        there = self._source.available(self._video, self._truth)
        for frame in frames:
            if frame not in there:
                self._skip(frame, f"{self._source.name} has no map of it")
        return [frame for frame in frames if frame in there]

    def _batches(self, frames: Sequence[int]) -> Generator[MapBatch]:
        if self._source is not None:
            yield from self._source.batches(self._video, self._truth, frames)
            return
        for frame in frames:  # the other observers' maps are made where they are scored
            yield MapBatch([frame], lambda index=None: [])

    def _take(self, count: int, future: Future[dict[int, Scored]]) -> None:
        for frame, scores in future.result().items():
            if isinstance(scores, str):
                self._skip(frame, scores)
            else:
                self._scores[frame] = scores
        self._progress.advance(count, note=self._note)

    def _skip(self, frame: int, reason: str) -> None:
        self._skipped.append(Skipped(self._video.record.id, frame, reason))

    def _score_batch(self, batch: MapBatch) -> dict[int, Scored]:
        """Score a batch; where something in it is bad, its frames one by one, to tell which."""
        if self._source is None:
            return {frame: self._score_observers(frame) for frame in batch.frames}
        try:
            return {**self._score_maps(batch.frames, batch.read())}
        except (SourceError, VideoError) as error:
            if not self._settings.skip_bad:
                raise
            if len(batch.frames) == 1:
                return {batch.frames[0]: str(error)}
        found: dict[int, Scored] = {}
        for index, frame in enumerate(batch.frames):
            found |= self._score_batch(MapBatch([frame], functools.partial(batch.read, index)))
        return found

    def _score_maps(self, frames: Sequence[int], maps: Sequence[AnyMap]) -> dict[int, Scores]:
        """Score maps; frames that lack the same labels together."""
        self._check_maps(frames, maps)
        if self._settings.through_png and self._source is not None and not self._source.is_8_bit:
            maps = [finish_map(np.asarray(m, np.float32), *self._size, "paper") for m in maps]
        for saliency in maps:
            self._check_size(saliency)
        wants_maps = bool(set(self._settings.measures) & ON_DENSITIES)
        groups: dict[tuple[Any, ...], list[_Case]] = {}
        for frame, saliency in zip(frames, maps, strict=True):
            density = self._truth.read_density(frame) if wants_maps else None
            case = _Case(frame, saliency, density, self._points_of(frame))
            kind = (saliency.shape, saliency.dtype, case.density is None, case.points is None)
            groups.setdefault(kind, []).append(case)
        found: dict[int, Scores] = {}
        for cases in groups.values():
            scores = self._measure(cases)
            for index, case in enumerate(cases):
                found[case.frame] = {name: float(values[index]) for name, values in scores.items()}
        return found

    def _check_size(self, saliency: AnyMap) -> None:
        """Raise a SourceError if the protocol does not take a map of this size."""
        protocol = PROTOCOLS[self._settings.protocol]
        if self._source is not None and not protocol.resize and saliency.shape != self._size:
            sizes = ["x".join(map(str, size)) for size in (saliency.shape, self._size)]
            raise SourceError(
                f"maps by {self._source.name} are {sizes[0]}, the ground truth of "
                f"{self._video.record.id!r} is {sizes[1]}, and the protocol {protocol.name!r} does "
                "not resize: add --through-png, or take the protocol dhf1k"
            )

    def _measure(self, cases: Sequence[_Case]) -> dict[Measure, npt.NDArray[np.float64]]:
        settings, first = self._settings, cases[0]
        device = settings.device
        needs_points = first.points is not None
        densities = None
        if first.density is not None:
            maps: list[npt.NDArray[Any]] = [
                case.density for case in cases if case.density is not None
            ]
            densities = _on(np.stack(maps), device)
        scores = score_batch(
            _on(np.stack([case.saliency for case in cases]), device),
            densities,
            [_pixels(case.points) for case in cases] if needs_points else None,
            [self._others_of(case.frame) for case in cases] if needs_points else None,
            self._prior() if needs_points else None,
            protocol=settings.protocol,
            measures=settings.measures,
            size=self._size,
        )
        found = {measure: scores[measure].cpu().numpy() for measure in settings.measures}
        if densities is not None:  # a map of no eye at all says nothing about distributions
            is_black = (densities.flatten(1).amax(1) == 0).cpu().numpy()
            for measure in ON_DENSITIES & found.keys():
                found[measure] = np.where(is_black, np.nan, found[measure])
        return found

    def _score_observers(self, frame: int) -> Scores:
        """Score for each observer the map that the others' points make; return the mean."""
        settings = self._settings
        nothing: Scores = dict.fromkeys(settings.measures, math.nan)
        points = self._truth.read_points(frame)
        if points is None:
            return nothing
        maps, fixations = observer_maps(points, *self._size)
        if not len(maps):
            return nothing
        wanted = [measure for measure in settings.measures if measure not in ON_DENSITIES]
        scores = score_batch(
            _on(maps, settings.device),
            None,
            _on(fixations, settings.device),
            [self._others_of(frame)] * len(maps),
            self._prior(),
            protocol=settings.protocol,
            measures=wanted,
        )
        return {**nothing, **{measure: float(scores[measure].nanmean()) for measure in wanted}}

    def _check_maps(self, frames: Sequence[int], maps: Sequence[AnyMap]) -> None:
        assert self._source is not None
        whose = f"of {self._video.record.id!r} by {self._source.name}"
        for frame, saliency in zip(frames, maps, strict=True):
            if saliency.dtype.kind == "f" and not np.isfinite(saliency).all():
                raise SourceError(f"the map of frame {frame} {whose} is not finite")

    def _points_of(self, frame: int) -> Points | None:
        """Return where eyes landed; what could not be read before is read again, to say why."""
        if not self._set.fixations:
            return None
        points = self._set.fixations[self._number].points.get(frame)
        if points is None:
            self._truth.read_fixations(frame)
        return points

    def _others_of(self, frame: int) -> torch.Tensor:
        scored = self._set
        if not scored.others:
            return torch.empty((0, 2), dtype=torch.int64)
        drawn = draw_others(
            scored.others,
            video=self._number,
            frame=frame,
            seed=self._settings.seed,
            size=self._size,
            without=scored.other_numbers.get(self._video.record.id),
        )
        return _pixels(drawn)

    def _prior(self) -> torch.Tensor | None:
        if "ig" not in self._settings.measures:
            return None
        return _on(self._set.prior.at(self._video.record.id, self._size), self._settings.device)


def _pixels(points: Points | None) -> torch.Tensor:
    assert points is not None
    return torch.from_numpy(points.astype(np.int64))


def _on(values: npt.NDArray[Any], device: str) -> torch.Tensor:
    if values.dtype == np.uint16:  # of which PyTorch can do little
        values = values.astype(np.int32)
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
