"""Logits on a fixed grid: what is refused, how far a stored value may be off, how it is packed.

Every value is rounded to a multiple of the grid step *s*, so it moves by at most *s*/2. The
logarithm of a sigmoid moves by no more than its logit, and so every normalised map keeps its
log-density within *s*/2 up to a constant: by Hoeffding's lemma KL(exact || stored) <= *s*^2/8.
"""

from __future__ import annotations

import warnings
from typing import Final

import numpy as np
import numpy.typing as npt

from stores.errors import TargetValueError

GRID_STEP: Final = 1 / 32
"""Default distance of two neighbouring stored values; a power of two, so float32 holds them."""
LIMIT: Final = 1000.0
"""Largest magnitude that is written. The 16-bit grid at 1/32 ends at 1024 and then wraps around."""
LOG_DENSITY_FLOOR: Final = -20.0
"""Log-densities, relative to the uniform map, are raised to this before they are written."""
PCODEC_LEVEL: Final = 8

Planes = npt.NDArray[np.float32]
"""A teacher's native maps of a span, ``(frame, map, y, x)`` logits or log-densities."""


def logit_error_bound(grid_step: float) -> float:
    """Return how far a stored logit may be from the teacher's."""
    return grid_step / 2


def kl_error_bound(grid_step: float) -> float:
    """Return the largest KL(exact || stored) of a normalised map, in nats."""
    return grid_step**2 / 8


def check_grid_step(grid_step: float) -> None:
    """Refuse steps that float32 or the 16-bit grid cannot hold.

    Raises:
        ValueError: If the step is not a power of two from 1/32 to 1.
    """
    if grid_step not in {2.0**-power for power in range(6)}:
        raise ValueError(f"grid_step must be 1, 1/2, 1/4, 1/8, 1/16 or 1/32, got {grid_step}")


def check_planes(planes: Planes, *, video: str, first_frame: int) -> None:
    """Refuse maps that the grid would turn into others without a word.

    The integer filter stores NaN as 0 and lets large values wrap around.

    Args:
        planes: ``(frame, map, y, x)`` logits or log-densities.
        video: Named in the error.
        first_frame: Index of the first of ``planes`` in the video.

    Raises:
        TargetValueError: If a value is not finite or beyond ``LIMIT``.
    """
    fits = np.abs(planes) <= LIMIT  # False for NaN
    if fits.all():
        return
    frame, map_index, y, x = (int(i) for i in np.argwhere(~fits)[0])
    raise TargetValueError(
        f"the teacher's map {map_index} for frame {first_frame + frame} of {video!r} has the value "
        f"{planes[frame, map_index, y, x]} at row {y}, column {x}; only finite logits up to "
        f"+-{LIMIT:g} can be stored"
    )


def silence_codec_remark() -> None:
    """Silence zarr's remark, at every opening, that numcodecs' codecs are not in its specification.

    They are not; ``docs/store-format.md`` says what they do.
    """
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr")
