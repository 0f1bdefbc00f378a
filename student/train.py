"""Fit a student to stored soft targets. No teacher is imported here, and none is needed."""

from __future__ import annotations

import logging
import signal
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch

from stores.progress import Progress
from student.checkpoints import load_model, read_checkpoint
from student.clips import Batch, load_batches
from student.experiment import write_recipe
from student.job import Prepared, TrainJob, check_students, prepare
from student.pools import Spares
from student.processes import Processes, synchronise_norms
from student.recipe import TrainConfig
from student.runs import RunDir, RunSink, check_run
from student.supervision import Supervisor, load_assistant
from student.tinyhd import TinyHD
from student.trainer import Trainer, TrainingError, TrainState, Watch, state_of

log = logging.getLogger(__name__)

__all__ = ["TrainConfig", "TrainJob", "TrainState", "TrainingError", "train"]


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
        CheckpointError: If a checkpoint that the recipe names, or the run's last one, is damaged.
        ValueError: If the configuration does not fit the store.
        RunError: If ``out`` cannot be used.
        TrainingError: If the loss stops being a number, too many clips cannot be read, or a worker
            is lost.
    """
    job = TrainJob(store=store, out=out, config=config, **options)
    has_workers = config.optimisation.workers > 1
    config.optimisation.synchronises_norms(job.device)
    # Before any worker starts: what is wrong is said here, and videos are looked at once. This
    # machine need not have what workers compute on.
    prepared = prepare(replace(job, device="cpu") if has_workers else job)
    check_students(config)
    if (state := _finished(job, prepared)) is not None:
        return state
    if not (out / "last.pt").exists():
        text = write_recipe(prepared.named(config))
        log.info("recipe of %s:\n%s", out, textwrap.indent(text, "  ").rstrip())
    if has_workers:
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
        run.keep_recipe(write_recipe(prepared.named(config)))
        torch.manual_seed(config.seed)
        model = _start(config).to(job.device)
        if how.synchronises_norms(job.device):
            synchronise_norms(model)
        supervisor = Supervisor(config, prepared.sources, assistant, prepared.teacher)
        trainer = Trainer(model, config, supervisor, run, processes)
        trainer.resume()
        state, per_epoch = trainer.state, len(prepared.draw(config, 0))
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
