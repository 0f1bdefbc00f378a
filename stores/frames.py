"""Frames at the size that a student sees: one rule for frames decoded now and frames kept."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

RESIZE_VERSION: Final = 1
"""Raised whenever the same frame would give other pixels."""
RESIZE_RULE: Final = "bilinear, half-pixel centres, no antialias, aspect not kept, rounded to uint8"


def resize_frames(
    frames: npt.NDArray[np.uint8], height: int, width: int, *, antialias: bool = False
) -> npt.NDArray[np.uint8]:
    """Squash frames to ``height`` x ``width``, as TinyHD's published students were trained.

    Shape:
        - frames: ``(frame, h, w, 3)``
        - returns: ``(frame, height, width, 3)``
    """
    if frames.shape[1:3] == (height, width):
        return frames
    channels_first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = F.interpolate(channels_first, (height, width), mode="bilinear", antialias=antialias)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())
