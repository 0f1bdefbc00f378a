"""A teacher that labels clips in the training step, as in the paper; for comparison with stores."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from distill.settings import DistillSettings
from stores.schema import LabelRequest
from stores.shards import Request
from student.experiment import read_size
from student.online import TeacherEyes, TeacherView
from student.recipe import OnlineTerm


class TeacherInStep:
    """A teacher, as the trainer asks for one.

    It looks at frames decoded now, at their own size, by the same rules as where it fills a store.

    Args:
        settings: Of the label set that a store would hold.
        device: Where it runs.

    Raises:
        ValueError: If it has to see every frame of a video in turn.
    """

    def __init__(self, settings: DistillSettings, device: str) -> None:
        self._teacher = settings.build_teacher(device=device)
        if self._teacher.is_recurrent:
            raise ValueError(
                f"the teacher {settings.teacher!r} sees every frame of a video in turn, and cannot "
                "label clips in the step; label the videos with: tinyhd distill"
            )
        self._requests: list[Request] = settings.requests(self._teacher)

    @property
    def request(self) -> LabelRequest:
        (request,) = self._requests
        assert isinstance(request, LabelRequest)
        return request

    @cached_property
    def eyes(self) -> TeacherEyes:
        return self._teacher.without_network()

    def label(self, view: TeacherView) -> dict[str, Tensor]:
        frames = self._teacher.prepare(view.frames)
        return self._teacher.label(
            frames, first=view.first, span=view.span, num_frames=view.num_frames
        )


def open_teacher(term: OnlineTerm, device: str) -> TeacherInStep:
    """Make the teacher that a recipe names; given to :func:`student.train.train`.

    Raises:
        WeightsError: If its weights cannot be read.
        ValueError: If there is no such teacher, or it cannot label clips in the step.
    """
    settings = DistillSettings(
        teacher=term.teacher,
        weights=Path(term.weights) if term.weights else None,
        teacher_options=term.options,
        size=read_size(term.size, "supervision.online.size") if term.size else None,
        precision=term.precision,
    )
    with torch.random.fork_rng():  # networks without weights begin at random
        return TeacherInStep(settings, device)
