"""What the student is held against: the teacher's saliency map and its hierarchical maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stores.maps import MapLayout
from student.metrics import kl_divergence
from student.tinyhd import StudentOutput


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms; a term of weight 0 is left out."""

    teacher: float = 1.0
    """KL to the teacher's saliency map."""
    hierarchical: float = 1.0
    """Sum over the decoder d1's four maps of the KL to the teacher's hierarchical map."""

    def __post_init__(self) -> None:
        if min(self.teacher, self.hierarchical) < 0 or self.teacher + self.hierarchical == 0:
            raise ValueError(f"loss weights must not be negative and not all zero, got {self}")


class Losses(NamedTuple):
    """The terms of a step by name, unweighted, and their weighted sum."""

    total: Tensor
    terms: Mapping[str, Tensor]


def wanted_maps(layout: MapLayout, weights: LossWeights) -> list[str]:
    """Return the teacher's maps that the terms need.

    Raises:
        ValueError: If hierarchical maps are asked for and the teacher has not got four.
    """
    if not weights.hierarchical:
        return [layout.saliency]
    if len(layout.hierarchical) != 4:
        raise ValueError(
            f"the label set has {len(layout.hierarchical)} hierarchical maps, the student four; "
            "give the hierarchical term the weight 0"
        )
    return [layout.saliency, *layout.hierarchical]


def distillation_loss(
    output: StudentOutput, targets: Mapping[str, Tensor], layout: MapLayout, weights: LossWeights
) -> Losses:
    """Compare a batch with its soft targets (Hu et al., WACV 2023).

    Each term is the mean over the maps of a batch; a target that is zero everywhere says nothing
    and is left out.

    Args:
        output: What the student said.
        targets: Maps of the teacher by name, each ``(B, H, W)``.
        layout: Says which of them is the saliency map and which are hierarchical.
        weights: Weights of the terms.
    """
    terms: dict[str, Tensor] = {}
    if weights.teacher:
        target = targets[layout.saliency]
        terms["teacher"] = _mean_kl(target, output.saliency_logits[:, 0])
    if weights.hierarchical:
        logits = output.map_logits["d1"][:, :, 0]  # B 4 H W
        divergences = [
            _mean_kl(targets[name], logits[:, index])
            for index, name in enumerate(layout.hierarchical)
        ]
        terms["hierarchical"] = torch.stack(divergences).sum()
    total = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
    return Losses(total, terms)


def _mean_kl(target: Tensor, logits: Tensor) -> Tensor:
    says_something = target.sum((-2, -1)) != 0  # True for NaN, which must not go unnoticed
    filled = target.where(says_something[:, None, None], 1.0)  # 0/0 would spoil the gradient
    # The maps are sigmoids: their logarithm is exact from the logits, also where they underflow.
    divergences = kl_divergence(filled, F.logsigmoid(logits))
    return divergences.where(says_something, 0.0).sum() / says_something.sum().clamp(min=1)
