"""Scores of frames on disk: kept video by video, so that an evaluation that was stopped goes on."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from stores.errors import TinyHDError
from student.averages import Average, average_frames
from student.protocols import Measure

FORMAT: Final = "tinyhd-scores"
VERSION: Final = 1
UNSAFE: Final = re.compile(r"[^\w.-]+")


class ScoresError(TinyHDError):
    """Scores cannot be kept where they are wanted."""


@dataclass(frozen=True)
class Skipped:
    """A frame that was not scored, or a whole video, and why."""

    video: str
    frame: int | None
    """Nothing for a whole video."""
    reason: str


@dataclass(frozen=True)
class VideoScores:
    """Scores of one video's frames."""

    video: str
    frames: tuple[int, ...]
    values: Mapping[Measure, npt.NDArray[np.float64]]
    """For each measure one score per frame; NaN where it is undefined."""
    skipped: tuple[Skipped, ...] = ()
    stamp: str = ""
    """By which maps and recorded eyes are taken to be the same as before."""


@dataclass
class SourceScores:
    """Scores of all videos by one source."""

    name: str
    measures: tuple[Measure, ...]
    videos: list[VideoScores] = field(default_factory=list)

    def average(self, measure: Measure) -> Average:
        """Average a measure over frames and videos."""
        index = np.repeat(np.arange(len(self.videos)), [len(v.frames) for v in self.videos])
        values = [video.values[measure] for video in self.videos]
        average = average_frames(np.concatenate([*values, np.empty(0)]), index)
        missing = len(self.videos) - len(average.per_video)  # at the end, without any frame
        per_video = np.concatenate([average.per_video, np.full(missing, np.nan)])
        return average._replace(per_video=per_video)

    @property
    def skipped(self) -> list[Skipped]:
        """All that was not scored."""
        return [item for video in self.videos for item in video.skipped]


class ScoresFile:
    """Scores of one source as JSON lines: a head that says of what, and a line for each video.

    Use in a ``with``. A line that a kill has cut is passed over and its video scored anew.

    Args:
        folder: Of the evaluation.
        name: Of the source.
        identity: What decides the scores; a file of another identity is an error.
        measures: What is scored.

    Raises:
        ScoresError: If the file is of another evaluation, or cannot be written.
    """

    def __init__(
        self, folder: Path, name: str, identity: Mapping[str, Any], measures: Sequence[Measure]
    ) -> None:
        self.path = folder / f"{file_name(name)}.jsonl"
        self._head = {"format": FORMAT, "version": VERSION, "source": name, **identity}
        self._measures = tuple(measures)
        self.known = {video.video: video for video in self._read()}
        self._file: IO[str] | None = None

    def __enter__(self) -> ScoresFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Written anew, so that no cut line is left in the middle.
            partial = self.path.with_name(f"{self.path.name}.partial")
            with partial.open("w", encoding="utf-8") as file:
                for line in (self._head, *map(_to_json, self.known.values())):
                    file.write(json.dumps(line) + "\n")
            partial.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ScoresError(f"cannot write {self.path}: {error.strerror}") from error
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, video: VideoScores) -> None:
        """Keep the scores of a video.

        Raises:
            ScoresError: If they cannot be written.
        """
        assert self._file is not None
        self.known[video.video] = video
        try:
            self._file.write(json.dumps(_to_json(video)) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ScoresError(f"cannot write {self.path}: {error.strerror}") from error

    def _read(self) -> list[VideoScores]:
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise ScoresError(f"cannot read {self.path}: {error}") from error
        head = _parse(lines[0])
        if head is None and len(lines) <= 1:
            return []  # nothing was kept yet
        if head != json.loads(json.dumps(self._head)):
            raise ScoresError(
                f"{self.path} holds scores of another evaluation{_difference(head, self._head)}; "
                "remove it, or choose another folder with --out"
            )
        found = []
        for line in lines[1:]:
            item = _parse(line)
            if item is None:
                continue
            try:
                found.append(_from_json(item, self._measures))
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
                continue
        return found


def file_name(name: str) -> str:
    """Return a source's name as one that every file system takes."""
    return UNSAFE.sub("-", name).strip("-.") or "source"


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        ScoresError: If it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ScoresError(f"cannot write {path}: {error.strerror}") from error


def to_plain(value: float) -> float | None:
    """Return a score as JSON has it, which knows no NaN."""
    return value if math.isfinite(value) else None


def _parse(line: str) -> dict[str, Any] | None:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return item if isinstance(item, dict) else None


def _to_json(video: VideoScores) -> dict[str, Any]:
    return {
        "video": video.video,
        "stamp": video.stamp,
        "frames": list(video.frames),
        "scores": {name: list(map(to_plain, v.tolist())) for name, v in video.values.items()},
        "skipped": [[item.frame, item.reason] for item in video.skipped],
    }


def _from_json(item: Mapping[str, Any], measures: Sequence[Measure]) -> VideoScores:
    frames = tuple(int(frame) for frame in item["frames"])
    values = {}
    for measure in measures:
        scores = np.array(
            [math.nan if v is None else float(v) for v in item["scores"][measure]], np.float64
        )
        if len(scores) != len(frames):
            raise ValueError(f"{len(scores)} scores of {len(frames)} frames")
        values[measure] = scores
    name = str(item["video"])
    skipped = tuple(
        Skipped(name, None if frame is None else int(frame), str(reason))
        for frame, reason in item["skipped"]
    )
    return VideoScores(name, frames, values, skipped, str(item["stamp"]))


def _difference(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> str:
    if found is None:
        return ""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return f" ({', '.join(names)} differ)"
