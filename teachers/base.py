"""What a teacher is: a network that only runs forward, and all that its soft targets depend on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stores.frames import resize_frames
from stores.maps import MapLayout

# Shapes: B windows, T frames, H height, W width, K maps of an array, h and w their native size.


def window_of(frame: int, *, length: int) -> range:
    """Return the frames that a causal teacher looks at to label ``frame``.

    Negative ones lie before the video; what stands in for them is the teacher's head policy.

    Raises:
        ValueError: If ``length`` is not positive.
    """
    if length < 1:
        raise ValueError(f"a window needs at least one frame, got {length}")
    return range(frame - length + 1, frame + 1)


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """The declaration of a teacher."""

    name: str
    paper: str
    licence: str
    """Licence of the published weights."""
    adapter_version: int
    """Raised whenever the same frames would give other targets."""
    normalisation: str
    """From uint8 RGB to what the network expects, in words."""
    resize_rule: str
    window: int
    """Frames the network sees at once; it labels the last of them."""
    head_policy: Literal["repeat_first"]
    """What stands in for frames before the video: copies of frame 0."""
    layout: MapLayout
    """Input size and maps."""
    batch: int
    """Windows that are labelled together when nobody says otherwise."""

    @property
    def provenance(self) -> dict[str, Any]:
        """What decides the targets, beside the video and what the store does with them.

        Normalisation and resize rule are parts of the adapter: they change with its version.
        """
        return {
            "adapter_version": self.adapter_version,
            "input_size": [self.layout.height, self.layout.width],
            "window": self.window,
            "labelled_frame": "last",
            "head_policy": self.head_policy,
            "compute": "float32",
        }

    @property
    def description(self) -> dict[str, str]:
        """What is good to know of the teacher; its wording may be mended at any time."""
        return {
            "paper": self.paper,
            "licence": self.licence,
            "normalisation": self.normalisation,
            "resize_rule": self.resize_rule,
        }


class Teacher(ABC):
    """A network that labels frames; one instance lives in each actor.

    Args:
        spec: What it is.
        device: Where it runs.
    """

    def __init__(self, spec: TeacherSpec, *, device: str = "cpu") -> None:
        self.spec = spec
        self.device: Final = torch.device(device)

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights' file; nothing for a teacher without weights."""
        return None

    def resize(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Squash a decoded frame to the network's input.

        Shape:
            - frame: ``(height, width, 3)`` RGB, of any size
            - returns: ``(H, W, 3)``
        """
        layout = self.spec.layout
        resized = resize_frames(frame[None], layout.height, layout.width, antialias=True)
        return resized.reshape(resized.shape[1:])

    def prepare(self, frames: npt.NDArray[np.uint8]) -> Tensor:
        """Bring resized frames to what the network expects.

        Shape:
            - frames: ``(T, H, W, 3)`` RGB
            - returns: ``(T, 3, H, W)`` on the teacher's device
        """
        pixels = torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2)
        return self.normalise(pixels.float() / 255)

    def normalise(self, frames: Tensor) -> Tensor:
        """Bring frames from 0..1 to what the network expects; unchanged unless overridden."""
        return frames

    def context_of(self, span: range) -> range:
        """Return the frames of a video that must be at hand to label ``span``."""
        return range(max(0, window_of(span.start, length=self.spec.window).start), span.stop)

    @torch.inference_mode()
    def label(self, frames: Tensor, *, first: int, span: range) -> dict[str, Tensor]:
        """Label a span of frames in one batch.

        Args:
            frames: Prepared frames ``first``, ``first + 1``, ... of a video, ``(T, 3, H, W)``; at
                least those of :meth:`context_of`.
            first: Index in the video of the first of ``frames``.
            span: Indices in the video of the frames to label.

        Returns:
            Native planes by array, ``(len(span), K, h, w)`` float32 logits or log-densities.
        """
        length = self.spec.window
        indices = torch.tensor([list(window_of(frame, length=length)) for frame in span])
        windows = frames[indices.clamp_(min=0) - first]  # B T 3 H W
        return dict(self.logits(windows.transpose(1, 2)))

    @abstractmethod
    def logits(self, windows: Tensor) -> Mapping[str, Tensor]:
        """Run the network on whole windows.

        Args:
            windows: ``(B, 3, T, H, W)``, prepared, oldest frame first.

        Returns:
            Native planes by array of the layout, ``(B, K, h, w)`` float32.
        """
