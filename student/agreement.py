"""How well a student says what its teacher says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stores.maps import MapLayout, render_maps
from student.clips import Batch
from student.metrics import correlation, kl_divergence
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
    """Compare saliency maps with a teacher's stored ones; the model is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    height, width = model.config.height, model.config.width
    kl, cc = [], []
    for batch in batches:
        planes = {name: values.to(device) for name, values in batch.planes.items()}
        target = render_maps(planes, layout, [layout.saliency], height=height, width=width)
        output = model(normalise_frames(batch.frames.to(device)))
        teacher = target[layout.saliency]
        kl.append(kl_divergence(teacher, F.logsigmoid(output.saliency_logits[:, 0])))
        cc.append(correlation(teacher, output.saliency[:, 0]))
    if not kl:
        raise ValueError("there are no clips to compare on")
    # A constant map has no correlation with anything: it counts as 0.
    correlations = torch.cat(cc).nan_to_num(nan=0.0)
    return Agreement(
        kl=torch.cat(kl).mean().item(), cc=correlations.mean().item(), maps=len(correlations)
    )
