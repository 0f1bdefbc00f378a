"""Predictions and ground truth of a batch of frames, checked and brought together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from student.auc import RankedPixels, borji_auc, judd_auc, shuffled_auc
from student.imresize import resize_maps
from student.map_statistics import MapStatistics, computed_once
from student.measures import (
    divergence,
    information_gain,
    linear_correlation,
    normalised_scanpath_saliency,
    similarity,
)
from student.pixel_sets import PixelSets
from student.protocols import ON_DENSITIES, Measure, Protocol

Maps = Tensor | npt.NDArray[Any]
Fixations = Maps | Sequence[Tensor]

CHUNK_PIXELS_CPU: Final = 2**20
"""Pixels that a CPU scores together: more do not stay in its caches."""
CHUNK_PIXELS: Final = 2**24
"""Pixels that are scored together elsewhere."""


@dataclass(frozen=True, eq=False)
class ScoredFrames:
    """A batch of frames; its statistics are computed when a measure first needs them."""

    predictions: Tensor
    """``(B, h, w)``, any real type."""
    densities: Tensor | None
    """``(B, H, W)``."""
    fixations: PixelSets | Tensor | None
    """As sets, or as masks ``(B, H, W)``."""
    others: PixelSets | Tensor | None
    baselines: Tensor | None
    """``(B, H, W)``, or ``(1, H, W)`` for all frames."""
    size: tuple[int, int]
    """Height and width of the ground truth."""
    protocol: Protocol
    first: int = 0
    """Index of the first frame in the whole batch."""
    whole: ScoredFrames | None = None
    """The whole batch, of a chunk."""

    def chunks(self) -> Iterator[ScoredFrames]:
        """Yield frames in batches as large as the device scores fastest."""
        pixels = CHUNK_PIXELS_CPU if self.predictions.device.type == "cpu" else CHUNK_PIXELS
        step = max(1, pixels // max(1, self.size[0] * self.size[1]))
        for start in range(0, len(self.predictions), step):
            span = slice(start, start + step)
            yield replace(
                self,
                predictions=self.predictions[span],
                densities=None if self.densities is None else self.densities[span],
                fixations=None if self.fixations is None else self.fixations[span],
                others=None if self.others is None else self.others[span],
                baselines=None if self.baselines is None else self.baselines[span],
                first=start,
                whole=self,
            )

    @computed_once
    def prediction(self) -> MapStatistics:
        return self._resize(self._given_prediction, self.predictions)

    @computed_once
    def density(self) -> MapStatistics:
        assert self.densities is not None
        return self._read("densities", self.densities)

    @property
    def has_one_baseline(self) -> bool:
        return self.baselines is not None and len(self.baselines) == 1

    @computed_once
    def baseline(self) -> MapStatistics | None:
        if self.baselines is None:
            return None
        if self.whole is not None and self.whole.has_one_baseline:
            return self.whole.baseline
        return self._resize(self._read("baselines", self.baselines), self.baselines)

    @computed_once
    def fixated(self) -> PixelSets:
        assert self.fixations is not None
        return _as_sets(self.fixations)

    @computed_once
    def ranks(self) -> RankedPixels:
        return RankedPixels(self.prediction, self.fixated)

    @computed_once
    def _given_prediction(self) -> MapStatistics:
        return self._read("predictions", self.predictions)

    def score(self, measure: Measure) -> Tensor:
        """Return one measure ``(B,)``; NaN where its ground truth is missing.

        Raises:
            ValueError: If a map that the measure looks at is not finite.
        """
        if measure in ON_DENSITIES:
            if self.densities is not None:
                return self._score_on_density(measure)
        elif self.fixations is not None and (measure != "auc_shuffled" or self.others is not None):
            return self._score_at_fixations(measure)
        return torch.full(
            (len(self.predictions),), torch.nan, dtype=torch.float64, device=self.predictions.device
        )

    def _score_on_density(self, measure: Measure) -> Tensor:
        rules = self.protocol
        if measure == "cc":
            return linear_correlation(
                self.prediction, self.density, constant_score=rules.constant_score
            )
        if measure == "sim":
            return similarity(
                self.prediction,
                self.density,
                minmax=rules.sim_minmax,
                of_zero=rules.sim_of_zero,
                repair=rules.repair,
            )
        if not rules.repair:
            _warn_of_negative("KLD", predictions=self._given_prediction, densities=self.density)
        return divergence(
            self.prediction, self.density, epsilon=rules.kld_epsilon, repair=rules.repair
        )

    def _score_at_fixations(self, measure: Measure) -> Tensor:
        rules = self.protocol
        if measure == "auc_judd":
            return judd_auc(self.ranks, ties=rules.ties, seed=rules.seed)
        if measure == "auc_borji":
            return borji_auc(self.ranks, grid=rules.grid, splits=rules.splits, seed=rules.seed)
        if measure == "auc_shuffled":
            assert self.others is not None
            return shuffled_auc(
                self.ranks,
                _as_sets(self.others),
                grid=rules.grid,
                splits=rules.splits,
                seed=rules.seed,
                denominator=rules.denominator,
            )
        if measure == "nss":
            return normalised_scanpath_saliency(
                self.prediction, self.fixated, ddof=rules.ddof, constant_score=rules.constant_score
            )
        if rules.ig_normalise == "density" and not rules.repair:
            _warn_of_negative("IG", predictions=self._given_prediction, baselines=self.baseline)
        return information_gain(
            self.prediction,
            self.fixated,
            self.baseline,
            normalise=rules.ig_normalise,
            repair=rules.repair,
        )

    def _read(self, name: str, maps: Tensor) -> MapStatistics:
        """Check that maps are finite, in float64."""
        given = MapStatistics(maps.to(torch.float64).flatten(1))
        finite = (given.lowest.isfinite() & given.highest.isfinite())[:, 0]
        if not finite.all():
            index = int((~finite).nonzero()[0]) + self.first
            raise ValueError(f"{name} hold NaN or infinity at index {index} of the batch")
        return given

    def _resize(self, given: MapStatistics, maps: Tensor) -> MapStatistics:
        """Bring maps to the ground truth's size."""
        if maps.shape[1:] == self.size:
            return given
        return MapStatistics(resize_maps(given.values.view(maps.shape), *self.size).flatten(1))


def gather_frames(
    predictions: Maps,
    densities: Maps | None,
    fixations: Fixations | None,
    others: Fixations | None,
    baselines: Maps | None,
    *,
    size: tuple[int, int] | None,
    protocol: Protocol,
) -> ScoredFrames:
    """Check what ``metrics.score_batch`` is given, and bring it to the predictions' device.

    Raises:
        ValueError: If shapes do not fit together.
    """
    predicted = to_tensor(predictions)
    if predicted.ndim != 3 or not predicted.numel():
        raise ValueError(
            "predictions must be (frame, height, width), none of them 0, got "
            f"{tuple(predicted.shape)}"
        )
    device = predicted.device
    truth = {"densities": densities, "fixations": fixations, "others": others}
    sets: dict[str, PixelSets | Tensor | None] = dict.fromkeys(truth)
    planes: dict[str, Tensor] = {}
    for name, given in truth.items():
        if given is not None and len(given) != len(predicted):
            raise ValueError(f"{name} are of {len(given)} frames, predictions of {len(predicted)}")
        if isinstance(given, Tensor | np.ndarray):
            planes[name] = to_tensor(given).to(device)
            size = size or _height_and_width(planes[name])
            if planes[name].shape[1:] != size:
                raise ValueError(
                    f"{name} must be (frame, {size[0]}, {size[1]}), as the other ground truth, got "
                    f"{tuple(planes[name].shape)}"
                )
    size = size or _height_and_width(predicted)
    for name in ("fixations", "others"):
        points = truth[name]
        if name in planes:
            sets[name] = planes[name]
        elif points is not None:
            sets[name] = PixelSets.from_points(list(points), *size, device=device)
    if baselines is not None:
        planes["baselines"] = to_tensor(baselines).to(device)
        if baselines.ndim == 2:
            planes["baselines"] = planes["baselines"][None]
        if planes["baselines"].ndim != 3 or len(planes["baselines"]) not in (1, len(predicted)):
            raise ValueError(
                "baselines must be one map or as many as the predictions, got "
                f"{tuple(baselines.shape)}"
            )
    frames = ScoredFrames(
        predicted,
        planes.get("densities"),
        sets["fixations"],
        sets["others"],
        planes.get("baselines"),
        size,
        protocol,
    )
    for name, maps in (("predictions", predicted), ("baselines", frames.baselines)):
        if maps is not None and maps.shape[1:] != size and not protocol.resize:
            raise ValueError(
                f"{name} are {maps.shape[1]}x{maps.shape[2]}, the ground truth is "
                f"{size[0]}x{size[1]}, and the protocol {protocol.name!r} does not resize"
            )
    return frames


def to_tensor(values: Maps) -> Tensor:
    """Return an array or tensor of any real type as a tensor.

    Raises:
        ValueError: If values are not real numbers.
    """
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "biuf":
            raise ValueError(f"maps must be of real numbers, got {values.dtype}")
        # A copy can always be written, which PyTorch wants, and has this machine's byte order.
        values = torch.from_numpy(
            np.array(values, bool if values.dtype.kind == "b" else np.float64)
        )
    if values.is_complex():
        raise ValueError(f"maps must be of real numbers, got {values.dtype}")
    return values


def _as_sets(fixations: PixelSets | Tensor) -> PixelSets:
    return PixelSets.from_masks(fixations) if isinstance(fixations, Tensor) else fixations


def _height_and_width(maps: Tensor) -> tuple[int, int]:
    if maps.ndim != 3:
        raise ValueError(f"ground truth must be (frame, height, width), got {tuple(maps.shape)}")
    return (maps.shape[1], maps.shape[2])


def _warn_of_negative(measure: str, **given: MapStatistics | None) -> None:
    for name, maps in given.items():
        if maps is not None and (maps.lowest < 0).any():
            warnings.warn(
                f"{measure} is about densities, but {name} have negative values", stacklevel=2
            )
