"""How alike two saliency maps are, and how well a map tells fixated pixels from others.

The measures are those of the MIT benchmark as the DHF1K benchmark uses them (Bylinski et al.,
PAMI 2019; Wang et al., CVPR 2018). NaN means undefined: it is left out of averages. Arithmetic is
float64.

Predictions ``(B, h, w)`` or ``(h, w)`` may have any real type and scale. Ground truth is never
resized; a prediction of another size is brought to it by ``resize_maps``. Fixations are masks
``(B, H, W)``, where what is positive is fixated, or for each frame an integer tensor ``(n, 2)`` of
pixels (row, column); a pixel counts once. All functions take tensors on one device, or arrays,
and raise ValueError where shapes do not fit together or maps are not finite.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from student.protocols import (
    MEASURES,
    ON_DENSITIES,
    PROTOCOLS,
    Denominator,
    Grid,
    Measure,
    Normalisation,
    Protocol,
    Ties,
)
from student.scored_frames import Fixations, Maps, ScoredFrames, gather_frames, to_tensor

__all__ = [
    "MEASURES",
    "PROTOCOLS",
    "Protocol",
    "auc_borji",
    "auc_judd",
    "auc_shuffled",
    "cc",
    "correlation",
    "ig",
    "kl_divergence",
    "kld",
    "nss",
    "score",
    "score_batch",
    "sim",
]


def kl_divergence(target: Tensor, log_prediction: Tensor) -> Tensor:
    """KL(target || prediction) of each pair of maps, in nats, with both scaled to sum 1.

    Pixels where the target is zero contribute nothing.

    Args:
        target: Non-negative maps, ``(..., H, W)``.
        log_prediction: Logarithms of the predicted maps, up to a constant, ``(..., H, W)``.

    Returns:
        ``(...)``; NaN for a target that is zero everywhere.
    """
    q = target / target.sum((-2, -1), keepdim=True)
    log_p = log_prediction - torch.logsumexp(log_prediction, (-2, -1), keepdim=True)
    return (torch.xlogy(q, q) - q * log_p).sum((-2, -1))


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation CC of each pair of maps.

    Args:
        first: Maps, ``(..., H, W)``.
        second: Maps, ``(..., H, W)``.

    Returns:
        ``(...)``; NaN where a map is constant.
    """
    a = first - first.mean((-2, -1), keepdim=True)
    b = second - second.mean((-2, -1), keepdim=True)
    norms = a.square().sum((-2, -1)) * b.square().sum((-2, -1))
    return (a * b).sum((-2, -1)) / norms.sqrt()


def score(
    prediction: Maps,
    density: Maps | None,
    fixations: Maps | None,
    other: Maps | None = None,
    baseline: Maps | None = None,
    protocol: Protocol | str = "dhf1k",
) -> dict[str, float]:
    """Score the prediction for one frame by all measures.

    Args:
        prediction: Saliency map, ``(h, w)``.
        density: Ground truth as a continuous map, ``(H, W)``.
        fixations: Ground truth as a fixation map, ``(H, W)``.
        other: Fixation map of other videos, ``(H, W)``, for shuffled AUC.
        baseline: Map that IG compares with, as the mean training density; without it, IG is
            the first term alone.
        protocol: Rules, or their name in ``PROTOCOLS``.

    Returns:
        A value for each of ``MEASURES``; NaN where it is undefined or its ground truth missing.

    Raises:
        ValueError: If shapes do not fit together or maps are not finite.
    """
    maps = (prediction, density, fixations, other, baseline)
    given = [None if values is None else to_tensor(values)[None] for values in maps]
    predictions, densities, masks, others, baselines = given
    assert predictions is not None
    scores = score_batch(predictions, densities, masks, others, baselines, protocol=protocol)
    return {measure: values.item() for measure, values in scores.items()}


@torch.no_grad()
def score_batch(
    predictions: Maps,
    densities: Maps | None,
    fixations: Fixations | None,
    others: Fixations | None = None,
    baselines: Maps | None = None,
    *,
    protocol: Protocol | str = "dhf1k",
    measures: Collection[Measure] = MEASURES,
    size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Score predictions for a batch of frames.

    Args:
        predictions: Saliency maps, ``(B, h, w)``; the work is done on their device, on a CPU by
            as many threads as PyTorch may use.
        densities: Ground truth as continuous maps, ``(B, H, W)``.
        fixations: Ground truth as fixations.
        others: Fixations of other videos, for shuffled AUC.
        baselines: Maps that IG compares with, ``(B, H, W)``, or one for all, ``(H, W)``; without
            them IG is the first term alone.
        protocol: Rules, or their name in ``PROTOCOLS``.
        measures: What is computed.
        size: Height and width of the ground truth, where it consists of points alone; the
            predictions' by default.

    Returns:
        For each measure ``(B,)``, float64; NaN where it is undefined or its ground truth missing.

    Raises:
        ValueError: If shapes do not fit together, maps are not finite, or a name is unknown.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ValueError(f"no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
        protocol = PROTOCOLS[protocol]
    if unknown := set(measures) - set(MEASURES):
        raise ValueError(f"no measure {min(unknown)!r}; there are {', '.join(MEASURES)}")
    frames = gather_frames(
        predictions,
        densities,
        fixations if set(measures) - ON_DENSITIES else None,
        others if "auc_shuffled" in measures else None,
        baselines if "ig" in measures else None,
        size=size,
        protocol=protocol,
    )
    wanted = [measure for measure in MEASURES if measure in measures]
    chunks = _score_chunks(list(frames.chunks()), wanted)
    return {
        measure: torch.cat([scores[index] for scores in chunks])
        for index, measure in enumerate(wanted)
    }


def _score_chunks(
    chunks: Sequence[ScoredFrames], measures: Sequence[Measure]
) -> list[list[Tensor]]:
    """Score chunks of frames, on a CPU several at a time.

    Each has a thread of its own. PyTorch's threads would wait for each other after every operation,
    and take many times as long where other programs are busy on the same cores.
    """

    @torch.no_grad()
    def score_chunk(chunk: ScoredFrames) -> list[Tensor]:
        own = replace(chunk)  # whose statistics are forgotten afterwards
        return [own.score(measure) for measure in measures]

    threads = min(torch.get_num_threads(), len(chunks))
    if threads < 2 or not chunks[0].predictions.is_cpu:
        return [score_chunk(chunk) for chunk in chunks]
    of_the_process = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "score", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(score_chunk, chunks))
    finally:
        torch.set_num_threads(of_the_process)  # part of it is not a thread's own


def auc_judd(
    predictions: Maps, fixations: Fixations, *, ties: Ties = "expected", seed: int = 0
) -> Tensor:
    """Area under the ROC curve through thresholds at the fixated values (Judd et al., 2012).

    Negatives are the pixels that are not fixated. The score is undefined where no pixel is
    fixated, or every one.

    Args:
        predictions: Saliency maps.
        fixations: Ground truth.
        ties: What becomes of equal values. "expected" is the mean over jitter too small to change
            the order of others. "jitter" adds uniform noise from 0 to 1e-7 (rescale maps of tiny
            values before). "none" counts as if there were no ties, which is wrong where there are.
            "joined" makes equal values one threshold and ends the curve at the map's minimum.
        seed: Of the jitter, which is the same for every frame.
    """
    return _score_one("auc_judd", Protocol(ties=ties, seed=seed), predictions, fixations=fixations)


def auc_borji(
    predictions: Maps,
    fixations: Fixations,
    *,
    grid: Grid = "closed",
    splits: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Area under the ROC curve against random pixels (Borji et al., 2013).

    Undefined for constant maps (but not on the full grid) and where no pixel is fixated.

    Args:
        predictions: Saliency maps.
        fixations: Ground truth.
        grid: Thresholds on maps that are scaled to 0..1. "closed" is 0, 0.1 .. 1; "open" the same
            below the highest value looked at; "full" every value, where maps are not scaled.
        splits: The score is the mean over that many draws of as many pixels as are fixated; None
            for its exact expectation.
        seed: Of the draws, which are the same for every frame.
    """
    protocol = Protocol(grid=grid, splits=splits, seed=seed)
    return _score_one("auc_borji", protocol, predictions, fixations=fixations)


def auc_shuffled(
    predictions: Maps,
    fixations: Fixations,
    others: Fixations,
    *,
    grid: Grid = "closed",
    splits: int | None = None,
    seed: int = 0,
    denominator: Denominator = "negatives",
) -> Tensor:
    """Area under the ROC curve against fixations of other videos (Zhang et al., 2008).

    Undefined as AUC-Borji is, and where there are no other fixations.

    Args:
        predictions: Saliency maps.
        fixations: Ground truth.
        others: Fixations of other videos.
        grid: Thresholds, as in ``auc_borji``.
        splits: The score is the mean over that many draws, without replacement, of as many of the
            others as pixels are fixated, or of all; None for its exact expectation.
        seed: Of the draws, which start anew for every frame.
        denominator: Whether false positives of a draw are divided by the number of its negatives
            or, as TinyHD does, of the fixations, also where there are fewer negatives.
    """
    protocol = Protocol(grid=grid, splits=splits, seed=seed, denominator=denominator)
    return _score_one("auc_shuffled", protocol, predictions, fixations=fixations, others=others)


def nss(predictions: Maps, fixations: Fixations, *, ddof: int = 1) -> Tensor:
    """Normalised scanpath saliency: mean z-score at the fixations (Peters et al., 2005).

    Undefined for constant maps and where no pixel is fixated.

    Args:
        predictions: Saliency maps.
        fixations: Ground truth.
        ddof: The variance divides by the number of pixels less this.
    """
    return _score_one("nss", Protocol(ddof=ddof), predictions, fixations=fixations)


def cc(predictions: Maps, densities: Maps) -> Tensor:
    """Pearson's correlation; undefined where a map is constant."""
    return _score_one("cc", Protocol(), predictions, densities=densities)


def sim(predictions: Maps, densities: Maps, *, minmax: bool = True) -> Tensor:
    """Similarity: sum over pixels of the lesser of two maps that have sum 1 (Judd et al., 2012).

    Args:
        predictions: Saliency maps.
        densities: Ground truth.
        minmax: Whether the minimum is taken off first. Then the score is 0 where a map is zero,
            and undefined where one has another constant value.
    """
    return _score_one("sim", Protocol(sim_minmax=minmax), predictions, densities=densities)


def kld(predictions: Maps, densities: Maps) -> Tensor:
    """Divergence KL(density || prediction) of maps scaled to sum 1, in nats, kept finite by 2^-52.

    A zero map stays zero: about 30 for a prediction, 0 for a density. Negative values are taken
    as they are, with a warning, and may make the score NaN.
    """
    return _score_one("kld", Protocol(), predictions, densities=densities)


def ig(
    predictions: Maps,
    fixations: Fixations,
    baselines: Maps | None = None,
    *,
    normalise: Normalisation = "minmax",
) -> Tensor:
    """Information gain over a baseline in bits per fixation (Kuemmerer et al., 2015).

    Undefined where no pixel is fixated and, with "minmax", where a map is constant.

    Args:
        predictions: Saliency maps.
        fixations: Ground truth.
        baselines: Maps that are compared with, as the mean training density; without them the
            score is the first term alone.
        normalise: Maps become densities by taking off the minimum and dividing by the sum
            ("minmax"; a zero that is fixated then costs 36 bits), or by the latter alone
            ("density").
    """
    protocol = Protocol(ig_normalise=normalise)
    return _score_one("ig", protocol, predictions, fixations=fixations, baselines=baselines)


def _score_one(
    measure: Measure,
    protocol: Protocol,
    predictions: Maps,
    *,
    densities: Maps | None = None,
    fixations: Fixations | None = None,
    others: Fixations | None = None,
    baselines: Maps | None = None,
) -> Tensor:
    """Score one map ``(h, w)``, giving ``()``, or a batch of them, giving ``(B,)``."""
    single = predictions.ndim == 2

    def as_batch(maps: Maps | None) -> Tensor | None:
        return None if maps is None else to_tensor(maps)[None] if single else to_tensor(maps)

    def as_sets(given: Fixations | None) -> Fixations | None:
        return as_batch(given) if isinstance(given, Tensor | np.ndarray) else given

    scores = score_batch(
        to_tensor(predictions)[None] if single else predictions,
        as_batch(densities),
        as_sets(fixations),
        as_sets(others),
        baselines,
        protocol=protocol,
        measures=[measure],
    )[measure]
    return scores[0] if single else scores
