"""The weights that the goldens of all teachers were made with: a rule that names alone decide."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

KEPT = ("shape", "sum", "abssum", "std", "min", "max", "sub")
"""What the goldens keep of an array."""


def fill(
    key: str,
    shape: tuple[int, ...],
    *,
    gains: Mapping[str, float] | None = None,
    lifts_few: bool = False,
) -> Tensor:
    """Return what the rule says of a parameter.

    Args:
        key: Its name.
        shape: Its shape.
        gains: Of some kernels, by name.
        lifts_few: Whether biases of 2 to 4 channels are raised by one.
    """
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    if leaf.startswith("coarse_gaussians"):
        values = np.array([0.5, -1.0]) + np.array([0.25, 0.5]) * rng.standard_normal(shape)
    elif leaf == "running_var" or leaf.startswith("a_") or (leaf == "weight" and len(shape) == 1):
        values = rng.uniform(0.5, 1.5, shape)
    elif leaf == "weight":
        gain = (gains or {}).get(key, 1.0)
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:])) * gain
    else:
        values = 0.1 * rng.standard_normal(shape)
        if lifts_few and leaf == "bias" and shape[0] in (2, 3, 4):
            values += 1.0
    return torch.from_numpy(values.astype(np.float32))


def filled(
    build: Callable[[], nn.Module],
    *,
    gains: Mapping[str, float] | None = None,
    lifts_few: bool = False,
) -> dict[str, Tensor]:
    """Return the weights of a network by the rule."""
    with torch.device("meta"):
        published = build().state_dict()
    return {
        key: fill(key, tuple(tensor.shape), gains=gains, lifts_few=lifts_few)
        for key, tensor in published.items()
    }
