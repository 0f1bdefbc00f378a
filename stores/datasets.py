"""Data sets as they lie on disk: which kind, which videos, which splits, where recorded eyes lie.

Nothing is opened here but folders; what videos and labels hold is found out by
:mod:`stores.catalogue`. Folders are matched by the number in their name, not by its spelling, and
what file browsers and archives leave behind is passed over.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, get_args

from stores.errors import DatasetError, VideoError
from stores.images import IMAGE_SUFFIXES, is_junk, natural_key
from stores.videos import VIDEO_SUFFIXES, VideoFile

Kind = Literal["dhf1k", "hollywood2", "ucf", "kinetics", "plain"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
KIND_NAMES: Final[Mapping[Kind, str]] = {
    "dhf1k": "DHF1K",
    "hollywood2": "Hollywood-2",
    "ucf": "UCF-Sports",
    "kinetics": "Kinetics",
    "plain": "plain folder",
}
SPLITS: Final = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of folders that are splits, in lower case."""
VIDEO_FOLDERS: Final = ("video", "videos", "frames")
FIXATION_FOLDERS: Final = ("fixation", "fixations")
LABEL_FOLDERS: Final = ("maps", *FIXATION_FOLDERS)
POINTS: Final = "fixations.csv"
NUMBER: Final = re.compile(r"\d{1,5}")
SHOT: Final = re.compile(r"actionclip(train|test)\d{5}_\d+")
ACTION: Final = re.compile(r"[A-Za-z]+(-[A-Za-z]+)*-\d{3}")
UCF_ACTION: Final = re.compile(
    r"(Diving-Side|Golf-Swing-(Back|Front|Side)|Kicking-(Front|Side)|Lifting|Riding-Horse|Run-Side"
    r"|SkateBoarding-Front|Swing-(Bench|SideAngle)|Walk-Front)-\d{3}"
)
"""Own folders may be called as UCF-Sports' are, but not all of them after its classes."""
YOUTUBE: Final = re.compile(r".{11}_\d{6}_\d{6}")
KINETICS_SPLIT: Final = re.compile(r"(train|training|val|valid|validation|test|testing)(_\d+)?")
NESTED: Final = 3
"""Folders with nothing else in them that may lie around a data set."""


@dataclass(frozen=True)
class LabelFolders:
    """Where a video's recorded eyes lie; paths are relative to the data set, empty if not there."""

    maps: str = ""
    """Folder of continuous maps."""
    fixations: str = ""
    """Folder of fixation maps: images, or ``.mat`` files in it or its folder ``maps``."""
    points: str = ""
    """Table of fixated points; see :mod:`stores.ground_truth`."""
    offset: int | None = None
    """By how much labels are numbered higher than frames; nothing where they tell it themselves."""

    def __bool__(self) -> bool:
        return bool(self.maps or self.fixations or self.points)


@dataclass(frozen=True)
class DatasetVideo:
    """A video of a data set, not yet opened."""

    file: VideoFile
    splits: tuple[str, ...] = ()
    labels: LabelFolders = LabelFolders()


@dataclass
class Dataset:
    """A data set whose folders were looked at."""

    kind: Kind
    root: Path
    videos: list[DatasetVideo] = field(default_factory=list)
    """In natural order of their ids."""
    problems: list[str] = field(default_factory=list)
    """What is not as it should be, but hinders nothing else."""

    def choose(self, split: str | None) -> list[DatasetVideo]:
        """Return the videos of a split; all if none is given.

        Raises:
            DatasetError: If there is no such split.
        """
        return choose_split(self.videos, split, lambda video: video.splits, str(self.root))


def choose_split(
    videos: list[Any], split: str | None, splits_of: Callable[[Any], tuple[str, ...]], where: str
) -> list[Any]:
    """Return the videos of a split; all if none is given.

    Raises:
        DatasetError: If there is no such split.
    """
    if split is None:
        return videos
    chosen = [video for video in videos if split in splits_of(video)]
    if not chosen:
        there = sorted({name for video in videos for name in splits_of(video)})
        raise DatasetError(
            f"{where} has no split {split!r}; it has {', '.join(there) or 'no splits'}"
        )
    return chosen


def find_dataset(root: Path, kind: Kind | None = None) -> Dataset:
    """Look at a folder and find out which data set it is and what videos it has.

    Args:
        root: The folder; folders that hold no video and one folder may lie around the data set.
        kind: Which data set; recognised if not given.

    Raises:
        DatasetError: If it is no folder, or holds no video of the kind.
        VideoError: If a folder cannot be looked into.
    """
    if not root.is_dir():
        raise DatasetError(f"{root} is no folder; give the folder of a data set or of videos")
    if kind is not None and kind not in KINDS:
        raise DatasetError(f"there is no kind {kind!r} of data sets; there are {', '.join(KINDS)}")
    inner = root = root.resolve()
    for _ in range(NESTED + 1):
        tree = _Tree(inner)
        for name, finder in _FINDERS.items():
            if kind in (None, name) and (dataset := finder(tree)) is not None:
                _tell_strangers(dataset, tree)
                _order(dataset)
                return dataset
        if len(tree.folders()) != 1 or any(map(_is_media, tree.files())):
            break
        inner = inner / tree.folders()[0]
    if kind not in (None, "plain"):
        raise DatasetError(
            f"{root} is not laid out as {KIND_NAMES[kind]}; see docs/datasets.md, or let its "
            "kind be recognised"
        )
    dataset = _find_plain(_Tree(root))
    if not dataset.videos:
        raise DatasetError(
            f"no videos in {root}; files ending in {' '.join(VIDEO_SUFFIXES)} and folders of "
            f"images ({' '.join(IMAGE_SUFFIXES)}) are looked for"
        )
    _order(dataset)
    return dataset


def _tell_strangers(dataset: Dataset, tree: _Tree) -> None:
    """Tell of video files that lie in a data set and are not of it."""
    known = {video.file.path for video in dataset.videos}
    strangers = []
    for path in _walk(tree):
        prefix = f"{path}/" if path else ""
        names = (prefix + name for name in tree.files(path) if _is_video(name))
        strangers += [name for name in names if name not in known]
    if strangers:
        shown = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        dataset.problems.append(
            f"{len(strangers)} videos are not of {KIND_NAMES[dataset.kind]} and passed over "
            f"({shown}); to take all, scan it as --kind plain"
        )


def _order(dataset: Dataset) -> None:
    """Sort a data set; give those an id with their split whose own ids are not unique."""
    counts = Counter(video.file.id for video in dataset.videos)
    if dataset.kind in ("hollywood2", "ucf"):
        for index, video in enumerate(dataset.videos):
            if counts[video.file.id] > 1:
                file = video.file
                unique = f"{video.splits[0]}/{file.id}" if video.splits else file.id
                dataset.videos[index] = DatasetVideo(
                    VideoFile(unique, file.root, file.path), video.splits, video.labels
                )
    dataset.videos.sort(key=lambda video: natural_key(video.file.id))


class _Tree:
    """Folders below a root, looked at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._entries: dict[str, tuple[list[str], list[str]]] = {}

    def folders(self, path: str = "") -> list[str]:
        """Return the names of the folders in a folder, in natural order."""
        return self._look(path)[0]

    def files(self, path: str = "") -> list[str]:
        """Return the names of the files in a folder, in natural order."""
        return self._look(path)[1]

    def has(self, path: str) -> bool:
        """Return whether a folder is there."""
        parent, _, name = path.rpartition("/")
        return name in self.folders(parent)

    def has_images(self, path: str) -> bool:
        """Return whether a folder is there and holds an image."""
        return self.has(path) and any(map(_is_image, self.files(path)))

    def splits(self, pattern: re.Pattern[str] | None = None) -> list[tuple[str, str]]:
        """Return folders that are splits, with the name of the split."""
        found = []
        for name in self.folders():
            match = pattern.fullmatch(name.lower()) if pattern is not None else None
            split = SPLITS.get(match[1] if match is not None else name.lower())
            if split is not None:
                found.append((name, split))
        return found

    def labels(self, base: str) -> LabelFolders:
        """Return what recorded eyes a folder holds."""
        if base and not self.has(base):
            return LabelFolders()
        folders, prefix = self.folders(base), f"{base}/" if base else ""
        fixations = next((name for name in FIXATION_FOLDERS if name in folders), "")
        return LabelFolders(
            maps=f"{prefix}maps" if "maps" in folders else "",
            fixations=f"{prefix}{fixations}" if fixations else "",
            points=f"{prefix}{POINTS}" if POINTS in self.files(base) else "",
        )

    def video(self, id_: str, path: str) -> VideoFile:
        return VideoFile(id_, self.root, path)

    def _look(self, path: str) -> tuple[list[str], list[str]]:
        if path not in self._entries:
            folders: list[str] = []
            files: list[str] = []
            try:
                with os.scandir(self.root / path) as entries:
                    for entry in entries:
                        if not is_junk(entry.name):
                            (folders if _is_folder(entry) else files).append(entry.name)
            except OSError as error:
                raise VideoError(f"cannot look into {error.filename}: {error.strerror}") from error
            self._entries[path] = (
                sorted(folders, key=natural_key),
                sorted(files, key=natural_key),
            )
        return self._entries[path]


def _find_dhf1k(tree: _Tree) -> Dataset | None:
    """Find DHF1K in the layouts in circulation; videos and labels are matched by number."""
    places = [""] + [name for name, _ in tree.splits()]
    videos: dict[int, str] = {}
    labels: dict[int, LabelFolders] = {}
    dataset = Dataset("dhf1k", tree.root)
    looks_alike = has_strangers = False

    def add_video(number: int, path: str) -> None:
        if videos.setdefault(number, path) != path:
            dataset.problems.append(f"{path} is passed over, as {videos[number]} has its number")

    def add_labels(number: int, base: str) -> None:
        if not (found := tree.labels(base)):
            return
        if labels.setdefault(number, found) != found:
            dataset.problems.append(f"{base} is passed over: its number has labels already")

    for place in places:
        prefix = f"{place}/" if place else ""
        for folder in (f"{prefix}{name}" for name in VIDEO_FOLDERS if tree.has(f"{prefix}{name}")):
            for name in tree.files(folder):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() not in VIDEO_SUFFIXES:
                    continue
                if NUMBER.fullmatch(stem):
                    add_video(int(stem), f"{folder}/{name}")
                    looks_alike |= len(stem) in (3, 4) and suffix.lower() == ".avi"
                else:
                    has_strangers = True
            for name in filter(NUMBER.fullmatch, tree.folders(folder)):
                if int(name) not in videos and tree.has_images(f"{folder}/{name}"):
                    add_video(int(name), f"{folder}/{name}")
        # annotation/0001 with or without images in it; or <split>/0001 with everything in it.
        for base in (f"{prefix}annotation", f"{prefix}annotations", place):
            if base and not tree.has(base):
                continue
            for name in filter(NUMBER.fullmatch, tree.folders(base)):
                inner = f"{base}/{name}" if base else name
                add_labels(int(name), inner)
                if int(name) not in videos and tree.has_images(f"{inner}/images"):
                    add_video(int(name), f"{inner}/images")
    has_labels = not labels.keys().isdisjoint(videos)
    if not (has_labels or (looks_alike and not has_strangers)):
        return None
    for number, path in sorted(videos.items()):
        file = tree.video(f"{number:04d}", path)
        found = labels.get(number, LabelFolders())
        if found and path.lower().endswith(VIDEO_SUFFIXES):
            found = replace(found, offset=1)  # of all videos of this data set
        dataset.videos.append(DatasetVideo(file, dhf1k_splits(number), found))
    if labels:
        bare = [n for n in videos if n not in labels and "test" not in dhf1k_splits(n)]
        _report(dataset, bare, "without recorded eyes; was the archive unpacked whole?")
    _report(dataset, sorted(labels.keys() - videos.keys()), "with labels have no video")
    return dataset


def _report(dataset: Dataset, numbers: list[int], what: str) -> None:
    if numbers:
        shown = ", ".join(f"{number:04d}" for number in numbers[:5])
        more = ", ..." if len(numbers) > 5 else ""
        dataset.problems.append(f"{len(numbers)} videos {what} ({shown}{more})")


def _find_hollywood2(tree: _Tree) -> Dataset | None:
    return _find_sequences(tree, "hollywood2", SHOT)


def _find_ucf(tree: _Tree) -> Dataset | None:
    dataset = _find_sequences(tree, "ucf", ACTION)
    if dataset is None or not any(UCF_ACTION.fullmatch(v.file.id) for v in dataset.videos):
        return None
    return dataset


def _find_sequences(tree: _Tree, kind: Kind, pattern: re.Pattern[str]) -> Dataset | None:
    """Find folders of images whose names fit a pattern, in folders of splits or in one of them."""
    dataset = Dataset(kind, tree.root)
    places = tree.splits() or [("", SPLITS.get(tree.root.name.lower(), ""))]
    for place, split in places:
        prefix = f"{place}/" if place else ""
        for name in filter(pattern.fullmatch, tree.folders(place)):
            base = f"{prefix}{name}"
            labels = tree.labels(base)
            if tree.has_images(f"{base}/images"):
                own = split
                if not own and (match := SHOT.fullmatch(name)) is not None:
                    own = match[1]
                file = tree.video(name, f"{base}/images")
                dataset.videos.append(DatasetVideo(file, (own,) if own else (), labels))
            elif labels:
                dataset.problems.append(f"{base} has labels, but no images")
    return dataset if dataset.videos else None


def _find_kinetics(tree: _Tree) -> Dataset | None:
    """Find Kinetics-400: folders of splits with folders of classes or, flat, with videos."""
    dataset = Dataset("kinetics", tree.root)
    is_certain = False
    for place, split in tree.splits(KINETICS_SPLIT):
        for folder in ("", *tree.folders(place)):
            inner = f"{place}/{folder}" if folder else place
            for name in tree.files(inner):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in VIDEO_SUFFIXES:
                    is_certain |= bool(YOUTUBE.fullmatch(stem))
                    file = tree.video(f"{inner}/{stem}", f"{inner}/{name}")
                    dataset.videos.append(DatasetVideo(file, (split,)))
    return dataset if is_certain else None


def _find_plain(tree: _Tree) -> Dataset:
    """Find videos and folders of images, to the bottom; ``train/``, ``val/``, ``test/`` are splits.

    The eyes recorded for ``a.mp4`` lie in ``a/maps`` and ``a/fixation``, those for images in
    ``a/images`` beside it, those for images in ``a`` in ``a/maps`` and ``a/fixation``.
    """
    dataset = Dataset("plain", tree.root)
    for path in _walk(tree):
        prefix = f"{path}/" if path else ""
        names = list(filter(_is_video, tree.files(path)))
        for name in names:
            stem = os.path.splitext(name)[0]
            id_ = prefix + stem
            labels = tree.labels(prefix + stem) if stem in tree.folders(path) else LabelFolders()
            dataset.videos.append(
                DatasetVideo(tree.video(id_, prefix + name), _plain_splits(id_), labels)
            )
        if names or not any(map(_is_image, tree.files(path))):
            continue  # pictures beside videos are covers and the like
        base, _, last = path.rpartition("/")
        base = base if last == "images" else path
        id_ = base or tree.root.name
        file = tree.video(id_, path or ".")
        dataset.videos.append(DatasetVideo(file, _plain_splits(id_), tree.labels(base)))
    return dataset


def _walk(tree: _Tree) -> Iterator[str]:
    """Yield the folders of a tree, but those of labels; links are followed, once."""
    seen: set[str] = set()
    left = [""]
    while left:
        path = left.pop()
        if (real := os.path.realpath(tree.root / path)) in seen:
            continue
        seen.add(real)
        yield path
        inner = [name for name in tree.folders(path) if name not in LABEL_FOLDERS]
        left += [f"{path}/{name}" if path else name for name in reversed(inner)]


def _plain_splits(id_: str) -> tuple[str, ...]:
    first, _, rest = id_.partition("/")
    return (SPLITS[first.lower()],) if rest and first.lower() in SPLITS else ()


_FINDERS: Final[Mapping[Kind, Callable[[_Tree], Dataset | None]]] = {
    "dhf1k": _find_dhf1k,
    "hollywood2": _find_hollywood2,
    "ucf": _find_ucf,
    "kinetics": _find_kinetics,
}


def dhf1k_splits(number: int) -> tuple[str, ...]:
    """Return the splits of DHF1K that a video's number is in, wherever it lies.

    ``train``, ``val`` and ``test`` are the official ones; ``train540`` and ``val60`` part the
    training videos, so that what is reported on ``val`` chose nothing.
    """
    lists = _dhf1k_lists()
    return tuple(name for name, numbers in lists.items() if number in numbers)


@cache
def _dhf1k_lists() -> dict[str, frozenset[int]]:
    data = json.loads((resources.files("stores") / "splits" / "dhf1k.json").read_text())
    lists = {
        name: frozenset(range(first, last + 1)) for name, (first, last) in data["official"].items()
    }
    val60 = frozenset(data["val60"]["numbers"])
    return {**lists, "train540": lists["train"] - val60, "val60": val60}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES)


def _is_media(name: str) -> bool:
    return name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)
