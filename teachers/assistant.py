"""A teacher assistant: a trained TinyHD that labels, so that a smaller one can learn from it.

A TinyHD-S says all its maps of the last frame of a clip. A TinyHD-M says the fused map of each of
its output frames; its clips lie side by side from frame 0, and the last one overlaps. The maps that
a decoder of a TinyHD-M makes for a whole clip belong to no frame and are not stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stores.frames import RESIZE_RULE, resize_frames
from stores.maps import DerivedMap, MapLayout, MapSpec
from stores.videos import hash_file
from student.checkpoints import load_model
from student.config import CLIP_FRAMES
from student.tinyhd import TinyHD
from teachers.base import Precision, Teacher, TeacherSpec, normalise_as_imagenet

CLIPS_AT_ONCE: Final = 4
SALIENCY: Final = "saliency"


class AssistantTeacher(Teacher):
    """A TinyHD of a checkpoint.

    Args:
        weights: The checkpoint.
        height: Rows of the frames fed to it; those of its configuration if not given.
        width: Columns.
        device: Where it runs.
        precision: What it computes in.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        ValueError: If the size is not a multiple of 32.
    """

    def __init__(
        self,
        *,
        weights: Path,
        height: int | None = None,
        width: int | None = None,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        model = load_model(weights)
        self._sha256 = hash_file(weights).hex()
        config = model.config
        self._output_frames = config.output_frames
        height, width = height or config.height, width or config.width
        if height % 32 or width % 32:
            raise ValueError(f"a TinyHD needs a size in multiples of 32, got {height}x{width}")
        spec = TeacherSpec(
            name="assistant",
            paper="Hu et al., TinyHD, WACV 2023",
            licence="that of the checkpoint",
            adapter_version=1,
            normalisation="RGB / 255, centred and scaled as ImageNet networks want it",
            resize_rule=RESIZE_RULE,
            window=CLIP_FRAMES,
            labelled_frame="each" if config.is_multi else "last",
            head_policy="overlap" if config.is_multi else "repeat_first",
            layout=_layout(model, height, width),
            batch=CLIPS_AT_ONCE * self._output_frames,
        )
        super().__init__(spec, device=device, precision=precision)
        self.network = model.for_inference().to(self.device)

    @property
    def weights_sha256(self) -> str:
        return self._sha256

    def resize(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Squash a decoded frame as students see it."""
        layout = self.spec.layout
        resized = resize_frames(frame[None], layout.height, layout.width)
        return resized.reshape(resized.shape[1:])

    def normalise(self, frames: Tensor) -> Tensor:
        return normalise_as_imagenet(frames)

    def window(self, frame: int, num_frames: int) -> Sequence[int]:
        """Return the clip in which a frame is labelled; see :meth:`Teacher.window`."""
        last = self._block(frame, num_frames)[-1]
        return [max(0, index) for index in range(last - CLIP_FRAMES + 1, last + 1)]

    def label_span(
        self, frames: Tensor, *, first: int, span: range, num_frames: int
    ) -> Mapping[str, Tensor]:
        """Label a span; a clip that labels several frames of it is looked at once."""
        blocks = list(dict.fromkeys(self._block(frame, num_frames) for frame in span))
        indices = torch.tensor([self.window(block[-1], num_frames) for block in blocks])
        clips = frames[indices - first].transpose(1, 2)  # B 3 T H W
        if self._output_frames == 1:
            return self.logits(clips)
        maps = self.network(clips).saliency_logits  # B 1 T H W
        row_of = {block: row for row, block in enumerate(blocks)}
        labelled = []
        for frame in span:
            block = self._block(frame, num_frames)
            labelled.append(maps[row_of[block], :, frame - block.stop])  # the newest is the last
        return {self.spec.layout.maps[0].array: torch.stack(labelled)}

    def logits(self, windows: Tensor) -> dict[str, Tensor]:
        """Return all maps of a TinyHD-S, in the order of the layout."""
        output = self.network(windows)
        maps = [maps.squeeze(2) for maps in output.map_logits.values()]
        return {self.spec.layout.maps[0].array: torch.cat(maps, 1)}

    def _block(self, frame: int, num_frames: int) -> range:
        """Return the frames that are labelled from the same clip as ``frame``."""
        length = self._output_frames
        stop = min((frame // length + 1) * length, num_frames)
        return range(stop - length, stop)


def _layout(model: TinyHD, height: int, width: int) -> MapLayout:
    """Return what is stored: of a TinyHD-S each decoder's maps, of which the fused one follows."""

    def plane(name: str) -> MapSpec:
        return MapSpec(
            name=name, height=height, width=width, activation="sigmoid", order="activate_first"
        )

    config = model.config
    if config.is_multi:
        return MapLayout(height=height, width=width, maps=(plane(SALIENCY),), saliency=SALIENCY)
    names = {
        name: [f"{name}_{level}" for level in range(4)] if name == "d1" else [name]
        for name in config.decoders
    }
    weights = model.fusion.weight.detach().flatten().tolist()
    fused = [map_name for name in config.fusion_order for map_name in names[name]]
    fusion = DerivedMap(
        name=SALIENCY,
        terms=tuple(zip(fused, weights, strict=True)),
        bias=float(model.fusion.get_parameter("bias").detach()),
        activation="sigmoid",
    )
    return MapLayout(
        height=height,
        width=width,
        maps=tuple(plane(map_name) for group in names.values() for map_name in group),
        derived=(fusion,),
        saliency=SALIENCY,
        hierarchical=tuple(names.get("d1", ())),
    )
