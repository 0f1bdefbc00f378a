"""A teacher that misbehaves on request, in whatever process it runs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stores.errors import VideoError
from stores.maps import MapLayout, MapSpec
from teachers.base import Precision, Teacher, TeacherSpec

PASSIVE = ("say nan", "want memory", "not load", "hang decoding")
"""Acts that are not done when a frame is labelled."""


class FakeTeacher(Teacher):
    """Says the mean brightness of its window's frames, quickly, and does what a script says.

    Args:
        weights: A JSON file: a list of acts, each with the name of what is ``do``\\ ne, the number
            of frames of the video (``video``) and a frame of it (``at``) that is labelled when it
            is done, and how often it is (``times``, always if not given). Acts are counted in files
            beside it.
        height: Of its input.
        width: Of its input.
        device: Where it runs.
        precision: What it computes in.
    """

    def __init__(
        self,
        *,
        weights: Path | None = None,
        height: int = 16,
        width: int = 24,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        maps = tuple(
            MapSpec(name=name, height=h, width=w, activation="exp", order="activate_first")
            for name, h, w in (("fine", 4, 6), ("coarse", 2, 3))
        )
        spec = TeacherSpec(
            name="fake",
            paper="none",
            licence="none",
            adapter_version=1,
            normalisation="none",
            resize_rule="none",
            window=5,
            head_policy="repeat_first",
            layout=MapLayout(height=height, width=width, maps=maps, saliency="fine"),
            batch=8,
        )
        super().__init__(spec, device=device, precision=precision)
        self._script = weights
        self._resized = 0
        self._acts: list[dict[str, Any]] = json.loads(weights.read_text()) if weights else []
        for act in self._acts:
            if act["do"] == "not load" and act["but"] != os.getpid():
                raise ValueError("this teacher cannot be loaded")

    def resize(self, frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Squash a frame, in the thread that decodes; it may hang there."""
        self._resized += 1
        for act in self._acts:
            if act["do"] == "hang decoding" and self._resized > act["after"] and self._is_due(act):
                time.sleep(1e6)
        return super().resize(frame)

    def label_span(
        self, frames: Tensor, *, first: int, span: range, num_frames: int
    ) -> Mapping[str, Tensor]:
        for act in self._acts:
            fits = act.get("video", num_frames) == num_frames and act.get("at", span[0]) in span
            if fits and act["do"] == "want memory" and len(span) > act["windows"]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if fits and act["do"] not in PASSIVE and self._is_due(act):
                self._do(act)
        planes = super().label_span(frames, first=first, span=span, num_frames=num_frames)
        for act in self._acts:
            if act["do"] == "say nan" and act["video"] == num_frames and act["at"] in span:
                planes = {name: values * torch.nan for name, values in planes.items()}
        return planes

    def logits(self, windows: Tensor) -> dict[str, Tensor]:
        means = windows.mean((1, 3, 4)) * 10  # B T
        value = (means * torch.arange(1, 6)).sum(1)[:, None, None, None]
        return {f"maps_{h}x{w}": value.expand(-1, 1, h, w) for h, w in ((4, 6), (2, 3))}

    def _is_due(self, act: dict[str, Any]) -> bool:
        """Count an act, across processes; return whether it is to be done."""
        assert self._script is not None
        for number in range(act.get("times", 10**6)):
            name = f"{self._script.name}.{act['do'].replace(' ', '-')}.{number}"
            try:
                self._script.with_name(name).touch(exist_ok=False)
            except FileExistsError:
                continue
            self._script.with_name(name).write_text(str(os.getpid()))
            return True
        return False

    def _do(self, act: dict[str, Any]) -> None:
        match act["do"]:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fail":
                raise RuntimeError("something went wrong\nin two lines")
            case "not see the video":
                raise VideoError("cannot read the video: No such file or directory")
            case "hang":
                time.sleep(1e6)
            case "take memory":
                taken = []
                while True:
                    taken.append(torch.ones(32, 2**20))  # 128 MiB
                    time.sleep(0.05)
            case "spoil the store":
                folder = Path(act["folder"])
                folder.rename(folder.with_name("away"))
                folder.write_bytes(b"")
            case "sleep":
                time.sleep(act["seconds"])
            case what:
                raise AssertionError(what)


class RecurrentTeacher(FakeTeacher):
    """Says the mean brightness of all frames so far, which it must have seen in order."""

    is_recurrent = True

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - those of a FakeTeacher
        super().__init__(**options)
        self.spec = replace(self.spec, name="recurrent", window=1)
        self.reset()

    def reset(self) -> None:
        self._seen, self._sum = 0, 0.0

    def label_span(
        self, frames: Tensor, *, first: int, span: range, num_frames: int
    ) -> Mapping[str, Tensor]:
        assert span.start == self._seen, "a frame was left out"
        values = []
        for frame in span:
            self._sum += float(frames[frame - first].mean())
            values.append(self._sum / (frame + 1) * 100)
        self._seen = span.stop
        value = torch.tensor(values)[:, None, None, None]
        return {f"maps_{h}x{w}": value.expand(-1, 1, h, w) for h, w in ((4, 6), (2, 3))}
