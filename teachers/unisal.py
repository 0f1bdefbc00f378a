"""UNISAL: one small recurrent network for the saliency of videos and of pictures.

Droste et al., "Unified image and video saliency modeling", ECCV 2020. A MobileNetV2 sees each frame
by itself, a recurrent unit remembers what came before, and a decoder makes the map. The network
learned from four data sets, its domains, and keeps for each of them some norms, the priors of where
people look, and the last layers. What acts in training only is left out: dropout, the momenta of
the norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from stores.codec import LOG_DENSITY_FLOOR
from stores.maps import MapLayout, MapSpec
from teachers.base import TeacherSpec, normalise_as_imagenet
from teachers.network import NetworkTeacher
from teachers.shared import Features, whole

Domain = Literal["DHF1K", "Hollywood", "UCFSports", "SALICON"]


class Protocol(NamedTuple):
    """How the published program shows the frames of a domain to the network."""

    height: int
    width: int
    frame_stride: int
    """Frames from one of a recurrent sequence to its next, 6 of them a second; 1 for pictures."""


PROTOCOLS: Final[Mapping[Domain, Protocol]] = {
    "DHF1K": Protocol(224, 384, 5),
    "Hollywood": Protocol(224, 416, 4),
    "UCFSports": Protocol(256, 384, 4),
    "SALICON": Protocol(288, 384, 1),
}
PICTURES: Final = "SALICON"
"""The domain whose maps remember no other frames."""

STRIDE: Final = 32
"""Pixels of the input to one of the coarsest level."""
HIDDEN: Final = 256
"""Channels of the bottleneck and of the recurrent state."""
PRIORS: Final = 16
ENCODER: Final = (
    (1, 16, (1,)),
    (6, 24, (2, 1)),
    (6, 32, (2, 1, 1)),
    (6, 64, (2, 1, 1, 1)),
    (6, 96, (1, 1, 1)),
    (6, 160, (2, 1, 1)),
    (6, 320, (1,)),
)
"""Of MobileNetV2's stages: expansion, channels, and of each block the stride."""
TAP_4X, TAP_2X = 7, 14
"""Blocks whose features are handed on before every second row and column is dropped."""
SMOOTHING: Final = 41
"""Rows and columns of the kernel that smooths the map."""
ENLARGEMENT: Final = 8
"""Pixels of the map to one of the decoder's."""

Norm = Callable[[int], nn.Module]

# Shapes: B sequences, T frames, N = B * T frames, C channels, H height, W width of the input.


class DomainNorm(nn.ModuleDict):
    """A batch norm for each domain."""

    def __init__(self, channels: int) -> None:
        super().__init__({f"bn_{domain}": nn.BatchNorm2d(channels) for domain in PROTOCOLS})

    def forward(self, features: Tensor, domain: Domain) -> Tensor:
        normed: Tensor = self[f"bn_{domain}"](features)
        return normed


class Layers(nn.ModuleList):
    """Layers one after the other; the domain's norms among them are told the domain."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(layers)

    def forward(self, features: Tensor, domain: Domain) -> Tensor:
        for layer in self:
            features = layer(features, domain) if isinstance(layer, DomainNorm) else layer(features)
        return features


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, look at neighbourhoods within channels, narrow.

    Args:
        in_channels: Channels of the features.
        out_channels: Channels of the result.
        expansion: How much wider the block is inside than its input.
        stride: Steps of the look at neighbourhoods.
        norm: What makes a norm.
        is_residual: Whether the features are added to the result.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        stride: int = 1,
        norm: Norm = nn.BatchNorm2d,
        is_residual: bool = False,
    ) -> None:
        super().__init__()
        self.is_residual = is_residual
        width = in_channels * expansion
        widen = [_pointwise(in_channels, width), norm(width), nn.ReLU6()] if expansion > 1 else []
        self.conv = Layers(
            *widen,
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            norm(width),
            nn.ReLU6(),
            _pointwise(width, out_channels),
            norm(out_channels),
        )

    def forward(self, features: Tensor, domain: Domain) -> Tensor:
        result: Tensor = self.conv(features, domain)
        return features + result if self.is_residual else result


class MobileNetLevels(NamedTuple):
    """What MobileNetV2 sees in frames ``(N, 3, H, W)``, from the finest level to the coarsest."""

    x4: Tensor
    """``(N, 64, H / 8, W / 8)``"""
    x2: Tensor
    """``(N, 160, H / 16, W / 16)``"""
    x1: Tensor
    """``(N, 1280, H / 32, W / 32)``"""


class MobileNetV2(nn.Module):
    """The encoder, the same for all domains (Sandler et al., CVPR 2018).

    The two blocks that are tapped leave their stride to the end: the taps have twice the height
    and width of what goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        blocks: list[nn.Module] = [nn.Sequential(first, nn.BatchNorm2d(32), nn.ReLU6())]
        channels = 32
        for expansion, out_channels, strides in ENCODER:
            for stride in strides:
                blocks.append(
                    InvertedResidual(
                        channels,
                        out_channels,
                        expansion=expansion,
                        stride=1 if len(blocks) in (TAP_4X, TAP_2X) else stride,
                        is_residual=stride == 1 and channels == out_channels,
                    )
                )
                channels = out_channels
        last = _pointwise(channels, 1280)
        self.features = nn.ModuleList(
            [*blocks, nn.Sequential(last, nn.BatchNorm2d(1280), nn.ReLU6())]
        )

    def forward(self, frames: Tensor, domain: Domain) -> MobileNetLevels:
        first, *blocks, last = self.features
        features: Tensor = first(frames)
        taps = {}
        for index, block in enumerate(blocks, 1):
            features = block(features, domain)
            if index in (TAP_4X, TAP_2X):
                taps[index] = features
                features = features[..., ::2, ::2]
        return MobileNetLevels(x4=taps[TAP_4X], x2=taps[TAP_2X], x1=last(features))


class Skip(nn.Module):
    """Bring a feature level past the bottleneck to the decoder, with fewer channels.

    Args:
        in_channels: Channels of the level.
        out_channels: Channels of the result.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        width = 2 * in_channels
        self.expansion = Layers(_pointwise(in_channels, width), DomainNorm(width), nn.ReLU6())
        self.reduction = Layers(nn.Conv2d(width, out_channels, 1), DomainNorm(out_channels))

    def forward(self, features: Tensor, domain: Domain) -> Tensor:
        reduced: Tensor = self.reduction(self.expansion(features, domain), domain)
        return reduced


class SeparableConv(nn.Module):
    """A 3x3 convolution within channels, a norm and a ReLU6, and a 1x1 convolution across."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.sep_bn = DomainNorm(channels)
        self.conv_sep = _pointwise(channels, channels)

    def forward(self, features: Tensor, domain: Domain) -> Tensor:
        within = F.relu6(self.sep_bn(self.conv_dw(features), domain))
        across: Tensor = self.conv_sep(within)
        return across


class GruCell(nn.Module):
    """A gated recurrent unit of separable convolutions.

    Unlike in PyTorch's own unit, the update gate is the share of the new value in the state, and
    the reset gate acts after the state's convolution.

    Args:
        channels: Of the features and of the state.
    """

    drop_mask_1: Tensor
    """Kept for its name alone: the published weights hold the dropout mask of their last use."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.b_r, self.b_z, self.b_h = (_constants(channels, 0.0) for _ in range(3))
        self.a_r_x, self.a_r_h = (_constants(channels, 1.0) for _ in range(2))
        self.a_z_x, self.a_z_h = (_constants(channels, 1.0) for _ in range(2))
        self.a_h_x, self.a_h_h = (_constants(channels, 1.0) for _ in range(2))
        self.register_buffer("drop_mask_1", torch.zeros(3, channels))
        self.norm_r_x, self.norm_r_h = DomainNorm(channels), DomainNorm(channels)
        self.norm_z_x, self.norm_z_h = DomainNorm(channels), DomainNorm(channels)
        self.norm_out_x, self.norm_out_h = DomainNorm(channels), DomainNorm(channels)
        self.w_r, self.u_r = SeparableConv(channels), SeparableConv(channels)
        self.w_z, self.u_z = SeparableConv(channels), SeparableConv(channels)
        self.w, self.u = SeparableConv(channels), SeparableConv(channels)

    def look(self, features: Tensor, domain: Domain) -> tuple[Tensor, Tensor, Tensor]:
        """Return what frames say to the reset gate, the update gate and the new value."""
        return (
            self.a_r_x * self.norm_r_x(self.w_r(features, domain), domain),
            self.a_z_x * self.norm_z_x(self.w_z(features, domain), domain),
            self.a_h_x * self.norm_out_x(self.w(features, domain), domain),
        )

    def remember(self, state: Tensor, domain: Domain) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the state says to the same three."""
        return (
            self.a_r_h * self.norm_r_h(self.u_r(state, domain), domain),
            self.a_z_h * self.norm_z_h(self.u_z(state, domain), domain),
            self.a_h_h * self.norm_out_h(self.u(state, domain), domain),
        )

    def forward(self, sequences: Tensor, state: Tensor, domain: Domain) -> Tensor:
        """Return the state after each frame of sequences, in their shape, ``(B, T, C, h, w)``."""
        said = [part.view_as(sequences) for part in self.look(sequences.flatten(0, 1), domain)]
        states = []
        for r_x, z_x, h_x in zip(*(part.unbind(1) for part in said), strict=True):
            r_h, z_h, h_h = self.remember(state, domain)
            reset = torch.sigmoid(r_x + r_h + self.b_r)
            update = torch.sigmoid(z_x + z_h + self.b_z)
            new = torch.tanh(h_x + reset * h_h + self.b_h)
            state = (1 - update) * state + update * new
            states.append(state)
        return torch.stack(states, 1)


class ConvGru(nn.Module):
    """The recurrence: one cell, led through sequences."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cell_list = nn.ModuleList([GruCell(channels)])

    def forward(
        self, sequences: Tensor, hidden: Sequence[Tensor] | None, domain: Domain
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the state after each frame, and the last one in the form of ``hidden``.

        Args:
            sequences: ``(B, T, C, h, w)``
            hidden: The state of before, alone in a list; zeros if not given.
            domain: Whose norms to use.

        Raises:
            ValueError: If the state is not one of such sequences.
        """
        (cell,), shape = self.cell_list, sequences[:, 0].shape
        (state,) = [sequences.new_zeros(shape, dtype=torch.float32)] if hidden is None else hidden
        if state.shape != shape:
            raise ValueError(f"a state of {tuple(shape)} is wanted, got {tuple(state.shape)}")
        states: Tensor = cell(sequences, state, domain)
        return states, [states[:, -1]]


class Encoded(NamedTuple):
    """What the network knows of frames before it remembers others."""

    bottleneck: Tensor
    """``(N, 256, H / 32, W / 32)``"""
    skip_2x: Tensor
    """``(N, 128, H / 16, W / 16)``"""
    skip_4x: Tensor
    """``(N, 64, H / 8, W / 8)``"""


class UnisalOutput(NamedTuple):
    """Maps of sequences and what was remembered at their end."""

    log_probabilities: Tensor
    """``(B, T, 1, h, w)``; their exponentials sum to 1 over each frame."""
    hidden: list[Tensor] | None
    """One ``(B, 256, H / 32, W / 32)``; nothing if the frames were taken as pictures."""


class Unisal(nn.Module):
    """Encoder, priors, recurrence and decoder, joined; names are the published ones."""

    def __init__(self) -> None:
        super().__init__()
        for domain in PROTOCOLS:
            self.register_parameter(f"coarse_gaussians_{domain.lower()}", _first_gaussians())
        self.cnn = MobileNetV2()
        seen = InvertedResidual(1280 + PRIORS, HIDDEN, expansion=1)
        self.post_cnn = nn.ModuleDict({"inv_res": seen})
        self.rnn = ConvGru(HIDDEN)
        self.post_rnn = Layers(_pointwise(HIDDEN, HIDDEN), DomainNorm(HIDDEN), nn.ReLU6())
        self.skip_2x = Skip(160, 128)
        coarse = InvertedResidual(HIDDEN + 128, 128, expansion=2, norm=DomainNorm)
        self.upsampling_2 = nn.ModuleDict({"inv_res": coarse})
        self.skip_4x = Skip(64, 64)
        fine = InvertedResidual(128 + 64, 64, expansion=2, norm=DomainNorm)
        self.post_upsampling_2 = nn.ModuleDict({"inv_res": fine})
        for domain in PROTOCOLS:
            self.add_module(f"adaptation_{domain.lower()}", nn.Sequential(nn.Conv2d(64, 1, 1)))
            smoothing = nn.Conv2d(1, 1, SMOOTHING, bias=False)
            self.add_module(f"smoothing_{domain.lower()}", smoothing)

    def forward(
        self,
        x: Tensor,
        *,
        target_size: tuple[int, int] | None = None,
        hidden: Sequence[Tensor] | None = None,
        source: Domain = "DHF1K",
        static: bool | None = None,
    ) -> UnisalOutput:
        """Map sequences of frames.

        Args:
            x: ``(B, T, 3, H, W)``, H and W multiples of 32.
            target_size: Height and width of the maps; those of the frames if not given.
            hidden: What was remembered at the end of the frames before these; it is not changed.
            source: The domain.
            static: Whether the frames are pictures, each without a past. If not given, a frame
                that comes alone is one: to go through a video frame by frame, say ``False``.

        Raises:
            ValueError: If there are no frames, their size is not a multiple of 32, there is no
                such domain, or what was remembered does not fit.
        """
        num_frames, (height, width) = x.shape[1], x.shape[-2:]
        if num_frames < 1:
            raise ValueError("UNISAL sees at least one frame at once, got none")
        _check_size(height, width)
        _check_domain(source)
        encoded = self.encode(x.flatten(0, 1), source)
        features = encoded.bottleneck
        states = None
        if not (num_frames == 1 if static is None else static):
            sequences = features.view(*x.shape[:2], *features.shape[1:])
            remembered, states = self.rnn(sequences, hidden, source)
            features = features + self.post_rnn(remembered.flatten(0, 1), source)
        logits = self.decode(encoded._replace(bottleneck=features), source)
        if target_size is not None and target_size != (height, width):
            logits = F.interpolate(logits, target_size, mode="bilinear", align_corners=False)
        log_probabilities = logits.float().flatten(1).log_softmax(1)
        return UnisalOutput(log_probabilities.view(*x.shape[:2], *logits.shape[1:]), states)

    def encode(self, frames: Tensor, domain: Domain) -> Encoded:
        """Look at frames ``(N, 3, H, W)``, each by itself."""
        levels = self.cnn(frames, domain)
        height, width = levels.x1.shape[-2:]
        priors = self.priors(height, width, domain).expand(len(frames), -1, -1, -1)
        seen = torch.cat([levels.x1, priors], 1)
        return Encoded(
            bottleneck=self.post_cnn["inv_res"](seen, domain),
            skip_2x=self.skip_2x(levels.x2, domain),
            skip_4x=self.skip_4x(levels.x4, domain),
        )

    def priors(self, height: int, width: int, domain: Domain) -> Tensor:
        """Return where people look whatever the frame, as Gaussian maps ``(1, 16, h, w)``."""
        gaussians = self.get_parameter(f"coarse_gaussians_{domain.lower()}")
        down, across = (
            _gaussian(torch.linspace(0, 1, size, device=axis.device), axis)
            for size, axis in zip((height, width), gaussians.unbind(1), strict=True)
        )
        return 6 * down[None, :, :, None] * across[None, :, None, :]

    def decode(self, encoded: Encoded, domain: Domain) -> Tensor:
        """Make logits of the frames' size, ``(N, 1, H, W)``, of what is known of them."""
        coarse = torch.cat([_double(encoded.bottleneck), encoded.skip_2x], 1)
        coarse = self.upsampling_2["inv_res"](coarse, domain)
        fine = torch.cat([_double(coarse), encoded.skip_4x], 1)
        fine = self.post_upsampling_2["inv_res"](fine, domain)
        pixels = self.get_submodule(f"adaptation_{domain.lower()}")(fine)
        return smooth(pixels, self.get_parameter(f"smoothing_{domain.lower()}.weight"))


class UnisalTeacher(NetworkTeacher):
    """UNISAL, labelling each frame of a video from all that it remembers.

    The network wants six frames a second. So a video is several recurrent sequences: one of the
    frames 0, 5, 10, ... in the domain DHF1K, one of 1, 6, 11, ..., and so on. The teacher keeps one
    state for each and labels the spans of a video in order; :meth:`reset` begins another video. In
    the domain SALICON each frame is a picture by itself, and spans may come in any order.

    Args:
        height: Rows of the input, in pixels; a multiple of 32; the domain's if not given.
        width: Columns of the input.
        domain: The data set whose norms, priors and last layers are used.
        options: As of :class:`teachers.network.NetworkTeacher`.

    Raises:
        ValueError: If the size is not a multiple of 32 or there is no such domain.

    Attributes:
        is_recurrent: Whether spans must be labelled in order.
        frame_stride: Frames from one of a recurrent sequence to its next.
    """

    title = "UNISAL"
    optional_keys = (*NetworkTeacher.optional_keys, "drop_mask_1")
    network: Unisal
    is_recurrent: bool = True

    def __init__(
        self,
        *,
        height: int | None = None,
        width: int | None = None,
        domain: Domain = "DHF1K",
        **options: Any,  # noqa: ANN401 - device, precision, weights
    ) -> None:
        _check_domain(domain)
        protocol = PROTOCOLS[domain]
        self._size = (
            protocol.height if height is None else height,
            protocol.width if width is None else width,
        )
        _check_size(*self._size)
        self.domain: Final = domain
        self.frame_stride: Final = protocol.frame_stride
        self.is_recurrent = domain != PICTURES
        self.reset()
        super().__init__(**options)

    def build_network(self) -> Unisal:
        return Unisal()

    def initialise(self, network: nn.Module) -> None:
        super().initialise(network)
        for domain in PROTOCOLS:
            smoothing = network.get_parameter(f"smoothing_{domain.lower()}.weight")
            with torch.no_grad():
                smoothing.copy_(_first_smoothing())

    def make_spec(self) -> TeacherSpec:
        height, width = self._size
        saliency = MapSpec(
            name="map", height=height, width=width, activation="exp", order="activate_first"
        )
        return TeacherSpec(
            name="unisal",
            paper="Droste et al., Unified Image and Video Saliency Modeling, ECCV 2020",
            licence="see the weights' publisher",
            adapter_version=1,
            normalisation="(RGB / 255 - mean) / standard deviation, as of ImageNet",
            resize_rule="Lanczos (Pillow), aspect not kept, rounded to uint8",
            window=1,
            head_policy="repeat_first",
            layout=MapLayout(height=height, width=width, maps=(saliency,), saliency="map"),
            batch=self.frame_stride if self.is_recurrent else 4,
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """All that decides the targets, but the video, its decoder and what the store does."""
        return {
            **super().provenance,
            "domain": self.domain,
            "frame_stride": self.frame_stride,
        }

    def import_weights(self, state_dict: Mapping[str, Any]) -> None:
        """Take weights with the published names, and forget what others remembered.

        Raises:
            WeightsError: If a tensor is missing, not expected, or of another shape or type.
        """
        super().import_weights(state_dict)
        self.reset()

    def resize(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        height, width = self._size
        resized = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        return np.array(resized)

    def normalise(self, frames: Tensor) -> Tensor:
        return normalise_as_imagenet(frames)

    def reset(self) -> None:
        """Forget all states: the next span begins a video."""
        self._next_frame = 0
        self._states: Tensor | None = None
        """Of each sequence, ``(frame_stride, 256, H / 32, W / 32)``, the next frame's first."""

    def label_span(
        self, frames: Tensor, *, first: int, span: range, num_frames: int
    ) -> dict[str, Tensor]:
        """Label the span of a video that follows the last one, or that begins it after a reset.

        The network always sees as many frames at once as there are sequences, so that numbers are
        rounded alike however a video is cut into spans; a span of another length than a multiple
        of that wastes some of the work. A span that fails leaves the states as they were, and can
        be tried again.

        Raises:
            ValueError: If the span does not follow the last one, or the frames have another size
                than the teacher's.
        """
        seen = frames[torch.tensor(span) - first]  # N 3 H W
        if not self.is_recurrent:
            return self.logits(seen.unsqueeze(2))
        if span.start != self._next_frame:
            raise ValueError(
                f"UNISAL labels a video in order: frame {self._next_frame} is next, "
                f"got frames {span.start}-{span.stop}; begin a video with reset()"
            )
        self._check_frames(seen)
        height, width = (side // STRIDE for side in self._size)
        states = self._states
        if states is None:
            states = seen.new_zeros(self.frame_stride, HIDDEN, height, width, dtype=torch.float32)
        planes = []
        for part in torch.split(
            seen, self.frame_stride
        ):  # a frame of each sequence, the last time fewer
            count = len(part)
            padded = F.pad(part, (0, 0) * 3 + (0, self.frame_stride - count))
            output: UnisalOutput = self.network(
                self.lay_out(padded).unsqueeze(1), hidden=[states], source=self.domain, static=False
            )
            assert output.hidden is not None
            planes.append(output.log_probabilities[:count, 0])
            states = torch.cat([states[count:], output.hidden[0][:count]])
        self._states, self._next_frame = states, span.stop
        return self._planes(torch.cat(planes))

    def logits(self, windows: Features) -> dict[str, Tensor]:
        """Return the planes of the last frames of sequences that begin with the first ones."""
        sequences = whole(windows).transpose(1, 2)
        self._check_frames(sequences)
        output: UnisalOutput = self.network(
            sequences, source=self.domain, static=not self.is_recurrent
        )
        return self._planes(output.log_probabilities[:, -1])

    @torch.no_grad()
    def predict(
        self,
        windows: Tensor,
        *,
        source: Domain | None = None,
        static: bool | None = None,
        target_size: tuple[int, int] | None = None,
        state: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the maps of all frames of some sequences, as the published network says them.

        The states of :meth:`label_span` are neither used nor changed.

        Args:
            windows: ``(B, 3, T, H, W)``, prepared, in order of time; any number of frames, any size
                in multiples of 32.
            source: The domain; the teacher's if not given.
            static: Whether the frames are pictures. If not given, a frame that comes alone is one.
            target_size: Height and width of the maps; those of the frames if not given.
            state: What was remembered at the end of the frames before these.

        Returns:
            ``map``: log-probabilities, ``(B, T, 1, h, w)`` float32. ``state``, unless the frames
            are pictures: what is remembered at their end, ``(B, 256, H / 32, W / 32)`` float32.

        Raises:
            ValueError: If there are no frames, their size is not a multiple of 32, there is no
                such domain, or the state does not fit.
        """
        with self._arithmetic():
            output: UnisalOutput = self.network(
                windows.transpose(1, 2),
                target_size=target_size,
                hidden=None if state is None else [state],
                source=self.domain if source is None else source,
                static=static,
            )
        maps = {"map": output.log_probabilities}
        return maps if output.hidden is None else {**maps, "state": output.hidden[0]}

    def _planes(self, log_probabilities: Tensor) -> dict[str, Tensor]:
        """Bring log-probabilities ``(N, 1, H, W)`` to what is stored."""
        (array,) = self.spec.layout.arrays
        relative = log_probabilities + math.log(math.prod(self._size))
        return {array: relative.clamp(min=LOG_DENSITY_FLOOR)}

    def _check_frames(self, frames: Tensor) -> None:
        if (size := tuple(frames.shape[-2:])) != self._size:
            wanted, given = ("x".join(map(str, sides)) for sides in (self._size, size))
            raise ValueError(f"this UNISAL labels frames of {wanted}, got {given}")


def smooth(pixels: Tensor, kernel: Tensor) -> Tensor:
    """Enlarge a picture eightfold to squares of one value, and convolve it, edges repeated.

    A pixel of the result sees some of the 7x7 squares around it. Which part of the kernel falls on
    which of them depends only on the pixel's place within its own square, so each of the 64 places
    has a kernel of 7x7 sums. The enlarged picture is never made, and a thirtieth of the products
    are left.

    Shape:
        - pixels: ``(N, 1, h, w)``
        - kernel: ``(1, 1, 41, 41)``
        - returns: ``(N, 1, 8 * h, 8 * w)``
    """
    reach = -(-(SMOOTHING // 2) // ENLARGEMENT)  # squares before one's own
    parts = torch.arange(SMOOTHING, device=kernel.device) - SMOOTHING // 2
    places = torch.arange(ENLARGEMENT, device=kernel.device)[:, None] + parts
    squares = places.div(ENLARGEMENT, rounding_mode="floor") + reach  # place, part of the kernel
    falls = F.one_hot(squares, 2 * reach + 1).to(kernel)
    sums = torch.einsum("ykj,xli,kl->yxji", falls, falls, kernel[0, 0])
    padded = F.pad(pixels, [reach] * 4, mode="replicate")
    return F.pixel_shuffle(F.conv2d(padded, sums.flatten(0, 1).unsqueeze(1)), ENLARGEMENT)


def _constants(channels: int, value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((channels, 1, 1), value))


def _pointwise(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def _double(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)


def _gaussian(places: Tensor, constants: Tensor) -> Tensor:
    """Return Gaussian bells ``(bell, place)`` of means and logarithms of widths ``(bell, 2)``."""
    mean, log_width = constants[:, :1], constants[:, 1:]
    return torch.exp(-0.5 * ((places - mean) / log_width.exp()) ** 2)


def _first_gaussians() -> nn.Parameter:
    """Return the priors before training, ``(16, 2, 2)``: of rows and columns, as `_gaussian`'s."""
    near, far, thirds = -1.5, 0.0, (0.25, 0.5, 0.75)
    spots = [[[y, near], [x, near]] for y in thirds for x in thirds]
    columns = [[[0.5, far], [x, near]] for x in thirds]
    rows = [[[y, near], [0.5, far]] for y in thirds]
    return nn.Parameter(torch.tensor([*spots, *columns, *rows, [[0.5, far], [0.5, far]]]))


def _first_smoothing() -> Tensor:
    """Return the kernel that smooths before training, ``(41, 41)``."""
    bell = _gaussian(torch.linspace(0, 1, SMOOTHING), torch.tensor([[0.5, -2.0]]))[0]
    kernel = torch.outer(bell, bell)
    return kernel / kernel.sum()


def _check_domain(domain: str) -> None:
    if domain not in get_args(Domain):
        raise ValueError(f"domain must be one of {get_args(Domain)}, got {domain!r}")


def _check_size(height: int, width: int) -> None:
    if height < STRIDE or width < STRIDE or height % STRIDE or width % STRIDE:
        raise ValueError(f"UNISAL needs a size in multiples of {STRIDE}, got {height}x{width}")
