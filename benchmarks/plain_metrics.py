"""Measures of saliency maps, formula by formula: what benchmarks and tests compare with.

Nothing here is shared with ``student/`` and nothing is made fast: one frame at a time, every
measure by itself, a sort for each AUC. These are the rules of the protocol ``dhf1k`` for maps of
one size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

EPSILON = 2.0**-52


def plain_scores(
    prediction: Floats, density: Floats, fixated: Mask, others: Mask, baseline: Floats
) -> dict[str, float]:
    """Score one frame; all are ``(H, W)``."""
    with np.errstate(divide="ignore", invalid="ignore"):
        at_fixations = {name: measure(prediction, fixated) for name, measure in ONE_MAP.items()}
        return {
            **at_fixations,
            "auc_shuffled": auc_shuffled(prediction, fixated, others),
            "cc": cc(prediction, density),
            "sim": sim(prediction, density),
            "kld": kld(prediction, density),
            "ig": ig(prediction, fixated, baseline),
        }


def auc_judd(prediction: Floats, fixated: Mask) -> float:
    """AUC-Judd in expectation over jitter."""
    positives, negatives = np.sort(prediction[fixated]), np.sort(prediction[~fixated])
    n, m = len(positives), len(negatives)
    if n == 0 or m == 0:
        return float("nan")
    lower = np.searchsorted(negatives, positives, side="left")
    equal = np.searchsorted(negatives, positives, side="right") - lower
    mann_whitney = (lower + equal / 2).sum() / (n * m)
    k = (positives == positives[0]).sum()
    above = m - lower[0] - equal[0]
    return float(mann_whitney + (above + equal[0] * k / (k + 1)) / (2 * n * m))


def auc_borji(prediction: Floats, fixated: Mask) -> float:
    """AUC-Borji in expectation over the drawn pixels."""
    scaled = scale(prediction)
    return grid_auc(scaled[fixated], scaled.ravel())


def auc_shuffled(prediction: Floats, fixated: Mask, others: Mask) -> float:
    """Shuffled AUC in expectation over the drawn fixations."""
    scaled = scale(prediction)
    return grid_auc(scaled[fixated], scaled[others])


def grid_auc(positives: Floats, negatives: Floats) -> float:
    """Area under the curve of eleven thresholds."""
    if not len(positives) or not len(negatives) or np.isnan(negatives[0]):
        return float("nan")
    thresholds = np.arange(11)[::-1] / 10
    rates = []
    for values in (positives, negatives):
        reached = len(values) - np.searchsorted(np.sort(values), thresholds, side="left")
        rates.append(np.concatenate([[0.0], reached / len(values), [1.0]]))
    return float(np.trapezoid(rates[0], rates[1]))


def nss(prediction: Floats, fixated: Mask) -> float:
    """Mean z-score at the fixations."""
    if not fixated.any():
        return float("nan")
    if prediction.min() == prediction.max():
        return float("nan")
    z = (prediction - prediction.mean()) / prediction.std(ddof=1)
    return float(z[fixated].mean())


def cc(prediction: Floats, density: Floats) -> float:
    """Pearson's correlation."""
    if prediction.min() == prediction.max() or density.min() == density.max():
        return float("nan")
    a = (prediction - prediction.mean()) / prediction.std()
    b = (density - density.mean()) / density.std()
    return float((a * b).mean())


def sim(prediction: Floats, density: Floats) -> float:
    """Sum of the lesser of both maps."""
    first, second = (
        to_density(scale(maps)) if maps.any() else maps for maps in (prediction, density)
    )
    return float(np.minimum(first, second).sum())


def kld(prediction: Floats, density: Floats) -> float:
    """Divergence of the density from the prediction in nats."""
    p, g = (to_density(maps) if maps.any() else maps for maps in (prediction, density))
    return float((g * np.log(EPSILON + g / (p + EPSILON))).sum())


def ig(prediction: Floats, fixated: Mask, baseline: Floats) -> float:
    """Information gain over the baseline in bits per fixation."""
    if not fixated.any():
        return float("nan")
    a, b = to_density(scale(prediction)), to_density(scale(baseline))
    gain = np.log2(EPSILON + a[fixated]) - np.log2(EPSILON + b[fixated])
    return float(gain.mean())


def scale(maps: Floats) -> Floats:
    """Bring values to 0..1; NaN where all are equal."""
    scaled: Floats = (maps - maps.min()) / (maps.max() - maps.min())
    return scaled


def to_density(maps: Floats) -> Floats:
    """Bring the sum to 1."""
    density: Floats = maps / maps.sum()
    return density


ONE_MAP: Mapping[str, Callable[[Floats, Mask], float]] = {
    "auc_judd": auc_judd,
    "auc_borji": auc_borji,
    "nss": nss,
}
