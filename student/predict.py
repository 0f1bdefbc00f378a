"""A saliency map for every frame of a video: as pictures, and laid over the video."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from stores.ahead import read_ahead
from stores.decode import Frame, decode_images, decode_video, read_header
from stores.errors import TinyHDError, VideoError
from stores.finding import find_videos
from stores.images import list_images
from stores.progress import Progress
from stores.videos import VideoFile, hash_file
from student.config import CLIP_FRAMES, TinyHDConfig
from student.pictures import GrayMap, Map, VideoWriter, gray_map, overlay_gray, resize_map
from student.runtimes import Runtime
from student.streaming import PASSED_BY
from student.tinyhd import normalise_frames

log = logging.getLogger(__name__)

RENDER_THREADS: Final = 2
FRAMES_IN_LINE: Final = range(2, 33)
"""Least and most frames that may be read ahead, and that may wait to be drawn and written."""
LINE_BYTES: Final = 64 * 2**20
"""What they should not exceed; large frames wait in shorter lines."""
OVERLAY_SIDES: Final = range(2, 16385)
"""Rows or columns that H.264 holds, as its encoder has it."""
DEFAULT_FPS: Final = Fraction(25)
"""Of an overlay whose video does not tell its own."""
RECORD: Final = "prediction.json"

PostProcessing = Literal["plain", "paper"]
Item = TypeVar("Item")


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


class Window(NamedTuple, Generic[Item]):
    """Frames that the network sees at once."""

    frames: tuple[Item, ...]
    """Oldest first; before the video's beginning, its first frame is repeated."""
    newest: int
    """Index of the newest frame."""


def clip_windows(frames: Iterable[Item], *, output_frames: int) -> Iterator[Window[Item]]:
    """Slide over a video so that every frame is among the newest ``output_frames`` of a window.

    A TinyHD-S gets a window for each frame, a TinyHD-M windows that do not overlap in the frames
    they map; but the last window ends with the video (TinyHD's published evaluation does so).
    """
    ring: deque[Item] = deque(maxlen=CLIP_FRAMES)
    count = 0
    for frame in frames:
        ring.extend([frame] if count else [frame] * CLIP_FRAMES)
        count += 1
        if count % output_frames == 0:
            yield Window(tuple(ring), count - 1)
    if count % output_frames:
        yield Window(tuple(ring), count - 1)


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
    line = LINE_BYTES // max(1, 3 * header.height * header.width)
    line = min(max(line, FRAMES_IN_LINE[0]), FRAMES_IN_LINE[-1])
    runtime.begin_video()
    count = 0
    with ExitStack() as stack:
        named = _NamedFrames(video.absolute)
        prepared = _prepare(named, runtime.config)
        frames = stack.enter_context(closing(read_ahead(prepared, line)))
        overlay = None
        if settings.overlay:
            fps = header.fps or DEFAULT_FPS
            overlay = stack.enter_context(VideoWriter(folder / "overlay.mp4", fps=fps))
        writer = _Writer(folder, settings, overlay, line, named)
        stack.enter_context(closing(writer))
        for index, frame, saliency in _mapped(frames, runtime, writer.has):
            writer.write(index, frame, saliency)
            progress.advance()
            count += 1
        writer.finish()
    (folder / RECORD).write_text(json.dumps(record | {"frames": count}, indent=1) + "\n")
    folder.replace(out / video.id)
    return count


Pixels = npt.NDArray[np.float32]
"""A frame as the network wants it, ``(3, H, W)``."""


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


def _prepare(frames: Iterable[Frame], config: TinyHDConfig) -> Iterator[tuple[Frame, Pixels]]:
    """Resize frames without rounding, as the published evaluation does."""
    size = (config.height, config.width)
    for frame in frames:
        picture = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
        resized = F.interpolate(picture, size, mode="bilinear").permute(0, 2, 3, 1)
        clip = normalise_frames(resized[None])  # 1 3 1 H W
        yield frame, clip[0, :, 0].contiguous().numpy()


def _mapped(
    frames: Iterable[tuple[Frame, Pixels]], runtime: Runtime, is_known: Callable[[int], bool]
) -> Iterator[tuple[int, Frame, Map | None]]:
    """Yield every frame with its map, in order; without a map where it is known already.

    A frame waits until no later window can map it again: the last one overlaps the one before.
    """
    number = runtime.config.output_frames
    natives: dict[int, Frame] = {}
    waiting: dict[int, Map | None] = {}

    def pixels() -> Iterator[Pixels]:
        for index, (frame, resized) in enumerate(frames):
            natives[index] = frame
            yield resized

    passed: deque[Window[Pixels]] = deque(maxlen=PASSED_BY)
    windows = clip_windows(pixels(), output_frames=number)
    while batch := list(islice(windows, runtime.batch)):
        wanted = [window for window in batch if not all(map(is_known, _indices(window, number)))]
        newest = [window.newest for window in wanted]
        passed.extend(window for window in batch if window.newest not in newest)
        if wanted:
            for window in passed:
                runtime.pass_by(_clips([window]), newest=[window.newest])
            passed.clear()
        maps = iter(runtime.predict(_clips(wanted), newest=newest) if wanted else ())
        for window in batch:
            indices = _indices(window, number)
            is_wanted = window.newest in newest
            window_maps = next(maps)[-len(indices) :] if is_wanted else [None] * len(indices)
            for index in [index for index in waiting if index < indices[0]]:
                yield index, natives.pop(index), waiting.pop(index)
            waiting.update(zip(indices, window_maps, strict=True))
    for index, saliency in waiting.items():
        yield index, natives.pop(index), saliency


def _indices(window: Window[Pixels], number: int) -> range:
    return range(max(0, window.newest + 1 - number), window.newest + 1)


def _clips(windows: Sequence[Window[Pixels]]) -> npt.NDArray[np.float32]:
    """Return ``(B, 3, 16, H, W)``."""
    return np.stack([np.stack(window.frames, 1) for window in windows])


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


def finish_map(saliency: Map, height: int, width: int, how: PostProcessing) -> GrayMap:
    """Make a map of the network visible at a video's size.

    ``paper`` follows TinyHD's published evaluation: scaled between minimum and maximum, cut to 8
    bits, resized bicubically (a = -0.75), blurred with a Gaussian of 5x5 pixels and sigma 1.1.

    Args:
        saliency: ``(h, w)``.
        height: Rows of the result.
        width: Columns of the result.
        how: ``plain`` or ``paper``.

    Returns:
        ``(height, width)``; a constant map is black.
    """
    if how == "plain":
        return gray_map(resize_map(saliency, height, width))
    low, high = float(saliency.min()), float(saliency.max())
    scaled = (saliency - low) / (high - low) * 255 if high > low else np.zeros_like(saliency)
    gray = torch.from_numpy(np.floor(scaled))[None, None]
    resized = F.interpolate(gray, (height, width), mode="bicubic").round().clamp(0, 255)
    offsets = torch.arange(-2, 3, dtype=torch.float32)
    kernel = torch.exp(-offsets.square() / (2 * 1.1**2))
    kernel = kernel / kernel.sum()
    border = "reflect" if min(height, width) > 2 else "replicate"  # too small to reflect in
    padded = F.pad(resized, (2, 2, 2, 2), mode=border)
    blurred = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 5, 1)), kernel.view(1, 1, 1, 5))
    return blurred.round().clamp(0, 255)[0, 0].numpy().astype(np.uint8)


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
