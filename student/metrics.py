"""How alike two saliency maps are."""

from __future__ import annotations

import torch
from torch import Tensor


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
