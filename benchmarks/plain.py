"""TinyHD as plain 3-D layers, straight from its tables: what benchmarks and tests compare with.

Nothing here is shared with ``student/`` and nothing is made fast: default memory layout, every
batch norm by itself, every upsampling where the paper's figure has it. It reads a state dict with
the published names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Time = tuple[int, int, int]
K1, K3, S2, K2 = (1, 1, 0), (3, 1, 1), (3, 2, 1), (2, 1, 0)  # kernel, stride, padding in time

# output channels at reduction 1, spatial stride, temporal: S and M differ from block 14 on
ENCODER: Sequence[tuple[int, int, Time, Time]] = (
    *((16, 1, K3, K3), (24, 2, K3, K3), (24, 1, K3, K3)),
    *((32, 2, S2, S2), (32, 1, K3, K3), (32, 1, K3, K3)),
    *((64, 2, S2, S2), (64, 1, K3, K3), (64, 1, K3, K3), (64, 1, K3, K3)),
    *((96, 1, K3, K3), (96, 1, K3, K3), (96, 1, K3, K3)),
    *((160, 2, K3, K2), (160, 1, K3, K1), (160, 1, K3, K1), (320, 1, K3, K1)),
)
RESIDUAL = (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)

# Depthwise temporal columns of the decoders: pure S, S inside M, M, M with 8 frames.
D1_TIMES: Mapping[int, tuple[Time, Time, Time]] = {
    **{0: (S2, S2, K3), 1: (K1, K3, K3), 2: (S2, S2, K3), 3: (S2, S2, K3)},
    **{4: (S2, S2, K3), 5: (K1, K3, K3), 6: (S2, S2, K3), 7: (K1, K3, K3)},
    **{8: (S2, S2, K3), 9: (K1, K3, K3), 10: (K1, K3, K3), 11: (K1, K3, K3)},
    **{12: (S2, K3, K3), 13: (K1, K3, K3), 14: (K1, K3, K3), 15: (K1, K3, K3)},
}
D2_TIMES: Mapping[int, tuple[Time, Time, Time]] = {
    **{0: (K1, K3, K3), 1: (K1, K3, K3), 2: (S2, S2, K3), 3: (K1, K3, K3)},
    **{4: (S2, S2, K3), 5: (S2, S2, K3), 6: (S2, S2, K3), 7: (S2, S2, K3)},
}
D3_TIMES: Mapping[int, tuple[Time, Time, Time, Time]] = {
    **{0: (S2, S2, K3, S2), 1: (S2, S2, K3, S2), 2: (K1, K3, K3, S2), 3: (K1, K3, K3, K3)},
    **{4: (K1, K3, K3, K3), 5: (S2, S2, K3, K3), 6: (S2, S2, K3, K3), 7: (S2, S2, K3, K3)},
    **{8: (S2, S2, K3, K3), 9: (S2, S2, K3, K3), 10: (S2, S2, K3, K3), 11: (S2, S2, K3, K3)},
    **{12: (K1, K3, K3, K3)},
}


@dataclass
class PlainTinyHD:
    """The network over a state dict with the published names."""

    weights: Mapping[str, Tensor]
    channel_reduction: int
    decoders: Sequence[str]
    single: Sequence[bool]
    output_frames: int
    force_multi: bool = False
    d1_last: bool = False
    training: bool = False
    blocks: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of blocks and levels of the last clip, when :attr:`keep_blocks`."""
    keep_blocks: bool = False
    macs: int = 0
    """Multiply-accumulates of the convolutions of the last clip, padded taps among them."""

    def __call__(self, clip: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the fused map and each decoder's maps, all after the sigmoid."""
        self.macs = 0
        self.multi = self.force_multi or not all(self.single)
        levels = self._encode(clip)
        first = 0  # the number of the decoder's first block
        maps: dict[str, Tensor] = {}
        for name, single in zip(self.decoders, self.single, strict=True):
            column = 2 if not single else 1 if self.multi else 0
            decode, blocks = {
                "d1": (self._d1, 16),
                "d2": (self._d2, 8),
                "d3": (self._d3, 13),
            }[name]
            maps[name] = torch.sigmoid(decode(levels, first, column))
            first += blocks
        return self._fuse(maps), maps

    # layers

    def _conv(self, key: str, x: Tensor, time: Time, *, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.weights[f"{key}.weight"]
        pad = weight.shape[-1] // 2
        assert weight.shape[2] == time[0], key
        steps, pads = (time[1], stride, stride), (time[2], pad, pad)
        y = F.conv3d(x, weight, None, steps, pads, 1, groups)
        self.macs += y.numel() * weight[0].numel()
        return y

    def _norm(self, key: str, x: Tensor) -> Tensor:
        w = self.weights
        return F.batch_norm(
            x,
            w[f"{key}.running_mean"],
            w[f"{key}.running_var"],
            w[f"{key}.weight"],
            w[f"{key}.bias"],
            training=self.training,
        )

    def _block(self, key: str, x: Tensor, time: Time, *, stride: int = 1) -> Tensor:
        """Expansion, depthwise, projection; without expansion where there is no such key."""
        at = 0
        if f"{key}.3.weight" in self.weights:
            x = F.relu6(self._norm(f"{key}.0.1", self._conv(f"{key}.0.0", x, K1)))
            at = 1
        conv = self._conv(f"{key}.{at}.0", x, time, stride=stride, groups=x.shape[1])
        x = F.relu6(self._norm(f"{key}.{at}.1", conv))
        return self._norm(f"{key}.{at + 2}", self._conv(f"{key}.{at + 1}", x, K1))

    def _decoder_block(self, number: int, x: Tensor, time: Time) -> Tensor:
        x = self._block(f"aggregator.aggregate_adapter.{number}.conv", x, time)
        self._keep(f"agg_{number}", x)
        return x

    def _keep(self, name: str, x: Tensor) -> None:
        if self.keep_blocks:
            self.blocks[name] = x

    # encoder

    def _encode(self, clip: Tensor) -> list[Tensor]:
        key = "encoder.encoder"
        x = F.relu6(self._norm(f"{key}.0.1", self._conv(f"{key}.0.0", clip, S2, stride=2)))
        self._keep("enc_0", x)
        outs = []
        for number, (_, stride, time_s, time_m) in enumerate(ENCODER, 1):
            time = time_m if self.multi else time_s
            y = self._block(f"{key}.{number}.conv", x, time, stride=stride)
            x = x + y if number in RESIDUAL else y
            self._keep(f"enc_{number}", x)
            outs.append(x)
        x = F.relu6(self._norm(f"{key}.18.1", self._conv(f"{key}.18.0", x, K1)))
        self._keep("enc_18", x)
        outs.append(x)
        runs = ((1, 1), (2, 3), (4, 6), (7, 13), (14, 18))
        groups = [torch.cat(outs[a - 1 : b], 1) for a, b in runs]
        raised = [bilinear(g) if self.channel_reduction == 8 else shuffle(g) for g in groups[1:]]
        levels = [torch.cat([groups[0], raised[0]], 1), *raised[1:]]
        for number, level in enumerate(levels):
            self._keep(f"lvl_{number}", level)
        return levels

    # decoders; column 0 is pure S, 1 is S inside M, 2 is M

    def _d1(self, levels: list[Tensor], first: int, column: int) -> Tensor:
        def block(number: int, x: Tensor) -> Tensor:
            return self._decoder_block(first + number, x, D1_TIMES[number][column])

        def v(x: Tensor) -> Tensor:
            return linear_in_time(x) if column == 2 else x

        x0 = block(1, block(0, levels[0]))
        map0 = block(3, block(2, shuffle(v(x0))))
        x1 = block(5, shuffle(v(block(4, levels[1]))))
        map1 = block(7, block(6, shuffle(v(x1))))
        x2 = block(9, shuffle(v(block(8, levels[2]))))
        map2 = block(11, shuffle(v(block(10, shuffle(v(x2))))))
        x3 = v(levels[3])
        x3 = block(12, bilinear(x3) if self.channel_reduction == 4 else shuffle(x3))
        for number in (13, 14, 15):
            x3 = block(number, shuffle(v(x3)))
        return torch.cat([map0, map1, map2, x3], 1)

    def _d2(self, levels: list[Tensor], first: int, column: int) -> Tensor:
        def block(number: int, x: Tensor) -> Tensor:
            return self._decoder_block(first + number, x, D2_TIMES[number][column])

        def v(x: Tensor) -> Tensor:
            return linear_in_time(x) if column == 2 else x

        p3 = v(shuffle(block(0, levels[3]))) + levels[2]
        p2 = v(shuffle(block(1, p3))) + block(2, levels[1])
        lateral = block(4, levels[0])
        p1 = v(shuffle(block(3, p2))) + block(5, lateral)
        q = block(6, p1)
        q = shuffle(q) if self.channel_reduction == 1 else bilinear(q)
        if self.output_frames == 16:
            q = v(q)
        return block(7, q)

    def _d3(self, levels: list[Tensor], first: int, column: int) -> Tensor:
        if column == 2 and self.output_frames == 8:
            column = 3

        def block(number: int, x: Tensor) -> Tensor:
            return self._decoder_block(first + number, x, D3_TIMES[number][column])

        def v(x: Tensor) -> Tensor:
            return linear_in_time(x) if column >= 2 else x

        r = [shuffle(x) if self.channel_reduction == 1 else bilinear(x) for x in levels]
        if column == 2:
            r = [v(x) for x in r]
        a = [r[0]] + [r[i + 1] + block(i, levels[i]) for i in range(3)]
        b_up = [v(shuffle(block(3 + i, a[i + 1]))) for i in range(3)]
        b = [b_up[i] + block(6 + i, a[i]) for i in range(3)]
        c = [v(shuffle(b[i + 1])) + block(9 + i, b[i]) for i in range(2)]
        return block(12, v(shuffle(c[1])) + block(11, c[0]))

    def _fuse(self, maps: Mapping[str, Tensor]) -> Tensor:
        weight, bias = (
            self.weights["decoder.decoder.0.weight"],
            self.weights["decoder.decoder.0.bias"],
        )
        order = [*[n for n in maps if n != "d1"], "d1"] if self.d1_last else list(maps)
        if not self.multi:
            fused = torch.cat([maps[name].squeeze(2) for name in order], 1)
            y = F.conv2d(fused, weight, bias)
            self.macs += y.numel() * weight[0].numel()
            return torch.sigmoid(y)
        frames = self.output_frames
        stretched = [
            m.expand(-1, -1, frames, -1, -1) if m.shape[2] == 1 else m
            for m in (maps[name] for name in order)
        ]
        y = F.conv3d(torch.cat(stretched, 1), weight, bias)
        self.macs += y.numel() * weight[0].numel()
        return torch.sigmoid(y)


def shuffle(x: Tensor) -> Tensor:
    """Pixel shuffle of every frame."""
    n, c, t, h, w = x.shape
    frames = x.transpose(1, 2).reshape(n * t, c, h, w)
    return F.pixel_shuffle(frames, 2).reshape(n, t, c // 4, 2 * h, 2 * w).transpose(1, 2)


def bilinear(x: Tensor) -> Tensor:
    """Double height and width."""
    return F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear", align_corners=True)


def linear_in_time(x: Tensor) -> Tensor:
    """Double the frames."""
    return F.interpolate(x, scale_factor=(2, 1, 1), mode="trilinear", align_corners=True)
