"""How good a student is on clips that it does not train on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from student.clips import Batch
from student.losses import Term, mean_of
from student.metrics import correlation, score_batch
from student.protocols import Measure
from student.supervision import Supervisor
from student.tinyhd import TinyHD, normalise_frames

RECORDED_MEASURES: Final[tuple[Measure, ...]] = ("auc_judd", "nss", "cc", "sim", "kld")
TOTAL: Final = "total"


@dataclass(frozen=True)
class Validation:
    """Means over the clips that validate."""

    values: Mapping[str, float]
    """By name: each term of the loss; ``total``, their weighted sum, by which the best weights are
    chosen; ``SOURCE/cc``, the correlation with a teacher's saliency map; and, where there are
    recorded eyes, the measures ``recorded/NAME`` at the student's size."""
    maps: int
    """Saliency maps that were looked at."""

    @property
    def total(self) -> float:
        """The weighted sum of the terms; less is better."""
        return self.values[TOTAL]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.values.items())


@torch.inference_mode()
def validate(model: TinyHD, batches: Iterable[Batch], supervisor: Supervisor) -> Validation:
    """Score a model; it is left in evaluation mode.

    Raises:
        ValueError: If there are no batches.
    """
    model.eval()
    device = next(model.parameters()).device
    every: list[dict[str, Term]] = []
    scores: dict[str, list[Tensor]] = {}
    maps = 0
    for batch in batches:
        clips = normalise_frames(batch.frames.to(device))
        output = model(clips)
        terms = supervisor.terms(output, batch, clips)
        every.append(terms)
        saliency = output.saliency.flatten(1, -3).float()  # B T H W
        maps += saliency.shape[0] * saliency.shape[1]
        for number, planes in enumerate(batch.planes):
            teacher = supervisor.saliency_of(number, planes, device)
            name = f"{supervisor.name_of(number)}/cc"
            scores.setdefault(name, []).append(correlation(teacher, saliency).flatten())
        for name, found_scores in _score_recorded(batch, saliency).items():
            scores.setdefault(name, []).append(found_scores)
    if not every:
        raise ValueError("there are no clips to validate on")
    means = mean_of(every)
    weights = {name: term.weight for terms in every for name, term in terms.items()}
    means[TOTAL] = sum(weights[name] * value for name, value in means.items())
    for name, parts in scores.items():
        found = float(torch.cat(parts).nanmean())
        if math.isfinite(found):
            means[name] = found
    return Validation(means, maps)


def _score_recorded(batch: Batch, saliency: Tensor) -> dict[str, Tensor]:
    """Score maps by recorded eyes, at the student's size."""
    if batch.density is None:
        return {}
    density = batch.density.flatten(0, 1)
    is_seen = density.flatten(1).amax(1) > 0
    if not is_seen.any():
        return {}
    fixations = None if batch.fixations is None else batch.fixations.flatten(0, 1)[is_seen]
    found = score_batch(
        saliency.flatten(0, 1).cpu()[is_seen],
        density[is_seen],
        fixations,
        measures=RECORDED_MEASURES,
    )
    return {f"recorded/{name}": values for name, values in found.items()}
