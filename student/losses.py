"""What the student is held against: maps of teachers, of an assistant, and of recorded eyes.

Shapes: B clips, T frames that the student maps, T' maps of a decoder (T, or 1 for a whole clip).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from student.metrics import correlation, kl_divergence
from student.recipe import GroundTruthTerm, HierarchicalRule, TermWeights
from student.tinyhd import StudentOutput

HIERARCHICAL_MAPS = 4


class SourceMaps(NamedTuple):
    """What a teacher or an assistant says of a batch; a map of zeros says nothing."""

    saliency: Tensor
    """``(B, T, H, W)``, non-negative."""
    hierarchical: Tensor | None = None
    """``(B, 4, T', H, W)``, the finest first."""


class RecordedMaps(NamedTuple):
    """What recorded eyes say of a batch; zero where a clip has none."""

    density: Tensor
    """``(B, T, H, W)``."""
    fixations: Tensor | None = None
    """``(B, T, H, W)``, bool; only needed for NSS."""


@dataclass(frozen=True)
class Term:
    """One term of the loss: a mean over maps, or a sum of such means over kinds of maps."""

    weight: float
    totals: Tensor
    """Sums over the maps of each kind, ``(K,)``."""
    counts: Tensor
    """How many maps each sum is over, ``(K,)``."""

    @property
    def value(self) -> Tensor:
        """The term itself, unweighted; 0 where there are no maps."""
        return (self.totals / self.counts.clamp(min=1)).sum()


class Losses(NamedTuple):
    """The terms of a step by name, unweighted, and their weighted sum."""

    total: Tensor
    terms: Mapping[str, Tensor]


def add_terms(
    terms: Mapping[str, Term],
    reduce: Callable[[Tensor], Tensor] | None = None,
    *,
    processes: int = 1,
) -> Losses:
    """Add terms up.

    Args:
        terms: By name.
        reduce: Sums a tensor over processes that share a step. Each term is then divided by the
            maps of all of them, so that clips count the same wherever they are.
        processes: How many share the step; gradients are averaged over them.
    """
    if not terms:
        raise ValueError("there is no term to learn from")
    counts = torch.cat([term.counts for term in terms.values()])
    if reduce is not None:
        counts = reduce(counts) / processes
    parts = torch.split(counts, [len(term.counts) for term in terms.values()])
    means = {
        name: (term.totals / part.clamp(min=1 / processes)).sum()
        for (name, term), part in zip(terms.items(), parts, strict=True)
    }
    total = torch.stack([terms[name].weight * mean for name, mean in means.items()]).sum()
    return Losses(total, means)


def source_terms(
    name: str,
    output: StudentOutput,
    maps: SourceMaps,
    weights: TermWeights,
    rule: HierarchicalRule = "auto",
) -> dict[str, Term]:
    """Hold a student against a teacher or an assistant (Hu et al., WACV 2023).

    Args:
        name: Of the source; the terms' names begin with it.
        output: What the student said.
        maps: What the source said.
        weights: Weights of the terms.
        rule: What becomes of hierarchical maps where d1 has one for the whole clip.

    Raises:
        ValueError: If the source lacks hierarchical maps, or has another number of them.
    """
    terms: dict[str, Term] = {}
    if weights.saliency:
        terms[f"{name}/saliency"] = _kl(
            maps.saliency[:, None], _fused(output)[:, None], weights.saliency
        )
    if weights.hierarchical:
        if maps.hierarchical is None:
            raise ValueError(f"{name} has no hierarchical maps; give that term the weight 0")
        logits = output.map_logits["d1"]
        target = _fit_frames(maps.hierarchical, logits.shape[2], rule, name)
        terms[f"{name}/hierarchical"] = _kl(target, logits, weights.hierarchical)
    terms |= _decoder_terms(name, output, maps.saliency, {"d2": weights.d2, "d3": weights.d3})
    return terms


def ground_truth_terms(
    output: StudentOutput, maps: RecordedMaps, weights: GroundTruthTerm
) -> dict[str, Term]:
    """Hold a student against recorded eyes."""
    terms: dict[str, Term] = {}
    fused = _fused(output)
    if weights.kl:
        terms["ground_truth/kl"] = _kl(maps.density[:, None], fused[:, None], weights.kl)
    saliency = fused.float().sigmoid()
    if weights.cc:
        is_seen = _says_something(maps.density)
        # Ones everywhere would do here, if a constant map had a correlation, and that a gradient.
        density = maps.density.where(is_seen[..., None, None], saliency.detach())
        found = 1 - correlation(density, saliency)
        terms["ground_truth/cc"] = _mean(found, is_seen, weights.cc)
    if weights.nss:
        if maps.fixations is None:
            raise ValueError("the NSS term needs fixations")
        count = maps.fixations.sum((-2, -1))
        deviation, mean = torch.std_mean(saliency, (-2, -1), keepdim=True)
        scores = (saliency - mean) / deviation.clamp(min=1e-6)
        found = -(scores * maps.fixations).sum((-2, -1)) / count.clamp(min=1)
        terms["ground_truth/nss"] = _mean(found, count > 0, weights.nss)
    decoders = {"d2": weights.d2, "d3": weights.d3}
    terms |= _decoder_terms("ground_truth", output, maps.density, decoders)
    return terms


def _decoder_terms(
    name: str, output: StudentOutput, saliency: Tensor, weights: Mapping[str, float]
) -> dict[str, Term]:
    terms = {}
    for decoder, weight in weights.items():
        if weight:
            logits = output.map_logits[decoder]
            target = _fit_frames(saliency[:, None], logits.shape[2], "auto", name)
            terms[f"{name}/{decoder}"] = _kl(target, logits, weight)
    return terms


def _fused(output: StudentOutput) -> Tensor:
    """Return the logits of the fused maps, ``(B, T, H, W)``."""
    return output.saliency_logits.flatten(1, -3)


def _fit_frames(maps: Tensor, frames: int, rule: HierarchicalRule, name: str) -> Tensor:
    """Return maps ``(B, K, T', H, W)`` of as many frames as a decoder has."""
    there = maps.shape[2]
    if there != frames and (frames > 1 or rule == "identity"):
        raise ValueError(f"{name} has maps of {there} frames, a decoder of {frames}")
    if there == frames:
        return maps
    return maps.mean(2, keepdim=True)


def _kl(target: Tensor, logits: Tensor, weight: float) -> Term:
    """Return the divergence of maps ``(B, K, T, H, W)``, a mean for each of the K kinds."""
    if target.shape != logits.shape:
        raise ValueError(
            f"targets must be {tuple(logits.shape)}, as the student's maps, "
            f"got {tuple(target.shape)}"
        )
    is_said = _says_something(target)
    # The maps are sigmoids: their logarithm is exact from the logits, also where they underflow.
    divergences = kl_divergence(_filled(target, is_said), F.logsigmoid(logits.float()))
    return Term(
        weight, divergences.where(is_said, 0.0).sum((0, 2)), is_said.sum((0, 2)).to(torch.float32)
    )


def _mean(values: Tensor, is_said: Tensor, weight: float) -> Term:
    total, count = values.where(is_said, 0.0).sum(), is_said.sum().to(torch.float32)
    return Term(weight, total[None], count[None])


def _says_something(maps: Tensor) -> Tensor:
    return maps.sum((-2, -1)) != 0  # True for NaN, which must not go unnoticed


def _filled(maps: Tensor, is_said: Tensor) -> Tensor:
    """Return maps with ones in place of zeros everywhere: 0/0 would spoil the gradient."""
    return maps.where(is_said[..., None, None], 1.0)


class TermSums:
    """Sums of terms over batches, each map counting the same."""

    def __init__(self) -> None:
        self._weights: dict[str, float] = {}
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Term]) -> None:
        """Add the terms of a batch."""
        for name, term in terms.items():
            self._add(name, term.weight, term.totals.detach(), term.counts)

    def join(self, others: TermSums) -> None:
        """Add what was summed elsewhere."""
        for name, weight in others._weights.items():
            self._add(name, weight, others._totals[name], others._counts[name])

    @property
    def means(self) -> dict[str, float]:
        """The terms by name, unweighted."""
        return {
            name: float((total / self._counts[name].clamp(min=1)).sum())
            for name, total in self._totals.items()
        }

    @property
    def total(self) -> float:
        """Their weighted sum."""
        return sum(self._weights[name] * value for name, value in self.means.items())

    def _add(self, name: str, weight: float, totals: Tensor, counts: Tensor) -> None:
        self._weights[name] = weight
        self._totals[name] = self._totals.get(name, 0) + totals.double().cpu()
        self._counts[name] = self._counts.get(name, 0) + counts.double().cpu()
