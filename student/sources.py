"""Whose saliency maps are scored: a student, a folder of maps, a label set, or a baseline."""

from __future__ import annotations

import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import numpy.typing as npt

from stores.catalogue import CatalogueVideo
from stores.decode import decode_images, decode_video
from stores.errors import ImageError, TinyHDError, VideoError
from stores.ground_truth import GroundTruth
from stores.images import list_images, read_gray
from stores.pairing import pair_labels
from stores.shards import LabelSet
from stores.targets import TargetStore
from stores.videos import FileStamp, hash_file
from student.inference import line_for, map_frames
from student.predict import RECORD
from student.runtimes import Runtime, load_runtime

Item = TypeVar("Item")
AnyMap = npt.NDArray[Any]
"""A saliency map as it comes, ``(h, w)``."""
READ_TOGETHER: Final = 16
"""Maps that are read, or asked of a store, at once."""
CHECKPOINTS: Final = (".pt", ".pth", ".onnx")
NAME: Final = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
NUMBER: Final = re.compile(r"\d+")


class SourceError(TinyHDError):
    """Maps that are to be scored are not there, or cannot be read."""


class MapBatch(NamedTuple):
    """Maps of some frames of a video, read when they are asked for."""

    frames: Sequence[int]
    read: Callable[..., Sequence[AnyMap]]
    """Gives a map for each frame or, of an index, for that one; may be called in another thread."""


class Source(ABC):
    """Gives saliency maps of the videos of a data set.

    Args:
        name: What it is called in tables and files.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    is_8_bit = False
    """Whether its maps are pictures of 8 bits already."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides its maps, as plain values: scores of equal sources are equal."""

    def stamp(self, video: CatalogueVideo) -> str:
        """Return by what a video's maps are taken to be the same as before, if they may change.

        Raises:
            SourceError: If they are not there.
            VideoError: If the video is gone.
        """
        return ""

    def available(self, video: CatalogueVideo, truth: GroundTruth) -> set[int]:
        """Return the frames of which it has a map.

        Raises:
            SourceError: If it has nothing of the video.
        """
        return set(range(video.record.frames))

    @abstractmethod
    def batches(
        self, video: CatalogueVideo, truth: GroundTruth, frames: Sequence[int]
    ) -> Generator[MapBatch]:
        """Yield the maps of frames, which ascend.

        Raises:
            SourceError: If maps are not there.
            VideoError: If the video cannot be read.
        """


class StudentSource(Source):
    """A student that looks at the videos now.

    Args:
        name: What it is called.
        checkpoint: A checkpoint, or an ONNX file of ``tinyhd export``.
        device: Where PyTorch computes.
        batch: Clips at once.  Default: 1, or the ONNX file's.
    """

    def __init__(
        self, name: str, checkpoint: Path, *, device: str = "cpu", batch: int | None = None
    ) -> None:
        super().__init__(name)
        self._hash = hash_file(checkpoint).hex()
        kind: Any = "onnxruntime" if checkpoint.suffix == ".onnx" else "torch"
        if kind != "torch":
            device = "cpu"
        self._runtime: Runtime = load_runtime(checkpoint, runtime=kind, device=device, batch=batch)

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "student", "weights_sha256": self._hash}

    def stamp(self, video: CatalogueVideo) -> str:
        stamp = FileStamp.of(video.record.absolute)
        return f"{stamp.num_bytes} {stamp.modified_ns}"

    def batches(
        self, video: CatalogueVideo, truth: GroundTruth, frames: Sequence[int]
    ) -> Generator[MapBatch]:
        wanted = set(frames)
        path = video.record.absolute
        last = frames[-1] if frames else -1
        decoded = (f for _, f in decode_images(path)) if path.is_dir() else decode_video(path)
        mapped = map_frames(
            decoded,
            self._runtime,
            line=line_for(video.record.height, video.record.width),
            is_known=lambda index: index not in wanted,
        )
        numbers: list[int] = []
        maps: list[AnyMap] = []
        count = 0
        with closing(mapped):
            for number, _, saliency in mapped:
                count += 1
                if number in wanted and saliency is not None:
                    numbers.append(number)
                    maps.append(saliency)
                if len(maps) == READ_TOGETHER or (maps and number == last):
                    yield MapBatch(numbers, functools.partial(choose, maps))
                    numbers, maps = [], []
        if count != video.record.frames:
            raise VideoError(
                f"{path} has {count} frames, not {video.record.frames} as when it was scanned; "
                "scan it again"
            )


class FolderSource(Source):
    """Maps that any model has written as gray pictures, in a folder for each video.

    A video's folder is called by its id, and may have them in its own folder ``maps``; numbers
    need not be padded alike. Maps are called as the labels or the frames, numbered from 1, or as
    ``tinyhd predict`` calls them.

    Args:
        name: What it is called.
        folder: The folder.
    """

    is_8_bit = True

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self._folder = folder
        self._by_number = {
            int(entry.name): entry.name
            for entry in sorted(folder.iterdir())
            if NUMBER.fullmatch(entry.name) and entry.is_dir()
        }

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "folder"}  # what lies in it is told by its stamps

    def stamp(self, video: CatalogueVideo) -> str:
        folder = self._folder_of(video)
        digest = hashlib.sha256()
        for name in list_images(folder):
            stamp = FileStamp.of(folder / name)
            told = f"{name} {stamp.num_bytes} {stamp.modified_ns}\n"
            digest.update(told.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def batches(
        self, video: CatalogueVideo, truth: GroundTruth, frames: Sequence[int]
    ) -> Generator[MapBatch]:
        folder = self._folder_of(video)
        names = list_images(folder)
        frame_of = self._pair(folder, names, video, truth)
        paths = {frame: folder / name for frame, name in frame_of.items()}
        for frame in frames:
            if frame not in paths:
                raise SourceError(
                    f"{folder} has no map for frame {frame} of {video.record.id!r}, which would be "
                    f"called {truth.name_of(frame)}.png; it has {len(paths)} of the video's "
                    f"{video.record.frames}"
                )
        for begin in range(0, len(frames), READ_TOGETHER):
            part = frames[begin : begin + READ_TOGETHER]
            yield MapBatch(part, functools.partial(_read_all, [paths[frame] for frame in part]))

    def available(self, video: CatalogueVideo, truth: GroundTruth) -> set[int]:
        folder = self._folder_of(video)
        return set(self._pair(folder, list_images(folder), video, truth))

    def _pair(
        self, folder: Path, names: Sequence[str], video: CatalogueVideo, truth: GroundTruth
    ) -> dict[int, str]:
        stems = [Path(name).stem for name in names]
        frames = video.record.frames
        by_label = {truth.name_of(frame): frame for frame in range(frames)}
        found = [by_label.get(stem) for stem in stems]
        of_predict = any((place / RECORD).is_file() for place in (folder, folder.parent))
        if of_predict or None in found:
            by_number = pair_labels(stems, frames, video.frame_names())
            # A map too many does not change what the others are called by.
            if of_predict or by_number.count(None) < found.count(None):
                found = by_number
        return {frame: name for frame, name in zip(found, names, strict=True) if frame is not None}

    def _folder_of(self, video: CatalogueVideo) -> Path:
        id_ = video.record.id
        tried = [id_, id_.rpartition("/")[2]]
        if NUMBER.fullmatch(id_) and int(id_) in self._by_number:
            tried.append(self._by_number[int(id_)])
        for name in tried:
            for folder in (self._folder / name / "maps", self._folder / name):
                if folder.is_dir():
                    return folder
        raise SourceError(f"{self._folder} has no maps of {id_!r}: there is no folder {id_}")


class LabelSetSource(Source):
    """A teacher's stored soft targets; videos are known by their content.

    Args:
        name: What it is called.
        labels: The label set.
    """

    def __init__(self, name: str, labels: LabelSet) -> None:
        super().__init__(name)
        self._labels = labels

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": "labels", "fingerprint": self._labels.fingerprint}

    def stamp(self, video: CatalogueVideo) -> str:
        return str(self._labels.coverage(self._id_of(video)))

    def batches(
        self, video: CatalogueVideo, truth: GroundTruth, frames: Sequence[int]
    ) -> Generator[MapBatch]:
        labels = self._labels
        id_ = self._id_of(video)
        there = self.available(video, truth)
        for frame in frames:
            if frame not in there:
                raise SourceError(
                    f"frame {frame} of {video.record.id!r} is not labelled in {labels.name} of "
                    f"{labels.store.url}"
                )
        for run in _runs(frames, READ_TOGETHER):
            yield MapBatch(run, functools.partial(self._read, id_, run.start, run.stop))

    def available(self, video: CatalogueVideo, truth: GroundTruth) -> set[int]:
        spans = self._labels.coverage(self._id_of(video))
        return {frame for span in spans for frame in span}

    def _id_of(self, video: CatalogueVideo) -> str:
        store = self._labels.store
        row = store.find_content(video.record.content_hash)
        if row is None:
            raise SourceError(
                f"{store.url} does not know {video.record.absolute}; label it with tinyhd distill"
            )
        return row.id

    def _read(
        self, video: str, start: int, stop: int, index: int | None = None
    ) -> Sequence[AnyMap]:
        if index is not None:
            start, stop = start + index, start + index + 1
        saliency = self._labels.layout.saliency
        return list(self._labels.read_maps(video, start, stop, [saliency])[saliency])


def open_source(given: str, *, device: str = "cpu", batch: int | None = None) -> Source:
    """Open what is to be scored.

    Args:
        given: A checkpoint, a folder of maps, a store or ``STORE/labels/NAME``; with ``NAME=``
            before it, it is called so.
        device: Where a student computes.
        batch: Clips that it takes at once.

    Raises:
        SourceError: If it is nothing of that.
        TinyHDError: If it cannot be opened.
    """
    name, what = "", given
    if (match := NAME.fullmatch(given)) is not None and not Path(given).exists():
        name, what = match[1], match[2]
    store, _, labels = what.partition("/labels/")
    path = Path(what)
    if "://" in what or (Path(store) / "zarr.json").is_file():
        label_set = TargetStore.open(store).label_set(labels.strip("/") or None)
        return LabelSetSource(name or label_set.name, label_set)
    if path.is_dir():
        return FolderSource(name or path.resolve().name, path)
    if path.is_file():
        if path.suffix not in CHECKPOINTS:
            raise SourceError(
                f"{path} is no checkpoint, which ends in {' '.join(CHECKPOINTS)}, and no folder of "
                "maps"
            )
        own = path.stem if path.stem not in ("best", "last") else f"{path.parent.name}-{path.stem}"
        return StudentSource(name or own, path, device=device, batch=batch)
    raise SourceError(
        f"{what} is not there; give a checkpoint, a folder of maps, or STORE/labels/NAME"
    )


def choose(items: Sequence[Item], index: int | None = None) -> Sequence[Item]:
    """Return all items, or the one of an index."""
    return items if index is None else [items[index]]


def _read_all(paths: Sequence[Path], index: int | None = None) -> Sequence[AnyMap]:
    try:
        return [read_gray(path) for path in choose(paths, index)]
    except ImageError as error:
        raise SourceError(str(error)) from error


def _runs(frames: Sequence[int], at_most: int) -> Iterator[range]:
    """Yield ascending numbers as ranges without gaps."""
    begin = 0
    for end in range(1, len(frames) + 1):
        is_last = end == len(frames) or frames[end] != frames[end - 1] + 1
        if is_last or end - begin == at_most:
            yield range(frames[begin], frames[end - 1] + 1)
            begin = end
