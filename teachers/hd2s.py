"""HD2S: a network with one decoder for each feature level of S3D, and TinyHD's first teacher.

Bellitto et al., "Hierarchical domain-adapted feature learning for video saliency prediction", IJCV
2021; the base model, without domain adaptation. Each decoder makes a map of its own, and the
saliency map is a weighted sum of the four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stores.maps import DerivedMap, MapLayout, MapSpec
from teachers.base import TeacherSpec, reflect, window_of
from teachers.network import NetworkTeacher
from teachers.s3d import NORM_EPS, NORM_MOMENTUM, Basic3d, S3d, S3dLevels
from teachers.shared import Features

HeadMode = Literal["time_reversed", "released"]

WINDOW: Final = 16
HEAD: Final = WINDOW - 1
"""The first frames of a video, which have no full window before them."""
STRIDE: Final = 32
"""Pixels of the input to one of the coarsest level."""
MAPS: Final = ("sal2", "sal3", "sal4", "sal5")
"""Hierarchical maps, the one of the finest level first."""

# Shapes: B windows, C channels, T frames, H height, W width.


class Hd2sMaps(NamedTuple):
    """Activated maps at the size of the input, each ``(B, H, W)``."""

    sal2: Tensor
    sal3: Tensor
    sal4: Tensor
    sal5: Tensor
    out: Tensor
    """The saliency map."""


class Basic2d(nn.Module):
    """A 3x3 convolution, its norm and a ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, NORM_EPS, NORM_MOMENTUM)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(features)))


class DwSep2d(nn.Module):
    """A 3x3 convolution within channels and a 1x1 one across, each with its norm and a ReLU.

    The norms have PyTorch's own constants, unlike all others of the network.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_s = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn_s = nn.BatchNorm2d(channels)
        self.conv_t = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn_t = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        features = F.relu(self.bn_s(self.conv_s(features)))
        return F.relu(self.bn_t(self.conv_t(features)))


class Decoder(nn.Module):
    """Read one feature level as a map, at half of the input's height and width.

    The published decoder doubles the last stage's three channels before it joins them. Doubling
    and joining commute, so the doubling is left to whoever wants the map at full size.

    Args:
        level: Number of the feature level; part of the layers' names.
        in_channels: Channels of the level.
        stages: Of each stage, its channels and its depthwise blocks; between two, height and width
            are doubled.

    Shape:
        - features: ``(B, in_channels, h, w)``
        - returns: ``(B, 1, h * 2**(stages - 1), w * 2**(stages - 1))``, logits
    """

    def __init__(self, level: int, in_channels: int, stages: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.stage_names = [f"deconvlayer{level}_{left}" for left in range(len(stages), 0, -1)]
        self.head_name = f"last_conv{level}"
        channels = in_channels
        for name, (out_channels, num_blocks) in zip(self.stage_names, stages, strict=True):
            blocks = [DwSep2d(out_channels) for _ in range(num_blocks)]
            self.add_module(name, nn.Sequential(Basic2d(channels, out_channels), *blocks))
            channels = out_channels
        self.add_module(self.head_name, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        for index, name in enumerate(self.stage_names):
            if index:
                features = double(features)
            features = self.get_submodule(name)(features)
        logits: Tensor = self.get_submodule(self.head_name)(features)
        return logits


class Hd2s(nn.Module):
    """Backbone, temporal reductions, decoders and fusion, joined; names are the published ones.

    Shape:
        - clip: ``(B, 3, 16, H, W)``, H and W multiples of 32
        - returns: the maps of the last frame
    """

    def __init__(self) -> None:
        super().__init__()
        self.featureExtractor = S3d()
        self.conv_t5 = _halve_frames(1024)
        self.decoder5 = Decoder(5, 1024, [(512, 2), (256, 2), (128, 1), (64, 1), (3, 1)])
        self.conv_t4 = _halve_frames(832)
        self.decoder4 = Decoder(4, 832, [(512, 2), (256, 2), (128, 1), (64, 1), (3, 1)])
        self.conv_t3_1 = _halve_frames(480)
        self.conv_t3_2 = _halve_frames(480)
        self.decoder3 = Decoder(3, 480, [(256, 1), (128, 1), (64, 1), (3, 1)])
        self.conv_t2_1 = _halve_frames(192)
        self.conv_t2_2 = _halve_frames(192)
        self.conv_t2_3 = _halve_frames(192)
        self.decoder2 = Decoder(2, 192, [(128, 1), (64, 1), (3, 1)])
        self.last_conv = nn.Conv2d(4, 1, 1)

    def forward(self, clip: Tensor) -> Hd2sMaps:
        return self.compose(self.logits(clip))

    def logits(self, clip: Features) -> Tensor:
        """Return the planes that decide all maps, sal2 first, ``(B, 4, H / 2, W / 2)``.

        Raises:
            ValueError: If the clip has not 16 frames or a size that cannot be halved five times.
        """
        frames, height, width = clip.shape[2:]
        if frames != WINDOW:
            raise ValueError(f"HD2S sees {WINDOW} frames at once, got {frames}")
        _check_size(height, width)
        return self.decode(*self.reduce(self.featureExtractor(clip)))

    def reduce(self, levels: S3dLevels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bring levels 2 to 5 to a single frame, each ``(B, C, 1, h, w)``."""
        return (
            self.conv_t2_3(self.conv_t2_2(self.conv_t2_1(levels.f2))),  # 8, 4, 2, 1 frames
            self.conv_t3_2(self.conv_t3_1(levels.f3)),
            self.conv_t4(levels.f4),
            self.conv_t5(levels.f5),
        )

    def decode(self, r2: Tensor, r3: Tensor, r4: Tensor, r5: Tensor) -> Tensor:
        """Read each reduced level as a plane of logits, ``(B, 4, H / 2, W / 2)``."""
        planes = [
            self.decoder2(r2.squeeze(2)),
            self.decoder3(r3.squeeze(2)),
            self.decoder4(r4.squeeze(2)),
            self.decoder5(r5.squeeze(2)),
        ]
        return torch.cat(planes, 1)

    def compose(self, planes: Tensor) -> Hd2sMaps:
        """Make maps of the planes of :meth:`logits`."""
        maps = double(planes).sigmoid()  # B 4 H W
        saliency = self.last_conv(maps.flip(1)).sigmoid()  # the coarsest map comes first
        return Hd2sMaps(*torch.cat([maps, saliency], 1).unbind(1))


class Hd2sTeacher(NetworkTeacher):
    """HD2S, labelling the last frame of each window of 16.

    The first 15 frames of a video have no such window. They are labelled from the one that begins
    with them: turned around in time, so that the labelled frame comes last, or as the published
    program does it, which turns the colours around instead and leaves time as it is. A video of
    fewer than 31 frames goes on backwards after its last frame, then repeats its first one.

    Args:
        height: Rows of the input, in pixels; a multiple of 32.
        width: Columns of the input.
        head_mode: How the first 15 frames are labelled.
        options: As of :class:`teachers.network.NetworkTeacher`.

    Raises:
        ValueError: If the size is not a multiple of 32 or there is no such ``head_mode``.
    """

    title = "HD2S"
    shares_windows = True
    network: Hd2s

    def __init__(
        self,
        *,
        height: int = 192,
        width: int = 256,
        head_mode: HeadMode = "time_reversed",
        **options: Any,  # noqa: ANN401 - device, precision, weights
    ) -> None:
        _check_size(height, width)
        if head_mode not in get_args(HeadMode):
            raise ValueError(f"head_mode must be one of {get_args(HeadMode)}, got {head_mode!r}")
        self._size, self._head_mode = (height, width), head_mode
        super().__init__(**options)

    def build_network(self) -> Hd2s:
        return Hd2s()

    def initialise(self, network: nn.Module) -> None:
        super().initialise(network)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.num_features <= 3:
                nn.init.ones_(module.bias)  # so few channels could all be cut off by the ReLU

    def make_spec(self) -> TeacherSpec:
        return TeacherSpec(
            name="hd2s",
            paper="Bellitto et al., Hierarchical Domain-Adapted Feature Learning for Video "
            "Saliency Prediction, IJCV 2021",
            licence="CC BY-NC 4.0 (published weights)",
            adapter_version=1,
            normalisation="(2 * RGB - 255) / 255",
            resize_rule="bilinear, antialiased, aspect not kept, rounded to uint8",
            window=WINDOW,
            head_policy=self._head_mode,
            layout=_layout(*self._size, self.network.last_conv),
            batch=8,
        )

    def normalise(self, frames: Tensor) -> Tensor:
        return 2 * frames - 1

    def window(self, frame: int, num_frames: int) -> Sequence[int]:
        if frame >= HEAD:
            return window_of(frame, length=WINDOW)
        window = [reflect(index, num_frames) for index in range(frame, frame + WINDOW)]
        return window[::-1] if self.spec.head_policy == "time_reversed" else window

    def label_span(
        self, frames: Tensor, *, first: int, span: range, num_frames: int
    ) -> Mapping[str, Tensor]:
        """Label a span; released, the colours of the first frames' windows are turned around."""
        if self.spec.head_policy != "released" or span.start >= HEAD:
            return super().label_span(frames, first=first, span=span, num_frames=num_frames)
        indices = torch.tensor([self.window(frame, num_frames) for frame in span])
        windows = frames[indices - first].transpose(1, 2)  # B 3 T H W
        is_head = torch.tensor([frame < HEAD for frame in span], device=windows.device)
        windows[is_head] = windows[is_head].flip(1)
        return self.logits(self.lay_out(windows))

    def logits(self, windows: Features) -> dict[str, Tensor]:
        (array,) = self.spec.layout.arrays
        return {array: self.network.logits(windows)}

    @torch.no_grad()
    def predict(self, windows: Tensor) -> dict[str, Tensor]:
        """Return all maps of whole windows, activated, at the size of the input.

        Args:
            windows: ``(B, 3, 16, H, W)``, prepared, the frame to label last.

        Returns:
            ``sal2`` to ``sal5`` and ``out``, each ``(B, H, W)`` float32.

        Raises:
            ValueError: If the windows have not 16 frames or a size that is no multiple of 32.
        """
        with self._arithmetic():
            maps: Hd2sMaps = self.network(self.lay_out(windows))
        return {name: values.float() for name, values in maps._asdict().items()}


def double(features: Tensor) -> Tensor:
    """Double height and width bilinearly, with half-pixel centres."""
    return F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)


def _layout(height: int, width: int, fusion: nn.Conv2d) -> MapLayout:
    maps = tuple(
        MapSpec(
            name=name,
            height=height // 2,
            width=width // 2,
            activation="sigmoid",
            order="resize_first",
        )
        for name in MAPS
    )
    weight, bias = fusion.parameters()
    saliency = DerivedMap(
        name="out",
        terms=tuple(zip(reversed(MAPS), weight.flatten().tolist(), strict=True)),
        bias=bias.item(),
        activation="sigmoid",
    )
    return MapLayout(
        height=height,
        width=width,
        maps=maps,
        derived=(saliency,),
        saliency="out",
        hierarchical=MAPS,
    )


def _halve_frames(channels: int) -> Basic3d:
    return Basic3d(channels, channels, kernel=(3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))


def _check_size(height: int, width: int) -> None:
    if height < STRIDE or width < STRIDE or height % STRIDE or width % STRIDE:
        raise ValueError(f"HD2S needs a size in multiples of {STRIDE}, got {height}x{width}")
