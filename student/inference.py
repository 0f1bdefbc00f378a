"""From frames to saliency maps: a student slid over a video, whatever becomes of its maps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from stores.ahead import read_ahead
from stores.decode import Frame
from student.config import CLIP_FRAMES, TinyHDConfig
from student.pictures import Map
from student.runtimes import Runtime
from student.streaming import PASSED_BY
from student.tinyhd import normalise_frames

FRAMES_IN_LINE: Final = range(2, 33)
"""Least and most frames that may be read ahead, and that may wait for what comes after."""
LINE_BYTES: Final = 64 * 2**20
"""What they should not exceed; large frames wait in shorter lines."""

Item = TypeVar("Item")
Pixels = npt.NDArray[np.float32]
"""A frame as the network wants it, ``(3, H, W)``."""


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


def map_frames(
    frames: Iterable[Frame],
    runtime: Runtime,
    *,
    line: int = FRAMES_IN_LINE[-1],
    is_known: Callable[[int], bool] = lambda index: False,
) -> Generator[tuple[int, Frame, Map | None]]:
    """Yield every frame of a video with its number and its saliency map, in order.

    Args:
        frames: Frames of one video, from its first; they are read ahead in a thread.
        runtime: The student.
        line: Frames that are read ahead.
        is_known: Tells whether the map of a frame is not wanted, as it is known already; where a
            whole window is not wanted, it is not computed.

    Yields:
        Number, frame, and its map at the student's size; nothing where no window was computed.
    """
    runtime.begin_video()
    with closing(read_ahead(_prepare(frames, runtime.config), line)) as prepared:
        yield from _mapped(prepared, runtime, is_known)


def line_for(height: int, width: int) -> int:
    """Return how many frames of a size may wait in a line."""
    line = LINE_BYTES // max(1, 3 * height * width)
    return min(max(line, FRAMES_IN_LINE[0]), FRAMES_IN_LINE[-1])


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
