"""The frames that maps are scored on, with what recorded eyes say of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from stores.catalogue import Catalogue, CatalogueVideo, open_catalogue
from stores.datasets import Kind, find_dataset
from stores.errors import DatasetError, VideoError
from stores.ground_truth import GroundTruth
from student.baselines import (
    CentrePrior,
    learn_prior,
    training_maps,
)
from student.fixations import VideoFixations, load_fixations
from student.metrics import MEASURES, PROTOCOLS
from student.protocols import ON_DENSITIES, Measure
from student.scores import Skipped

log = logging.getLogger(__name__)

Pool = Literal["scored", "train"]
POOL_FRAMES: Final = 50
"""Frames of each training video whose fixations shuffled AUC draws from, at most."""
VERSION: Final = 1
"""Raised when the same maps would get other scores."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How maps are scored."""

    protocol: str = "dhf1k"
    """Rules by which measures are computed and averaged; one of ``PROTOCOLS``."""
    measures: tuple[Measure, ...] = MEASURES
    other: Pool = "scored"
    """Whose fixations shuffled AUC draws: of the other scored videos, or of training videos."""
    seed: int = 0
    """Of what is drawn: other fixations, frames, maps of the centre prior, bootstrap."""
    max_frames: int | None = None
    """Score so many frames of the whole set, chosen at random; all if not given."""
    through_png: bool = False
    """Bring float maps through 8 bits and a blur first, as published predictions were written."""
    skip_bad: bool = False
    """Leave out what is missing or damaged and list it; else it is an error."""
    baselines: bool = True
    """Score the centre prior and, where it is told who looked where, other observers, too."""
    workers: int | None = None
    """Threads that read and score; as many as there are CPUs if not given."""
    device: str = "cpu"
    """Where measures are computed, and students compute."""

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"there is no protocol {self.protocol!r}; there are {', '.join(PROTOCOLS)}"
            )
        if unknown := set(self.measures) - set(MEASURES):
            raise ValueError(
                f"there is no measure {min(unknown)!r}; there are {', '.join(MEASURES)}"
            )
        if not self.measures:
            raise ValueError(f"name a measure; there are {', '.join(MEASURES)}")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the score of a map."""
        names = ("protocol", "other", "seed", "max_frames", "through_png")
        values = {name: getattr(self, name) for name in names}
        measures = [measure for measure in MEASURES if measure in self.measures]
        return {"scoring": VERSION, "measures": measures, **values}


class ScoredSet:
    """The frames of a data set that are scored, and what is read once for all sources.

    Use in a ``with``.

    Args:
        data: Folder of a data set, or its catalogue.
        split: Which videos; that which the field reports on if not given.
        settings: How maps are scored.

    Raises:
        DatasetError: If there is nothing to score on.
        GroundTruthError: If recorded eyes are damaged and that is not to be left out.
        VideoError: The same of a video.
    """

    def __init__(self, data: Path, split: str | None, settings: EvaluateSettings) -> None:
        self.settings = settings
        self._data = data
        self.catalogue, self.split = _open(data, split)
        self.left_out: list[Skipped] = []
        bad = [b for b in self.catalogue.bad if self.split is None or self.split in b.splits]
        if bad and not settings.skip_bad:
            raise DatasetError(
                f"{self.catalogue.root / bad[0].path} cannot be scored on: {bad[0].reason} "
                f"({len(bad)} such videos); leave them out with --skip-bad"
            )
        self.left_out += [Skipped(item.id, None, item.reason) for item in bad]
        self.videos: list[CatalogueVideo] = []
        self.truths: list[GroundTruth] = []
        for video in self.catalogue.choose(self.split):
            self._take(video)
        if not any(truth.frames for truth in self.truths):
            raise DatasetError(
                f"{data} has no recorded eyes"
                + (f" in its split {self.split!r}" if self.split else "")
                + "; see docs/datasets.md for where they are looked for"
            )
        self.numbers = {video.record.id: number for number, video in enumerate(self.videos)}
        self.sizes = [(video.record.height, video.record.width) for video in self.videos]
        self.frames = self._choose_frames()
        self.workers = settings.workers or os.cpu_count() or 1

    def __enter__(self) -> ScoredSet:
        self.pool = ThreadPoolExecutor(
            self.workers,
            thread_name_prefix="score",
            initializer=torch.set_num_threads,
            initargs=(1,),
        )
        try:
            self._read_fixations()
        except BaseException:
            self.pool.shutdown(cancel_futures=True)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _take(self, video: CatalogueVideo) -> None:
        """Take a video, if it has recorded eyes; say what is wrong with it."""
        if not video.labels:
            return
        id_ = video.record.id
        odd = {name: "cannot be decoded, and is no frame" for name in video.dropped}
        odd |= dict.fromkeys(video.uneven, "has another size than the other frames")
        for name, what in odd.items():
            if not self.settings.skip_bad:
                raise DatasetError(
                    f"{video.record.absolute / name} {what}; leave it out with --skip-bad"
                )
            self.left_out.append(Skipped(id_, None, f"{name} {what}"))
        for problem in video.census.problems:
            log.warning("%s: %s", id_, problem)
        try:
            truth = video.ground_truth()
            _ = truth.frames  # a table of points is read here, and may be damaged
        except VideoError as error:
            if not self.settings.skip_bad:
                raise
            self.left_out.append(Skipped(id_, None, str(error)))
            return
        self.videos.append(video)
        self.truths.append(truth)

    def _choose_frames(self) -> list[list[int]]:
        frames = list(map(_scorable, self.videos, self.truths))
        total = sum(map(len, frames))
        if self.settings.max_frames is None or self.settings.max_frames >= total:
            return frames
        rng = np.random.default_rng(self.settings.seed)
        chosen = np.zeros(total, np.bool_)
        chosen[rng.choice(total, self.settings.max_frames, replace=False)] = True
        parts = np.split(chosen, np.cumsum([len(part) for part in frames])[:-1])
        return [
            [frame for frame, is_chosen in zip(part, mask, strict=True) if is_chosen]
            for part, mask in zip(frames, parts, strict=True)
        ]

    def _read_fixations(self) -> None:
        """Read what location measures need; other fixations are drawn from all that was read."""
        wanted = set(self.settings.measures) - ON_DENSITIES
        self.fixations: list[VideoFixations] = []
        self.others: list[VideoFixations] = []
        self.other_numbers: dict[str, int] = {}
        """Numbers of the scored videos among those of which others are drawn."""
        if not wanted:
            return
        shuffles = "auc_shuffled" in wanted
        takes_scored = shuffles and self.settings.other == "scored"
        self.fixations = load_fixations(
            self.truths,
            self.sizes,
            self.pool,
            frames=None if takes_scored else self.frames,
            # What is left out here is told by whoever scores the frame.
            on_bad=(lambda *_: None) if self.settings.skip_bad else None,
        )
        self.others = self.fixations if takes_scored else []
        self.other_numbers = dict(self.numbers) if takes_scored else {}
        if shuffles and not takes_scored:
            self.others = self._training_fixations()
        seen = [number for number, video in enumerate(self.others) if video.seen]
        own = set(self.other_numbers.values())
        if shuffles and (not seen or (len(seen) == 1 and seen[0] in own)):
            log.warning("there are no other videos with fixations: shuffled AUC is undefined")

    def _training_fixations(self) -> list[VideoFixations]:
        videos = [video for video in self._training() if video.labels]
        self.other_numbers = {video.record.id: number for number, video in enumerate(videos)}
        truths = [video.ground_truth() for video in videos]
        sizes = [(video.record.height, video.record.width) for video in videos]
        frames = []
        for number, truth in enumerate(truths):
            rng = np.random.default_rng([self.settings.seed, number])
            count = min(POOL_FRAMES, len(truth.frames))
            picks = rng.choice(len(truth.frames), count, replace=False)
            frames.append([truth.frames[pick] for pick in sorted(picks)])

        def leave_out(number: int, frame: int, reason: str) -> None:
            self.left_out.append(Skipped(videos[number].record.id, frame, reason))

        on_bad = leave_out if self.settings.skip_bad else None
        return load_fixations(truths, sizes, self.pool, frames=frames, on_bad=on_bad)

    def _training(self) -> list[CatalogueVideo]:
        catalogue = self.catalogue
        if "train" not in catalogue.splits and self._data.is_dir():
            catalogue = open_catalogue(self._data, split="train")
        return catalogue.choose("train")

    @property
    def has_observers(self) -> bool:
        """Whether it is told who looked where."""
        return any(truth.has_observers for truth in self.truths)

    @cached_property
    def prior(self) -> CentrePrior:
        """Where people look, whatever is shown: in training videos, else in the scored ones."""
        folders = _map_folders(v for v in self.catalogue.videos if "train" in v.splits)
        if not folders and self._data.is_dir():
            folders = training_maps(self._data)
        is_training = any(folder for _, folder in folders.values())
        if not is_training:
            folders = _map_folders(self.videos)
        return learn_prior(
            folders,
            self.pool,
            scored=self.numbers.keys(),
            is_training=is_training,
            seed=self.settings.seed,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the scores of any source."""
        digest = hashlib.sha256()
        for video, frames in zip(self.videos, self.frames, strict=True):
            labels = asdict(video.labels)
            described = [video.record.id, video.record.content_hash.hex(), labels, list(frames)]
            digest.update(json.dumps(described, sort_keys=True).encode())
        values = {"data": self.catalogue.kind, "split": self.split, "videos": digest.hexdigest()}
        if self.others:
            values["other_fixations"] = _digest(self.others)
        if "ig" in self.settings.measures:
            values["prior"] = self.prior.digest
        return {**values, **self.settings.identity}


def _usual_split(kind: Kind, splits: Collection[str]) -> str | None:
    """Return the split that is reported on, if a data set has splits."""
    usual = ("val", "test") if kind == "dhf1k" else ("test", "val")
    return next((name for name in usual if name in splits), None)


def _map_folders(videos: Iterable[CatalogueVideo]) -> dict[str, tuple[Path, str]]:
    return {video.record.id: (Path(video.record.root), video.labels.maps) for video in videos}


def _scorable(video: CatalogueVideo, truth: GroundTruth) -> list[int]:
    """Return the frames with recorded eyes, less those that are scaled to another size."""
    if not video.uneven:
        return truth.frames
    names = video.frame_names() or []
    uneven = {frame for frame, name in enumerate(names) if name in set(video.uneven)}
    return [frame for frame in truth.frames if frame not in uneven]


def _digest(fixations: Sequence[VideoFixations]) -> str:
    digest = hashlib.sha256()
    for video in fixations:
        for frame, points in video.points.items():
            digest.update(f"{video.size} {frame} {len(points)}".encode() + points.tobytes())
    return digest.hexdigest()


def _open(data: Path, split: str | None) -> tuple[Catalogue, str | None]:
    """Open a data set at a split, or at that which the field reports on."""
    if not data.is_dir():
        catalogue = Catalogue.load(data)
        return catalogue, split or _usual_split(catalogue.kind, catalogue.splits)
    if split is None:
        dataset = find_dataset(data)
        split = _usual_split(dataset.kind, {n for video in dataset.videos for n in video.splits})
    return open_catalogue(data, split=split), split
