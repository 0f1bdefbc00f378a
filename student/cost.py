"""What a network costs: parameters and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from student.config import CLIP_FRAMES, TinyHDConfig
from student.layers import Conv
from student.tinyhd import TinyHD


@dataclass(frozen=True)
class Cost:
    """Cost of a network for one clip at its configured size."""

    parameters: int
    macs: int
    """Multiply-accumulates of all convolutions as the paper's figure has them, taps on padding
    among them."""
    macs_by_part: dict[str, int] = field(default_factory=dict)
    """Of the encoder, each decoder and the fusion."""
    output_frames: int = 1

    @property
    def macs_per_map(self) -> float:
        """Multiply-accumulates for each saliency map."""
        return self.macs / self.output_frames


def cost_of(config: TinyHDConfig) -> Cost:
    """Count parameters and multiply-accumulates of a configuration; nothing is computed."""
    with torch.device("meta"):
        model = TinyHD(config).eval()
        clip = torch.empty(1, 3, CLIP_FRAMES, config.height, config.width)
    parts = dict.fromkeys(("encoder", *config.decoders), 0)

    def count(part: str, conv: Conv, output: Tensor) -> None:
        parts[part] += output.numel() * conv.weight[0].numel()

    for name, module in model.named_modules():
        if isinstance(module, Conv):
            part = name.split(".")[1] if name.startswith("decoders.") else "encoder"
            module.register_forward_hook(
                lambda conv, _, output, part=part: count(part, conv, output)
            )
    with torch.inference_mode():
        model(clip)
    maps_of_fusion = model.fusion.weight.shape[1]
    pixels = config.output_frames * config.height * config.width
    parts["fusion"] = maps_of_fusion * pixels
    return Cost(
        parameters=model.num_parameters,
        macs=sum(parts.values()),
        macs_by_part=parts,
        output_frames=config.output_frames,
    )


def computed_macs(model: nn.Module, clip: Tensor) -> int:
    """Count the multiply-accumulates that a network really does for a clip (PyTorch's counter)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(clip)
    return int(counter.get_total_flops()) // 2
