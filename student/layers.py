"""Convolutions and upsamplings of clips, each in the form that costs least.

Features are ``(B, C, T, H, W)`` and lie in memory as ``channels_last_3d``: channels together, then
columns, rows, frames. In that order the frames of all clips are also a batch of pictures, without
a copy, and whatever does not mix frames is done to pictures: two-dimensional layers are many times
faster. Other runtimes have layouts of their own, in which that view would be a copy: exported
graphs stay five-dimensional. Numbers are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight


class Conv(nn.Conv3d):
    """A 3-D convolution, done to pictures where it does not mix frames.

    That is so where its kernel spans one frame, and where the clip has one frame and the kernel's
    other taps would only see padding.
    """

    def forward(self, features: Tensor) -> Tensor:
        kernel, padding = self.kernel_size[0], int(self.padding[0])
        if torch.compiler.is_exporting():
            return super().forward(features)
        if kernel > 1 and (features.shape[2] > 1 or not padding):
            # Without oneDNN, at a third of the speed, PyTorch would compute a lone clip's stem.
            is_slow = self.groups == 1 and len(features) == 1 and features.device.type == "cpu"
            if is_slow:
                return self._stack_frames(features)
            if torch.is_grad_enabled() and self._has_fast_gradient(features):
                mixed: Tensor = _MixDepthwise.apply(  # type: ignore[no-untyped-call]
                    features, self.weight, self.stride[0]
                )
                return mixed
            return super().forward(features)
        pictures = F.conv2d(
            as_pictures(features),
            self.weight[:, :, padding],
            self.bias,
            self.stride[1:],
            self.padding[1:],
            self.dilation[1:],
            self.groups,
        )
        return as_clips(pictures, len(features))

    def _has_fast_gradient(self, features: Tensor) -> bool:
        return (
            features.device.type == "cpu"
            and features.dtype == self.weight.dtype == torch.float32
            and self.bias is None
            and self.groups == self.in_channels == self.out_channels
            and self.kernel_size == (3, 3, 3)
            and self.padding == (1, 1, 1)
            and self.stride in ((1, 1, 1), (2, 1, 1))
            and features.shape[2] % self.stride[0] == 0
            and not torch.compiler.is_compiling()
        )

    def _stack_frames(self, features: Tensor) -> Tensor:
        """Convolve pictures whose channels are those of all frames that the kernel spans."""
        kernel, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        padded = F.pad(features, (0, 0, 0, 0, padding, padding))
        windows = padded.unfold(2, kernel, stride).permute(0, 2, 1, 5, 3, 4)  # B T' C k H W
        pictures = F.conv2d(
            windows.flatten(2, 3).flatten(0, 1),
            self.weight.flatten(1, 2).contiguous(memory_format=torch.channels_last),
            self.bias,
            self.stride[1:],
            self.padding[1:],
        )
        return as_clips(pictures, len(features))


class _MixDepthwise(torch.autograd.Function):
    """A depthwise 3x3x3 convolution whose gradients are made of layers that are fast on a CPU.

    oneDNN differentiates three-dimensional depthwise layers slowly. But the gradient of the
    features is such a layer itself, with the kernel turned around, and that of the kernel, for
    each of its frames, is the one of a two-dimensional layer.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, stride: int) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(features, weight)
        ctx.stride = stride
        return F.conv3d(features, weight, None, (stride, 1, 1), 1, 1, features.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN401
        features, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        of_features = of_weight = None
        if ctx.needs_input_grad[0]:
            spread = gradient
            if ctx.stride == 2:  # zeros where the kernel's middle has not been
                spread = torch.zeros_like(features)
                spread[:, :, ::2] = gradient
            turned = weight.flip(2, 3, 4)
            of_features = F.conv3d(spread, turned, None, 1, 1, 1, features.shape[1])
        if ctx.needs_input_grad[1]:
            taps = [_tap_gradient(features, gradient, ctx.stride, tap) for tap in range(3)]
            of_weight = torch.stack(taps, 2)
        return of_features, of_weight, None


def _tap_gradient(features: Tensor, gradient: Tensor, stride: int, tap: int) -> Tensor:
    """Return the gradient of one frame of a depthwise kernel, ``(C, 1, 3, 3)``."""
    outputs = gradient.shape[2]
    # Output frame o meets, under this tap, input frame stride * o + tap - 1, if there is one.
    first = 1 if tap == 0 else 0
    last = outputs - 1 if stride * (outputs - 1) + tap - 1 >= features.shape[2] else outputs
    channels = features.shape[1]
    if last <= first:
        return gradient.new_zeros(channels, 1, 3, 3)
    start = stride * first + tap - 1
    met = features[:, :, start : start + stride * (last - first - 1) + 1 : stride]
    pictures = [
        as_pictures(part).contiguous(memory_format=torch.channels_last)
        for part in (met, gradient[:, :, first:last])
    ]
    size = (channels, 1, 3, 3)
    of_tap: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        pictures[0], size, pictures[1], padding=1, groups=channels
    )
    return of_tap


def as_pictures(features: Tensor) -> Tensor:
    """View clips ``(B, C, T, H, W)`` as pictures ``(B * T, C, H, W)``."""
    if features.shape[2] == 1:  # squeezing keeps strides that tell channels-last; merging does not
        return features.squeeze(2)
    return features.transpose(1, 2).flatten(0, 1)


def as_clips(pictures: Tensor, batch: int) -> Tensor:
    """View pictures ``(B * T, C, H, W)`` as clips ``(B, C, T, H, W)``."""
    if len(pictures) == batch:
        return pictures.unsqueeze(2)
    return pictures.view(batch, -1, *pictures.shape[1:]).transpose(1, 2)


def shuffle_up(features: Tensor) -> Tensor:
    """Double height and width, frame by frame, by taking four channels apart (pixel shuffle).

    Shape:
        - features: ``(B, 4 * C, T, H, W)``
        - returns: ``(B, C, T, 2 * H, 2 * W)``
    """
    if not torch.compiler.is_exporting():
        return as_clips(F.pixel_shuffle(as_pictures(features), 2), len(features))
    batch, channels, frames, height, width = features.shape
    last = features.permute(0, 2, 3, 4, 1)
    taken = last.reshape(batch, frames, height, width, channels // 4, 2, 2)  # B T H W C dy dx
    placed = taken.permute(0, 1, 2, 5, 3, 6, 4)
    doubled = placed.reshape(batch, frames, 2 * height, 2 * width, channels // 4)
    return doubled.permute(0, 4, 1, 2, 3)


def interpolate_up(features: Tensor) -> Tensor:
    """Double height and width bilinearly, corners aligned; channels are kept.

    Shape:
        - features: ``(B, C, T, H, W)``
        - returns: ``(B, C, T, 2 * H, 2 * W)``
    """
    if torch.compiler.is_exporting():
        return F.interpolate(features, scale_factor=(1, 2, 2), mode="trilinear", align_corners=True)
    pictures = as_pictures(features)
    doubled = F.interpolate(pictures, scale_factor=2, mode="bilinear", align_corners=True)
    return as_clips(doubled, len(features))


def double_frames(features: Tensor) -> Tensor:
    """Double the frames linearly, first and last aligned; a single frame is repeated.

    Shape:
        - features: ``(B, C, T, H, W)``
        - returns: ``(B, C, 2 * T, H, W)``
    """
    batch, channels, frames, height, width = features.shape
    if frames == 1:
        return torch.cat([features, features], 2)
    if torch.compiler.is_exporting():
        return torch.cat(list(_doubled_frames(features)), 2)
    weights = _doubling_weights(frames, features)
    rows = features.permute(0, 2, 3, 4, 1).reshape(batch, frames, -1)
    doubled = (weights @ rows).view(batch, 2 * frames, height, width, channels)
    return doubled.permute(0, 4, 1, 2, 3)


def _doubled_frames(features: Tensor) -> Iterator[Tensor]:
    frames = torch.split(features, 1, 2)
    steps = 2 * len(frames) - 1
    for index in range(2 * len(frames)):
        first, rest = divmod(index * (len(frames) - 1), steps)
        share = rest / steps
        if rest:
            yield frames[first] * (1 - share) + frames[first + 1] * share
        else:
            yield frames[first]


def _doubling_weights(frames: int, like: Tensor) -> Tensor:
    """Weight of each of ``frames`` frames in each of twice as many, ``(2 * frames, frames)``."""
    eye = torch.eye(frames, dtype=like.dtype, device=like.device)
    rows = F.interpolate(eye[None], scale_factor=2, mode="linear", align_corners=True)
    return rows[0].T
