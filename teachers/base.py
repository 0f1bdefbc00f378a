"""What a teacher is: a network that only runs forward, and all that its soft targets depend on."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stores.frames import resize_frames
from stores.maps import MapLayout
from student.tinyhd import IMAGENET_MEAN, IMAGENET_STD

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES: Final[Mapping[Precision, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

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


def reflect(index: int, num_frames: int) -> int:
    """Return the frame at ``index`` of a video that goes on backwards after its last frame.

    Once it is back at its first frame it stays there.
    """
    return index if index < num_frames else max(0, 2 * num_frames - 1 - index)


def normalise_as_imagenet(frames: Tensor) -> Tensor:
    """Centre and scale frames in 0..1, ``(T, 3, H, W)``, as ImageNet networks want them."""
    mean = torch.tensor(IMAGENET_MEAN, device=frames.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=frames.device).view(3, 1, 1)
    return (frames - mean) / std


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """The declaration of a teacher."""

    name: str
    paper: str
    licence: str
    """Licence of the published weights."""
    adapter_version: int = 1
    """Raised whenever the same frames would give other targets."""
    normalisation: str = "RGB / 255"
    """From uint8 RGB to what the network expects, in words."""
    resize_rule: str = "bilinear, antialiased, aspect not kept, rounded to uint8"
    window: int
    """Frames the network sees at once."""
    labelled_frame: Literal["last", "middle", "each"] = "last"
    """Which frame of its window the network labels."""
    head_policy: Literal["repeat_first", "time_reversed", "released", "overlap"]
    """How the first ``window - 1`` frames are labelled: with copies of frame 0 before the video;
    from a window that runs backwards in time; as the published program does. ``overlap``: a network
    that labels each frame of its window needs none, the last window of a video overlaps."""
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
            "labelled_frame": self.labelled_frame,
            "head_policy": self.head_policy,
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
        precision: What convolutions and matrix products are computed in. Below float32, the targets
            drift from the teacher's; ``tinyhd distill --calibrate`` says how far.
    """

    def __init__(
        self, spec: TeacherSpec, *, device: str = "cpu", precision: Precision = "float32"
    ) -> None:
        self.spec = spec
        self.device: Final = torch.device(device)
        self.precision: Final = precision

    is_recurrent: bool = False
    """Whether a frame's map depends on all frames before it; see :meth:`reset`."""

    def reset(self) -> None:  # noqa: B027 - nothing to forget, unless recurrent
        """Forget the video: a recurrent teacher labels span after span from frame 0 on."""

    @property
    def provenance(self) -> dict[str, Any]:
        """All that decides the targets, but the video, its decoder and what the store does."""
        return {
            **self.spec.provenance,
            "compute": self.precision,
            "weights_sha256": self.weights_sha256,
        }

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

    def without_network(self) -> Self:
        """Return a copy that knows windows and sizes, and is small enough to be sent around."""
        eyes = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, nn.Module):
                setattr(eyes, name, None)
        return eyes

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

    def window(self, frame: int, num_frames: int) -> Sequence[int]:
        """Return the frames that the network sees to label ``frame``, in the order it sees them.

        Args:
            frame: Index in the video.
            num_frames: Of the whole video.
        """
        return [max(0, index) for index in window_of(frame, length=self.spec.window)]

    def context_of(self, span: range, num_frames: int) -> range:
        """Return the frames of a video that must be at hand to label ``span``.

        Args:
            span: Frames to label, at least one.
            num_frames: Of the whole video.
        """
        seen = [index for frame in span for index in self.window(frame, num_frames)]
        return range(min(seen), max(seen) + 1)

    @torch.no_grad()
    def label(
        self, frames: Tensor, *, first: int, span: range, num_frames: int
    ) -> dict[str, Tensor]:
        """Label a span of frames in one batch.

        Args:
            frames: Prepared frames ``first``, ``first + 1``, ... of a video, ``(T, 3, H, W)``; at
                least those of :meth:`context_of`.
            first: Index in the video of the first of ``frames``.
            span: Indices in the video of the frames to label.
            num_frames: Of the whole video.

        Returns:
            Native planes by array, ``(len(span), K, h, w)`` float32 logits or log-densities.

        Raises:
            ValueError: If the span is empty, reaches beyond the video, or needs other frames.
        """
        if not span or span.start < 0 or span.stop > num_frames:
            raise ValueError(f"cannot label frames {span.start}-{span.stop} of {num_frames}")
        context = self.context_of(span, num_frames)
        if context.start < first or context.stop > first + len(frames):
            raise ValueError(
                f"labelling frames {span.start}-{span.stop} takes frames "
                f"{context.start}-{context.stop}, got {first}-{first + len(frames)}"
            )
        with self._arithmetic():
            planes = self.label_span(frames, first=first, span=span, num_frames=num_frames)
        return {name: values.float() for name, values in planes.items()}

    def label_span(
        self, frames: Tensor, *, first: int, span: range, num_frames: int
    ) -> Mapping[str, Tensor]:
        """Do what :meth:`label` does, with its arguments; by whole windows unless overridden."""
        indices = torch.tensor([self.window(frame, num_frames) for frame in span])
        windows = frames[indices - first]  # B T 3 H W
        return self.logits(windows.transpose(1, 2))

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Compute in the teacher's precision; float32 means float32, on a GPU too."""
        convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
        before = convolutions.allow_tf32, products.allow_tf32
        convolutions.allow_tf32 = products.allow_tf32 = False
        dtype = DTYPES[self.precision]
        try:
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                yield
        finally:
            convolutions.allow_tf32, products.allow_tf32 = before

    @abstractmethod
    def logits(self, windows: Tensor) -> Mapping[str, Tensor]:
        """Run the network on whole windows.

        Args:
            windows: ``(B, 3, T, H, W)``, prepared, in the order of :meth:`window`.

        Returns:
            Native planes by array of the layout, ``(B, K, h, w)``.
        """
