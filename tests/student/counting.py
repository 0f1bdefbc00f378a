"""Small stores whose frames and targets tell which frame they are of, and who says so.

The left half of a picture or map tells it, the right half its opposite: so does mirroring.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from stores.catalogue import Catalogue, CatalogueVideo
from stores.datasets import LabelFolders
from stores.ground_truth import LabelCensus
from stores.maps import MapLayout, MapSpec
from stores.schema import FrameRequest, LabelRequest, Variant
from stores.shards import LabelSet, ShardSet
from stores.targets import TargetStore
from tests.miniature import write_png
from tests.stores.test_targets import record

HEIGHT: Final = 32
WIDTH: Final = 64
KINDS: Final = ("out", "h1", "h2", "h3", "h4")
STEP: Final = 32
"""Stored values are multiples of its inverse."""
PER_KIND: Final = 100


def counting_request(
    teacher: str = "toy", *, variant: Variant = "identity", window: int = 1, middle: bool = False
) -> LabelRequest:
    """Ask for a saliency map and four hierarchical ones."""
    maps = tuple(
        MapSpec(name=name, height=2, width=4, activation="exp", order="activate_first")
        for name in KINDS
    )
    layout = MapLayout(
        height=HEIGHT, width=WIDTH, maps=maps, saliency=KINDS[0], hierarchical=KINDS[1:]
    )
    provenance = {"window": window, "labelled_frame": "middle" if middle else "last"}
    return LabelRequest(
        teacher=teacher, provenance=provenance, layout=layout, variant=variant, shard_frames=16
    )


def counting_planes(frames: Iterable[int], first: int) -> npt.NDArray[np.float32]:
    """Make planes ``(frame, map, y, x)`` that tell ``first`` and the frame's number."""
    numbers = np.array(list(frames), np.float32) + first
    values = (numbers[:, None] + PER_KIND * np.arange(len(KINDS), dtype=np.float32)) / STEP
    planes = np.stack([values, values, -values, -values], -1)[:, :, None].repeat(2, 2)
    return planes.astype(np.float32)


def told_by(maps: Tensor) -> Tensor:
    """Return the number that maps tell, negative if mirrored."""
    return (maps[..., 0, 0].log() * STEP).round().long()


def fill(shards: ShardSet, video: str, values: npt.NDArray[np.generic], numbers: range) -> None:
    """Write some shards of a video from the values of all its frames."""
    row = shards.store.video(video)
    (name,) = shards.array_names
    for shard in list(shards.shards(row))[numbers.start : numbers.stop]:
        span = shards.frames_of(shard, row)
        receipt = shards.write_shard(shard, {name: values[span.start : span.stop]}, row)
        shards.commit([receipt])


def make_store(
    path: Path,
    videos: Mapping[str, int],
    sets: Mapping[LabelRequest, int] | Sequence[tuple[LabelRequest, int]],
    *,
    contents: Mapping[str, bytes] | None = None,
) -> TargetStore:
    """Make a store with frames, and with label sets that tell numbers from a first one."""
    store = TargetStore.open_or_create(path)
    known = contents or {}
    store.add_videos([record(name, count, known.get(name)) for name, count in videos.items()])
    frame_set = store.ensure_set(
        FrameRequest(height=HEIGHT, width=WIDTH, decoder={}, shard_frames=16), {}
    )
    for name, count in videos.items():
        pictures = np.empty((count, HEIGHT, WIDTH, 3), np.uint8)
        pictures[:, :, : WIDTH // 2] = np.arange(count)[:, None, None, None]
        pictures[:, :, WIDTH // 2 :] = 255 - np.arange(count)[:, None, None, None]
        fill(frame_set, name, pictures, range(1000))
    for request, first in dict(sets).items() if isinstance(sets, Mapping) else sets:
        labels = store.ensure_set(request, {})
        for name, count in videos.items():
            fill(labels, name, counting_planes(range(count), first), range(1000))
    return TargetStore.open(path, mode="r+")


def add_labels(
    store: TargetStore, request: LabelRequest, spans: Mapping[str, range], *, first: int = 0
) -> LabelSet:
    """Label some shards of some videos, counted from the video's first."""
    labels = store.ensure_set(request, {})
    for name, shards in spans.items():
        frames = store.video(name).frames
        fill(labels, name, counting_planes(range(frames), first), shards)
    return TargetStore.open(store.url).label_set(labels.name)


def record_eyes(store: TargetStore, root: Path, frames: Mapping[str, Sequence[int]]) -> Path:
    """Make a data set with maps and fixations of some frames, and return its catalogue.

    The pixel of a frame's number is brightest, and fixated; a frame 0 is black.
    """
    catalogue = Catalogue("plain", root)
    for name, labelled in frames.items():
        row = store.video(name)
        for frame in labelled:
            density = np.zeros((row.height, row.width), np.uint8)
            fixations = np.zeros_like(density)
            if frame:
                density[:, : row.width // 4] = frame
                density[0, frame % row.width] = 255
                fixations[0, frame % row.width] = 255
            write_png(root / name / "maps" / f"{frame + 1:04d}.png", density)
            write_png(root / name / "fixation" / f"{frame + 1:04d}.png", fixations)
        seen = replace(record(name, row.frames), root=str(root), content_hash=row.content_hash)
        catalogue.videos.append(
            CatalogueVideo(
                record=seen,
                labels=LabelFolders(maps=f"{name}/maps", fixations=f"{name}/fixation"),
                census=LabelCensus(len(labelled), len(labelled), len(labelled)),
            )
        )
    catalogue.save(root / "eyes.jsonl")
    return root / "eyes.jsonl"
