"""What a teacher's maps are, and how a stored native plane becomes a map that one can look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch.nn.functional as F
from torch import Tensor

from stores.codec import kl_error_bound, logit_error_bound

MAX_SIDE: Final = 16384
"""Rows or columns of a map or a frame, in pixels."""


@dataclass(frozen=True, kw_only=True)
class MapSpec:
    """One map of a teacher, stored as a plane of logits or log-densities."""

    name: str
    height: int
    """Rows of the stored plane: the resolution at which the teacher made the map."""
    width: int
    activation: Literal["sigmoid", "exp"]
    """What turns a stored value into the map's: of a logit, or of a log-density."""
    order: Literal["resize_first", "activate_first"]
    """Whether the teacher resizes the plane to its input size before or after the activation."""

    def __post_init__(self) -> None:
        if not (1 <= self.height <= MAX_SIDE and 1 <= self.width <= MAX_SIDE):
            raise ValueError(
                f"{self.name} needs a size from 1 to {MAX_SIDE}, got {self.height}x{self.width}"
            )
        if self.activation not in ("sigmoid", "exp"):
            raise ValueError(f"{self.name} has the activation {self.activation!r}")
        if self.order not in ("resize_first", "activate_first"):
            raise ValueError(f"{self.name} has the order {self.order!r}")

    @property
    def array(self) -> str:
        """Name of the array that holds the plane; maps of one resolution share an array."""
        return f"maps_{self.height}x{self.width}"


@dataclass(frozen=True, kw_only=True)
class DerivedMap:
    """A map that follows from others, at the teacher's input size, and so is not stored."""

    name: str
    terms: tuple[tuple[str, float], ...]
    """Names of stored maps and the weights with which the activated maps are summed."""
    bias: float = 0.0
    activation: Literal["identity", "sigmoid"]
    """What is applied to the sum."""

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError(f"{self.name} is derived from nothing")
        if self.activation not in ("identity", "sigmoid"):
            raise ValueError(f"{self.name} has the activation {self.activation!r}")


@dataclass(frozen=True, kw_only=True)
class MapLayout:
    """All maps of a label set."""

    height: int
    """Rows of the teacher's input, in pixels; derived maps are composed at this size."""
    width: int
    maps: tuple[MapSpec, ...]
    derived: tuple[DerivedMap, ...] = ()
    saliency: str
    """The map that is the teacher's prediction."""
    hierarchical: tuple[str, ...] = ()
    """The hierarchical maps, the finest first; empty for a teacher that has none."""

    def __post_init__(self) -> None:
        if not (1 <= self.height <= MAX_SIDE and 1 <= self.width <= MAX_SIDE):
            raise ValueError(f"maps of {self.height}x{self.width} pixels are not possible")
        stored, names = [spec.name for spec in self.maps], self.names
        if len(set(names)) != len(names):
            raise ValueError(f"map names must differ, got {', '.join(names)}")
        for derived in self.derived:
            if missing := [name for name, _ in derived.terms if name not in stored]:
                raise ValueError(f"{derived.name} is derived from {missing}, which are not stored")
        if missing := [name for name in (self.saliency, *self.hierarchical) if name not in names]:
            raise ValueError(f"there are no maps {missing}; there are {', '.join(names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all maps, stored and derived."""
        return (*(spec.name for spec in self.maps), *(rule.name for rule in self.derived))

    @property
    def arrays(self) -> dict[str, tuple[MapSpec, ...]]:
        """The arrays of the label set and, in the order of their ``map`` axis, what they hold."""
        arrays: dict[str, tuple[MapSpec, ...]] = {}
        for spec in self.maps:
            arrays[spec.array] = (*arrays.get(spec.array, ()), spec)
        return arrays

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as plain values, for a store's attributes."""
        values = asdict(self)
        for derived in values["derived"]:
            derived["terms"] = [list(term) for term in derived["terms"]]
        return {**values, **{key: list(values[key]) for key in ("maps", "derived", "hierarchical")}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MapLayout:
        """Build a layout from what :meth:`to_dict` gave.

        Raises:
            TypeError: If a field is unknown or missing.
            ValueError: If the maps do not fit each other.
        """
        derived = [
            DerivedMap(**{**item, "terms": tuple((name, weight) for name, weight in item["terms"])})
            for item in values["derived"]
        ]
        return cls(
            **{
                **values,
                "maps": tuple(MapSpec(**item) for item in values["maps"]),
                "derived": tuple(derived),
                "hierarchical": tuple(values["hierarchical"]),
            }
        )


def error_bounds(layout: MapLayout, grid_step: float) -> dict[str, Any]:
    """Return how far stored values and what follows from them may be off.

    A sigmoid's slope is at most 1/4, so a sum of sigmoids weighted by *w* moves by at most
    s * sum(abs(w)) / 8. Its sigmoid's logarithm moves by no more; a sum with nothing negative in it
    keeps the bound of its terms. Elsewhere there is no bound, which is None.

    Returns:
        ``logit``: of a stored value; ``kl_nats``: KL(exact || stored) of a stored map; ``derived``:
        for each derived map ``logit``, of the sum, and ``kl_nats``.
    """
    activations = {spec.name: spec.activation for spec in layout.maps}
    derived = {}
    for rule in layout.derived:
        weights = [weight for _, weight in rule.terms]
        is_bounded = all(activations[name] == "sigmoid" for name, _ in rule.terms)
        logit = grid_step * sum(map(abs, weights)) / 8 if is_bounded else None
        kl = None
        if rule.activation == "sigmoid" and logit is not None:
            kl = kl_error_bound(2 * logit)
        elif rule.activation == "identity" and min([*weights, rule.bias]) >= 0:
            kl = kl_error_bound(grid_step)
        derived[rule.name] = {"logit": logit, "kl_nats": kl}
    bounds = {"logit": logit_error_bound(grid_step), "kl_nats": kl_error_bound(grid_step)}
    return {**bounds, "derived": derived}


def render_maps(
    planes: Mapping[str, Tensor],
    layout: MapLayout,
    names: Sequence[str],
    *,
    height: int,
    width: int,
) -> dict[str, Tensor]:
    """Turn stored planes into activated maps at a student's size.

    A map is first made at the size where the teacher defines it: an ``activate_first`` map at its
    native one, all others at the teacher's input size. From there it is resized by antialiased
    bilinear interpolation.

    Args:
        planes: Arrays of the label set by name, ``(B, map, y, x)``.
        layout: The label set's layout.
        names: The maps wanted.
        height: Rows of the result.
        width: Columns of the result.

    Returns:
        ``(B, height, width)`` by name; non-negative, meaningful up to the sum of a map.

    Raises:
        KeyError: If the layout has no such map.
    """
    size, input_size = (height, width), (layout.height, layout.width)
    where = {
        spec.name: (spec, array, index)
        for array, specs in layout.arrays.items()
        for index, spec in enumerate(specs)
    }
    derived_maps = {derived.name: derived for derived in layout.derived}

    def defined(name: str) -> Tensor:
        spec, array, index = where[name]
        plane = planes[array][:, index : index + 1]
        if spec.order == "resize_first":
            return _activate(_resize(plane, input_size, antialias=False), spec.activation)
        return _activate(plane, spec.activation)

    rendered = {}
    for name in names:
        if name in derived_maps:
            rule = derived_maps[name]
            total = sum(
                (weight * _resize(defined(term), input_size) for term, weight in rule.terms),
                start=planes[where[rule.terms[0][0]][1]].new_tensor(rule.bias),
            )
            native = total.sigmoid() if rule.activation == "sigmoid" else total
        else:
            native = defined(name)
        rendered[name] = _resize(native, size)[:, 0]
    return rendered


def _activate(values: Tensor, activation: Literal["sigmoid", "exp"]) -> Tensor:
    return values.sigmoid() if activation == "sigmoid" else values.exp()


def _resize(maps: Tensor, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False, antialias=antialias)
