"""How videos are labelled, and what label sets and frame sets that asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distill.executors import HANG_SECONDS
from distill.plan import Budget
from stores.codec import GRID_STEP
from stores.decode import Reader, decoder_version
from stores.schema import FRAME_ALIGNMENT, FrameRequest, LabelRequest, Variant
from stores.shards import Request
from teachers.base import Precision, Teacher
from teachers.registry import WITH_WEIGHTS, build


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How videos are labelled."""

    teacher: str
    """A name, or ``package.module:factory``."""
    weights: Path | None = None
    """The teacher's file of weights; every machine needs it at this path."""
    teacher_options: Mapping[str, str] = field(default_factory=dict)
    """What else the teacher takes; see :func:`teachers.registry.build`."""
    size: tuple[int, int] | None = None
    """Height and width fed to the teacher; its published size if not given."""
    precision: Precision = "float32"
    """What the teacher computes in; each has a label set of its own."""
    variant: Variant | Literal["both"] = "identity"
    """``hflip``: the teacher sees mirrored frames. ``both``: two label sets, decoding once."""
    with_frames: tuple[int, int] | None = None
    """Height and width at which the frames are kept too."""
    reader: Reader = "pyav"
    batch: int | None = None
    """Windows labelled together; the teacher's own number if not given."""
    shard_frames: int = FRAME_ALIGNMENT
    grid_step: float = GRID_STEP
    budget: Budget | None = None
    """How much of each video is labelled; all if not given."""
    replace_changed: bool = False
    """Whether a video whose content has changed is labelled anew; else it is an error."""
    retry_failed: bool = False
    """Whether what failed in earlier runs is tried again; else it is passed over."""
    executor: Literal["ray", "inline"] = "ray"
    actors: int | None = None
    cpus_per_actor: int = 1
    gpus_per_actor: float | None = None
    """A fraction lets actors share a GPU; 1 if not given and there is one, else 0."""
    address: str | None = None
    hang_seconds: float = HANG_SECONDS
    """Time without anything done after which a worker or a decoder is killed."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What the teacher sees, a label set for each."""
        return ("identity", "hflip") if self.variant == "both" else (self.variant,)

    @property
    def gpus(self) -> float:
        """GPUs of each actor."""
        if self.gpus_per_actor is not None:
            return self.gpus_per_actor
        import torch

        return 1.0 if torch.cuda.is_available() else 0.0

    @property
    def device(self) -> str:
        """Where the teacher runs."""
        return "cuda" if self.gpus else "cpu"

    def build_teacher(self, *, device: str = "cpu") -> Teacher:
        """Make the teacher; see :func:`teachers.registry.build`."""
        if self.weights is None and self.teacher in WITH_WEIGHTS:
            raise ValueError(
                f"the teacher {self.teacher!r} needs its weights; give them with --weights FILE"
            )
        return build(
            self.teacher,
            size=self.size,
            device=device,
            precision=self.precision,
            weights=self.weights,
            **self.teacher_options,
        )

    def requests(self, teacher: Teacher) -> list[Request]:
        """Return the label sets, and the frame set if there is to be one."""
        decoder = decoder_version(self.reader)
        requests: list[Request] = [
            LabelRequest(
                teacher=teacher.spec.name,
                provenance={**teacher.provenance, "decoder": decoder},
                layout=teacher.spec.layout,
                description={
                    **teacher.spec.description,
                    "factory": self.teacher,
                    "options": json.dumps(dict(self.teacher_options), sort_keys=True),
                },
                variant=variant,
                grid_step=self.grid_step,
                shard_frames=self.shard_frames,
            )
            for variant in self.variants
        ]
        if self.with_frames is not None:
            height, width = self.with_frames
            requests.append(
                FrameRequest(
                    height=height, width=width, decoder=decoder, shard_frames=self.shard_frames
                )
            )
        return requests
