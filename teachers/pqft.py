"""A classical teacher without weights: the phase spectrum of the quaternion Fourier transform.

Guo & Zhang, "A novel multiresolution spatiotemporal saliency detection model and its applications
in image and video compression", IEEE TIP 2010; the spectral residual of Hou & Zhang, CVPR 2007, is
its ancestor. What is regular in a picture has a large amplitude spectrum; an inverse transform of
the phase alone therefore leaves what stands out. Intensity, two colour opponents and motion are
the four parts of one quaternion picture and are transformed together.

It stands in the place of a learned teacher such as HD2S so that everything works without any
download. It is no substitute for one: it knows nothing of objects, faces or context.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from stores.codec import LOG_DENSITY_FLOOR
from stores.maps import DerivedMap, MapLayout, MapSpec
from teachers.base import Precision, Teacher, TeacherSpec

LEVELS: Final = ("fine", "medium", "coarse", "coarsest")
"""Hierarchical maps, at 1/2, 1/4, 1/8 and 1/16 of the input size."""
MOTION_LAG: Final = 3
"""Frames between the two whose difference is the motion channel."""
BLUR_SIGMA: Final = 2.0
"""Standard deviation of the Gaussian on each level's map, in that level's pixels."""
TINY: Final = 1e-8


class PqftTeacher(Teacher):
    """Phase spectrum of the quaternion Fourier transform, at four resolutions.

    Each level's map is a density relative to the uniform map (its mean is 1) and is given as its
    logarithm. The saliency map is the mean of the four at the input size.

    Args:
        height: Rows of the input, in pixels; a multiple of 16.
        width: Columns of the input.
        device: Where it runs.
        precision: Of its convolutions; the transforms are always float32.

    Raises:
        ValueError: If the size is not a multiple of 16.
    """

    def __init__(
        self,
        *,
        height: int = 192,
        width: int = 256,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        if height < 32 or width < 32 or height % 16 or width % 16:
            raise ValueError(
                f"pqft needs a size of at least 32x32 in multiples of 16, got {height}x{width}"
            )
        maps = tuple(
            MapSpec(
                name=name,
                height=height >> level,
                width=width >> level,
                activation="exp",
                order="activate_first",
            )
            for level, name in enumerate(LEVELS, start=1)
        )
        saliency = DerivedMap(
            name="saliency",
            terms=tuple((name, 1 / len(LEVELS)) for name in LEVELS),
            activation="identity",
        )
        spec = TeacherSpec(
            name="pqft",
            paper="Guo & Zhang, IEEE Transactions on Image Processing 19(1), 2010",
            licence="no weights",
            adapter_version=1,
            normalisation="RGB / 255",
            resize_rule="bilinear, antialiased, aspect not kept, rounded to uint8",
            window=MOTION_LAG + 1,
            head_policy="repeat_first",
            layout=MapLayout(
                height=height,
                width=width,
                maps=maps,
                derived=(saliency,),
                saliency="saliency",
                hierarchical=LEVELS,
            ),
            batch=32,
        )
        super().__init__(spec, device=device, precision=precision)

    def logits(self, windows: Tensor) -> dict[str, Tensor]:
        return self._label_pairs(_channels(windows[:, :, -1]), _intensity(windows[:, :, 0]))

    def label_span(
        self, frames: Tensor, *, first: int, span: range, num_frames: int
    ) -> dict[str, Tensor]:
        """Label a span; a window's middle frames are not touched."""
        now = torch.arange(span.start, span.stop)
        before = (now - MOTION_LAG).clamp_(min=0)
        return self._label_pairs(_channels(frames[now - first]), _intensity(frames[before - first]))

    def _label_pairs(self, now: Tensor, before: Tensor) -> dict[str, Tensor]:
        planes = {}
        for spec in self.spec.layout.maps:
            size = (spec.height, spec.width)
            intensity, red_green, blue_yellow = F.interpolate(now, size, mode="area").unbind(1)
            motion = (intensity - F.interpolate(before, size, mode="area")[:, 0]).abs()
            conspicuity = _phase_only(motion, red_green, blue_yellow, intensity)
            planes[spec.array] = _log_density(_blur(conspicuity[:, None]))
        return planes


def _intensity(frames: Tensor) -> Tensor:
    """``(B, 3, H, W)`` RGB in 0..1 to ``(B, 1, H, W)``."""
    return frames.mean(1, keepdim=True)


def _channels(frames: Tensor) -> Tensor:
    """Intensity, red-green and blue-yellow opponents, ``(B, 3, H, W)``."""
    r, g, b = frames.unbind(1)
    red, green, blue = r - (g + b) / 2, g - (r + b) / 2, b - (r + g) / 2
    yellow = (r + g) / 2 - (r - g).abs() / 2 - b
    return torch.stack([(r + g + b) / 3, red - green, blue - yellow], 1)


def _phase_only(
    motion: Tensor, red_green: Tensor, blue_yellow: Tensor, intensity: Tensor
) -> Tensor:
    """Squared norm of the quaternion picture that has its phase spectrum and a flat amplitude.

    The quaternion motion + red_green i + blue_yellow j + intensity k is (motion + red_green i) +
    (blue_yellow + intensity i) j: two complex pictures, so two ordinary transforms.
    """
    first = torch.fft.fft2(torch.complex(motion, red_green))
    second = torch.fft.fft2(torch.complex(blue_yellow, intensity))
    amplitude = (_power(first) + _power(second)).sqrt().clamp_(min=TINY)
    return _power(torch.fft.ifft2(first / amplitude)) + _power(torch.fft.ifft2(second / amplitude))


def _power(values: Tensor) -> Tensor:
    return values.real.square() + values.imag.square()


def _blur(maps: Tensor) -> Tensor:
    """Smooth ``(B, 1, h, w)`` with a Gaussian; the borders are mirrored."""
    radius = min(round(3 * BLUR_SIGMA), min(maps.shape[-2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-offsets.square() / (2 * BLUR_SIGMA**2))
    kernel /= kernel.sum()
    padded = F.pad(maps, (radius, radius, radius, radius), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def _log_density(maps: Tensor) -> Tensor:
    """Logarithm of maps scaled to mean 1; an empty map becomes the uniform one."""
    mean = maps.mean((-2, -1), keepdim=True)
    density = torch.where(mean > TINY, maps / mean.clamp(min=TINY), 1.0)
    return density.log().clamp_(min=LOG_DENSITY_FLOOR)
