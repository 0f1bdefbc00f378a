"""Fit a student to stored soft targets. No teacher is imported here, and none is needed."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import textwrap
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import torch

from stores.catalogue import CatalogueVideo
from stores.progress import Progress
from stores.schema import fingerprint
from stores.targets import TargetStore
from stores.videos import hash_file
from student.checkpoints import load_model, read_checkpoint
from student.clips import Batch, ClipDataset, load_batches
from student.config import TinyHDConfig
from student.experiment import write_recipe
from student.online import OnlineTeacher
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
from student.processes import Processes, synchronise_norms
from student.recipe import OnlineTerm, TrainConfig
from student.runs import RunDir, RunSink, check_run
from student.supervision import (
    LabelSource,
    Supervisor,
    check_assistant,
    check_teacher,
    describe_content,
    find_recorded,
    find_sources,
    flips,
    load_assistant,
    target_lag,
)
from student.tinyhd import TinyHD
from student.trainer import Trainer, TrainingError, TrainState, Watch, state_of

log = logging.getLogger(__name__)

__all__ = ["TrainConfig", "TrainJob", "TrainState", "TrainingError", "train"]

OpenTeacher = Callable[[OnlineTerm, str], OnlineTeacher]
"""Makes the teacher of a recipe on a device."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A training, as it is handed to the processes that do it."""

    store: str | Path
    """Path or URL of the target store; it is only read."""
    out: Path
    """The run's folder."""
    config: TrainConfig
    videos_root: Path | None = None
    """Where the videos lie now, if not where they were labelled."""
    device: str = "cpu"
    """Where the student is trained."""
    loader_workers: int = 0
    """Processes that read clips; 0 to read in the one that trains."""
    checkpoint_seconds: float = 60.0
    """At least so often is a checkpoint written."""
    open_teacher: OpenTeacher | None = None
    """Makes the teacher that the recipe names to label in the step, on a device."""
    address: str | None = None
    """Ray cluster of several workers; one of its own on this machine if not given."""


def train(
    store: str | Path,
    out: Path,
    config: TrainConfig,
    **options: Any,  # noqa: ANN401 - fields of TrainJob
) -> TrainState:
    """Fit a student to what a store says, continuing from ``out`` if it holds a checkpoint.

    ``SIGINT`` and ``SIGTERM`` end training after the current step, with a checkpoint; a second one
    ends it at once. A clip that cannot be read is replaced by another, and counted. Several workers
    train on Ray.

    Args:
        store: Path or URL of the target store; it is only read.
        out: The run's folder.
        config: What is trained, and how.
        options: Other fields of :class:`TrainJob`.

    Raises:
        TargetStoreError: If the store, a label set or the frames are not there.
        ValueError: If the configuration does not fit the store.
        RunError: If ``out`` cannot be used.
        TrainingError: If the loss stops being a number, too many clips cannot be read, or a worker
            is lost.
    """
    job = TrainJob(store=store, out=out, config=config, **options)
    # Before any worker starts: what is wrong is said here, and videos are looked at once.
    prepared = prepare(job)
    check_students(config)
    if (state := _finished(job, prepared)) is not None:
        return state
    log.info("recipe of %s:\n%s", out, textwrap.indent(write_recipe(config), "  ").rstrip())
    if config.optimisation.workers > 1:
        from student.workers import train_on_workers

        return train_on_workers(job, prepared.identity)
    with stop_on_signal() as stop, BarWatch(stop) as watch:
        return run_job(job, prepared, Processes(), watch)


def _finished(job: TrainJob, prepared: Prepared) -> TrainState | None:
    """Return where a run is that has nothing left to do, after a look at its folder.

    Raises:
        RunError: If the folder cannot be used.
        CheckpointError: If the last checkpoint is damaged, or of another network.
    """
    check_run(job.out, prepared.identity)
    if not (job.out / "last.pt").exists():
        return None
    state = state_of(read_checkpoint(job.out / "last.pt"), job.out / "last.pt")
    state.is_complete = state.epoch >= job.config.optimisation.epochs
    return state if state.is_complete else None


class Prepared(NamedTuple):
    """What a training takes, after a look at all of it."""

    sources: Sequence[LabelSource]
    recorded: Mapping[str, CatalogueVideo]
    teacher: OnlineTeacher | None
    pools: ClipPools
    is_flipping: bool
    training: ClipDataset
    validating: ClipDataset
    validation: Sequence[ClipKey]
    """Clips to validate on."""
    per_epoch: int
    """Clips of an epoch."""
    identity: Mapping[str, Any]
    """All that decides what training gives."""

    def draw(self, config: TrainConfig, epoch: int) -> list[ClipKey]:
        """Draw the clips of an epoch; of each is said whether it is mirrored and who speaks."""
        return _draw_clips(
            config,
            self.pools,
            epoch,
            labelled=self.recorded,
            sources=len(self.sources),
            is_flipping=self.is_flipping,
        )


def prepare(job: TrainJob, identity: Mapping[str, Any] | None = None) -> Prepared:
    """Look at all that a training takes; nothing is written.

    Args:
        job: The training.
        identity: What decides it, if another process has found that out, which looks at every
            file with recorded eyes.

    Raises:
        TargetStoreError: If the store, a label set or the frames are not there.
        ValueError: If the configuration does not fit the store.
        TrainingError: If the device cannot be used.
    """
    config, supervision = job.config, job.config.supervision
    store = TargetStore.open(job.store)
    sources = find_sources(store, supervision)
    recorded = find_recorded(store, supervision)
    _check_device(job.device)
    config.optimisation.synchronises_norms(job.device)
    teacher = _open_teacher(job)
    is_flipping = flips(sources, supervision)
    pools = _find_pools(store, config, sources, is_flipping=is_flipping, teacher=teacher)
    log.info("clips: %s", pools.describe(store.videos))
    content = describe_content(config, sources, recorded, teacher)
    training = ClipDataset(job.store, content, videos_root=job.videos_root)
    # Recorded eyes are scored at fixations, too, which training need not read.
    scored = replace(content, with_fixations=True)
    validating = ClipDataset(job.store, scored, videos_root=job.videos_root)
    has_frames = training.find_frames(sorted(pools.training))
    has_frames &= validating.find_frames(sorted(pools.validation))
    if not has_frames and teacher is None:
        log.warning(
            "frames are decoded from the videos for every clip; "
            "tinyhd distill --with-frames %dx%d would make training faster",
            *(config.student.height, config.student.width),
        )
    validation = spread_clips(pools.validation, per_video=config.sampling.validation_clips)
    if not validation:
        log.warning("no clip is held out: there is no validation, and the last weights are kept")
    prepared = Prepared(
        sources=sources,
        recorded=recorded,
        teacher=teacher,
        pools=pools,
        is_flipping=is_flipping,
        training=training,
        validating=validating,
        validation=validation,
        per_epoch=0,
        identity=identity or _identity(config, store, sources, recorded, pools, teacher),
    )
    per_epoch = len(prepared.draw(config, 0))
    if not per_epoch:
        raise ValueError(
            "an epoch has no clip: sampling.unlabelled counts clips for each one with recorded "
            "eyes, and none of those is left to train on"
        )
    if per_epoch < config.optimisation.workers:
        raise ValueError(
            f"an epoch has {per_epoch} clips, too few for {config.optimisation.workers} workers; "
            "raise sampling.clips_per_video, or take fewer workers"
        )
    return prepared._replace(per_epoch=per_epoch)


def run_job(job: TrainJob, prepared: Prepared, processes: Processes, watch: Watch) -> TrainState:
    """Train, in one process or in one of several that do it together.

    Args:
        job: What to do.
        prepared: What it takes.
        processes: Those that do it.
        watch: Looks at the first of them.

    Raises:
        RunError: If the run's folder cannot be used.
        TrainingError: If the loss stops being a number, or too many clips cannot be read.
    """
    config, how = job.config, job.config.optimisation
    term = config.supervision.assistant
    assistant = load_assistant(term, config, job.device) if term is not None else None
    with _open_run(job, prepared, processes) as run:
        run.keep_recipe(write_recipe(config))
        torch.manual_seed(config.seed)
        model = _start(config).to(job.device)
        if how.synchronises_norms(job.device):
            synchronise_norms(model)
        supervisor = Supervisor(config, prepared.sources, assistant, prepared.teacher)
        trainer = Trainer(model, config, supervisor, run, processes)
        trainer.resume()
        state, per_epoch = trainer.state, prepared.per_epoch
        done = state.epoch * per_epoch + min(
            per_epoch, state.batch * how.batch_size * processes.count
        )
        watch.begin(how.epochs * per_epoch, done)
        while state.epoch < how.epochs:
            trainer.begin_epoch()
            own = processes.share_of(prepared.draw(config, state.epoch), how.batch_size)
            batches = load_batches(
                prepared.training,
                own[state.batch * how.batch_size :],
                batch_size=how.batch_size,
                workers=job.loader_workers,
                spares=Spares(prepared.pools.training, config.seed),
            )
            if not trainer.run_epoch(batches, watch, per_epoch, job.checkpoint_seconds):
                break
            trainer.end_epoch(_validation_batches(job, prepared, processes))
            if processes.any(watch.is_stopping):
                break
        state.is_complete = state.epoch >= how.epochs
    return state


def _validation_batches(
    job: TrainJob, prepared: Prepared, processes: Processes
) -> Iterator[Batch] | None:
    if not prepared.validation:
        return None
    return load_batches(
        prepared.validating,
        prepared.validation[processes.rank :: processes.count],
        batch_size=job.config.optimisation.batch_size * 2,
        spares=Spares(prepared.pools.validation, job.config.seed),
    )


@contextmanager
def _open_run(job: TrainJob, prepared: Prepared, processes: Processes) -> Iterator[RunSink]:
    if not processes.is_first:
        yield RunSink(job.out)
        return
    with RunDir.open(job.out, prepared.identity) as run:
        yield run


class BarWatch(Watch):
    """Shows a progress bar, and looks at a flag."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.__exit__(*error)

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    def begin(self, total: int, done: int) -> None:
        self._progress = Progress(total, unit="clips", label="training", done=done).__enter__()

    def advance(self, clips: int, note: str) -> None:
        if self._progress is not None:
            self._progress.advance(clips, note=note)


def _open_teacher(job: TrainJob) -> OnlineTeacher | None:
    term = job.config.supervision.online
    if term is None:
        return None
    if job.open_teacher is None:
        raise ValueError(
            f"the recipe has the teacher {term.teacher!r} label in the step, and nobody handed it "
            "in: the command line does; in Python, give train() an open_teacher"
        )
    teacher = job.open_teacher(term, job.device)
    check_teacher(teacher, term)
    return teacher


def _find_pools(
    store: TargetStore,
    config: TrainConfig,
    sources: Sequence[LabelSource],
    *,
    is_flipping: bool,
    teacher: OnlineTeacher | None = None,
) -> ClipPools:
    """Find the clips whose targets are there; to train on, those of mirrored frames too."""
    find = partial(
        find_pools,
        store.videos,
        sampling=config.sampling,
        target_frames=config.student.output_frames,
        lag=target_lag(config),
        grids=[teacher.request.grid] if teacher is not None else [],
    )
    labels = [source.labels for source in sources]
    pools = find(labels)
    twins = [source.twin for source in sources if source.twin is not None]
    if not (is_flipping and twins):
        return pools
    mirrored = find([*labels, *twins])
    if mirrored.num_training < pools.num_training:
        log.warning(
            "of mirrored frames %s covers less: %d of %d clips are left to train on; complete it "
            "with: tinyhd distill --variant both, or set supervision.flip to none",
            *(twins[0].name, mirrored.num_training, pools.num_training),
        )
    return replace(pools, training=mirrored.training)


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
        size = config.optimisation.batch_size * config.optimisation.workers
        clips = take_turns(clips, sources=sources, batch_size=size, **when)
    return clips


def check_students(config: TrainConfig) -> None:
    """Make sure that the checkpoints that a recipe names can be used.

    Raises:
        CheckpointError: If one cannot be read.
        ValueError: If one does not fit the student.
    """
    if config.start:
        check_start(load_model(Path(config.start)).config, config)
    term = config.supervision.assistant
    if term is not None:
        check_assistant(load_model(Path(term.checkpoint)).config, term, config)


def check_start(theirs: TinyHDConfig, config: TrainConfig) -> None:
    """Make sure that a student can start from the weights of another.

    Raises:
        ValueError: If it is another network.
    """
    found, ours = theirs.to_dict(), config.student.to_dict()
    sizes = ("height", "width")  # which weights do not depend on
    if changed := [n for n in ours if found[n] != ours[n] and n not in sizes]:
        raise ValueError(
            f"{config.start} is of another network: its {changed[0]} is {found[changed[0]]}, the "
            f"student's {ours[changed[0]]}"
        )


def _start(config: TrainConfig) -> TinyHD:
    """Build the student, at random or with the weights of a checkpoint."""
    if not config.start:
        return TinyHD(config.student)
    weights = load_model(Path(config.start)).state_dict()
    student = TinyHD(config.student)
    student.load_state_dict(weights)
    return student


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Turn the first signal into a flag that is looked at between steps; a second one interrupts.

    Raises:
        KeyboardInterrupt: At the second.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

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
    teacher: OnlineTeacher | None,
) -> Mapping[str, Any]:
    """Return what makes two runs the same: the configuration, the targets and the clips."""
    clips = [
        [store.video(video).content_hash.hex(), [[span.start, span.stop] for span in spans]]
        for part in (pools.training, pools.validation)
        for video, spans in part.items()
    ]
    truths = {
        store.video(name).content_hash.hex(): video.ground_truth().stamp(with_times=False)
        for name, video in sorted(recorded.items())
    }
    settings = asdict(config)
    # Names of label sets may be given in part; what they stand for counts.
    for term, source in zip(settings["supervision"]["labels"], sources, strict=True):
        term["labels"] = source.labels.fingerprint
    # Whoever has mended some of the damage may allow for the rest.
    del settings["sampling"]["max_bad_share"]
    # Files are known by what is in them, wherever they lie.
    files = {"start": settings.pop("start")}
    if config.supervision.assistant is not None:
        files["assistant"] = settings["supervision"]["assistant"].pop("checkpoint")
    if config.supervision.ground_truth is not None:
        del settings["supervision"]["ground_truth"]["data"]
    if teacher is not None:
        del settings["supervision"]["online"]["weights"]
    requests = [teacher.request] if teacher is not None else []
    return {
        **settings,
        "label_sets": {source.labels.name: source.labels.fingerprint for source in sources},
        "online_sets": {request.name: fingerprint(request.identity) for request in requests},
        "flipped_sets": [source.twin.name for source in sources if source.twin is not None],
        "files_sha256": {name: hash_file(Path(path)).hex() for name, path in files.items() if path},
        "recorded_sha256": hashlib.sha256(json.dumps(truths).encode()).hexdigest(),
        "clips_sha256": hashlib.sha256(json.dumps(clips).encode()).hexdigest(),
    }


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # as torch says that it was built without
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"device {device!r} cannot be used: {reason}") from error
