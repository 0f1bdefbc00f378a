"""ViNet: S3D and a decoder that lays the feature levels behind each other in time.

Jain et al., "ViNet: Pushing the limits of visual modality for audio-visual saliency prediction",
IROS 2021; the network that sees no sound, for clips of 32 frames, with all three skips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stores.maps import MapLayout, MapSpec
from teachers.base import TeacherSpec, normalise_as_imagenet
from teachers.network import NetworkTeacher
from teachers.s3d import S3d
from teachers.shared import Conv3d, Features, Sharing, through, whole

WINDOW: Final = 32
HEAD: Final = WINDOW - 1
"""The first frames of a video, which have no full window before them."""

# Shapes: B windows, C channels, T frames, H height, W width.


class Levels(NamedTuple):
    """What S3D sees in a clip ``(B, 3, T, H, W)``, from the coarsest level to the finest.

    Each is taken before the pooling that leads to the next one.
    """

    y0: Tensor
    """``(B, 1024, T / 8, H / 32, W / 32)``"""
    y1: Tensor
    """``(B, 832, T / 4, H / 16, W / 16)``"""
    y2: Tensor
    """``(B, 480, T / 2, H / 8, W / 8)``"""
    y3: Tensor
    """``(B, 192, T / 2, H / 4, W / 4)``"""


class Backbone(Sharing):
    """S3D, cut before its pools instead of behind them.

    Shape:
        - clip: ``(B, 3, T, H, W)``, T a multiple of 8, H and W multiples of 32
        - returns: four feature levels
    """

    def __init__(self) -> None:
        super().__init__()
        s3d = S3d()
        self.base1 = nn.Sequential(*s3d.block1, *list(s3d.block2)[:-1])
        self.maxp2 = s3d.block2[-1]
        self.base2 = s3d.block3[:-1]
        self.maxp3 = s3d.block3[-1]
        self.base3 = s3d.block4[:-1]
        self.maxp4 = s3d.block4[-1]
        self.base4 = s3d.block5

    def forward(self, clip: Features) -> Levels:
        y3 = through(self.base1, clip)
        y2 = through(self.base2, through(self.maxp2, y3))
        y1 = through(self.base3, through(self.maxp3, y2))
        y0 = through(self.base4, through(self.maxp4, y1))
        return Levels(whole(y0), whole(y1), whole(y2), whole(y3))


class Double(nn.Module):
    """Double height and width bilinearly, frame by frame.

    Args:
        align_corners: Whether the corners' centres stay where they are; if not, the borders do.

    Shape:
        - features: ``(B, C, T, h, w)``
        - returns: ``(B, C, T, 2 * h, 2 * w)``
    """

    def __init__(self, *, align_corners: bool = False) -> None:
        super().__init__()
        self.align_corners = align_corners

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        return stretch(features, 2 * height, 2 * width, align_corners=self.align_corners)


class Decoder(nn.Module):
    """Read the feature levels as one map.

    Each level is laid behind the decoded features in time; what comes next takes as many frames at
    once as there were before, so that four are left.

    Args:
        groups: Of the channels, in each of the five convolutions that look at neighbourhoods.
        align_corners: How height and width are doubled; see :class:`Double`.

    Shape:
        - levels: those of a clip of 32 frames
        - returns: ``(B, 1, H, W)``, logits
    """

    def __init__(
        self,
        *,
        groups: tuple[int, int, int, int, int] = (1, 1, 1, 1, 1),
        align_corners: bool = False,
    ) -> None:
        super().__init__()

        def stage(in_channels: int, out_channels: int, frames: int, groups: int) -> list[nn.Module]:
            convolution = Conv3d(
                in_channels,
                out_channels,
                (frames, 3, 3),
                (frames, 1, 1),
                (0, 1, 1),
                groups=groups,
                bias=False,
            )
            return [convolution, nn.ReLU(), Double(align_corners=align_corners)]

        self.convtsp1 = nn.Sequential(*stage(1024, 832, 1, groups[0]))
        self.convtsp2 = nn.Sequential(*stage(832, 480, 3, groups[1]))
        self.convtsp3 = nn.Sequential(*stage(480, 192, 5, groups[2]))
        self.convtsp4 = nn.Sequential(
            *stage(192, 64, 5, groups[3]),
            *stage(64, 32, 2, groups[4]),
            Conv3d(32, 32, (2, 1, 1), (2, 1, 1), bias=False),
            nn.ReLU(),
            Conv3d(32, 1, 1),
        )

    def forward(self, levels: Levels) -> Tensor:
        z1 = self.convtsp1(levels.y0)  # B 832 4 H/16 W/16
        z2 = self.convtsp2(torch.cat([z1, levels.y1], 2))  # of 4 + 8 frames, B 480 4 H/8 W/8
        z3 = self.convtsp3(torch.cat([z2, levels.y2], 2))  # of 4 + 16 frames, B 192 4 H/4 W/4
        logits: Tensor = self.convtsp4(torch.cat([z3, levels.y3], 2))  # B 1 1 H W
        return logits.squeeze(2)


class Vinet(nn.Module):
    """Backbone and decoder, joined; names are the published ones.

    Args:
        decoder: That of ViNet if not given.

    Shape:
        - clip: ``(B, 3, 32, H, W)``, H and W multiples of 32
        - returns: the last frame's map, ``(B, 1, H, W)``, logits
    """

    def __init__(self, decoder: Decoder | None = None) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.decoder = decoder or Decoder()

    def forward(self, clip: Features) -> Tensor:
        logits: Tensor = self.decoder(self.backbone(clip))
        return logits


class MapTeacher(NetworkTeacher):
    """A teacher whose network reads a window as one map, at the size of its input.

    The map's last layers are not linear and follow the last doubling, so no smaller plane decides
    it.

    Args:
        height: Rows of the input, in pixels.
        width: Columns of the input.
        options: As of :class:`teachers.network.NetworkTeacher`.

    Raises:
        ValueError: If height or width is not a multiple of ``stride``.
    """

    stride: ClassVar[int]
    """What height and width must be multiples of."""

    def __init__(
        self,
        *,
        height: int,
        width: int,
        **options: Any,  # noqa: ANN401 - device, precision, weights
    ) -> None:
        self._check_size(height, width)
        self._size = height, width
        super().__init__(**options)

    def make_layout(self) -> MapLayout:
        """Return the layout of the spec."""
        height, width = self._size
        saliency = MapSpec(
            name="map",
            height=height,
            width=width,
            activation="sigmoid",
            order="activate_first",
        )
        return MapLayout(height=height, width=width, maps=(saliency,), saliency="map")

    def logits(self, windows: Features) -> dict[str, Tensor]:
        """Run the network on whole windows; see :meth:`teachers.base.Teacher.logits`.

        Raises:
            ValueError: If the windows have another length or a size that does not fit the network.
        """
        frames, height, width = windows.shape[2:]
        if frames != self.spec.window:
            raise ValueError(f"{self.title} sees {self.spec.window} frames at once, got {frames}")
        self._check_size(height, width)
        (array,) = self.spec.layout.arrays
        return {array: self.network(windows)}

    @torch.no_grad()
    def predict(self, windows: Tensor) -> dict[str, Tensor]:
        """Return the map of whole windows, activated.

        Args:
            windows: ``(B, 3, T, H, W)``, prepared.

        Returns:
            ``map``, ``(B, H, W)`` float32.

        Raises:
            ValueError: If the windows have another length or a size that does not fit the network.
        """
        with self._arithmetic():
            (planes,) = self.logits(self.lay_out(windows)).values()
        return {"map": planes.squeeze(1).float().sigmoid()}

    def _check_size(self, height: int, width: int) -> None:
        if height < 1 or width < 1 or height % self.stride or width % self.stride:
            raise ValueError(
                f"{self.title} needs a size in multiples of {self.stride}, got {height}x{width}"
            )


class VinetTeacher(MapTeacher):
    """ViNet, labelling the last frame of each window of 32.

    The first 31 frames of a video have no such window. They are labelled from the one that begins
    with them, turned around in time; those near the end of a video that is too short for it, with
    copies of frame 0 before the video.

    Args:
        height: Rows of the input, in pixels; a multiple of 32.
        width: Columns of the input.
        options: As of :class:`teachers.network.NetworkTeacher`.

    Raises:
        ValueError: If the size is not a multiple of 32.
    """

    title = "ViNet"
    shares_windows = True
    stride = 32
    network: Vinet

    def __init__(
        self,
        *,
        height: int = 224,
        width: int = 384,
        **options: Any,  # noqa: ANN401 - device, precision, weights
    ) -> None:
        super().__init__(height=height, width=width, **options)

    def build_network(self) -> Vinet:
        return Vinet()

    def make_spec(self) -> TeacherSpec:
        return TeacherSpec(
            name="vinet",
            paper="Jain et al., ViNet: Pushing the Limits of Visual Modality for Audio-Visual "
            "Saliency Prediction, IROS 2021",
            licence="see the weights' publisher",
            adapter_version=1,
            normalisation="RGB / 255, centred and scaled as ImageNet networks want it",
            resize_rule="bilinear, antialiased, aspect not kept, rounded to uint8",
            window=WINDOW,
            head_policy="time_reversed",
            layout=self.make_layout(),
            batch=4,
        )

    def normalise(self, frames: Tensor) -> Tensor:
        return normalise_as_imagenet(frames)

    def window(self, frame: int, num_frames: int) -> Sequence[int]:
        if frame < min(HEAD, num_frames - WINDOW):
            return range(frame + HEAD, frame - 1, -1)
        return super().window(frame, num_frames)


def stretch(features: Tensor, height: int, width: int, *, align_corners: bool = False) -> Tensor:
    """Resize all frames of features ``(B, C, T, h, w)`` bilinearly."""
    batch, _, frames, _, _ = features.shape
    pictures = features.transpose(1, 2).flatten(0, 1)  # B*T C h w, a view if channels come last
    size = height, width
    stretched = F.interpolate(pictures, size, mode="bilinear", align_corners=align_corners)
    return stretched.reshape(batch, frames, *stretched.shape[1:]).transpose(1, 2)
