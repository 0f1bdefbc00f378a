"""A saliency map for every frame of a video: as pictures, and laid over the video."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from stores.decode import Frame, decode_images, decode_video, read_header
from stores.errors import TinyHDError, VideoError
from stores.finding import find_videos
from stores.images import list_images
from stores.progress import Progress
from stores.videos import VideoFile, hash_file
from student.inference import line_for, map_frames
from student.pictures import (
    GrayMap,
    Map,
    PostProcessing,
    VideoWriter,
    finish_map,
    overlay_gray,
)
from student.runtimes import Runtime

log = logging.getLogger(__name__)

RENDER_THREADS: Final = 2
OVERLAY_SIDES: Final = range(2, 16385)
"""Rows or columns that H.264 holds, as its encoder has it."""
DEFAULT_FPS: Final = Fraction(25)
"""Of an overlay whose video does not tell its own."""
RECORD: Final = "prediction.json"


class PredictionError(TinyHDError):
    """Predictions cannot be written where they are wanted."""


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """What is written of a prediction, and how maps are made visible."""

    post_processing: PostProcessing = "plain"
    """``plain``: each map scaled to 0..255 and resized bilinearly. ``paper``: as the published maps
    were made, with bicubic resizing and a blur."""
    maps: bool = True
    """Write each map as a gray PNG of the video's size."""
    overlay: bool = True
    """Write a video with the maps laid over the frames."""

    def __post_init__(self) -> None:
        if not (self.maps or self.overlay):
            raise ValueError("neither maps nor an overlay are wanted: nothing would be written")


@dataclass
class PredictReport:
    """What was done."""

    videos: int = 0
    skipped: int = 0
    """Videos that an earlier run had done."""
    frames: int = 0
    seconds: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Videos that could not be done, and why."""

    def __str__(self) -> str:
        rate = self.frames / self.seconds if self.seconds else 0.0
        parts = [f"{self.videos} videos, {self.frames} frames in {self.seconds:.1f} s"]
        parts[0] += f" ({rate:.1f} per second)" if self.frames else ""
        if self.skipped:
            parts.append(f"{self.skipped} were done before")
        if self.failures:
            parts.append(f"{len(self.failures)} failed")
        return ", ".join(parts)


def predict_videos(
    paths: Sequence[Path],
    out: Path,
    runtime: Runtime,
    settings: PredictSettings,
    *,
    weights_hash: str,
    split: str | None = None,
) -> PredictReport:
    """Write saliency maps of videos below ``out``, a folder for each.

    What an earlier run wrote is kept: finished videos are skipped, and of a video that it was
    stopped in, frames that have their picture are not computed again.

    Args:
        paths: Videos, folders that are searched for them, data sets and catalogues.
        out: Where to write: ``<video>/maps/<frame>.png``, ``<video>/overlay.mp4`` and a record.
            Frames of a video file are numbered from 0, those that are images keep their names.
        runtime: The student.
        settings: What to write.
        weights_hash: SHA-256 of the student's file, which decides what can be kept.
        split: Take this split of data sets and catalogues alone.

    Raises:
        VideoError: If a path holds no video.
        PredictionError: If nothing can be written.
    """
    # An overlay lies beside its record; it is no video to predict, wherever ``out`` is.
    videos = [
        v for v in find_videos(paths, split=split) if not (v.absolute.parent / RECORD).is_file()
    ]
    frames = {video.id: _frames_told(video) for video in videos}
    report = PredictReport()
    total = sum(frames.values())
    with Progress(total, unit="frames", label="predict") as progress:
        for video in videos:
            try:
                record = _record(video, runtime, settings, weights_hash)
                if _is_done(out / video.id, record):
                    report.skipped += 1
                    progress.advance(frames[video.id])
                    continue
                began = time.monotonic()
                report.frames += _predict_video(video, out, runtime, settings, record, progress)
                report.seconds += time.monotonic() - began
                report.videos += 1
            except (VideoError, PredictionError) as error:
                log.warning("%s: %s", video.id, error)
                report.failures.append((video.id, str(error)))
                if isinstance(error, VideoError):
                    shutil.rmtree(_partial(out / video.id), ignore_errors=True)
            except OSError as error:
                raise PredictionError(
                    f"cannot write below {out}: {error.strerror or error}; what is there is kept, "
                    "and the same command continues"
                ) from error
    return report


def _predict_video(
    video: VideoFile,
    out: Path,
    runtime: Runtime,
    settings: PredictSettings,
    record: dict[str, Any],
    progress: Progress,
) -> int:
    """Write all of one video; return its number of frames."""
    header = read_header(video.absolute)
    if settings.overlay and not {header.height, header.width} <= set(OVERLAY_SIDES):
        raise VideoError(
            f"{video.absolute} has frames of {header.height}x{header.width}, an overlay can have "
            f"{OVERLAY_SIDES[0]} to {OVERLAY_SIDES[-1]} rows and columns; leave it out with "
            "--no-overlay"
        )
    folder = _begin(out / video.id, record)
    line = line_for(header.height, header.width)
    count = 0
    with ExitStack() as stack:
        named = _NamedFrames(video.absolute)
        overlay = None
        if settings.overlay:
            fps = header.fps or DEFAULT_FPS
            overlay = stack.enter_context(VideoWriter(folder / "overlay.mp4", fps=fps))
        writer = _Writer(folder, settings, overlay, line, named)
        stack.enter_context(closing(writer))
        mapped = map_frames(named, runtime, line=line, is_known=writer.has)
        for index, frame, saliency in stack.enter_context(closing(mapped)):
            writer.write(index, frame, saliency)
            progress.advance()
            count += 1
        writer.finish()
    (folder / RECORD).write_text(json.dumps(record | {"frames": count}, indent=1) + "\n")
    folder.replace(out / video.id)
    return count


class _NamedFrames:
    """Frames of a video, and what the map of each is called.

    Args:
        path: A video file, whose frames are numbered, or a folder of images, which have names.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stems: list[str] | None = None
        if path.is_dir():
            self._stems = []
            names = list_images(path)
            self._has_twins = len({Path(name).stem for name in names}) < len(names)

    def __iter__(self) -> Iterator[Frame]:
        if self._stems is None:
            yield from decode_video(self._path)
            return
        for name, frame in decode_images(self._path):
            self._stems.append(name if self._has_twins else Path(name).stem)
            yield frame

    def name_of(self, index: int) -> str:
        """Return the file name of a map, whose frame must have been read."""
        return f"{index:06d}.png" if self._stems is None else f"{self._stems[index]}.png"


class _Writer:
    """Draw and write in threads while the network computes; in order where order matters."""

    def __init__(
        self,
        folder: Path,
        settings: PredictSettings,
        overlay: VideoWriter | None,
        line: int,
        named: _NamedFrames,
    ) -> None:
        self._maps, self._settings, self._overlay = folder / "maps", settings, overlay
        self._line = line
        self._maps.mkdir(exist_ok=True)
        self._named = named
        self._known = {file.name for file in self._maps.iterdir()}
        self._pool = ThreadPoolExecutor(RENDER_THREADS, thread_name_prefix="render")
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")  # one: in order
        self._waiting: deque[Future[None]] = deque()

    def has(self, index: int) -> bool:
        """Return whether an earlier run has written a frame's map."""
        return self._named.name_of(index) in self._known

    def write(self, index: int, frame: Frame, saliency: Map | None) -> None:
        """Take the next frame; wait if too many are waiting."""
        drawn = self._pool.submit(self._draw, index, frame, saliency)
        self._waiting.append(self._encoder.submit(self._encode, drawn))
        while len(self._waiting) > self._line or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Write what is still waiting."""
        while self._waiting:
            self._waiting.popleft().result()
        if not self._settings.maps:
            self._maps.rmdir()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._encoder.shutdown(wait=True, cancel_futures=True)

    def _draw(self, index: int, frame: Frame, saliency: Map | None) -> npt.NDArray[np.uint8] | None:
        path = self._maps / self._named.name_of(index)
        if saliency is None:
            gray = _read_map(path, frame)
        else:
            if not np.isfinite(saliency).all():
                raise PredictionError(
                    f"the map of frame {index} is not finite; the student's weights are damaged"
                )
            height, width = frame.shape[:2]
            gray = finish_map(saliency, height, width, self._settings.post_processing)
            if self._settings.maps:
                partial = path.with_name(f"{path.name}.partial")
                Image.fromarray(gray).save(partial, format="png", compress_level=1)
                partial.replace(path)
        if self._overlay is None:
            return None
        rows, columns = (length - length % 2 for length in gray.shape)  # as H.264 wants it
        return overlay_gray(frame, gray)[:rows, :columns]

    def _encode(self, drawn: Future[npt.NDArray[np.uint8] | None]) -> None:
        picture = drawn.result()
        if self._overlay is not None and picture is not None:
            self._overlay.write(picture)


def _frames_told(video: VideoFile) -> int:
    try:
        return read_header(video.absolute).frames
    except VideoError:  # reported when its turn comes
        return 0


def _read_map(path: Path, frame: Frame) -> GrayMap:
    """Read a map that an earlier run wrote."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.mode == "L" and picture.size == (frame.shape[1], frame.shape[0]):
                return np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        pass
    raise PredictionError(f"{path} is not the map that a run left there; remove it")


def _record(
    video: VideoFile, runtime: Runtime, settings: PredictSettings, weights_hash: str
) -> dict[str, Any]:
    """Tell what decides the maps of a video."""
    return {
        "video": video.path,
        "video_sha256": hash_file(video.absolute).hex(),
        "weights_sha256": weights_hash,
        "config": runtime.config.to_dict(),
        "runtime": type(runtime).__name__,
        **asdict(settings),
    }


def _is_done(folder: Path, record: dict[str, Any]) -> bool:
    if not folder.exists():
        return False
    found = _read_record(folder)
    if {key: found.get(key) for key in record} == record:
        return True
    raise PredictionError(
        f"{folder} is there already and holds something else than this prediction; "
        "remove it, or choose another folder with --out"
    )


def _begin(folder: Path, record: dict[str, Any]) -> Path:
    """Return the folder to write into until all is done; keep what fits of an earlier run."""
    partial = _partial(folder)
    if partial.exists() and _read_record(partial) != record:
        shutil.rmtree(partial)
    if not partial.exists():
        partial.mkdir(parents=True)
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return partial


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
