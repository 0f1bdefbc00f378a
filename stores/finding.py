"""Find the videos that a user names: files, folders, data sets, catalogues and lists."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from stores.catalogue import CATALOGUE_SUFFIX, Catalogue
from stores.datasets import find_dataset
from stores.errors import DatasetError, VideoError
from stores.videos import VideoFile


def find_videos(
    paths: Sequence[Path], lists: Sequence[Path] = (), *, split: str | None = None
) -> list[VideoFile]:
    """Return the videos in files, folders, data sets, catalogues and lists, by id.

    A folder is searched to its bottom; if it is a data set that is known, its videos are called as
    there, else by their path below it. A file is called by its name. A list names a video in each
    line; one that ends in ``.csv`` has a column ``path`` and may have a column ``id``. Paths in a
    list are relative to its folder, and without an id name the video.

    Args:
        paths: Files, folders and catalogues of ``tinyhd data scan``.
        lists: Lists of videos.
        split: Take only the videos of a split from folders and catalogues.

    Raises:
        VideoError: If a path is not there, holds no video, or two videos would get one id.
        DatasetError: If nothing has such a split, or a catalogue is damaged.
    """
    found: dict[str, VideoFile] = {}
    for path in paths:
        if not path.exists():
            raise VideoError(f"{path} does not exist; give a video file or a folder of videos")
        if path.is_dir():
            files = [video.file for video in find_dataset(path).choose(split)]
        elif path.suffix.lower() == CATALOGUE_SUFFIX:
            files = [video.file for video in Catalogue.load(path).choose(split)]
        elif split is not None:
            raise DatasetError(f"{path} is a single file, which has no split {split!r}")
        else:
            files = [VideoFile(_id_of(path.name), path.parent.resolve(), path.name)]
        for file in files:
            _add(found, file)
    for list_file in lists:
        for video in _listed_videos(list_file):
            _add(found, video)
    return [found[id_] for id_ in sorted(found)]


def _add(found: dict[str, VideoFile], video: VideoFile) -> None:
    other = found.setdefault(video.id, video)
    if other.absolute != video.absolute:
        raise VideoError(
            f"{other.absolute} and {video.absolute} would both be called {video.id!r}; "
            "rename one, give ids in a .csv list, or label them into different stores"
        )


def _id_of(relative: str) -> str:
    """Return what a video is called whose path below its root is given."""
    return os.path.splitext(relative)[0]


def _listed_videos(list_file: Path) -> Iterator[VideoFile]:
    root = list_file.parent.resolve()
    count = 0
    for number, name, own_id in _entries(list_file):
        path = Path(name)
        where = root / path
        if not where.is_file():
            raise VideoError(f"{list_file}, line {number}: {where} is no file")
        if own_id.startswith("/") or {".", ".."} & set(own_id.split("/")):
            raise VideoError(
                f"{list_file}, line {number}: the id {own_id!r} would lead out of the folder that "
                "is written to"
            )
        count += 1
        is_below = not path.is_absolute() and ".." not in path.parts
        if is_below:
            relative = path.as_posix()
            yield VideoFile(own_id or _id_of(relative), root, relative)
        else:
            yield VideoFile(own_id or _id_of(path.name), where.parent.resolve(), path.name)
    if not count:
        raise VideoError(f"{list_file} names no video")


def _entries(list_file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, path and, if there is one, id of a list's entries."""
    try:
        with list_file.open(encoding="utf-8-sig", newline="") as file:
            if list_file.suffix.lower() != ".csv":
                for number, line in enumerate(file, 1):
                    if line.strip() and not line.startswith("#"):
                        yield number, line.strip(), ""
                return
            table = csv.DictReader(file)
            if "path" not in (table.fieldnames or ()):
                raise VideoError(
                    f"{list_file} has no column 'path'; its columns are: "
                    f"{', '.join(table.fieldnames or ()) or 'none'}"
                )
            for row in table:
                if path := (row["path"] or "").strip():
                    yield table.line_num, path, (row.get("id") or "").strip()
    except OSError as error:
        raise VideoError(f"cannot read {list_file}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise VideoError(f"{list_file} is no list of videos: {error}") from error
