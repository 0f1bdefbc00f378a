"""How well a student says what its teacher says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stores.maps import MapLayout
from student.clips import Batch
from student.metrics import correlation, kl_divergence
from student.supervision import render_batch
from student.tinyhd import TinyHD, normalise_frames


@dataclass(frozen=True)
class Agreement:
    """Mean agreement of the student's saliency maps with the teacher's."""

    kl: float
    """KL(teacher || student) in nats; 0 is best."""
    cc: float
    """Pearson's correlation; 1 is best; 0 for a pair with a constant map."""
    maps: int
    """Maps that were compared."""


@torch.inference_mode()
def compare_with_teacher(model: TinyHD, batches: Iterable[Batch], layout: MapLayout) -> Agreement:
    """Compare maps with those of the first label set; the model is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    height, width = model.config.height, model.config.width
    kl, cc = [], []
    for batch in batches:
        teacher = render_batch(batch.planes[0], layout, (), height, width, device).saliency
        output = model(normalise_frames(batch.frames.to(device)))
        logits = output.saliency_logits.flatten(1, -3)  # B T H W
        kl.append(kl_divergence(teacher, F.logsigmoid(logits)).flatten())
        cc.append(correlation(teacher, logits.sigmoid()).flatten())
    if not kl:
        raise ValueError("there are no clips to compare on")
    # A constant map has no correlation with anything: it counts as 0.
    correlations = torch.cat(cc).nan_to_num(nan=0.0)
    return Agreement(
        kl=torch.cat(kl).mean().item(), cc=correlations.mean().item(), maps=len(correlations)
    )
