"""Windows that overlap share what they have in common, exactly.

Consecutive windows of a video begin one frame apart. Deep in a network, a position of a window is a
function of some frames alone, as long as no padding at the window's ends reaches it; two windows
that hold those frames at the same phase of the layer's stride have the same values there. Such
*clean* positions are computed once for the run of windows, the others for each window.

Layers see a run through :func:`through`, which takes a tensor of whole windows just as well: a
network is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shapes: B windows, C channels, T positions, H height, W width, D frames at which a clean position
# of some window lies.


@dataclass(frozen=True)
class WindowRun:
    """Features of consecutive windows: clean positions once, the others window by window.

    Position ``p`` of the window that begins at frame ``s`` lies at frame ``s + stride * p``.
    """

    windows: int
    """B: they begin at frames 0, 1, 2, ..."""
    length: int
    """T: positions of a window."""
    stride: int
    """Frames between two positions."""
    clean: range
    """Positions that are shared, not empty."""
    shared: Tensor
    """``(1, C, D, H, W)``, of the frames from ``stride * clean.start`` on."""
    lead: Tensor
    """``(B, C, clean.start, H, W)``, the positions before the clean ones."""
    trail: Tensor
    """``(B, C, T - clean.stop, H, W)``, the positions after them."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole windows, ``(B, C, T, H, W)``."""
        shared = self.shared.shape
        return torch.Size((self.windows, shared[1], self.length, *shared[3:]))

    @classmethod
    def of(cls, frames: Tensor, length: int) -> WindowRun:
        """Return the windows of some frames: each position of a window is a frame.

        Args:
            frames: ``(F, C, H, W)``, those of ``F - length + 1`` windows.
            length: Frames of a window.
        """
        windows = len(frames) - length + 1
        nothing = frames.new_empty(windows, frames.shape[1], 0, *frames.shape[2:])
        shared = frames.transpose(0, 1)[None]
        return cls(windows, length, 1, range(length), shared, nothing, nothing)

    def framewise(self, layer: Callable[[Tensor], Tensor]) -> WindowRun:
        """Apply what looks at single positions."""
        lead, trail = self.lead.shape[2], self.trail.shape[2]
        shared = layer(self.shared)
        if not lead + trail:
            empty = shared.new_empty(self.windows, shared.shape[1], 0, *shared.shape[3:])
            return replace(self, shared=shared, lead=empty, trail=empty)
        ends = layer(torch.cat([self.lead, self.trail], 2))
        return replace(self, shared=shared, lead=ends[:, :, :lead], trail=ends[:, :, lead:])

    def over_time(
        self,
        layer: Callable[[Tensor, int, int], Tensor],
        *,
        kernel: int,
        stride: int,
        padding: int,
        fill: float,
    ) -> WindowRun | Tensor:
        """Apply what looks at several positions.

        Args:
            layer: Called with features, without padding in time, stride and dilation in time.
            kernel: Positions that it looks at.
            stride: Positions between two results.
            padding: Positions that are added at either end of a window.
            fill: What they hold.

        Returns:
            A run, or whole windows where no two windows share a position any more.
        """
        length = (self.length + 2 * padding - kernel) // stride + 1
        first = -(-(self.clean.start + padding) // stride)
        last = (self.clean.stop - 1 + padding - kernel + 1) // stride
        clean = range(first, last + 1)
        if len(clean) < 2:
            padded = F.pad(self.whole(), (0, 0, 0, 0, padding, padding), value=fill)
            return layer(padded, stride, 1)
        # Clean results lie at every frame, whatever its phase: neighbours are a stride apart.
        begin = (stride * clean.start - padding - self.clean.start) * self.stride
        reach = self.windows - 1 + self.stride * stride * (len(clean) - 1)
        span = self.stride * (kernel - 1) + reach + 1
        shared = layer(self.shared[:, :, begin : begin + span], 1, self.stride)
        before = self.positions(0, stride * (clean.start - 1) - padding + kernel)
        lead = layer(F.pad(before, (0, 0, 0, 0, padding, 0), value=fill), stride, 1)
        after = self.positions(stride * clean.stop - padding, self.length)
        trail = layer(F.pad(after, (0, 0, 0, 0, 0, padding), value=fill), stride, 1)
        return WindowRun(
            self.windows,
            length,
            self.stride * stride,
            clean,
            shared,
            lead[:, :, : clean.start],
            trail[:, :, : length - clean.stop],
        )

    def positions(self, start: int, stop: int) -> Tensor:
        """Return some positions of each window, ``(B, C, stop - start, H, W)``."""
        lead = self.lead[:, :, start : min(stop, self.clean.start)]
        middle = range(max(start, self.clean.start), min(stop, self.clean.stop))
        trail = self.trail[:, :, max(0, start - self.clean.stop) : max(0, stop - self.clean.stop)]
        parts = [part for part in (lead, self._clean(middle), trail) if part.shape[2]]
        if not parts:
            return lead
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def whole(self) -> Tensor:
        """Return whole windows, ``(B, C, T, H, W)``."""
        return self.positions(0, self.length)

    def narrow(self, clean: range) -> WindowRun:
        """Return the run with fewer clean positions."""
        if clean == self.clean:
            return self
        begin = (clean.start - self.clean.start) * self.stride
        reach = self.windows + self.stride * (len(clean) - 1)
        return replace(
            self,
            clean=clean,
            shared=self.shared[:, :, begin : begin + reach],
            lead=self.positions(0, clean.start),
            trail=self.positions(clean.stop, self.length),
        )

    def _clean(self, positions: range) -> Tensor:
        begin = (positions.start - self.clean.start) * self.stride
        windows = [
            self.shared[:, :, begin + window :][:, :, : self.stride * len(positions) : self.stride]
            for window in range(self.windows)
        ]
        return torch.cat([window[:, :, : len(positions)] for window in windows], 0)


Features = WindowRun | Tensor


class Sharing(nn.Module):
    """A part of a network whose ``forward`` takes a run of windows as well as whole ones."""


def through(layer: nn.Module, features: Features) -> Features:
    """Apply a layer: a convolution, a pool, or what looks at single positions."""
    if isinstance(layer, nn.Sequential):
        for part in layer:
            features = through(part, features)
        return features
    if isinstance(features, Tensor) or isinstance(layer, Sharing):
        result: Features = layer(features)
        return result
    if isinstance(layer, nn.Conv3d):
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        if kernel == 1 and stride == 1:
            return features.framewise(layer)
        pads, steps = (int(p) for p in layer.padding[1:]), layer.stride[1:]
        height, width = pads

        def convolve(x: Tensor, every: int, dilation: int) -> Tensor:
            return F.conv3d(
                x, layer.weight, layer.bias, (every, *steps), (0, height, width), (dilation, 1, 1)
            )

        return features.over_time(convolve, kernel=kernel, stride=stride, padding=padding, fill=0.0)
    if isinstance(layer, nn.MaxPool3d):
        kernels, strides, paddings = map(_triple, (layer.kernel_size, layer.stride, layer.padding))
        if kernels[0] == 1 and strides[0] == 1:
            return features.framewise(layer)

        def pool(x: Tensor, every: int, dilation: int) -> Tensor:
            return F.max_pool3d(
                x, kernels, (every, *strides[1:]), (0, *paddings[1:]), (dilation, 1, 1)
            )

        return features.over_time(
            pool, kernel=kernels[0], stride=strides[0], padding=paddings[0], fill=-torch.inf
        )
    return features.framewise(layer)


def join(parts: Sequence[Features]) -> Features:
    """Lay features side by side on the channels."""
    runs = [part for part in parts if isinstance(part, WindowRun)]
    if len(runs) < len(parts):
        return torch.cat([whole(part) for part in parts], 1)
    clean = range(max(r.clean.start for r in runs), min(r.clean.stop for r in runs))
    if not clean:
        return torch.cat([run.whole() for run in runs], 1)
    runs = [run.narrow(clean) for run in runs]
    return replace(
        runs[0],
        shared=torch.cat([run.shared for run in runs], 1),
        lead=torch.cat([run.lead for run in runs], 1),
        trail=torch.cat([run.trail for run in runs], 1),
    )


def whole(features: Features) -> Tensor:
    """Return whole windows."""
    return features if isinstance(features, Tensor) else features.whole()


def _triple(value: int | tuple[int, ...]) -> tuple[int, int, int]:
    if isinstance(value, int):
        return value, value, value
    first, second, third = value
    return first, second, third
