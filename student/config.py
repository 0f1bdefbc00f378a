"""What network is built; how it is trained is :class:`student.train.TrainConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal, get_args

ChannelReduction = Literal[1, 2, 4, 8]
DecoderName = Literal["d1", "d2", "d3"]
OutputFrames = Literal[1, 8, 16]
CLIP_FRAMES: Final = 16
"""Frames the network sees at once; its temporal strides leave no other choice."""
SIZE_MULTIPLE: Final = 32
"""The encoder halves height and width five times."""


@dataclass(frozen=True, kw_only=True)
class TinyHDConfig:
    """A student network (Hu et al., WACV 2023); by default TinyHD-S with all decoders.

    With :attr:`output_frames` 1 it is a TinyHD-S: every decoder is single, the map is that of the
    clip's newest frame. Otherwise it is a TinyHD-M, which maps several frames at once.

    Raises:
        ValueError: If the fields do not go together.
    """

    channel_reduction: ChannelReduction = 1
    """Divisor of every channel count of the encoder; above 1, distil from a teacher assistant."""
    decoders: tuple[DecoderName, ...] = ("d1", "d2", "d3")
    """Which decoders there are; the fusion takes their maps in this order."""
    single: tuple[bool, ...] = (True, True, True)
    """For each decoder: whether it makes one map for the whole clip, not one for each frame."""
    output_frames: OutputFrames = 1
    """Saliency maps per clip: 1 (the newest frame), 16 (every frame) or 8 (the newest eight)."""
    force_multi: bool = False
    """Build a TinyHD-M though every decoder is single; all its output frames are equal."""
    d1_last: bool = False
    """Let the fusion take the maps of ``d1`` after those of the other decoders."""
    height: int = 192
    """Height of the frames fed to the network, in pixels; a multiple of 32."""
    width: int = 256
    """Width of the frames fed to the network, in pixels; a multiple of 32."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("channel_reduction", get_args(ChannelReduction)),
            ("output_frames", get_args(OutputFrames)),
        ):
            value = getattr(self, name)
            if type(value) is not int or value not in choices:
                known = ", ".join(map(str, choices[:-1]))
                raise ValueError(f"{name} must be {known} or {choices[-1]}, got {value!r}")
        for name in ("force_multi", "d1_last"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("height", "width"):
            pixels = getattr(self, name)
            ok = isinstance(pixels, int) and not isinstance(pixels, bool)
            if not ok or pixels < SIZE_MULTIPLE or pixels % SIZE_MULTIPLE:
                raise ValueError(
                    f"{name} must be a positive multiple of {SIZE_MULTIPLE}, got {pixels!r}"
                )
        # Lists come from JSON and from callers; a configuration is hashable.
        object.__setattr__(self, "decoders", _as_tuple("decoders", self.decoders))
        object.__setattr__(self, "single", _as_tuple("single", self.single))
        self._check_decoders()
        self._check_output_frames()

    def _check_decoders(self) -> None:
        names = get_args(DecoderName)
        unknown = [name for name in self.decoders if name not in names]
        if not self.decoders or unknown or len(set(self.decoders)) != len(self.decoders):
            raise ValueError(
                f"decoders must be some of {', '.join(names)}, each at most once, "
                f"got {list(self.decoders)}"
            )
        if len(self.single) != len(self.decoders) or not all(
            isinstance(single, bool) for single in self.single
        ):
            raise ValueError(
                f"single must have one True or False for each of the {len(self.decoders)} decoders "
                f"{list(self.decoders)}, got {list(self.single)}"
            )
        if self.force_multi and not all(self.single):
            raise ValueError(
                "force_multi is for networks whose decoders are all single; this one is a TinyHD-M "
                f"already, with single={list(self.single)}"
            )
        if self.d1_last and "d1" not in self.decoders:
            raise ValueError(f"d1_last needs d1 among the decoders, got {list(self.decoders)}")

    def _check_output_frames(self) -> None:
        if self.is_multi and self.output_frames == 1:
            reason = "force_multi" if self.force_multi else f"single={list(self.single)}"
            raise ValueError(
                f"a TinyHD-M ({reason}) has 16 or 8 output_frames, got 1; for one map make every "
                "decoder single"
            )
        if not self.is_multi and self.output_frames != 1:
            raise ValueError(
                "a network whose decoders are all single has 1 output frame, got output_frames="
                f"{self.output_frames}; for more, make d2 or d3 not single, or set force_multi"
            )
        if self.output_frames == 8 and "d1" in self.decoders and not self.is_single("d1"):
            raise ValueError(
                "d1 makes 16 maps unless it is single, which does not go with output_frames=8; "
                "make d1 single or set output_frames=16"
            )

    @property
    def is_multi(self) -> bool:
        """Whether this is a TinyHD-M: one map for each of several frames."""
        return self.force_multi or not all(self.single)

    @property
    def fusion_order(self) -> tuple[DecoderName, ...]:
        """Decoders in the order in which the fusion takes their maps."""
        if not self.d1_last:
            return self.decoders
        return (*(name for name in self.decoders if name != "d1"), "d1")

    def is_single(self, decoder: DecoderName) -> bool:
        """Tell whether a decoder makes one map for the whole clip."""
        return self.single[self.decoders.index(decoder)]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for JSON and checkpoints."""
        return asdict(self) | {"decoders": list(self.decoders), "single": list(self.single)}

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


def _as_tuple(name: str, values: Any) -> tuple[Any, ...]:  # noqa: ANN401 - what a caller gave
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} must be a list, got {values!r}")
    return tuple(values)


_S = TinyHDConfig()
_M = TinyHDConfig(single=(True, False, False), output_frames=16)
VARIANTS: Final[Mapping[str, TinyHDConfig]] = {
    "tinyhd-s": _S,
    "tinyhd-s-rc2": replace(_S, channel_reduction=2),
    "tinyhd-s-rc4": replace(_S, channel_reduction=4),
    "tinyhd-m": _M,
    "tinyhd-m-rc2": replace(_M, channel_reduction=2),
    "tinyhd-m-rc4": replace(_M, channel_reduction=4),
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
    return replace(
        config,
        height=config.height if height is None else height,
        width=config.width if width is None else width,
    )
