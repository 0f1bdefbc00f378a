"""TinyHD-S: encoder, decoders and fusion, joined (Hu et al., WACV 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from student.config import CLIP_FRAMES, SIZE_MULTIPLE, TinyHDConfig
from student.decoders import GridDecoder, HierarchicalDecoder, PyramidDecoder
from student.encoder import Encoder, level_channels

DECODERS: Final = (("d1", HierarchicalDecoder), ("d2", PyramidDecoder), ("d3", GridDecoder))
"""In the order in which the fusion takes their maps."""

# Shapes: B clips, K maps, T frames, H height, W width.

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class StudentOutput(NamedTuple):
    """What the student says of a clip's newest frame. Logits, because the loss is exact there."""

    saliency_logits: Tensor
    """``(B, 1, H, W)``"""
    map_logits: Mapping[str, Tensor]
    """``(B, K, 1, H, W)`` of each decoder; ``d1`` has the four hierarchical maps."""

    @property
    def saliency(self) -> Tensor:
        """Saliency map, ``(B, 1, H, W)`` in 0..1; it means something only up to its sum."""
        return self.saliency_logits.sigmoid()

    @property
    def maps(self) -> dict[str, Tensor]:
        """Maps of each decoder, ``(B, K, 1, H, W)`` in 0..1."""
        return {name: logits.sigmoid() for name, logits in self.map_logits.items()}


class TinyHD(nn.Module):
    """The student network.

    Args:
        config: What to build.

    Shape:
        - clip: ``(B, 3, 16, H, W)`` from :func:`normalise_frames`, oldest frame first
        - returns: :class:`StudentOutput`

    Raises:
        ValueError: From ``forward``, if the clip is not of the configured frames and size.
    """

    def __init__(self, config: TinyHDConfig) -> None:
        super().__init__()
        self.config = config
        reduction = config.channel_reduction
        channels = level_channels(reduction)
        self.encoder = Encoder(channel_reduction=reduction)
        decoders = {name: build(channels, channel_reduction=reduction) for name, build in DECODERS}
        num_maps = sum(decoder.num_maps for decoder in decoders.values())
        self.decoders = nn.ModuleDict(decoders)
        self.fusion = nn.Conv2d(num_maps, 1, kernel_size=1)
        self._initialise()
        for part in (self.encoder, self.decoders):  # depthwise layers are several times faster so
            part.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def _initialise(self) -> None:
        """Start as MobileNetV2 does in the encoder; decoders keep PyTorch's defaults."""
        for module in self.encoder.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.kaiming_normal_(self.fusion.weight, mode="fan_out")
        nn.init.constant_(self.fusion.get_parameter("bias"), 0.0)

    def forward(self, clip: Tensor) -> StudentOutput:
        _check_clip(clip)
        levels = self.encoder(clip.contiguous(memory_format=torch.channels_last_3d))
        map_logits = {name: decode(levels) for name, decode in self.decoders.items()}  # B K 1 H W
        maps = torch.cat([logits.sigmoid() for logits in map_logits.values()], 1)
        return StudentOutput(self.fusion(maps[:, :, 0]), map_logits)


def normalise_frames(frames: Tensor) -> Tensor:
    """Turn decoded frames into what the network expects.

    Args:
        frames: uint8 RGB, ``(B, T, H, W, 3)``, oldest frame first.

    Returns:
        float32, ``(B, 3, T, H, W)``, per channel centred and scaled as ImageNet networks want it.

    Raises:
        ValueError: If the frames are of another type or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames must be uint8 (B, T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}"
        )
    mean = torch.tensor(IMAGENET_MEAN, device=frames.device)
    std = torch.tensor(IMAGENET_STD, device=frames.device)
    return ((frames.float() / 255 - mean) / std).permute(0, 4, 1, 2, 3)


def _check_clip(clip: Tensor) -> None:
    ok = clip.ndim == 5 and clip.shape[1] == 3 and clip.shape[2] == CLIP_FRAMES
    if not ok or clip.shape[3] % SIZE_MULTIPLE or clip.shape[4] % SIZE_MULTIPLE:
        raise ValueError(
            f"a clip must be (B, 3, {CLIP_FRAMES}, H, W) with H and W multiples of "
            f"{SIZE_MULTIPLE}, got {tuple(clip.shape)}"
        )
    if not clip.is_floating_point():
        raise ValueError(f"a clip must be floating point and normalised, got {clip.dtype}")
