"""Fit a student to stored soft targets. No teacher is imported here, and none is needed."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from stores.catalogue import CatalogueVideo
from stores.progress import Progress
from stores.targets import TargetStore
from stores.videos import hash_file
from student.checkpoints import load_model
from student.clips import ClipDataset, load_batches
from student.experiment import write_recipe
from student.pools import (
    ClipKey,
    ClipPools,
    Spares,
    draw_epoch,
    find_pools,
    flip_some,
    spread_clips,
    take_turns,
)
from student.recipe import TrainConfig
from student.runs import RunDir
from student.supervision import (
    LabelSource,
    Supervisor,
    describe_content,
    find_recorded,
    find_sources,
    flips,
    load_assistant,
    target_lag,
)
from student.tinyhd import TinyHD
from student.trainer import Stop, Trainer, TrainingError, TrainState

log = logging.getLogger(__name__)

__all__ = ["TrainConfig", "TrainState", "TrainingError", "train"]


def train(
    store: str | Path,
    out: Path,
    config: TrainConfig,
    *,
    videos_root: Path | None = None,
    device: str = "cpu",
    loader_workers: int = 0,
    checkpoint_seconds: float = 60.0,
) -> TrainState:
    """Fit a student to what a store says, continuing from ``out`` if it holds a checkpoint.

    ``SIGINT`` and ``SIGTERM`` end training after the current step, with a checkpoint. A clip that
    cannot be read is replaced by another, and counted.

    Args:
        store: Path or URL of the target store; it is only read.
        out: The run's folder.
        config: What is trained, and how.
        videos_root: Where the videos lie now, if not where they were labelled.
        device: Where the student is trained.
        loader_workers: Processes that read clips; 0 to read in this one.
        checkpoint_seconds: At least so often is a checkpoint written.

    Raises:
        TargetStoreError: If the store, a label set or the frames are not there.
        ValueError: If the configuration does not fit the store.
        RunError: If ``out`` cannot be used.
        TrainingError: If the loss stops being a number, or too many clips cannot be read.
    """
    opened = TargetStore.open(store)
    sources = find_sources(opened, config.supervision)
    recorded = find_recorded(opened, config.supervision)
    is_flipping = flips(sources, config.supervision)
    pools = _find_pools(opened, config, sources, is_flipping=is_flipping)
    content = describe_content(config, sources, recorded)
    dataset = ClipDataset(store, content, videos_root=videos_root)
    # Recorded eyes are scored at fixations, too, which training need not read.
    scored = replace(content, with_fixations=True)
    validating = ClipDataset(store, scored, videos_root=videos_root)
    _check_device(device)
    has_frames = dataset.find_frames(sorted(pools.training))
    if not (validating.find_frames(sorted(pools.validation)) and has_frames):
        log.warning(
            "frames are decoded from the videos for every clip; "
            "tinyhd distill --with-frames %dx%d would make training faster",
            *(config.student.height, config.student.width),
        )
    validation = spread_clips(pools.validation, per_video=config.sampling.validation_clips)
    if not validation:
        log.warning("no video has held-out frames for a clip: there is no validation")

    def clips_of(epoch: int) -> list[ClipKey]:
        return _draw_clips(
            config, pools, epoch, labelled=recorded, sources=len(sources), is_flipping=is_flipping
        )

    per_epoch = len(clips_of(0))
    if not per_epoch:
        raise ValueError(
            "an epoch has no clip: sampling.unlabelled counts clips for each one with recorded "
            "eyes, and none of those is left to train on"
        )
    term = config.supervision.assistant
    assistant = load_assistant(term, config, device) if term is not None else None
    with RunDir.open(out, _identity(config, opened, sources, recorded, pools)) as run:
        run.keep_recipe(write_recipe(config))
        torch.manual_seed(config.seed)
        model = _start(config).to(device)
        supervisor = Supervisor(config, sources, assistant)
        trainer = Trainer(model, config, supervisor, run)
        trainer.resume()
        state, how = trainer.state, config.optimisation
        done = state.epoch * per_epoch + min(per_epoch, state.batch * how.batch_size)
        total = how.epochs * per_epoch
        with (
            _stop_on_signal() as stop,
            Progress(total, unit="clips", label="training", done=done) as progress,
        ):
            while state.epoch < how.epochs and not stop.is_set:
                trainer.begin_epoch()
                left = clips_of(state.epoch)[state.batch * how.batch_size :]
                batches = load_batches(
                    dataset,
                    left,
                    batch_size=how.batch_size,
                    workers=loader_workers,
                    spares=Spares(pools.training, config.seed),
                )
                trainer.run_epoch(batches, stop, progress, checkpoint_seconds)
                if not stop.is_set:
                    spares = Spares(pools.validation, config.seed)
                    size = how.batch_size * 2
                    trainer.end_epoch(
                        load_batches(validating, validation, batch_size=size, spares=spares)
                        if validation
                        else None
                    )
        state.is_complete = state.epoch >= how.epochs
    return state


def _find_pools(
    store: TargetStore,
    config: TrainConfig,
    sources: Sequence[LabelSource],
    *,
    is_flipping: bool,
) -> ClipPools:
    """Find the clips whose targets are there, those of mirrored frames too where that is done."""
    labels = [source.labels for source in sources]
    if is_flipping:
        labels += [source.twin for source in sources if source.twin is not None]
    return find_pools(
        store.videos,
        labels,
        config.sampling,
        target_frames=config.student.output_frames,
        lag=target_lag(config),
        seed=config.seed,
    )


def _draw_clips(
    config: TrainConfig,
    pools: ClipPools,
    epoch: int,
    *,
    labelled: Collection[str],
    sources: int,
    is_flipping: bool,
) -> list[ClipKey]:
    """Draw the clips of an epoch, and say of each whether it is mirrored and who speaks of it."""
    supervision, when = config.supervision, {"seed": config.seed, "epoch": epoch}
    clips = draw_epoch(pools.training, config.sampling, labelled=labelled, **when)
    if is_flipping:
        clips = flip_some(clips, **when)
    if supervision.mixing == "one_per_batch" and sources > 1:
        size = config.optimisation.batch_size
        clips = take_turns(clips, sources=sources, batch_size=size, **when)
    return clips


def _start(config: TrainConfig) -> TinyHD:
    """Build the student, at random or with the weights of a checkpoint.

    Raises:
        CheckpointError: If that cannot be read.
        ValueError: If it is of another network.
    """
    if not config.start:
        return TinyHD(config.student)
    model = load_model(Path(config.start)).train()
    theirs, ours = model.config.to_dict(), config.student.to_dict()
    sizes = ("height", "width")  # which weights do not depend on
    if changed := [n for n in ours if theirs[n] != ours[n] and n not in sizes]:
        raise ValueError(
            f"{config.start} is of another network: its {changed[0]} is {theirs[changed[0]]}, the "
            f"student's {ours[changed[0]]}"
        )
    student = TinyHD(config.student)
    student.load_state_dict(model.state_dict())
    return student


@contextmanager
def _stop_on_signal() -> Iterator[Stop]:
    """Turn signals into a flag that the loop looks at between steps."""
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.is_set = True

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _identity(
    config: TrainConfig,
    store: TargetStore,
    sources: Sequence[LabelSource],
    recorded: Mapping[str, CatalogueVideo],
    pools: ClipPools,
) -> Mapping[str, Any]:
    """Return what makes two runs the same: the configuration, the targets and the clips."""
    clips = [
        [store.video(video).content_hash.hex(), [[span.start, span.stop] for span in spans]]
        for part in (pools.training, pools.validation)
        for video, spans in part.items()
    ]
    settings = asdict(config)
    # Whoever has mended some of the damage may allow for the rest.
    del settings["sampling"]["max_bad_share"]
    # Files are known by what is in them, wherever they lie.
    files = {"start": settings.pop("start")}
    if config.supervision.assistant is not None:
        files["assistant"] = settings["supervision"]["assistant"].pop("checkpoint")
    if config.supervision.ground_truth is not None:
        del settings["supervision"]["ground_truth"]["data"]
    return {
        **settings,
        "label_sets": {source.labels.name: source.labels.fingerprint for source in sources},
        "flipped_sets": [source.twin.name for source in sources if source.twin is not None],
        "files_sha256": {name: hash_file(Path(path)).hex() for name, path in files.items() if path},
        "recorded": sorted(recorded),
        "clips_sha256": hashlib.sha256(json.dumps(clips).encode()).hexdigest(),
    }


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # as torch says that it was built without
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"device {device!r} cannot be used: {reason}") from error
