"""A teacher that labels clips in the training step, as in the paper: what the trainer asks of it.

The trainer imports no teacher; who starts a training hands one in.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stores.schema import LabelRequest


class TeacherView(NamedTuple):
    """What a teacher sees to label the newest frames of a clip."""

    frames: npt.NDArray[np.uint8]
    """At its input size, ``(T, H, W, 3)`` RGB."""
    first: int
    """Index in the video of the first of them."""
    span: range
    """Indices in the video of the frames that are labelled."""
    num_frames: int
    """Of the whole video."""


class TeacherEyes(Protocol):
    """Which frames a teacher looks at, and how; it is sent to the processes that read clips."""

    def context_of(self, span: range, num_frames: int) -> range:
        """Return the frames of a video that must be at hand to label ``span``."""
        ...

    def resize(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Squash a decoded frame ``(height, width, 3)`` to the network's input."""
        ...


class OnlineTeacher(Protocol):
    """A teacher that labels clips in the step."""

    @property
    def request(self) -> LabelRequest:
        """What a store would know its label set by: name, layout, windows, fingerprint."""
        ...

    @property
    def eyes(self) -> TeacherEyes:
        """How it looks at videos, without its network."""
        ...

    def label(self, view: TeacherView) -> dict[str, Tensor]:
        """Return native planes by array, ``(T, map, y, x)`` float32, of the labelled frames."""
        ...
