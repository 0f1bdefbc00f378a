"""Decode with scikit-video's FFmpeg reader, the alternative to PyAV.

scikit-video 1.1.11 was written for a numpy that still had ``np.float`` and ``np.int``. They are
given back to its two reader modules alone, through a stand-in for their name ``np``: numpy itself,
and with it the rest of the process, stays as it is. ffmpeg and ffprobe must be installed.
"""

from __future__ import annotations

import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stores.errors import VideoError


class _NumpyOfOld(types.ModuleType):
    """numpy with the two names that scikit-video's readers use and numpy 2 no longer has."""

    float = float
    int = int

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any name of numpy
        return getattr(np, name)


def decode_frames(path: Path) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield every frame of a video, ``(height, width, 3)`` RGB.

    Raises:
        VideoError: If ffmpeg is not installed or the video cannot be opened.
    """
    io = _load()
    try:
        # passthrough: a frame per decoded frame, none doubled or dropped to keep a rate;
        # bilinear: the conversion to RGB that PyAV does.
        reader = io.FFmpegReader(
            str(path), outputdict={"-vsync": "passthrough", "-sws_flags": "bilinear"}
        )
    except (AttributeError, KeyError, ValueError, AssertionError, OSError) as error:
        # scikit-video has no errors of its own: a file without video shows as one of these.
        raise VideoError(f"cannot open {path} as a video with scikit-video") from error
    try:
        yield from reader.nextFrame()
    finally:
        process = reader._proc
        reader.close()
        for pipe in (process.stdin, process.stdout, process.stderr):  # it leaves them open
            pipe.close()
        process.wait()


def ffmpeg_version() -> str:
    """Return the version that ``ffmpeg -version`` tells.

    Raises:
        VideoError: If ffmpeg or ffprobe is not installed.
    """
    _load()
    first = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True)
    return first.stdout.split()[2]


def _load() -> Any:  # noqa: ANN401 - an untyped module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escape sequences in its source that Python deprecates
        import skvideo
        import skvideo.io
    if not skvideo._HAS_FFMPEG:
        raise VideoError(
            "scikit-video needs ffmpeg and ffprobe on the PATH; install them or use --reader pyav"
        )
    stand_in = _NumpyOfOld("numpy")
    for name in ("skvideo.io.abstract", "skvideo.io.ffmpeg"):
        sys.modules[name].np = stand_in  # type: ignore[attr-defined]
    return skvideo.io
