"""Pictures of what a student says while it is trained: frame, recorded eyes, teachers, student."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from student.clips import Batch
from student.pictures import Map, Picture, colour_map, contact_sheet
from student.supervision import Supervisor
from student.tinyhd import TinyHD, normalise_frames

SHOWN_CLIPS: Final = 4
LEAST_WIDTH: Final = 128
"""Of a picture, in pixels."""


@torch.inference_mode()
def draw_snapshot(model: TinyHD, batch: Batch, supervisor: Supervisor) -> Picture:
    """Draw the newest frame of a batch's first clips and all that is said of it, a row for each.

    Args:
        model: The student, in evaluation mode.
        batch: Clips that stay the same during a training.
        supervisor: Knows the teachers.
    """
    model.eval()
    device = next(model.parameters()).device
    clips = normalise_frames(batch.frames.to(device))
    output = model(clips)
    columns: dict[str, torch.Tensor] = {}
    if batch.density is not None:
        columns["recorded eyes"] = batch.density[:, -1]
    for target in supervisor.targets(batch, clips):
        columns[target.name] = target.maps.saliency[:, -1]
    columns["student"] = output.saliency.flatten(1, -3)[:, -1]
    for name, maps in output.maps.items():
        columns[f"its {name}"] = maps[:, 0, -1]
    drawn = {name: maps.float().cpu().numpy() for name, maps in columns.items()}
    rows, captions = [], []
    for index, key in enumerate(batch.keys[:SHOWN_CLIPS]):
        frame = batch.frames[index, -1].numpy()
        pictures = [frame, *(_colour(maps[index]) for maps in drawn.values())]
        rows.append([_enlarge(picture) for picture in pictures])
        captions.append(f"{key.video}, frame {key.last}")
    return contact_sheet(rows, titles=("frame", *drawn), captions=captions)


def _enlarge(picture: Picture) -> Picture:
    """Repeat pixels until a picture is wide enough to have a title."""
    times = -(-LEAST_WIDTH // picture.shape[1])
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _colour(saliency: Map) -> Picture:
    return colour_map(np.nan_to_num(saliency))
