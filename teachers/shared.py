"""Windows that overlap share what they have in common, exactly.

Consecutive windows of a video begin one frame apart. Deep in a network, a position of a window is a
function of some frames alone, as long as no padding at the window's ends reaches it; two windows
that hold those frames at the same phase of the layer's stride have the same values there. Such
*clean* positions are computed once for the run of windows, the others for each window.

Layers see a run through :func:`through` and :func:`convolve`, which take a tensor of whole windows
just as well: a network is written once. A convolution over time must not be dilated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Triple = tuple[int, int, int]

FRAMEWISE: Final = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish),
    *(nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout3d, nn.BatchNorm3d),
)
"""Layers that see nothing of other positions, the norm in evaluation."""

HAS_ONE_DNN: Final[bool] = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

# Shapes: B windows, C channels, T positions of a window, H height, W width; S phases, D positions
# of a phase.


@dataclass(frozen=True)
class WindowRun:
    """Features of consecutive windows: clean positions once, the others window by window.

    Behind a stride of S frames, only each S-th window holds the same positions. Windows are told
    apart by that phase, so that layers see S sequences without gaps: position ``p`` of window ``w``
    is position ``w // S + p - clean.start`` of phase ``w % S``.
    """

    windows: int
    """B: each begins one frame after the one before."""
    length: int
    """T: positions of a window."""
    clean: range
    """Positions that are shared, not empty."""
    shared: Tensor
    """``(S, C, D, H, W)``, the clean positions"""
    ends: Tensor
    """``(B, C, T - len(clean), H, W)``, the positions before them and those after them"""

    @property
    def shape(self) -> torch.Size:
        """Of the whole windows, ``(B, C, T, H, W)``."""
        _, channels, _, height, width = self.shared.shape
        return torch.Size((self.windows, channels, self.length, height, width))

    @property
    def phases(self) -> int:
        """S: frames between two positions."""
        return self.shared.shape[0]

    @classmethod
    def of(cls, frames: Tensor, length: int) -> WindowRun:
        """Return the windows of some frames: each position of a window is a frame.

        Args:
            frames: ``(F, C, H, W)``, those of ``F - length + 1`` windows.
            length: Frames of a window.
        """
        windows = len(frames) - length + 1
        shared = frames[None].transpose(1, 2)
        return cls(windows, length, range(length), shared, _nothing(shared, windows))

    def framewise(self, layer: Callable[[Tensor], Tensor]) -> WindowRun:
        """Apply what looks at single positions."""
        shared = layer(self.shared)
        ends = layer(self.ends) if self.ends.shape[2] else _nothing(shared, self.windows)
        return replace(self, shared=shared, ends=ends)

    def over_time(
        self,
        layer: Callable[[Tensor], Tensor],
        *,
        kernel: int,
        stride: int,
        padding: int,
        fill: float,
    ) -> WindowRun | Tensor:
        """Apply what looks at several positions.

        Args:
            layer: Applied to features, without padding in time.
            kernel: Positions that it looks at.
            stride: Positions between two results.
            padding: Positions that are added at either end of a window.
            fill: What they hold.

        Returns:
            A run, or whole windows where sharing would save nothing any more.
        """
        length = (self.length + 2 * padding - kernel) // stride + 1
        first = -(-(self.clean.start + padding) // stride)
        last = (self.clean.stop - 1 + padding - kernel + 1) // stride
        clean = range(first, last + 1)
        phases = self.phases * stride
        depth = -(-self.windows // phases) + len(clean) - 1
        if not clean or phases * depth >= self.windows * len(clean):
            return layer(self.positions(-padding, self.length + padding, fill=fill))
        # Windows of one phase were of one phase before; of those, each stride-th one.
        begin = stride * clean.start - padding - self.clean.start
        span = stride * (depth - 1) + kernel
        missing = begin + stride - 1 + span - self.shared.shape[2]  # of windows that do not exist
        source = F.pad(self.shared, (0, 0, 0, 0, 0, missing)) if missing > 0 else self.shared
        shared = [layer(source[:, :, begin + late :][:, :, :span]) for late in range(stride)]
        ends = []
        if clean.start:
            stop = stride * (clean.start - 1) - padding + kernel
            ends.append(layer(self.positions(-padding, stop, fill=fill)))
        if clean.stop < length:
            start, stop = (stride * position - padding for position in (clean.stop, length - 1))
            ends.append(layer(self.positions(start, stop + kernel, fill=fill)))
        joined = _join(ends, 2) if ends else _nothing(shared[0], self.windows)
        return WindowRun(self.windows, length, clean, _join(shared, 0), joined)

    def positions(self, start: int, stop: int, *, fill: float = 0.0) -> Tensor:
        """Return some positions of each window, ``(B, C, stop - start, H, W)``.

        Args:
            start: The first one; negative ones lie before the window.
            stop: Behind the last one; there may be some behind the window.
            fill: What those outside of the window hold.
        """
        _, channels, _, height, width = self.shared.shape
        is_last = self.shared.stride(1) == 1
        result = torch.empty(
            (self.windows, channels, stop - start, height, width),
            dtype=self.shared.dtype,
            device=self.shared.device,
            memory_format=torch.channels_last_3d if is_last else torch.contiguous_format,
        )

        def overlap(low: int, high: int) -> tuple[slice, int, int]:  # in the result, from, to
            low = min(stop, max(start, low))
            high = max(low, min(stop, high))
            return slice(low - start, high - start), low, high

        for edge in (overlap(start, 0), overlap(self.length, stop)):
            result[:, :, edge[0]] = fill
        for edge, gap in (
            (overlap(0, self.clean.start), 0),
            (overlap(self.clean.stop, self.length), len(self.clean)),
        ):
            target, low, high = edge
            result[:, :, target] = self.ends[:, :, low - gap : high - gap]
        target, low, high = overlap(self.clean.start, self.clean.stop)
        for window in range(self.windows):
            late, phase = divmod(window, self.phases)
            gap = self.clean.start - late
            result[window, :, target] = self.shared[phase, :, low - gap : high - gap]
        return result

    def whole(self) -> Tensor:
        """Return whole windows, ``(B, C, T, H, W)``."""
        return self.positions(0, self.length)

    def narrow(self, clean: range) -> WindowRun:
        """Return the run with fewer clean positions."""
        if clean == self.clean:
            return self
        begin = clean.start - self.clean.start
        depth = self.shared.shape[2] - len(self.clean) + len(clean)
        ends = [self.positions(0, clean.start), self.positions(clean.stop, self.length)]
        shared = self.shared[:, :, begin : begin + depth]
        return replace(self, clean=clean, shared=shared, ends=_join(ends, 2))


Features = WindowRun | Tensor


class Sharing(nn.Module):
    """A part of a network whose ``forward`` takes a run of windows as well as whole ones."""


def through(layer: nn.Module, features: Features) -> Features:
    """Apply a layer: a convolution, a max pool, or what looks at single positions.

    Raises:
        TypeError: If windows are shared and it is not known what the layer does to them.
    """
    if isinstance(features, Tensor) or isinstance(layer, Sharing):
        result: Features = layer(features)
        return result
    if isinstance(layer, nn.Sequential):
        for part in layer:
            features = through(part, features)
        return features
    if isinstance(layer, nn.Conv3d):
        return convolve(features, layer, layer.weight, layer.bias)
    if isinstance(layer, nn.MaxPool3d):
        kernel, stride, padding, dilation = map(
            _triple, (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        if dilation[0] > 1 or layer.ceil_mode or layer.return_indices:
            raise TypeError(f"windows cannot share {layer}: ask for whole ones before it")

        def pool(x: Tensor) -> Tensor:
            return F.max_pool3d(x, kernel, stride, (0, *padding[1:]), dilation)

        return _over_time(features, pool, kernel, stride, padding, -torch.inf)
    if isinstance(layer, FRAMEWISE):
        return features.framewise(layer)
    raise TypeError(
        f"it is not known whether {type(layer).__name__} looks at other frames: make it a Sharing, "
        "or ask for whole windows before it"
    )


def convolve(features: Features, like: nn.Conv3d, weight: Tensor, bias: Tensor | None) -> Features:
    """Apply a convolution with other weights than its own.

    Raises:
        TypeError: If its padding is not in numbers, or not of zeros, or if it is dilated in time
            and windows are shared.
    """
    if isinstance(like.padding, str) or like.padding_mode != "zeros":
        raise TypeError(f"windows cannot share {like}: its padding must be numbers, of zeros")
    padding = _triple(like.padding)

    def apply(x: Tensor, padding: Triple) -> Tensor:
        if _is_for_one_dnn(x):
            return torch.mkldnn_convolution(
                x, weight, bias, padding, like.stride, like.dilation, like.groups
            )
        return F.conv3d(x, weight, bias, like.stride, padding, like.dilation, like.groups)

    if isinstance(features, Tensor):
        return apply(features, padding)

    if like.dilation[0] > 1:
        raise TypeError(f"windows cannot share {like}: ask for whole ones before it")

    def apply_within(x: Tensor) -> Tensor:
        return apply(x, (0, *padding[1:]))

    return _over_time(features, apply_within, like.kernel_size, like.stride, padding, 0.0)


class Conv3d(nn.Conv3d):
    """A convolution of whole windows that is as fast in a single thread as in many."""

    def forward(self, features: Tensor) -> Tensor:
        convolved = convolve(features, self, self.weight, self.bias)
        assert isinstance(convolved, Tensor)  # as windows are not shared
        return convolved


@overload
def convolve_norm(
    features: Tensor, conv: nn.Conv3d, norm: nn.BatchNorm3d, *, relu: bool = True
) -> Tensor: ...


@overload
def convolve_norm(
    features: Features, conv: nn.Conv3d, norm: nn.BatchNorm3d, *, relu: bool = True
) -> Features: ...


def convolve_norm(
    features: Features, conv: nn.Conv3d, norm: nn.BatchNorm3d, *, relu: bool = True
) -> Features:
    """Apply a convolution, its norm and, if not told otherwise, a ReLU.

    Where the norm would touch more numbers than there are weights, it is worked into the weights.
    They are not kept: whoever changes the network's weights need not know.
    """
    finish = F.relu_ if relu else nn.Identity()
    outputs = math.prod(features.shape) // conv.in_channels * conv.out_channels
    if norm.training or outputs // math.prod(conv.stride) <= conv.weight.numel():
        features = convolve(features, conv, conv.weight, conv.bias)
        return _framewise(lambda x: finish(norm(x)), features)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = conv.weight * scale.view(-1, 1, 1, 1, 1)
    bias = norm.bias - scale * norm.running_mean
    if conv.bias is not None:
        bias = bias + scale * conv.bias
    return _framewise(finish, convolve(features, conv, weight, bias))


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
        ends=torch.cat([run.ends for run in runs], 1),
    )


def whole(features: Features) -> Tensor:
    """Return whole windows."""
    return features if isinstance(features, Tensor) else features.whole()


def _is_for_one_dnn(x: Tensor) -> bool:
    """Return whether a convolution is to be given to oneDNN whatever PyTorch thinks.

    In a single thread PyTorch takes kernels over time, and those of single pixels, to a convolution
    of its own, which takes several times as long and undoes the memory layout.
    """
    return (
        not torch.compiler.is_compiling()  # compilers know the other one only, and choose anew
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_grad_enabled()
        and HAS_ONE_DNN
    )


def _framewise(layer: Callable[[Tensor], Tensor], features: Features) -> Features:
    return layer(features) if isinstance(features, Tensor) else features.framewise(layer)


def _over_time(
    run: WindowRun,
    layer: Callable[[Tensor], Tensor],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    fill: float,
) -> Features:
    if kernel[0] == 1 and stride[0] == 1 and not padding[0]:
        return run.framewise(layer)
    return run.over_time(layer, kernel=kernel[0], stride=stride[0], padding=padding[0], fill=fill)


def _nothing(like: Tensor, windows: int) -> Tensor:
    """Return no positions at all of windows with the channels and the size of some features."""
    _, channels, _, height, width = like.shape
    return like.new_empty(windows, channels, 0, height, width)


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _triple(value: int | tuple[int, ...]) -> Triple:
    if isinstance(value, int):
        return value, value, value
    first, second, third = value
    return first, second, third
