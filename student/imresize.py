"""Resize saliency maps as MATLAB's ``imresize`` does, which the published metrics do."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK: Final = 64
"""Output pixels of an axis that are computed by one matrix product."""


def resize_maps(maps: Tensor, height: int, width: int) -> Tensor:
    """Resize maps by cubic convolution with a = -0.5 (Keys, 1981), antialiased when they shrink.

    Pixel centres are at half-integers, edges are reflected and repeated, weights sum to 1. The axis
    that shrinks more, or grows less, is resized first. Nothing is clipped: values may leave the
    range of the input.

    Args:
        maps: ``(..., h, w)``, any real type.
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        ``(..., height, width)``, float64; the input itself where it is just that.

    Raises:
        ValueError: If a side of the maps or of the result is not positive.
    """
    rows, columns = maps.shape[-2:]
    if min(rows, columns, height, width) < 1:
        raise ValueError(f"cannot resize maps of {rows}x{columns} to {height}x{width}")
    maps = maps.to(torch.float64)
    if height / rows <= width / columns:
        return _resize_columns(_resize_rows(maps, height), width)
    return _resize_rows(_resize_columns(maps, width), height)


class _Block(NamedTuple):
    """What makes a span of output pixels of a span of input pixels."""

    outputs: slice
    inputs: slice
    weights: Tensor


def _resize_rows(maps: Tensor, height: int) -> Tensor:
    if maps.shape[-2] == height:
        return maps
    resized = maps.new_empty((*maps.shape[:-2], height, maps.shape[-1]))
    for outputs, inputs, weights in _blocks(maps.shape[-2], height, maps.device):
        resized[..., outputs, :] = weights @ maps[..., inputs, :]
    return resized


def _resize_columns(maps: Tensor, width: int) -> Tensor:
    if maps.shape[-1] == width:
        return maps
    resized = maps.new_empty((*maps.shape[:-1], width))
    for outputs, inputs, weights in _blocks(maps.shape[-1], width, maps.device):
        resized[..., outputs] = maps[..., inputs] @ weights.T
    return resized


@lru_cache(maxsize=64)
def _blocks(size: int, new_size: int, device: torch.device) -> list[_Block]:
    """Cut the band matrix that resizes an axis into blocks without most of its zeros."""
    weights = _axis_weights(size, new_size)
    blocks = []
    for first in range(0, new_size, BLOCK):
        rows = weights[first : first + BLOCK]
        (used,) = np.nonzero(rows.any(axis=0))
        inputs = slice(int(used[0]), int(used[-1]) + 1)
        block = torch.from_numpy(np.ascontiguousarray(rows[:, inputs])).to(device)
        blocks.append(_Block(slice(first, first + len(rows)), inputs, block))
    return blocks


def _axis_weights(size: int, new_size: int) -> npt.NDArray[np.float64]:
    """Return the weight of every input pixel for every output pixel, ``(new_size, size)``."""
    scale = new_size / size
    stretch = min(scale, 1.0)
    reach = 2 / stretch  # the kernel is zero from there on
    centres = (np.arange(new_size) + 0.5) / scale - 0.5
    first = np.floor(centres - reach).astype(np.int64)
    taps = first[:, None] + np.arange(int(np.ceil(2 * reach)) + 2)
    kernel = _cubic((centres[:, None] - taps) * stretch)
    kernel /= kernel.sum(axis=1, keepdims=True)
    period = taps % (2 * size)
    reflected = np.minimum(period, 2 * size - 1 - period)
    weights = np.zeros((new_size, size))
    np.add.at(weights, (np.arange(new_size)[:, None], reflected), kernel)
    return weights


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))
