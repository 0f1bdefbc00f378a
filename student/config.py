"""What network is built; how it is trained is :class:`student.train.TrainConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal, get_args

ChannelReduction = Literal[1, 2, 4, 8]
CLIP_FRAMES: Final = 16
"""Frames the network sees at once; its temporal strides leave no other choice."""
SIZE_MULTIPLE: Final = 32
"""The encoder halves height and width five times."""


@dataclass(frozen=True, kw_only=True)
class TinyHDConfig:
    """A TinyHD-S: one saliency map per clip, for its newest frame (Hu et al., WACV 2023)."""

    channel_reduction: ChannelReduction = 1
    """Divisor of every channel count of the encoder; above 1, distil from a teacher assistant."""
    height: int = 192
    """Height of the frames fed to the network, in pixels; a multiple of 32."""
    width: int = 256
    """Width of the frames fed to the network, in pixels; a multiple of 32."""

    def __post_init__(self) -> None:
        if self.channel_reduction not in get_args(ChannelReduction):
            raise ValueError(
                f"channel_reduction must be 1, 2, 4 or 8, got {self.channel_reduction!r}"
            )
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if not isinstance(pixels, int) or pixels < SIZE_MULTIPLE or pixels % SIZE_MULTIPLE:
                raise ValueError(
                    f"{name} must be a positive multiple of {SIZE_MULTIPLE}, got {pixels!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TinyHDConfig:
        """Build a configuration from what :meth:`to_dict` gave.

        Raises:
            ValueError: If a field is unknown or has a value that is not allowed.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown fields {unknown} in a TinyHD configuration; known: {sorted(known)}"
            )
        return cls(**values)


VARIANTS: Final[Mapping[str, TinyHDConfig]] = {
    "tinyhd-s": TinyHDConfig(channel_reduction=1),
    "tinyhd-s-rc2": TinyHDConfig(channel_reduction=2),
    "tinyhd-s-rc4": TinyHDConfig(channel_reduction=4),
}


def build_config(
    variant: str, *, height: int | None = None, width: int | None = None
) -> TinyHDConfig:
    """Return the named variant, at its published size of 192x256 unless another is given.

    Raises:
        ValueError: If there is no such variant, or the size does not fit the network.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no student variant {variant!r}; there are: {', '.join(VARIANTS)}")
    config = VARIANTS[variant]
    return replace(config, height=height or config.height, width=width or config.width)
