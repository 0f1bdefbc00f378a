"""The student: encoder, decoders and fusion, joined (Hu et al., WACV 2023)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from student.blocks import ConvNorm
from student.config import CLIP_FRAMES, SIZE_MULTIPLE, DecoderName, TinyHDConfig
from student.decoders import GridDecoder, HierarchicalDecoder, PyramidDecoder, Role
from student.encoder import Encoder, level_channels

DECODERS: Final[Mapping[DecoderName, type[HierarchicalDecoder | PyramidDecoder | GridDecoder]]] = {
    "d1": HierarchicalDecoder,
    "d2": PyramidDecoder,
    "d3": GridDecoder,
}

LARGEST_VALUE: Final = 20.0
"""Beyond it, a clip cannot have been normalised."""

# Shapes: B clips, K maps, T frames, H height, W width.

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class StudentOutput(NamedTuple):
    """What the student says of a clip. Logits, because the loss is exact there."""

    saliency_logits: Tensor
    """TinyHD-S: ``(B, 1, H, W)``, of the clip's newest frame. TinyHD-M: ``(B, 1, T, H, W)``, of the
    newest ``T = output_frames`` frames, oldest first."""
    map_logits: Mapping[str, Tensor]
    """``(B, K, T', H, W)`` of each decoder; ``d1`` has the four hierarchical maps. A single decoder
    has ``T'`` 1."""

    @property
    def saliency(self) -> Tensor:
        """Saliency maps in 0..1, shaped as the logits; they mean something only up to their sum."""
        return self.saliency_logits.sigmoid()

    @property
    def maps(self) -> dict[str, Tensor]:
        """Maps of each decoder in 0..1, shaped as the logits."""
        return {name: logits.sigmoid() for name, logits in self.map_logits.items()}


class TinyHD(nn.Module):
    """The student network.

    Args:
        config: What to build.

    Shape:
        - clip: ``(B, 3, 16, H, W)`` from :func:`normalise_frames`, oldest frame first
        - returns: :class:`StudentOutput`

    Raises:
        ValueError: From ``forward``, if the clip has not 16 frames of a size divisible by 32, or
            is not normalised. The configured size is not enforced: other sizes give maps, too.
    """

    def __init__(self, config: TinyHDConfig) -> None:
        super().__init__()
        self.config = config
        self.is_folded = False
        """Whether this is the form for inference, whose weights no checkpoint holds."""
        reduction = config.channel_reduction
        channels = level_channels(reduction)
        self.encoder = Encoder(channel_reduction=reduction, multi=config.is_multi)
        decoders: dict[str, HierarchicalDecoder | PyramidDecoder | GridDecoder] = {
            name: DECODERS[name](
                channels,
                channel_reduction=reduction,
                role=_role_of(name, config),
                output_frames=config.output_frames,
            )
            for name in config.decoders
        }
        self.decoders = nn.ModuleDict(dict(decoders))
        num_maps = sum(decoder.num_maps for decoder in decoders.values())
        fusion = nn.Conv3d if config.is_multi else nn.Conv2d
        self.fusion = fusion(num_maps, 1, kernel_size=1)
        self._initialise()
        for part in (self.encoder, self.decoders):  # depthwise layers are several times faster so
            part.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def _initialise(self) -> None:
        """Start as MobileNetV2 does in the encoder; decoders keep PyTorch's defaults."""
        for module in self.encoder.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if not self.config.is_multi:
            nn.init.kaiming_normal_(self.fusion.weight, mode="fan_out")
            nn.init.constant_(self.fusion.get_parameter("bias"), 0.0)

    def forward(self, clip: Tensor) -> StudentOutput:
        _check_clip(clip, self.fusion.weight.dtype)
        return self.decode(self.encoder(clip))

    def decode(self, levels: Sequence[Tensor]) -> StudentOutput:
        """Read the encoder's levels: all decoders and the fusion."""
        map_logits = {name: decode(levels) for name, decode in self.decoders.items()}  # B K T' H W
        return StudentOutput(self._fuse(map_logits), map_logits)

    def _fuse(self, map_logits: Mapping[str, Tensor]) -> Tensor:
        """Weigh all maps; a map of the whole clip counts for every frame."""
        maps = {name: map_logits[name].sigmoid() for name in self.config.fusion_order}
        if not self.config.is_multi:
            fused: Tensor = self.fusion(torch.cat(list(maps.values()), 1).squeeze(2))
            return fused
        shares = torch.split(self.fusion.weight, [m.shape[1] for m in maps.values()], 1)
        parts = [F.conv3d(m, share) for m, share in zip(maps.values(), shares, strict=True)]
        parts[0] = parts[0] + self.fusion.get_parameter("bias")
        whole = functools.reduce(torch.add, parts)  # one frame is added to every frame
        return whole.expand(-1, -1, self.config.output_frames, -1, -1)

    @property
    def num_parameters(self) -> int:
        """Number of weights that are learnt."""
        return sum(parameter.numel() for parameter in self.parameters())

    def for_inference(self) -> TinyHD:
        """Return a copy that predicts faster: norms are part of the convolutions.

        Its maps are those of the network in evaluation mode, up to rounding. It cannot be trained.
        """
        model = copy.deepcopy(self).eval().requires_grad_(requires_grad=False)
        model.is_folded = True
        for module in model.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return model


def _role_of(decoder: DecoderName, config: TinyHDConfig) -> Role:
    if not config.is_single(decoder):
        return Role.MULTI
    return Role.SINGLE_IN_MULTI if config.is_multi else Role.SINGLE


def normalise_frames(frames: Tensor) -> Tensor:
    """Turn decoded frames into what the network expects.

    Args:
        frames: RGB, uint8 or float32 in 0..255, ``(B, T, H, W, 3)``, oldest frame first.

    Returns:
        float32, ``(B, 3, T, H, W)``, per channel centred and scaled as ImageNet networks want it.

    Raises:
        ValueError: If the frames are of another type or shape.
    """
    known = frames.dtype in (torch.uint8, torch.float32)
    if not known or frames.ndim != 5 or frames.shape[-1] != 3:
        raise ValueError(
            "frames must be uint8 or float32 (B, T, H, W, 3), "
            f"got {frames.dtype} {tuple(frames.shape)}"
        )
    mean = torch.tensor(IMAGENET_MEAN, device=frames.device)
    std = torch.tensor(IMAGENET_STD, device=frames.device)
    return ((frames.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)


def _check_clip(clip: Tensor, dtype: torch.dtype) -> None:
    ok = clip.ndim == 5 and clip.shape[1] == 3 and clip.shape[2] == CLIP_FRAMES
    if not ok or clip.shape[3] % SIZE_MULTIPLE or clip.shape[4] % SIZE_MULTIPLE or not clip.numel():
        raise ValueError(
            f"a clip must be (B, 3, {CLIP_FRAMES}, H, W) with H and W multiples of "
            f"{SIZE_MULTIPLE}, got {tuple(clip.shape)}"
        )
    if not clip.is_floating_point() or not (
        clip.dtype == dtype or torch.is_autocast_enabled(clip.device.type)
    ):
        raise ValueError(
            f"a clip must be floating point and normalised, {dtype} as the network's weights, "
            f"got {clip.dtype}"
        )
    # Looking at values would stop a GPU or a compiler; on a CPU it costs next to nothing.
    if clip.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (float(bound) for bound in clip.detach().aminmax())
        if not (low > -LARGEST_VALUE and high < LARGEST_VALUE):
            raise ValueError(
                f"a clip must be normalised as by normalise_frames, which gives about -2 to 3, "
                f"got values from {low:.3g} to {high:.3g}"
            )
