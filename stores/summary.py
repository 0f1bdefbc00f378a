"""What a store holds, in numbers: for people and, as plain values, for other programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from stores import schema
from stores.run_log import LOG_FOLDER
from stores.shards import LabelSet, ShardSet
from stores.targets import TargetStore


@dataclass(frozen=True, kw_only=True)
class SetSummary:
    """A label set or frame set."""

    name: str
    kind: str
    """``labels`` or ``frames``."""
    fingerprint: str
    frames: int
    """Frames that are there, of videos that count."""
    coverage: float
    """Share of all frames of these videos."""
    shards: int
    bytes_of_arrays: dict[str, int]
    """Bytes on disk by array."""
    raw_bytes: int
    """Bytes of the same values without packing, at their native sizes."""
    full_size_bytes: int
    """Bytes as float32 of all maps, derived ones too, at the teacher's input size; of labels."""
    teacher: str = ""
    variant: str = ""
    maps: tuple[str, ...] = ()
    error_bounds: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    made: tuple[float, ...] = ()
    """Seconds since 1970 of each run that worked on it."""

    @property
    def bytes(self) -> int:
        return sum(self.bytes_of_arrays.values())


@dataclass(frozen=True, kw_only=True)
class StoreSummary:
    """A store."""

    url: str
    version: int
    videos: int
    frames: int
    replaced: int
    """Rows of videos that were replaced since; their targets are still there."""
    bytes: int
    sets: tuple[SetSummary, ...]
    damaged: tuple[str, ...]
    """What is wrong with sets that cannot be opened."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        replaced = f", {self.replaced} replaced since" if self.replaced else ""
        lines = [
            f"{self.url}: target store, format version {self.version}",
            f"{self.videos} videos{replaced}, {self.frames} frames, {format_bytes(self.bytes)}",
        ]
        for item in self.sets:
            lines += ["", *_set_lines(item)]
        if self.damaged:
            lines += ["", *(f"damaged: {what}" for what in self.damaged)]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class VideoSummary:
    """A video of a store."""

    id: str
    path: str
    frames: int
    height: int
    width: int
    fps: float
    content_hash: str
    spans: dict[str, list[list[int]]]
    """For each set, the spans of frames that are there, ends exclusive."""


def summarise(store: TargetStore) -> StoreSummary:
    """Count what a store holds."""
    sizes: dict[tuple[str, ...], int] = {}
    for key, size in store.place.walk():
        part = tuple(key.split("/")[:3])
        sizes[part] = sizes.get(part, 0) + size
    runs = _runs(store)
    return StoreSummary(
        url=store.url,
        version=schema.VERSION,
        videos=len(store.videos),
        frames=sum(video.frames for video in store.videos),
        replaced=sum(row.superseded_by >= 0 for row in store.rows),
        bytes=sum(sizes.values()),
        sets=tuple(
            _summarise_set(store, item, sizes, runs)
            for item in (*store.label_sets, *store.frame_sets)
        ),
        damaged=tuple(map(str, store.damaged_sets)),
    )


def summarise_videos(store: TargetStore) -> list[VideoSummary]:
    """Describe each video that counts, in the order of the store."""
    sets = (*store.label_sets, *store.frame_sets)
    return [
        VideoSummary(
            id=video.id,
            path=str(video.absolute),
            frames=video.frames,
            height=video.height,
            width=video.width,
            fps=video.fps,
            content_hash=video.content_hash.hex(),
            spans={
                item.name: [[span.start, span.stop] for span in item.coverage(video.id)]
                for item in sets
            },
        )
        for video in store.videos
    ]


def video_table(videos: Iterable[VideoSummary]) -> str:
    """Return a line for each video: frames, size, and how much of it each set has."""
    lines = []
    for video in videos:
        shares = [
            f"{name} {sum(stop - start for start, stop in spans) / video.frames:.0%}"
            for name, spans in video.spans.items()
        ]
        lines.append(
            f"{video.id}  {video.frames} frames  {video.width}x{video.height}  "
            f"{video.fps:.4g} fps  {', '.join(shares)}"
        )
    return "\n".join(lines)


def _summarise_set(
    store: TargetStore,
    item: ShardSet,
    sizes: dict[tuple[str, ...], int],
    runs: dict[str, list[float]],
) -> SetSummary:
    kind, name = item.key.split("/")
    unique = {video.first: video for video in store.videos}.values()
    frames = sum(len(span) for video in unique for span in item.coverage(video.id))
    total = sum(video.frames for video in unique)
    values = {n: form.packing.dtype.itemsize for n, form in item.formats.items()}
    for array, form in item.formats.items():
        for length in form.packing.shape:
            values[array] *= length
    details: dict[str, Any] = {}
    full = 0
    if isinstance(item, LabelSet):
        layout = item.layout
        names = layout.names
        full = frames * len(names) * layout.height * layout.width * 4
        details = {
            "teacher": item.teacher,
            "variant": str(item.attributes["variant"]),
            "maps": names,
            "error_bounds": item.attributes["error_bounds"],
            "provenance": item.attributes["provenance"],
        }
    return SetSummary(
        name=name,
        kind=kind,
        fingerprint=item.fingerprint,
        frames=frames,
        coverage=frames / total if total else 0.0,
        shards=len(item.receipts),
        bytes_of_arrays={a: sizes.get((kind, name, a), 0) for a in item.array_names},
        raw_bytes=frames * sum(values.values()),
        full_size_bytes=full,
        environment=item.attributes.get("environment"),
        made=tuple(runs.get(name, ())),
        **details,
    )


def _runs(store: TargetStore) -> dict[str, list[float]]:
    """Return when each set was worked on, as the logs tell."""
    times: dict[str, list[float]] = {}
    for key, _ in sorted(store.place.walk(LOG_FOLDER)):
        for line in store.place.read(key).decode(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry.get("event") == "start" and 0 <= float(entry["time"]) < 1e11:
                    times.setdefault(str(entry["label_set"]), []).append(float(entry["time"]))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                continue  # a log decides nothing
    return times


def _set_lines(item: SetSummary) -> list[str]:
    lines = [
        f"{item.kind}/{item.name}",
        f"  {item.frames} frames ({item.coverage:.1%}) in {item.shards} shards, "
        f"{format_bytes(item.bytes)}",
    ]
    lines += [f"  {name}: {format_bytes(size)}" for name, size in item.bytes_of_arrays.items()]
    if item.bytes and item.frames:
        ratio = f"  1/{item.raw_bytes / item.bytes:.1f} of the values unpacked"
        if item.full_size_bytes:
            ratio += f", 1/{item.full_size_bytes / item.bytes:.0f} of the maps at full size"
        lines.append(f"{ratio}; {item.bytes / item.frames / 1024:.2f} KiB per frame")
    if item.error_bounds is not None:
        bounds = item.error_bounds
        lines.append(
            f"  maps: {', '.join(item.maps)}; logits within {bounds['logit']:.4g}, "
            f"KL within {bounds['kl_nats']:.2g} nats"
        )
    if item.provenance is not None:
        weights = item.provenance.get("weights_sha256") or "none"
        lines.append(f"  teacher: {item.teacher}, {item.variant}, weights {weights}")
    if item.environment is not None:
        made = ", ".join(f"{key} {value}" for key, value in item.environment.items())
        lines.append(f"  made with: {made}")
    if item.made:
        lines.append(
            f"  runs: {len(item.made)}, from {_when(item.made[0])} to {_when(item.made[-1])}"
        )
    return lines


def _when(seconds: float) -> str:
    import datetime

    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def format_bytes(number: float) -> str:
    """Return a number of bytes as one reads it."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"
