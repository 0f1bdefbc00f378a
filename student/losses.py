"""What the student is held against: the teacher's saliency map and its hierarchical maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
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
    ground_truth: float = 1.0
    """KL to the map of recorded eyes, where a clip has one."""
    d2_ground_truth: float = 0.0
    """The same for the map of the decoder d2; 0.5 in the published recipe, where it is used."""
    d3_ground_truth: float = 0.0
    """The same for the decoder d3."""

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0 or self.teacher + self.hierarchical == 0:
            raise ValueError(
                "loss weights must not be negative, and those of the teacher's terms not all zero, "
                f"got {self}"
            )


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
            "train with the saliency map alone (--hierarchical-weight 0), or choose a label set of "
            "a teacher that has them"
        )
    return [layout.saliency, *layout.hierarchical]


def distillation_loss(
    output: StudentOutput,
    targets: Mapping[str, Tensor],
    layout: MapLayout,
    weights: LossWeights,
    *,
    ground_truth: Tensor | None = None,
) -> Losses:
    """Compare a batch with its soft targets (Hu et al., WACV 2023).

    Each term is the mean over the maps of a batch; a target that is zero everywhere says nothing
    and is left out. Where a decoder makes one map for the whole clip and the teacher one for each
    frame, it is compared with the mean of the teacher's.

    Args:
        output: What the student said of T frames.
        targets: Maps of the teacher by name, each ``(B, T, H, W)``.
        layout: Says which of them is the saliency map and which are hierarchical.
        weights: Weights of the terms.
        ground_truth: Maps of recorded eyes, ``(B, T, H, W)``; zero where a clip has none.

    Raises:
        ValueError: If the decoder of a term is missing, or makes another number of maps.
    """
    terms: dict[str, Tensor] = {}
    saliency = output.saliency_logits.flatten(1, -3)  # B T H W
    if weights.teacher:
        terms["teacher"] = _mean_kl(targets[layout.saliency], saliency)
    if weights.hierarchical:
        logits = _maps_of("d1", output)  # B 4 T' H W
        divergences = [
            _mean_kl(_as_many_frames(targets[name], logits.shape[2]), logits[:, index])
            for index, name in enumerate(layout.hierarchical)
        ]
        terms["hierarchical"] = torch.stack(divergences).sum()
    if ground_truth is not None:
        if weights.ground_truth:
            terms["ground_truth"] = _mean_kl(ground_truth, saliency)
        for decoder in ("d2", "d3"):
            if getattr(weights, name := f"{decoder}_ground_truth"):
                terms[name] = _mean_kl(ground_truth, _maps_of(decoder, output)[:, 0])
    total = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
    return Losses(total, terms)


def _maps_of(decoder: str, output: StudentOutput) -> Tensor:
    if decoder not in output.map_logits:
        raise ValueError(
            f"a term is about the decoder {decoder}, the student has {', '.join(output.map_logits)}"
        )
    return output.map_logits[decoder]


def _as_many_frames(target: Tensor, frames: int) -> Tensor:
    return target.mean(1, keepdim=True) if frames == 1 else target


def _mean_kl(target: Tensor, logits: Tensor) -> Tensor:
    """Return the mean divergence of the maps ``(B, T, H, W)`` whose target says something."""
    if target.shape != logits.shape:
        raise ValueError(
            f"targets must be {tuple(logits.shape)}, as the student's maps, "
            f"got {tuple(target.shape)}"
        )
    says_something = target.sum((-2, -1)) != 0  # True for NaN, which must not go unnoticed
    filled = target.where(says_something[..., None, None], 1.0)  # 0/0 would spoil the gradient
    # The maps are sigmoids: their logarithm is exact from the logits, also where they underflow.
    divergences = kl_divergence(filled, F.logsigmoid(logits))
    return divergences.where(says_something, 0.0).sum() / says_something.sum().clamp(min=1)
