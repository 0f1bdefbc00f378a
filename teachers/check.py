"""Look at a teacher's weights before hours are spent on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from stores.maps import render_maps
from teachers.registry import build

SPREAD: Final = 1e-4
"""A map whose standard deviation is a smaller part of its mean says nothing."""


@dataclass(frozen=True)
class MapStatistics:
    """One map of the built-in clip's last frame."""

    name: str
    least: float
    most: float
    mean: float
    deviation: float
    peak: tuple[int, int]
    """Row and column of the largest value."""

    @property
    def problem(self) -> str:
        """What is wrong, or nothing."""
        if not all(map(math.isfinite, (self.least, self.most, self.mean))):
            return "not finite"
        if self.deviation <= SPREAD * abs(self.mean):
            return "constant"
        return ""


@dataclass(frozen=True)
class CheckReport:
    """What a teacher says of a built-in clip."""

    teacher: str
    licence: str
    weights_sha256: str | None
    size: tuple[int, int]
    maps: tuple[MapStatistics, ...]

    @property
    def is_good(self) -> bool:
        return not any(item.problem for item in self.maps)

    def __str__(self) -> str:
        height, width = self.size
        lines = [
            f"{self.teacher}: weights fit, SHA-256 {self.weights_sha256}",
            f"  licence of the published weights: {self.licence}",
            f"  a bright square that moves over noise, {height}x{width}, its last frame:",
        ]
        for item in self.maps:
            lines.append(
                f"  {item.name}: {item.least:.3g} to {item.most:.3g}, mean {item.mean:.3g}, "
                f"deviation {item.deviation:.3g}, largest at row {item.peak[0]}, column "
                f"{item.peak[1]}" + (f": {item.problem}" if item.problem else "")
            )
        return "\n".join(lines)


def check_weights(
    name: str,
    weights: Path | None,
    *,
    size: tuple[int, int] | None = None,
    device: str = "cpu",
    **options: str,
) -> CheckReport:
    """Import weights strictly and run a built-in clip.

    Args:
        name: Of the teacher; see :func:`teachers.registry.build`.
        weights: Its file; nothing in it is run.
        size: Height and width fed to the network; the published one if not given.
        device: Where it runs.
        options: What else the teacher takes.

    Raises:
        TinyHDError: If the file cannot be read or its weights do not fit.
        ValueError: If there is no such teacher.
    """
    teacher = build(name, size=size, device=device, precision="float32", weights=weights, **options)
    layout = teacher.spec.layout
    clip = _clip(max(teacher.spec.window, 8), layout.height, layout.width)
    last = len(clip) - 1
    teacher.reset()
    first = 0 if teacher.is_recurrent else last
    span = range(first, last + 1)
    prepared = teacher.prepare(clip)
    planes = teacher.label(prepared, first=0, span=span, num_frames=len(clip))
    maps = render_maps(
        {array: values[-1:].cpu() for array, values in planes.items()},
        layout,
        layout.names,
        height=layout.height,
        width=layout.width,
    )
    statistics = []
    for map_name, values in maps.items():
        flat = values[0].double().numpy()
        row, column = (int(i) for i in np.unravel_index(np.nan_to_num(flat).argmax(), flat.shape))
        statistics.append(
            MapStatistics(
                name=map_name,
                least=float(flat.min()),
                most=float(flat.max()),
                mean=float(flat.mean()),
                deviation=float(flat.std()),
                peak=(row, column),
            )
        )
    return CheckReport(
        teacher=teacher.spec.name,
        licence=teacher.spec.licence,
        weights_sha256=teacher.weights_sha256,
        size=(layout.height, layout.width),
        maps=tuple(statistics),
    )


def _clip(frames: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return a bright square that moves over noise, ``(frames, height, width, 3)``."""
    rng = np.random.default_rng(0)
    ground = rng.integers(40, 110, (height, width, 3), np.uint8)
    clip = np.repeat(ground[None], frames, axis=0)
    side = min(height, width) // 5
    for number in range(frames):
        x = (width - side) * number // max(1, frames - 1)
        y = height // 2 - side // 2
        clip[number, y : y + side, x : x + side] = (250, 220, 60)
    return clip
