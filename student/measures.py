"""Formulas of the measures that are no areas, for rows of pixels."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from student.map_statistics import MapStatistics
from student.pixel_sets import PixelSets
from student.protocols import EPSILON, Normalisation

TINY: Final = 1e-20
"""Added to the maps in the density form of IG."""


def normalised_scanpath_saliency(
    prediction: MapStatistics, fixations: PixelSets, *, ddof: int, constant_score: float
) -> Tensor:
    """Return NSS ``(B,)``: the mean at fixations of maps with mean 0 and standard deviation 1."""
    size = prediction.values.shape[1]
    found = fixations.mean(fixations.read(prediction.unit, padding=0.0))
    variance = prediction.unit_variance * size / max(size - ddof, 1)  # constant if size is ddof
    score = ((found[:, None] - prediction.unit_mean) / variance.sqrt())[:, 0]
    score = score.masked_fill(prediction.constant, constant_score)
    return score.where(fixations.counts > 0, torch.nan)


def linear_correlation(
    prediction: MapStatistics, density: MapStatistics, *, constant_score: float
) -> Tensor:
    """Return CC ``(B,)``."""
    products = _dot(prediction.unit, density.unit)[:, None] / prediction.unit.shape[1]
    covariance = products - prediction.unit_mean * density.unit_mean
    variances = prediction.unit_variance * density.unit_variance
    score = (covariance / variances.sqrt())[:, 0]
    score = score.masked_fill(prediction.constant, constant_score)
    return score.masked_fill(density.constant, torch.nan)


def similarity(
    prediction: MapStatistics, density: MapStatistics, *, minmax: bool, of_zero: float, repair: bool
) -> Tensor:
    """Return SIM ``(B,)``: the sum over pixels of the lesser of two maps that have sum 1."""
    if not minmax:
        if repair:
            prediction, density = prediction.repaired(), density.repaired()
        scaled = prediction.values * (density.total / prediction.total)
        return torch.minimum(scaled, density.values, out=scaled).sum(1) / density.total[:, 0]
    ratio = density.unit_total / prediction.unit_total
    scaled = torch.mul(prediction.unit, ratio, out=prediction.scratch)
    lesser = torch.minimum(scaled, density.unit, out=scaled).sum(1)
    score = lesser / density.unit_total[:, 0]
    score = score.masked_fill(prediction.zero | density.zero, of_zero)
    constant = (prediction.constant & ~prediction.zero) | (density.constant & ~density.zero)
    return score.masked_fill(constant, torch.nan)


def divergence(
    prediction: MapStatistics, density: MapStatistics, *, epsilon: float, repair: bool
) -> Tensor:
    """Return KLD ``(B,)`` of the density from the prediction, both scaled to sum 1, in nats.

    That is the sum of ``g * ln(epsilon + g / (p + epsilon))``; here numerator and denominator are
    multiplied by the density's sum, which saves to divide the density by it.
    """
    if repair:
        prediction, density = prediction.repaired(), density.repaired()
    predicted = prediction.total.masked_fill(prediction.zero[:, None], 1.0)
    total = density.total.masked_fill(density.zero[:, None], 1.0)
    ratio = torch.mul(prediction.values, total / predicted, out=prediction.scratch)
    ratio.add_(epsilon * total)
    torch.div(density.values, ratio, out=ratio)
    return _dot(density.values, ratio.add_(epsilon).log_()) / total[:, 0]


def information_gain(
    prediction: MapStatistics,
    fixations: PixelSets,
    baseline: MapStatistics | None,
    *,
    normalise: Normalisation,
    repair: bool,
) -> Tensor:
    """Return IG ``(B,)`` in bits per fixation; without a baseline, the prediction's term alone."""
    bits = _log_densities(prediction, fixations, normalise=normalise, repair=repair)
    if baseline is not None:
        bits = bits - _log_densities(baseline, fixations, normalise=normalise, repair=repair)
    return fixations.mean(bits)


def _log_densities(
    maps: MapStatistics, fixations: PixelSets, *, normalise: Normalisation, repair: bool
) -> Tensor:
    """Return the binary logarithms of densities at the fixations, ``(B, n)``."""
    if normalise == "minmax":  # the sum of a constant map is 0, and all else NaN
        return (fixations.read(maps.unit, padding=1.0) / maps.unit_total + EPSILON).log2()
    if repair:
        maps = maps.repaired()
    total = maps.total + TINY * maps.values.shape[1]
    return ((fixations.read(maps.values, padding=1.0) + TINY) / total).log2()


def _dot(first: Tensor, second: Tensor) -> Tensor:
    if first.is_cpu:  # row by row in BLAS, which needs no memory for the products
        return torch.stack([torch.dot(a, b) for a, b in zip(first, second, strict=True)])
    return (first * second).sum(1)
