"""What needs no model and still scores: the mean of many maps, and what other observers do."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Collection, Generator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from stores.catalogue import CatalogueVideo
from stores.datasets import find_dataset
from stores.errors import ImageError
from stores.ground_truth import GroundTruth, Points, fixation_map
from stores.images import list_images, read_gray
from student.imresize import resize_maps
from student.sources import READ_TOGETHER, MapBatch, Source, choose

GRID: Final = (192, 256)
"""Rows and columns of a centre prior; it goes to the size of what it is compared with."""
PRIOR_MAPS: Final = 1000
"""Maps that a centre prior is the mean of, at most."""
GAUSSIAN_SIGMA: Final = 0.25
"""Of the centre prior where there is nothing to learn it from, in sides of the frame."""
OBSERVER_SIGMA: Final = 12.74 / 640
"""Of the Gaussian that makes a map of observers' points, in widths of the frame (DHF1K's)."""

PriorMap = npt.NDArray[np.float64] | npt.NDArray[np.float32]


class PriorPart(NamedTuple):
    """The maps of one video that go into a centre prior."""

    total: PriorMap
    """Their sum, each with the sum 1."""
    maps: int


class CentrePrior:
    """The mean of maps of recorded eyes: where people look, whatever is shown.

    Args:
        whole: Of all videos that it is learnt from.
        own: Of the scored ones among them, by id: each is left out of its own prior.
        source: In words, what it was learnt from.
    """

    def __init__(self, whole: PriorPart, own: Mapping[str, PriorPart], source: str) -> None:
        self._whole, self._own, self.source = whole, own, source
        self.at = functools.lru_cache(4)(self._at)

    @property
    def digest(self) -> str:
        """Hash of what decides it."""
        return hashlib.sha256(self._whole.total.tobytes() + self.source.encode()).hexdigest()

    def _at(self, video: str, size: tuple[int, int]) -> PriorMap:
        """Return the prior for a scored video, ``size``, with the sum 1."""
        total, maps = self._whole
        if video in self._own:
            total, maps = total - self._own[video].total, maps - self._own[video].maps
        prior = total / maps if maps else _gaussian(*GRID)
        resized = resize_maps(torch.from_numpy(prior)[None], *size)[0].clamp(min=0).numpy()
        return np.asarray(resized / resized.sum())


class CentrePriorSource(Source):
    """The centre prior, scored like a model."""

    def __init__(self, name: str, prior: CentrePrior) -> None:
        super().__init__(name)
        self._prior = prior

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "centre prior", "sha256": self._prior.digest}

    def batches(
        self, video: CatalogueVideo, truth: GroundTruth, frames: Sequence[int]
    ) -> Generator[MapBatch]:
        record = video.record
        prior = self._prior.at(record.id, (record.height, record.width))
        for begin in range(0, len(frames), READ_TOGETHER):
            part = frames[begin : begin + READ_TOGETHER]
            yield MapBatch(part, functools.partial(choose, [prior] * len(part)))


def learn_prior(
    folders: Mapping[str, tuple[Path, str]],
    pool: Executor,
    *,
    scored: Collection[str],
    is_training: bool,
    seed: int = 0,
) -> CentrePrior:
    """Learn the centre prior from the maps of videos.

    Args:
        folders: By id, root and folder of maps; an empty folder where a video has none.
        pool: Threads that read.
        scored: Ids of the scored videos.
        is_training: Whether the videos are training videos.
        seed: Of the choice of maps.

    Raises:
        VideoError: If a folder cannot be looked into.
    """
    ids = sorted(id_ for id_, (_, folder) in folders.items() if folder)
    if len(ids) > PRIOR_MAPS:
        ids = sorted(np.random.default_rng(seed).choice(ids, PRIOR_MAPS, replace=False).tolist())
    each = max(1, PRIOR_MAPS // max(1, len(ids)))
    jobs = [(*folders[id_], each, seed, zlib.crc32(id_.encode("utf-8", "replace"))) for id_ in ids]
    total, maps = np.zeros(GRID), 0
    own: dict[str, PriorPart] = {}
    for id_, part in zip(ids, pool.map(_prior_part, jobs), strict=True):
        total, maps = total + part.total, maps + part.maps
        if id_ in scored:
            own[id_] = PriorPart(part.total.astype(np.float32), part.maps)
    if is_training:
        source = f"mean of {maps} training maps"
    elif len(ids) > 1:
        source = "mean of the maps of the other scored videos"
    else:
        source = f"Gaussian, sigma {GAUSSIAN_SIGMA:g} of each side"
    return CentrePrior(PriorPart(total, maps), own, source)


def training_maps(root: Path) -> dict[str, tuple[Path, str]]:
    """Return by id root and folder of maps of a data set's training videos, opening none."""
    return {
        video.file.id: (video.file.root, video.labels.maps)
        for video in find_dataset(root).videos
        if "train" in video.splits
    }


def observer_maps(
    points: Points, height: int, width: int
) -> tuple[PriorMap, npt.NDArray[np.bool_]]:
    """Return for each observer the map that the others' points make, and the own fixation map.

    Returns:
        Maps and fixation maps, ``(observer, height, width)``; none where there is one observer.
    """
    names = sorted(set(points.observers))
    if len(names) < 2:
        return np.empty((0, height, width)), np.empty((0, height, width), np.bool_)
    own = []
    for name in names:
        is_own = np.array([observer == name for observer in points.observers])
        own.append(fixation_map(points.rows[is_own], points.columns[is_own], height, width))
    fixations = np.stack(own)
    counts = torch.from_numpy(fixations).double()
    blurred = _blur(counts, OBSERVER_SIGMA * width).numpy()  # linear: the others' are the rest
    return blurred.sum(0, keepdims=True) - blurred, fixations


def _prior_part(job: tuple[Path, str, int, int, int]) -> PriorPart:
    root, folder, each, seed, number = job
    total, count = np.zeros(GRID), 0
    if not folder:
        return PriorPart(total, count)
    names = list_images(root / folder)
    rng = np.random.default_rng([seed, number])
    for index in sorted(rng.choice(len(names), min(each, len(names)), replace=False)):
        try:
            values = read_gray(root / folder / names[index])
        except ImageError:  # said where it is scored; a prior does without
            continue
        density = torch.from_numpy(values.astype(np.float32))[None, None]
        small = F.interpolate(density, GRID, mode="bilinear", antialias=True)[0, 0].double()
        if small.sum() > 0:
            total += (small / small.sum()).numpy()
            count += 1
    return PriorPart(total, count)


def _gaussian(height: int, width: int) -> PriorMap:
    y, x = ((np.arange(side) + 0.5) / side - 0.5 for side in (height, width))
    squared = (y[:, None] ** 2 + x[None] ** 2) / GAUSSIAN_SIGMA**2
    return np.asarray(np.exp(-squared / 2))


def _blur(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur maps ``(B, H, W)`` with a Gaussian; what is beyond the border counts as nothing."""
    radius = max(1, round(4 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    columns = F.conv2d(maps[:, None], kernel.view(1, 1, -1, 1), padding=(radius, 0))
    return F.conv2d(columns, kernel.view(1, 1, 1, -1), padding=(0, radius))[:, 0]
