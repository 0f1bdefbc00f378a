"""How good a student is on clips that it does not train on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from student.clips import Batch
from student.losses import TermSums
from student.metrics import correlation, score_batch
from student.processes import Processes
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
def validate(
    model: TinyHD,
    batches: Iterable[Batch],
    supervisor: Supervisor,
    processes: Processes | None = None,
) -> Validation:
    """Score a model; it is left in evaluation mode.

    Args:
        model: The student.
        batches: Clips, of this process.
        supervisor: Computes the terms.
        processes: Those that score clips of the same validation.

    Raises:
        ValueError: If there are no batches.
    """
    model.eval()
    device = next(model.parameters()).device
    sums, means, maps = TermSums(), _Means(), 0
    for batch in batches:
        clips = normalise_frames(batch.frames.to(device))
        output = model(clips)
        targets = supervisor.targets(batch, clips)
        sums.add(supervisor.terms(output, batch, targets))
        saliency = output.saliency.flatten(1, -3).float()  # B T H W
        maps += saliency.shape[0] * saliency.shape[1]
        for target in targets:
            means.add(f"{target.name}/cc", correlation(target.maps.saliency, saliency))
        for name, scores in _score_recorded(batch, saliency).items():
            means.add(name, scores)
    (first, *others) = (processes or Processes()).gather((sums, means, maps))
    sums, means, maps = first
    for other in others:
        sums.join(other[0])
        means.join(other[1])
        maps += other[2]
    if not maps:
        raise ValueError("there are no clips to validate on")
    return Validation({**sums.means, TOTAL: sums.total, **means.values}, maps)


class _Means:
    """Means of scores; those that are no number count for nothing."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, scores: Tensor) -> None:
        """Add scores of a name."""
        finite = scores[scores.isfinite()].double()
        self._add(name, float(finite.sum()), finite.numel())

    def join(self, others: _Means) -> None:
        """Add what was scored elsewhere."""
        for name, (total, count) in others._sums.items():
            self._add(name, total, count)

    @property
    def values(self) -> dict[str, float]:
        """Means by name."""
        return {name: total / count for name, (total, count) in self._sums.items() if count}

    def _add(self, name: str, total: float, count: int) -> None:
        before = self._sums.get(name, (0.0, 0))
        self._sums[name] = (before[0] + total, before[1] + count)


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
