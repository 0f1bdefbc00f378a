"""A catalogue: what is in a data set, learnt once by looking at everything in it.

It is a file of JSON lines: the first tells of the data set, each further one of a video.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from stores.datasets import (
    KIND_NAMES,
    KINDS,
    Dataset,
    DatasetVideo,
    Kind,
    LabelFolders,
    choose_split,
    find_dataset,
)
from stores.errors import DatasetError, GroundTruthError, VideoError
from stores.ground_truth import GroundTruth, LabelCensus
from stores.images import list_images, read_size
from stores.pairing import find_offset
from stores.probing import Probe, ProbeFailure, probe_videos
from stores.progress import Progress
from stores.videos import VideoFile, VideoRecord

log = logging.getLogger(__name__)

CATALOGUE_SUFFIX: Final = ".jsonl"
FORMAT: Final = "tinyhd-catalogue"
VERSION: Final = 1
NAMES: Final = "surrogateescape"
"""How names of files that are no text are kept."""
SHOWN_PROBLEMS: Final = 20
NO_LABELS: Final = LabelFolders()
NO_CENSUS: Final = LabelCensus()
SPLIT_ORDER: Final = ("train", "train540", "val60", "val", "test")


@dataclass(frozen=True, kw_only=True)
class CatalogueVideo:
    """A video of a data set that was looked at."""

    record: VideoRecord
    splits: tuple[str, ...] = ()
    labels: LabelFolders = NO_LABELS
    dropped: tuple[str, ...] = ()
    """Names of images that cannot be decoded, and so are no frames."""
    uneven: tuple[str, ...] = ()
    """Names of images of another size than the first, to which they are scaled."""
    census: LabelCensus = NO_CENSUS

    @property
    def file(self) -> VideoFile:
        """Where it lies."""
        return VideoFile(self.record.id, Path(self.record.root), self.record.path)

    def frame_names(self) -> list[str] | None:
        """Return the names of the images that are its frames; nothing for a video file.

        Raises:
            VideoError: If they are not those that were looked at.
        """
        folder = self.record.absolute
        if not folder.is_dir():
            return None
        gone = set(self.dropped)
        names = [name for name in list_images(folder) if name not in gone]
        if len(names) != self.record.frames:
            raise VideoError(
                f"{folder} holds {len(names)} images, not {self.record.frames} as when it was "
                "scanned; scan it again"
            )
        return names

    def ground_truth(self) -> GroundTruth:
        """Return its recorded eyes.

        Raises:
            VideoError: If its images are not those that were looked at.
        """
        record = self.record
        return GroundTruth(
            Path(record.root),
            self.labels,
            frames=record.frames,
            names=self.frame_names(),
            dropped=self.dropped,
            size=(record.height, record.width),
        )


@dataclass(frozen=True)
class BadVideo:
    """A file that is no video, and why."""

    id: str
    path: str
    splits: tuple[str, ...]
    reason: str


@dataclass
class Catalogue:
    """What is in a data set."""

    kind: Kind
    root: Path
    videos: list[CatalogueVideo] = field(default_factory=list)
    bad: list[BadVideo] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Of the data set as a whole."""

    @property
    def splits(self) -> list[str]:
        """Names of its splits."""
        names = {name for video in self.videos for name in video.splits}
        known = [name for name in SPLIT_ORDER if name in names]
        return [*known, *sorted(names - set(known))]

    def choose(self, split: str | None) -> list[CatalogueVideo]:
        """Return the videos of a split; all if none is given.

        Raises:
            DatasetError: If there is no such split.
        """
        return choose_split(self.videos, split, lambda video: video.splits, str(self.root))

    def all_problems(self) -> list[str]:
        """Return what is wrong, file by file."""
        found = list(self.problems)
        found += [f"{bad.id}: {bad.reason}" for bad in self.bad]
        for video in self.videos:
            if video.uneven:
                found.append(
                    f"{video.record.id}: {len(video.uneven)} images are of another size than the "
                    f"first: {_some(video.uneven)}"
                )
            if video.dropped:
                found.append(
                    f"{video.record.id}: {len(video.dropped)} images cannot be decoded and are "
                    f"left out: {_some(video.dropped)}"
                )
            found += [f"{video.record.id}: {problem}" for problem in video.census.problems]
        return found

    def save(self, path: Path) -> None:
        """Write the catalogue, whole or not at all.

        Raises:
            DatasetError: If it cannot be written.
        """
        head = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "root": str(self.root),
            "videos": len(self.videos),
            "problems": self.problems,
        }
        partial = path.with_name(f"{path.name}.partial")
        try:
            with partial.open("w", encoding="utf-8", errors=NAMES) as file:
                for line in (head, *map(_video_to_json, self.videos), *map(_bad_to_json, self.bad)):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise DatasetError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Catalogue:
        """Read a catalogue.

        Raises:
            DatasetError: If it is none, is damaged, or of another version.
        """
        number = 0
        try:
            with path.open(encoding="utf-8", errors=NAMES) as file:
                lines = enumerate(file, 1)
                number, line = next(lines, (1, ""))
                catalogue, length = _head_from_json(json.loads(line), path)
                for number, line in lines:  # noqa: B007 - told where it fails
                    item = json.loads(line)
                    if "reason" in item:
                        catalogue.bad.append(_bad_from_json(item))
                    else:
                        catalogue.videos.append(_video_from_json(item, catalogue.root))
        except OSError as error:
            raise DatasetError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DatasetError(
                f"{path}, line {number}: this is no catalogue, or a damaged one ({error}); make "
                "it anew with: tinyhd data scan"
            ) from error
        ids = [video.record.id for video in catalogue.videos]
        if len(set(ids)) != len(ids):
            raise DatasetError(f"{path} has a video twice; make it anew with: tinyhd data scan")
        if len(catalogue.videos) != length:
            raise DatasetError(
                f"{path} is cut off: it has {len(catalogue.videos)} of {length} videos; make it "
                "anew with: tinyhd data scan"
            )
        return catalogue

    def __str__(self) -> str:
        frames = sum(video.record.frames for video in self.videos)
        name = KIND_NAMES[self.kind]
        lines = [f"{name} in {self.root}: {len(self.videos):,} videos, {frames:,} frames"]
        rows = [
            ("split", "videos", "frames", "least", "most", "labelled", "maps", "fixations"),
            *(_row(name, self.choose(name)) for name in self.splits),
        ]
        if rest := [video for video in self.videos if not video.splits]:
            rows.append(_row("no split", rest))
        if len(rows) > 2:
            rows.append(_row("all", self.videos))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for name, *values in rows:
            cells = [value.rjust(w) for value, w in zip(values, widths[1:], strict=True)]
            lines.append("  " + "  ".join([name.ljust(widths[0]), *cells]))
        problems = self.all_problems()
        if problems:
            lines.append(f"{len(problems)} problems")
            lines += [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
            if len(problems) > SHOWN_PROBLEMS:
                lines.append(f"  and {len(problems) - SHOWN_PROBLEMS} more, all in the catalogue")
        return "\n".join(lines).encode(errors="replace").decode()


def is_catalogue(path: Path) -> bool:
    """Return whether a file begins as a catalogue does, of whatever version, maybe damaged.

    Raises:
        DatasetError: If it cannot be read.
    """
    begin = json.dumps({"format": FORMAT}).removesuffix("}").encode()
    try:
        with path.open("rb") as file:
            return file.read(len(begin)) == begin
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error


def open_catalogue(path: Path, *, split: str | None = None) -> Catalogue:
    """Read a catalogue, or scan a folder.

    Args:
        path: The catalogue or the folder of a data set.
        split: Look at this split alone, where a folder has to be scanned.

    Raises:
        DatasetError: If there is neither, or no such split.
        VideoError: If a folder cannot be looked into.
    """
    return scan(path, split=split) if path.is_dir() else Catalogue.load(path)


def scan(root: Path, *, kind: Kind | None = None, split: str | None = None) -> Catalogue:
    """Look at all videos and labels of a data set.

    What was learnt of a video before is not learnt again, so that a scan that was stopped goes on.

    Args:
        root: Folder of the data set.
        kind: Which data set; recognised if not given.
        split: Look at this split alone.

    Raises:
        DatasetError: If it is no data set of the kind.
        VideoError: If a folder cannot be looked into.
    """
    dataset = find_dataset(root, kind)
    _agree_on_offsets(dataset)
    chosen = dataset.choose(split)
    catalogue = Catalogue(dataset.kind, dataset.root, problems=dataset.problems)
    videos: dict[str, CatalogueVideo] = {}
    by_id = {video.file.id: video for video in chosen}
    if len(by_id) != len(chosen):
        twice = next(video.file for video in chosen if by_id[video.file.id] is not video)
        raise DatasetError(
            f"{twice.absolute} and {by_id[twice.id].file.absolute} would both be called "
            f"{twice.id!r}; rename one"
        )
    with (
        Progress(len(chosen), unit="videos", label=f"scanning {dataset.root.name}") as progress,
        closing(_look_at(dataset, chosen)) as found,
    ):
        for item in found:
            if isinstance(item, ProbeFailure):
                file = item.file
                bad = BadVideo(file.id, file.path, by_id[file.id].splits, item.reason)
                catalogue.bad.append(bad)
            else:
                videos[item.record.id] = item
            progress.advance()
    catalogue.videos = [videos[id_] for id_ in by_id if id_ in videos]
    order = {id_: number for number, id_ in enumerate(by_id)}
    catalogue.bad.sort(key=lambda bad: order[bad.id])
    return catalogue


def _agree_on_offsets(dataset: Dataset) -> None:
    """Let sequences of images whose labels are complete tell how those of others are numbered."""
    own: dict[str, int | None] = {}
    for video in dataset.videos:
        if video.labels and video.labels.offset is None and video.file.absolute.is_dir():
            try:
                names = list_images(video.file.absolute)
                truth = GroundTruth(dataset.root, video.labels, frames=len(names), names=names)
            except VideoError:  # told when the video is looked at
                continue
            own[video.file.id] = find_offset(truth.label_stems(), len(names), names)
    votes = Counter(offset for offset in own.values() if offset is not None)
    if not votes:
        return
    (usual, _), *others = votes.most_common()
    if others or usual:
        told = [f"{number} videos by {offset}" for offset, number in votes.most_common()]
        dataset.problems.append(f"labels are numbered higher than images: {', '.join(told)}")
    for index, video in enumerate(dataset.videos):
        if video.file.id in own and own[video.file.id] is None:
            labels = replace(video.labels, offset=usual)
            dataset.videos[index] = replace(video, labels=labels)


def _look_at(
    dataset: Dataset, chosen: Sequence[DatasetVideo]
) -> Generator[CatalogueVideo | ProbeFailure]:
    """Yield videos in no particular order; labels are looked at while others are decoded."""
    by_id = {video.file.id: video for video in chosen}
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="labels") as pool:
        waiting = []
        try:
            for found in probe_videos([video.file for video in chosen]):
                if isinstance(found, ProbeFailure):
                    yield found
                    continue
                waiting.append(pool.submit(_look_at_one, by_id[found.record.id], found))
                while waiting and waiting[0].done():
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt does not wait for all labels


def _look_at_one(video: DatasetVideo, probe: Probe) -> CatalogueVideo | ProbeFailure:
    record = probe.record
    dropped: tuple[str, ...] = ()
    names: list[str] = []
    try:
        if record.absolute.is_dir() and probe.index is not None:
            names = list_images(record.absolute)
            kept = set(probe.index.timestamps.tolist())
            dropped = tuple(name for rank, name in enumerate(names) if rank not in kept)
        found = CatalogueVideo(
            record=record,
            splits=video.splits,
            labels=video.labels,
            dropped=dropped,
            uneven=_uneven(record, names, set(dropped)),
        )
        return replace(found, census=_count_labels(found)) if video.labels else found
    except VideoError as error:
        return ProbeFailure(video.file, str(error))


def _uneven(record: VideoRecord, names: Sequence[str], dropped: set[str]) -> tuple[str, ...]:
    size = (record.height, record.width)
    kept = [name for name in names if name not in dropped]
    return tuple(name for name in kept if read_size(record.absolute / name) != size)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _count_labels(video: CatalogueVideo) -> LabelCensus:
    truth = video.ground_truth()
    try:
        return truth.census()
    except GroundTruthError as error:  # it has no labels, but is a video
        return LabelCensus(problems=(str(error),))


def _row(name: str, videos: Sequence[CatalogueVideo]) -> tuple[str, ...]:
    lengths = [video.record.frames for video in videos]
    counts = [
        *(len(videos), sum(lengths), min(lengths), max(lengths)),
        *(sum(video.census.labelled for video in videos), sum(v.census.maps for v in videos)),
        sum(video.census.fixations for video in videos),
    ]
    return (name, *(f"{count:,}" for count in counts))


def _head_from_json(head: Mapping[str, Any], path: Path) -> tuple[Catalogue, int]:
    if head["format"] != FORMAT or head["kind"] not in KINDS:
        raise ValueError(f"format {head['format']!r}, kind {head['kind']!r}")
    if head["version"] != VERSION:
        raise DatasetError(
            f"{path} is a catalogue of version {head['version']}, this program reads version "
            f"{VERSION}; make it anew with: tinyhd data scan"
        )
    problems = list(_checked_texts(head["problems"]))
    length = _checked_number(head["videos"])
    return Catalogue(head["kind"], Path(head["root"]), problems=problems), length


def _video_to_json(video: CatalogueVideo) -> dict[str, Any]:
    record = {**asdict(video.record), "content_hash": video.record.content_hash.hex()}
    del record["root"]
    labels = {key: value for key, value in asdict(video.labels).items() if value not in ("", None)}
    line = {**record, "splits": video.splits, "labels": labels}
    line |= {"dropped": video.dropped, "uneven": video.uneven}
    return {**line, "census": asdict(video.census)}


def _video_from_json(item: Mapping[str, Any], root: Path) -> CatalogueVideo:
    record = VideoRecord(
        id=_checked_path(item["id"]),
        root=str(root),
        path=_checked_path(item["path"]),
        content_hash=bytes.fromhex(item["content_hash"]),
        frames=_checked_number(item["frames"]),
        height=_checked_number(item["height"]),
        width=_checked_number(item["width"]),
        fps=_checked_rate(item["fps"]),
    )
    offset = item["labels"].get("offset")
    paths = {key: value for key, value in item["labels"].items() if key != "offset"}
    labels: dict[str, Any] = {key: _checked_path(value) for key, value in paths.items()}
    if offset is not None:
        labels["offset"] = int(offset)
    census = {**item["census"]}
    problems = _checked_texts(census.pop("problems"))
    counts = {key: _checked_number(value) for key, value in census.items()}
    return CatalogueVideo(
        record=record,
        splits=_checked_texts(item["splits"]),
        labels=LabelFolders(**labels),
        dropped=_checked_texts(item["dropped"]),
        uneven=_checked_texts(item["uneven"]),
        census=LabelCensus(**counts, problems=problems),
    )


def _bad_to_json(bad: BadVideo) -> dict[str, Any]:
    return asdict(bad)


def _bad_from_json(item: Mapping[str, Any]) -> BadVideo:
    splits = _checked_texts(item["splits"])
    return BadVideo(str(item["id"]), str(item["path"]), splits, str(item["reason"]))


def _checked_path(path: object) -> str:
    """Return a path that cannot lead out of the data set.

    Raises:
        ValueError: If it would.
    """
    if (
        not isinstance(path, str)
        or not path
        or path.startswith("/")
        or ".." in Path(path).parts
        or "\0" in path
    ):
        raise ValueError(f"{path!r} is no path below the data set")
    return path


def _checked_number(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"{value!r} is no number of anything")
    return value


def _checked_rate(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no number of frames per second")
    return float(value)


def _checked_texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{values!r} is no list of texts")
    return tuple(values)
