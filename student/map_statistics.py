"""What several measures need of a batch of maps, computed once and only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class computed_once(Generic[T]):
    """A property that is computed when it is first read.

    ``functools.cached_property`` of Python 3.11 lets a single thread compute at a time.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute

    def __get__(self, instance: object, owner: type) -> T:
        value = self.compute(instance)
        instance.__dict__[self.compute.__name__] = value
        return value


class MapStatistics:
    """A batch of maps as rows of pixels, with their statistics.

    Shape:
        - values: ``(B, N)``, float64
        - unit: ``(B, N)``
        - lowest, highest, total, unit_total, unit_mean, unit_variance: ``(B, 1)``
        - constant, zero: ``(B,)``, bool

    Args:
        values: The pixels.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @computed_once
    def lowest(self) -> Tensor:
        return self.values.amin(1, keepdim=True)

    @computed_once
    def highest(self) -> Tensor:
        return self.values.amax(1, keepdim=True)

    @computed_once
    def constant(self) -> Tensor:
        return (self.lowest == self.highest)[:, 0]

    @computed_once
    def zero(self) -> Tensor:
        return self.constant & (self.lowest == 0)[:, 0]

    @computed_once
    def total(self) -> Tensor:
        return self.values.sum(1, keepdim=True)

    @computed_once
    def unit(self) -> Tensor:
        """The maps with their minimum at 0 and their maximum at 1; 0 for constant maps."""
        extent = (self.highest - self.lowest).masked_fill(self.constant[:, None], 1.0)
        # Divided, not multiplied by the inverse: 51/255 must reach the threshold 0.2.
        return (self.values - self.lowest).div_(extent)

    @computed_once
    def unit_total(self) -> Tensor:
        return self.unit.sum(1, keepdim=True)

    @computed_once
    def unit_mean(self) -> Tensor:
        return self.unit_total / self.unit.shape[1]

    @computed_once
    def unit_variance(self) -> Tensor:
        """Mean square of ``unit`` less the square of its mean.

        A map from 0 to 1 has a variance of at least 1/N, so that the difference keeps its digits.
        """
        norm: Tensor = torch.linalg.vector_norm(self.unit, dim=1, keepdim=True)
        return norm.square() / self.unit.shape[1] - self.unit_mean.square()

    @computed_once
    def scratch(self) -> Tensor:
        """Memory for results in between, ``(B, N)``: new memory takes longer than arithmetic."""
        return torch.empty_like(self.values)

    def repaired(self) -> MapStatistics:
        """Return densities: negative maps raised to a minimum of 0, then zero maps made uniform."""
        raised = self.values - self.lowest.clamp(max=0.0)
        empty = raised.amax(1, keepdim=True) == 0
        return MapStatistics(raised.masked_fill(empty, 1.0))
