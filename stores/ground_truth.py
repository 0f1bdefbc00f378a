"""What recorded eyes say of a frame: a continuous map, and where the eyes landed.

Labels are paired with frames by name where frames are images, else by number: ``0001.png`` is about
frame 0. Everything is read at the size in which it was recorded.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from stores.datasets import LabelFolders
from stores.errors import GroundTruthError, ImageError
from stores.images import (
    MAX_PIXELS,
    GrayImage,
    check_png,
    is_junk,
    list_images,
    natural_key,
    read_gray,
    read_size,
)
from stores.pairing import find_offset, pair_labels
from stores.videos import FileStamp

MAT_SUFFIX: Final = ".mat"
MAT_VARIABLE: Final = "I"
SHOWN: Final = 3
"""Files that a problem names."""

FixationMap = npt.NDArray[np.bool_]
"""Where eyes landed, ``(height, width)``."""


class FrameTruth(NamedTuple):
    """What recorded eyes say of one frame; nothing where that was not recorded."""

    density: GrayImage | None
    """The continuous map, 8 or 16 bits; black if no eye was on the frame."""
    fixations: FixationMap | None


class Points(NamedTuple):
    """Fixated pixels, one for each observer that was on the frame."""

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    observers: tuple[str, ...]
    """Who looked there; empty names where that is not told."""


@dataclass(frozen=True)
class LabelCensus:
    """What labels of a video there are, from a look at names, sizes and ends of files."""

    maps: int = 0
    """Frames with a continuous map."""
    fixations: int = 0
    """Frames with a fixation map or points."""
    labelled: int = 0
    """Frames with either."""
    problems: tuple[str, ...] = ()


class GroundTruth:
    """The recorded eyes of one video.

    Args:
        root: The data set's folder.
        labels: Where they lie below it.
        frames: Number of frames of the video.
        names: Names of the images that are its frames; nothing for a video file.
        dropped: Names of images beside them that are no frames.
        size: Height and width of the video; with it, labels of another size are an error.
    """

    def __init__(
        self,
        root: Path,
        labels: LabelFolders,
        *,
        frames: int,
        names: Sequence[str] | None = None,
        dropped: Sequence[str] = (),
        size: tuple[int, int] | None = None,
    ) -> None:
        self._root, self._labels, self._size = root, labels, size
        self.num_frames = frames
        self._names = names
        if names is not None and len(names) != frames:
            raise ValueError(f"{frames} frames with {len(names)} names")
        self._dropped = dropped
        maps, fixations = self._files(labels.maps), self._fixation_files()
        # One offset for all: a label that is missing must not move those of the other kind.
        stems = {path.stem for path in (*maps, *fixations)}
        images = self._images()
        number = frames if images is None else len(images)
        self._offset = labels.offset
        if self._offset is None:
            self._offset = find_offset(stems, number, images)
        self._maps, self._extra_maps = self._pair(maps)
        self._fixations, self._extra_fixations = self._pair(fixations)

    @cached_property
    def frames(self) -> list[int]:
        """Frames that have a map, a fixation map or points, in order."""
        return sorted({*self._maps, *self._fixations, *self._points})

    @property
    def has_observers(self) -> bool:
        """Whether it is told who looked where."""
        return any(any(points.observers) for points in self._points.values())

    def name_of(self, frame: int) -> str:
        """Return the file name of a frame's label, or what it would be, without its suffix."""
        if frame in self._maps:
            return self._maps[frame].stem
        if frame in self._fixations:
            return self._fixations[frame].stem
        if self._names is not None:
            return Path(self._names[frame]).stem
        return f"{frame + 1:04d}"

    def read(self, frame: int) -> FrameTruth:
        """Read the labels of a frame.

        Raises:
            GroundTruthError: If a file is damaged, or sizes differ.
        """
        truth = FrameTruth(self.read_density(frame), self.read_fixations(frame))
        if truth.density is not None and truth.fixations is not None:
            shapes = {self._maps[frame]: truth.density.shape}
            if frame in self._fixations:
                shapes[self._fixations[frame]] = truth.fixations.shape
            self._check_sizes(frame, shapes)
        return truth

    def read_density(self, frame: int) -> GrayImage | None:
        """Read the continuous map of a frame, if it has one.

        Raises:
            GroundTruthError: If it is damaged, or has another size than the frame.
        """
        path = self._maps.get(frame)
        if path is None:
            return None
        density = _read_gray(path)
        self._check_sizes(frame, {path: density.shape})
        return density

    def read_fixations(self, frame: int) -> FixationMap | None:
        """Read where eyes landed on a frame, if that was recorded.

        Raises:
            GroundTruthError: If the file is damaged, or has another size than the frame.
        """
        path = self._fixations.get(frame)
        if path is not None:
            is_mat = path.suffix.lower() == MAT_SUFFIX
            fixations = _read_mat(path) if is_mat else _read_fixation_image(path)
            self._check_sizes(frame, {path: fixations.shape})
            return fixations
        points = self.read_points(frame)
        if points is None:
            return None
        height, width = self._label_size(frame)
        return fixation_map(points.rows, points.columns, height, width)

    def read_points(self, frame: int) -> Points | None:
        """Return the fixated points of a frame, where the data set has a table of them."""
        return self._points.get(frame)

    def stamp(self, *, with_times: bool = True) -> str:
        """Return by what its files are taken to be the same as before, and about the same frames.

        Args:
            with_times: Whether files that were written anew are others; copies have other times.

        Raises:
            VideoError: If one is gone.
        """
        digest = hashlib.sha256()
        files = [*self._maps.items(), *self._fixations.items()]
        if self._labels.points:
            files.append((-1, self._root / self._labels.points))
        for frame, path in files:
            stamp = FileStamp.of(path)
            modified = stamp.modified_ns if with_times else ""
            told = f"{frame} {path.name} {stamp.num_bytes} {modified}\n"
            digest.update(told.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def label_stems(self) -> set[str]:
        """Return the names of all labels, without suffix."""
        paths = [*self._maps.values(), *self._fixations.values()]
        return {path.stem for path in (*paths, *self._extra_maps, *self._extra_fixations)}

    def census(self) -> LabelCensus:
        """Look at the labels without decoding them: pairing, sizes, whether files are cut off."""
        problems = []
        paired = len({*self._maps, *self._fixations})
        recorded = len(self.frames)
        if recorded and recorded < self.num_frames:
            problems.append(f"{self.num_frames} frames, {recorded} of them with labels")
        for what, extra, paired_files in (
            ("maps", self._extra_maps, self._maps),
            ("fixation maps", self._extra_fixations, self._fixations),
        ):
            if extra:
                number = len(extra) + len(paired_files)
                paths = [str(self._relative(path)) for path in extra]
                problems.append(
                    f"{len(extra)} of {number} {what} belong to none of the {self.num_frames} "
                    f"frames: {_some(paths)}"
                )
        bad: set[int] = set()
        for frame in self.frames if paired else ():
            sizes = {}
            for files in (self._maps, self._fixations):
                if (path := files.get(frame)) is None:
                    continue
                try:
                    sizes[path] = _quick_size(path)
                except ImageError as error:
                    problems.append(str(error))
                    bad.add(frame)
            try:
                known = {path: size for path, size in sizes.items() if size is not None}
                self._check_sizes(frame, known)
            except GroundTruthError as error:
                problems.append(str(error))
                bad.add(frame)
        return LabelCensus(
            maps=len(self._maps.keys() - bad),
            fixations=len((self._fixations.keys() | self._points.keys()) - bad),
            labelled=len(set(self.frames) - bad),
            problems=tuple(problems),
        )

    @cached_property
    def _points(self) -> Mapping[int, Points]:
        if not self._labels.points:
            return {}
        return _read_table(self._root / self._labels.points, self.num_frames)

    def _files(self, folder: str) -> list[Path]:
        if not folder:
            return []
        return [self._root / folder / name for name in list_images(self._root / folder)]

    def _fixation_files(self) -> list[Path]:
        """Return files of fixations; a ``.mat`` where there is no image of the same name."""
        if not (folder := self._labels.fixations):
            return []
        files = {path.stem: path for path in reversed(self._mats(f"{folder}/maps"))}
        files |= {path.stem: path for path in self._mats(folder)}
        files |= {
            path.stem: path for path in self._mats(self._labels.maps) if path.stem not in files
        }
        files |= {path.stem: path for path in self._files(folder)}
        return sorted(files.values(), key=lambda path: natural_key(path.stem))

    def _mats(self, folder: str) -> list[Path]:
        path = self._root / folder
        if not folder or not path.is_dir():
            return []
        try:
            names = sorted(name for name in os.listdir(path) if not is_junk(name))
        except OSError as error:
            raise GroundTruthError(f"cannot look into {path}: {error.strerror}") from error
        return [path / name for name in names if name.lower().endswith(MAT_SUFFIX)]

    def _pair(self, files: Sequence[Path]) -> tuple[dict[int, Path], list[Path]]:
        """Return files by the frame they are about, and those that are about none."""
        frame_of = self._frames_of([path.stem for path in files])
        paired: dict[int, Path] = {}
        extra = []
        for path, frame in zip(files, frame_of, strict=True):
            if frame is None or paired.setdefault(frame, path) != path:
                extra.append(path)
        return paired, extra

    def _images(self) -> list[str] | None:
        """Return all images, those that are no frames, too: they count where numbers tell pairs."""
        if self._names is None:
            return None
        return sorted([*self._names, *self._dropped], key=natural_key)

    def _frames_of(self, stems: Sequence[str]) -> list[int | None]:
        images = self._images()
        if images is None or self._names is None:
            return pair_labels(stems, self.num_frames, None, self._offset)
        frame_at = {name: frame for frame, name in enumerate(self._names)}
        ranks = pair_labels(stems, len(images), images, self._offset)
        return [None if rank is None else frame_at.get(images[rank]) for rank in ranks]

    def _check_sizes(self, frame: int, sizes: Mapping[Path, tuple[int, ...]]) -> None:
        if len(set(sizes.values())) > 1:
            told = [f"{path} is {_size(shape)}" for path, shape in sizes.items()]
            raise GroundTruthError(f"labels of one frame differ in size: {', '.join(told)}")
        for path, shape in sizes.items():
            if self._size is not None and shape != self._size:
                what = f"frame {frame}" if self._names is None else self._names[frame]
                raise GroundTruthError(
                    f"{path} is {_size(shape)}, and {what} of its video {_size(self._size)}"
                )

    def _label_size(self, frame: int) -> tuple[int, int]:
        if self._size is not None:
            return self._size
        if (path := self._maps.get(frame)) is not None:
            return _image_size(path)
        raise GroundTruthError(
            f"{self._root / self._labels.points} gives points, but the frames' size is not known"
        )

    def _relative(self, path: Path) -> Path:
        return path.relative_to(self._root)


def fixation_map(
    rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], height: int, width: int
) -> FixationMap:
    """Return a map of fixated points; those outside of it are left out."""
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    fixations = np.zeros((height, width), np.bool_)
    fixations[rows[inside], columns[inside]] = True
    return fixations


def move_points(
    rows: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
    size: tuple[int, int],
    new_size: tuple[int, int],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where points of a map lie in one of another size: pixel centres go with the map.

    Fixation maps are never resized as images: that would invent or lose fixations.
    """
    moved = (
        np.floor((values + 0.5) * new / old).astype(np.int64)
        for values, old, new in zip((rows, columns), size, new_size, strict=True)
    )
    new_rows, new_columns = moved
    return new_rows, new_columns


def resize_fixations(fixations: FixationMap, height: int, width: int) -> FixationMap:
    """Return a fixation map at another size, with its points moved."""
    if fixations.shape == (height, width):
        return fixations
    rows, columns = np.nonzero(fixations)
    moved = move_points(rows, columns, (fixations.shape[0], fixations.shape[1]), (height, width))
    return fixation_map(*moved, height, width)


def _read_gray(path: Path) -> GrayImage:
    try:
        return read_gray(path)
    except ImageError as error:
        raise GroundTruthError(str(error)) from error


def _read_fixation_image(path: Path) -> FixationMap:
    # JPEG rings around each fixation; everywhere else what is positive is one.
    least = 127 if path.suffix.lower() in (".jpg", ".jpeg") else 0
    return _read_gray(path) > least


def _read_mat(path: Path) -> FixationMap:
    """Read the variable ``I`` of a MATLAB file; nothing in it is run."""
    from scipy.io import loadmat, whosmat
    from scipy.sparse import issparse

    _check_regular(path)
    try:
        for name, shape, _ in whosmat(path):  # which reads no values
            if name == MAT_VARIABLE and math.prod(shape) > MAX_PIXELS:
                raise GroundTruthError(f"{path} says that it has {_size(shape)} pixels")
        content: dict[str, Any] = loadmat(path, variable_names=[MAT_VARIABLE])
    except GroundTruthError:
        raise
    except NotImplementedError as error:
        raise GroundTruthError(
            f"{path} is a MATLAB file of version 7.3; save it anew with -v7"
        ) from error
    except Exception as error:  # a damaged file makes the parser fail in any way
        raise GroundTruthError(f"cannot read {path}: {error}; is it damaged?") from error
    values = content.get(MAT_VARIABLE)
    if issparse(values) and values is not None and math.prod(values.shape) <= MAX_PIXELS:
        values = values.toarray()
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "buif":
        raise GroundTruthError(f"{path} has no map in a variable {MAT_VARIABLE!r}")
    return np.asarray(values > 0)


def _read_table(path: Path, frames: int) -> dict[int, Points]:
    """Read a table of points with columns ``frame`` (from 0), ``x``, ``y`` and maybe ``observer``.

    Points of frames that are not there are left out.
    """
    found: dict[int, list[tuple[int, int, str]]] = {}
    _check_regular(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            if missing := {"frame", "x", "y"} - set(table.fieldnames or ()):
                raise GroundTruthError(f"{path} has no column {sorted(missing)[0]!r}")
            for row in table:
                frame = int(row["frame"])
                point = (_pixel(row["y"]), _pixel(row["x"]), row.get("observer") or "")
                if 0 <= frame < frames:
                    found.setdefault(frame, []).append(point)
    except OSError as error:
        raise GroundTruthError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, OverflowError, csv.Error) as error:
        raise GroundTruthError(f"{path}, line {table.line_num}: {error}") from error
    return {
        frame: Points(
            np.array([row for row, _, _ in points], np.int64),
            np.array([column for _, column, _ in points], np.int64),
            tuple(observer for _, _, observer in points),
        )
        for frame, points in found.items()
    }


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise GroundTruthError(f"{path} is no regular file")


def _pixel(coordinate: str) -> int:
    """Return the pixel that a point lies in."""
    pixel = math.floor(float(coordinate))
    if abs(pixel) > MAX_PIXELS:
        raise ValueError(f"{coordinate} is no place in a picture")
    return pixel


def _quick_size(path: Path) -> tuple[int, int] | None:
    """Return a file's size as its head tells it; nothing for a ``.mat``, whose head does not."""
    if path.suffix.lower() == MAT_SUFFIX:
        try:
            is_empty = not path.stat().st_size
        except OSError as error:
            raise ImageError(f"cannot read {path}: {error.strerror}") from error
        if is_empty:
            raise ImageError(f"{path} is empty")
        return None
    return check_png(path) if path.suffix.lower() == ".png" else read_size(path)


def _image_size(path: Path) -> tuple[int, int]:
    try:
        return read_size(path)
    except ImageError as error:
        raise GroundTruthError(str(error)) from error


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
