"""TASED-Net: an encoder that keeps frames while it shrinks pictures, and a decoder that undoes it.

Min & Corso, "TASED-Net: Temporally-aggregating spatial encoder-decoder network for video saliency
detection", ICCV 2019; the updated model that was released. The encoder is S3D. What its pools find
the decoder puts back to where it was found, so that edges stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stores.frames import RESIZE_RULE, resize_frames
from stores.maps import MapLayout, MapSpec
from teachers.base import TeacherSpec, reflect, window_of
from teachers.network import NetworkTeacher
from teachers.s3d import NORM_EPS, NORM_MOMENTUM, Basic3d, Mixed, Sep3d
from teachers.shared import Conv3d, Features, through, whole

WINDOW: Final = 32
HEAD: Final = WINDOW - 1
"""The first frames of a video, which have no full window before them."""
STRIDE: Final = 32
"""Pixels of the input to one of the coarsest features."""
SALIENCY: Final = "map"
"""Name of the only map."""
NARROW: Final = 4
"""Channels at the end of the decoder."""

# Shapes: B windows, C channels, T frames, H height, W width.


class Switches(NamedTuple):
    """Where the encoder's pools found their maxima, from the finest level to the coarsest.

    Each is a flat position among the frames, rows and columns of what was pooled.
    """

    fine: Tensor
    """``(B, 192, 4, H / 8, W / 8)``, in 4 frames of H / 4 x W / 4"""
    middle: Tensor
    """``(B, 480, 4, H / 16, W / 16)``, in 4 frames of H / 8 x W / 8"""
    coarse: Tensor
    """``(B, 832, 4, H / 32, W / 32)``, in 4 frames of H / 16 x W / 16"""


class Tased(nn.Module):
    """Encoder and decoder, joined; names are the published ones.

    Shape:
        - clip: ``(B, 3, 32, H, W)``, H and W multiples of 32
        - returns: ``(B, H, W)``, the saliency map of the last frame
    """

    def __init__(self) -> None:
        super().__init__()
        self.base1 = nn.Sequential(
            Sep3d(3, 64, kernel=7, stride=2, padding=3),
            _halve_pictures(),
            Basic3d(64, 64),
            Sep3d(64, 192, kernel=3, stride=1, padding=1),
        )
        self.maxp2 = _halve_pictures()
        self.base2 = nn.Sequential(
            Mixed(192, 64, (96, 128), (16, 32), 32),  # 3b: 256 channels
            Mixed(256, 128, (128, 192), (32, 96), 64),  # 3c: 480
        )
        self.maxp3 = nn.MaxPool3d(3, 2, 1)
        self.base3 = nn.Sequential(
            Mixed(480, 192, (96, 208), (16, 48), 64),  # 4b: 512
            Mixed(512, 160, (112, 224), (24, 64), 64),  # 4c: 512
            Mixed(512, 128, (128, 256), (24, 64), 64),  # 4d: 512
            Mixed(512, 112, (144, 288), (32, 64), 64),  # 4e: 528
            Mixed(528, 256, (160, 320), (32, 128), 128),  # 4f: 832
        )
        self.maxt4 = nn.MaxPool3d((2, 1, 1))
        self.maxp4 = nn.MaxPool3d((1, 2, 2), return_indices=True)
        self.base4 = nn.Sequential(
            Mixed(832, 256, (160, 320), (32, 128), 128),  # 5b: 832
            Mixed(832, 384, (192, 384), (48, 128), 128),  # 5c: 1024
        )
        self.find_maxima = nn.Sequential(
            nn.MaxPool3d((4, 1, 1)),  # 16 frames to 4
            _halve_pictures(return_indices=True),
        )
        self.convtsp1 = nn.Sequential(
            *_with_norm(Conv3d(1024, 1024, 1, bias=False)),
            *_with_norm(_spread(1024, 832)),
        )
        self.convtsp2 = nn.Sequential(*_with_norm(_spread(832, 480)))
        self.convtsp3 = nn.Sequential(*_with_norm(_spread(480, 192)))
        self.convtsp4 = nn.Sequential(
            *_with_norm(_double_pictures(192, 64)),
            *_with_norm(_halve_frames(64)),
            *_with_norm(nn.ConvTranspose3d(64, NARROW, 1, bias=False)),
            *_with_norm(_halve_frames(NARROW)),
            _double_pictures(NARROW, NARROW),
            Conv3d(NARROW, 1, 1),
        )

    def forward(self, clip: Tensor) -> Tensor:
        return self.logits(clip).sigmoid().squeeze(1)

    def logits(self, clip: Features) -> Tensor:
        """Return the saliency map before its activation, ``(B, 1, H, W)``.

        Raises:
            ValueError: If the clip has not 32 frames or a size that cannot be halved five times.
        """
        frames, height, width = clip.shape[2:]
        if frames != WINDOW:
            raise ValueError(f"TASED-Net sees {WINDOW} frames at once, got {frames}")
        _check_size(height, width)
        return self.decode(*self.encode(clip))

    def encode(self, clip: Features) -> tuple[Tensor, Switches]:
        """Return features ``(B, 1024, 4, H / 32, W / 32)`` and where their maxima came from.

        The decoder has 4 frames throughout, so the two finer switches are those of features whose
        frames were brought to 4. The encoder itself goes on from all frames.
        """
        pool_frames, pool_pictures = self.find_maxima
        features = through(self.base1, clip)  # B 192 T/2 H/4 W/4
        _, fine = pool_pictures(whole(through(pool_frames, features)))
        features = through(self.base2, through(self.maxp2, features))  # B 480 T/2 H/8 W/8
        _, middle = pool_pictures(whole(through(pool_frames, features)))
        features = through(self.base3, through(self.maxp3, features))  # B 832 T/4 H/16 W/16
        coarsest, coarse = self.maxp4(whole(through(self.maxt4, features)))  # B 832 T/8 H/32 W/32
        return self.base4(coarsest), Switches(fine, middle, coarse)

    def decode(self, features: Tensor, switches: Switches) -> Tensor:
        """Read what :meth:`encode` gave as logits, ``(B, 1, H, W)``."""
        features = unpool(self.convtsp1(features), switches.coarse)  # B 832 4 H/16 W/16
        features = unpool(self.convtsp2(features), switches.middle)  # B 480 4 H/8 W/8
        features = unpool(self.convtsp3(features), switches.fine)  # B 192 4 H/4 W/4
        logits: Tensor = self.convtsp4(features)  # B 1 1 H W
        return logits.squeeze(2)


class TasedTeacher(NetworkTeacher):
    """TASED-Net, labelling the last frame of each window of 32.

    The first 31 frames of a video have no such window. They are labelled from the one that begins
    with them, turned around in time, so that the labelled frame comes last. The published program
    passes over videos of fewer than 63 frames. Here one that is too short for those windows goes on
    backwards after its last frame, then repeats its first one.

    Args:
        height: Rows of the input, in pixels; a multiple of 32.
        width: Columns of the input.
        options: As of :class:`teachers.network.NetworkTeacher`.

    Raises:
        ValueError: If the size is not a multiple of 32.
    """

    title = "TASED-Net"
    shares_windows = True
    network: Tased

    def __init__(
        self,
        *,
        height: int = 224,
        width: int = 384,
        **options: Any,  # noqa: ANN401 - device, precision, weights
    ) -> None:
        _check_size(height, width)
        self._size = (height, width)
        super().__init__(**options)

    def build_network(self) -> Tased:
        return Tased()

    def make_spec(self) -> TeacherSpec:
        return TeacherSpec(
            name="tased",
            paper="Min & Corso, TASED-Net: Temporally-Aggregating Spatial Encoder-Decoder Network "
            "for Video Saliency Detection, ICCV 2019",
            licence="see the weights' publisher",
            adapter_version=1,
            normalisation="(2 * RGB - 255) / 255",
            resize_rule=RESIZE_RULE,
            window=WINDOW,
            head_policy="time_reversed",
            layout=_layout(*self._size),
            batch=8,
        )

    def resize(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Squash a decoded frame without antialiasing, as the published program does."""
        resized = resize_frames(frame[None], *self._size)
        return resized.reshape(resized.shape[1:])

    def normalise(self, frames: Tensor) -> Tensor:
        return 2 * frames - 1

    def window(self, frame: int, num_frames: int) -> Sequence[int]:
        if frame >= HEAD:
            return window_of(frame, length=WINDOW)
        return [reflect(index, num_frames) for index in reversed(range(frame, frame + WINDOW))]

    def logits(self, windows: Features) -> dict[str, Tensor]:
        (array,) = self.spec.layout.arrays
        return {array: self.network.logits(windows)}

    @torch.no_grad()
    def predict(self, windows: Tensor) -> dict[str, Tensor]:
        """Return the saliency maps of whole windows, activated.

        Args:
            windows: ``(B, 3, 32, H, W)``, prepared, the frame to label last.

        Returns:
            ``map``, ``(B, H, W)`` float32.

        Raises:
            ValueError: If the windows have not 32 frames or a size that is no multiple of 32.
        """
        with self._arithmetic():
            saliency = self.network(self.lay_out(windows))
        return {SALIENCY: saliency.float()}


def unpool(features: Tensor, switches: Tensor) -> Tensor:
    """Put features back to where a pool that halved height and width found them.

    Windows of the pool may overlap, so several features may belong to one position. The last of
    them stays, in the order of frames, rows and columns. PyTorch's own unpooling keeps any of them
    on a GPU; here it is the same one everywhere.

    Shape:
        - features, switches: ``(B, C, T, h, w)``
        - returns: ``(B, C, T, 2 * h, 2 * w)``, zero where nothing belongs
    """
    *_, height, width = features.shape
    values, positions = features.flatten(2), switches.flatten(2)
    nobody = positions.new_full((*positions.shape[:2], 4 * positions.shape[2]), -1)
    ranks = torch.arange(positions.shape[2], device=positions.device).expand_as(positions)
    last = nobody.scatter_reduce_(2, positions, ranks, "amax")  # a maximum knows no order
    placed = values.gather(2, last.clamp(min=0)).masked_fill_(last < 0, 0)
    return placed.view(*features.shape[:3], 2 * height, 2 * width)


def _layout(height: int, width: int) -> MapLayout:
    saliency = MapSpec(
        name=SALIENCY, height=height, width=width, activation="sigmoid", order="activate_first"
    )
    return MapLayout(height=height, width=width, maps=(saliency,), saliency=SALIENCY)


def _with_norm(convolution: nn.Conv3d | nn.ConvTranspose3d) -> tuple[nn.Module, ...]:
    norm = nn.BatchNorm3d(convolution.out_channels, NORM_EPS, NORM_MOMENTUM)
    return convolution, norm, nn.ReLU()


def _spread(in_channels: int, out_channels: int) -> nn.ConvTranspose3d:
    return nn.ConvTranspose3d(in_channels, out_channels, (1, 3, 3), 1, (0, 1, 1), bias=False)


def _double_pictures(in_channels: int, out_channels: int) -> nn.ConvTranspose3d:
    kernel, stride, padding = (1, 4, 4), (1, 2, 2), (0, 1, 1)
    return nn.ConvTranspose3d(in_channels, out_channels, kernel, stride, padding, bias=False)


def _halve_frames(channels: int) -> nn.Conv3d:
    return Conv3d(channels, channels, (2, 1, 1), (2, 1, 1), bias=False)


def _halve_pictures(*, return_indices: bool = False) -> nn.MaxPool3d:
    return nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1), return_indices=return_indices)


def _check_size(height: int, width: int) -> None:
    if height < STRIDE or width < STRIDE or height % STRIDE or width % STRIDE:
        raise ValueError(f"TASED-Net needs a size in multiples of {STRIDE}, got {height}x{width}")
