"""Fit a student to stored soft targets. No teacher is imported here, and none is needed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import torch
from torch import nn

from stores.errors import TinyHDError
from stores.maps import MapLayout, render_maps
from stores.progress import Progress
from stores.shards import LabelSet
from stores.targets import TargetStore
from student.agreement import Agreement, compare_with_teacher
from student.checkpoints import CheckpointError
from student.clips import (
    Batch,
    ClipDataset,
    ClipError,
    ClipKey,
    ClipSplit,
    Spares,
    draw_clips,
    load_batches,
    split_clips,
    spread_clips,
)
from student.config import TinyHDConfig
from student.losses import Losses, LossWeights, distillation_loss, wanted_maps
from student.runs import RunDir
from student.tinyhd import TinyHD, normalise_frames

log = logging.getLogger(__name__)

MILESTONES: Final = (0.5, 0.75, 0.9)
"""Shares of all epochs after which the learning rate falls to a tenth (TinyHD: 100, 150, 180)."""

FEW_BAD_CLIPS: Final = 5
"""So many do not end training: at its beginning they would be a large share."""


class TrainingError(TinyHDError):
    """Training cannot start or go on."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a student is trained.

    The defaults are the paper's, as far as they go: it also flips clips, starts the encoder from
    ImageNet, goes back to the best weights at the milestones and computes in mixed precision.
    """

    student: TinyHDConfig = field(default_factory=TinyHDConfig)
    epochs: int = 200
    clips_per_video: int = 2
    """Random clips of each video in an epoch."""
    batch_size: int = 2
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    loss: LossWeights = field(default_factory=LossWeights)
    holdout: float = 0.1
    """Share of each video's frames, at its end, that is kept for validation."""
    validation_clips: int = 5
    """Clips of each video that are validated on after an epoch."""
    seed: int = 0
    max_bad_share: float = 0.05
    """Share of clips that may be unreadable, and replaced by others, before training stops.

    A handful may be at any time, unless it is 0. It may be another when a run is continued.
    """

    def __post_init__(self) -> None:
        for name in ("epochs", "clips_per_video", "batch_size", "validation_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be from 0 to 1, got {self.max_bad_share}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.student.is_multi:
            raise ValueError(
                "only TinyHD-S is trained so far: a TinyHD-M needs the soft targets of several "
                f"frames for each clip, got output_frames={self.student.output_frames}"
            )
        if self.loss.hierarchical and "d1" not in self.student.decoders:
            raise ValueError(
                "the hierarchical term needs the decoder d1, the student has "
                f"{', '.join(self.student.decoders)}; give it the weight 0"
            )

    def learning_rate_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        passed = sum(epoch >= round(share * self.epochs) for share in MILESTONES)
        return self.learning_rate * 0.1**passed


@dataclass
class TrainState:
    """Where training is."""

    epoch: int = 0
    step: int = 0
    """Updates so far."""
    batch: int = 0
    """Batches of the epoch so far."""
    clips: int = 0
    """Clips read so far, or tried to read, in training and validation."""
    bad_clips: int = 0
    """Those of them that could not be read, and were replaced."""
    best_kl: float = float("inf")
    validation: Agreement | None = None
    """Of the last epoch that was validated."""
    is_complete: bool = False


def train(
    store: str | Path,
    out: Path,
    config: TrainConfig,
    *,
    labels: str | None = None,
    videos_root: Path | None = None,
    device: str = "cpu",
    loader_workers: int = 0,
    checkpoint_seconds: float = 60.0,
) -> TrainState:
    """Fit a student to a label set, continuing from ``out`` if it holds a checkpoint.

    ``SIGINT`` and ``SIGTERM`` end training after the current step, with a checkpoint. A clip that
    cannot be read is replaced by another, and counted.

    Args:
        store: Path or URL of the target store; it is only read.
        out: The run's folder.
        config: What is trained, and how.
        labels: Name of the label set, or its beginning; the only one if not given.
        videos_root: Where the videos lie now, if not where they were labelled.
        device: Where the student is trained.
        loader_workers: Processes that read clips; 0 to read in this one.
        checkpoint_seconds: At least so often is a checkpoint written.

    Raises:
        TargetStoreError: If the store, the label set or the frames are not there.
        ValueError: If the configuration does not fit the label set.
        RunError: If ``out`` cannot be used.
        TrainingError: If the loss stops being a number, or too many clips cannot be read.
    """
    label_set = TargetStore.open(store).label_set(labels)
    wanted_maps(label_set.layout, config.loss)
    split = split_clips(label_set, holdout=config.holdout)
    dataset = ClipDataset(
        store,
        label_set.name,
        height=config.student.height,
        width=config.student.width,
        videos_root=videos_root,
    )
    _check_device(device)
    if not dataset.find_frames(sorted(split.training.keys() | split.validation.keys())):
        log.warning(
            "frames are decoded from the videos for every clip; "
            "tinyhd distill --with-frames %dx%d would make training faster",
            *(config.student.height, config.student.width),
        )
    validation = spread_clips(split.validation, per_video=config.validation_clips)
    if not validation:
        log.warning("no video has held-out frames for a clip: there is no validation")
    with RunDir.open(out, _identity(config, label_set, split)) as run:
        torch.manual_seed(config.seed)
        model = TinyHD(config.student).to(device)
        optimizer = build_optimizer(model, config)
        state = _resume(run, model, optimizer, epochs=config.epochs)
        trainer = _Trainer(model, optimizer, label_set.layout, config, run, state)
        per_epoch = config.clips_per_video * len(split.training)
        done = state.epoch * per_epoch + min(per_epoch, state.batch * config.batch_size)
        with (
            _stop_on_signal() as stop,
            Progress(
                config.epochs * per_epoch, unit="clips", label="training", done=done
            ) as progress,
        ):
            while state.epoch < config.epochs and not stop.is_set:
                clips = draw_clips(
                    split.training,
                    per_video=config.clips_per_video,
                    seed=config.seed,
                    epoch=state.epoch,
                )
                left = clips[state.batch * config.batch_size :]
                batches = load_batches(
                    dataset,
                    left,
                    batch_size=config.batch_size,
                    workers=loader_workers,
                    spares=Spares(split.training, config.seed),
                )
                trainer.run_epoch(batches, stop, progress, checkpoint_seconds)
                if not stop.is_set:
                    trainer.end_epoch(
                        load_batches(
                            dataset,
                            validation,
                            batch_size=config.batch_size * 2,
                            spares=Spares(split.validation, config.seed),
                        )
                        if validation
                        else None
                    )
        state.is_complete = state.epoch >= config.epochs
    return state


def build_optimizer(model: TinyHD, config: TrainConfig) -> torch.optim.SGD:
    """Return SGD with the paper's groups: the encoder learns at half the rate, biases at double.

    Biases do not decay; weights of batch norms do, as in the published recipe.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_bias = name.endswith("bias")
        scale = (0.5 if name.startswith("encoder") else 1.0) * (2.0 if is_bias else 1.0)
        decay = 0.0 if is_bias else config.weight_decay
        groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.SGD(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (scale, decay), parameters in groups.items()
        ],
        lr=config.learning_rate,
        momentum=config.momentum,
    )


class _Trainer:
    """The verbs of the loop."""

    def __init__(
        self,
        model: TinyHD,
        optimizer: torch.optim.SGD,
        layout: MapLayout,
        config: TrainConfig,
        run: RunDir,
        state: TrainState,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._layout, self._config = layout, config
        self._run, self._state = run, state
        self._map_names = wanted_maps(layout, config.loss)
        self._saved_at = time.monotonic()
        self._warned: set[str] = set()
        self._bad_told = state.bad_clips

    def run_epoch(
        self, batches: Iterator[Batch], stop: _Stop, progress: Progress, checkpoint_seconds: float
    ) -> None:
        """Train on what is left of an epoch, or until a signal comes."""
        config, state = self._config, self._state
        rate = config.learning_rate_at(state.epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self._model.train()
        for batch in self._counted(batches):
            losses = self.train_step(batch)
            state.step += 1
            state.batch += 1
            terms = {name: term.item() for name, term in losses.terms.items()}
            total = losses.total.item()
            values = {"total": total, **terms, "learning_rate": rate, "bad_clips": state.bad_clips}
            self._run.log("training", state.step, values)
            progress.advance(
                len(batch.keys),
                note=f"epoch {state.epoch + 1} of {config.epochs}, loss {total:.3f}",
            )
            if stop.is_set or time.monotonic() - self._saved_at >= checkpoint_seconds:
                self.save(is_best=False)
            if stop.is_set:
                return

    def train_step(self, batch: Batch) -> Losses:
        """Make one update."""
        config, device = self._config.student, next(self._model.parameters()).device
        planes = {name: values.to(device) for name, values in batch.planes.items()}
        targets = render_maps(
            planes, self._layout, self._map_names, height=config.height, width=config.width
        )
        targets = {name: maps[:, None] for name, maps in targets.items()}  # of one frame
        output = self._model(normalise_frames(batch.frames.to(device)))
        losses = distillation_loss(output, targets, self._layout, self._config.loss)
        if not losses.total.isfinite():
            raise TrainingError(
                f"the loss of step {self._state.step + 1} is not finite, on the clips "
                f"{_describe(batch.keys)}; the last checkpoint is from before it; "
                "try a smaller learning rate"
            )
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.total)
        self._optimizer.step()
        return losses

    def end_epoch(self, validation: Iterator[Batch] | None) -> None:
        """Validate, keep a checkpoint, and go on to the next epoch."""
        state = self._state
        is_best = True
        if validation is not None:
            scores = compare_with_teacher(self._model, self._counted(validation), self._layout)
            if not math.isfinite(scores.kl):
                raise TrainingError(
                    f"the validation after step {state.step} gave KL {scores.kl}; the last "
                    "checkpoint is from before it"
                )
            self._run.log("validation", state.step, {"kl": scores.kl, "cc": scores.cc})
            is_best = scores.kl < state.best_kl
            state.best_kl = min(scores.kl, state.best_kl)
            state.validation = scores
            log.info(
                "epoch %d of %d, step %d: KL %.4f, CC %.4f to the teacher on held-out frames",
                *(state.epoch + 1, self._config.epochs, state.step, scores.kl, scores.cc),
            )
        if state.bad_clips > self._bad_told:
            self._bad_told = state.bad_clips
            log.warning(
                "%d of %d clips so far could not be read, and were replaced by others",
                *(state.bad_clips, state.clips),
            )
        state.epoch += 1
        state.batch = 0
        self.save(is_best=is_best)

    def save(self, *, is_best: bool) -> None:
        """Keep everything that the next step depends on."""
        state = {name: getattr(self._state, name) for name in _SAVED}
        validation = asdict(self._state.validation) if self._state.validation else None
        self._run.save(
            self._model,
            is_best=is_best,
            optimizer=self._optimizer.state_dict(),
            random_state=torch.get_rng_state(),
            validation=validation,
            threads=torch.get_num_threads(),
            **state,
        )
        self._saved_at = time.monotonic()

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches, after a look at what was replaced in them.

        Raises:
            TrainingError: If too many clips could not be read.
        """
        try:
            for batch in batches:
                self._count(batch)
                yield batch
        except ClipError as error:
            raise TrainingError(str(error)) from error

    def _count(self, batch: Batch) -> None:
        state, limit = self._state, self._config.max_bad_share
        state.clips += len(batch.keys) + len(batch.bad)
        state.bad_clips += len(batch.bad)
        for clip in batch.bad:
            if clip.source not in self._warned:
                self._warned.add(clip.source)
                log.warning("%s; other clips are taken instead", clip.reason)
        few = FEW_BAD_CLIPS if limit else 0
        if batch.bad and state.bad_clips > max(few, limit * state.clips):
            raise TrainingError(
                f"{state.bad_clips} of the {state.clips} clips so far could not be read, more than "
                f"the share of {limit:g} that may be; at last: {batch.bad[-1].reason}; mend what "
                "is damaged, or allow more with --max-bad-share, and continue the run"
            )


_SAVED: Final = ("epoch", "step", "batch", "best_kl", "clips", "bad_clips")


class _Stop:
    is_set = False


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Turn signals into a flag that the loop looks at between steps."""
    stop = _Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.is_set = True

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _identity(config: TrainConfig, labels: LabelSet, split: ClipSplit) -> Mapping[str, Any]:
    """Return what makes two runs the same: the configuration, the targets and the clips."""
    clips = [
        [labels.store.video(video).content_hash.hex(), [[span.start, span.stop] for span in spans]]
        for part in (split.training, split.validation)
        for video, spans in part.items()
    ]
    settings = asdict(config)
    del settings["max_bad_share"]  # whoever has mended some of the damage may allow for the rest
    return {
        **settings,
        "label_set": labels.name,
        "label_fingerprint": labels.fingerprint,
        "clips_sha256": hashlib.sha256(json.dumps(clips).encode()).hexdigest(),
    }


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # as torch says that it was built without
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"device {device!r} cannot be used: {reason}") from error


def _resume(run: RunDir, model: TinyHD, optimizer: torch.optim.SGD, *, epochs: int) -> TrainState:
    checkpoint = run.checkpoint
    if checkpoint is None:
        return TrainState()
    try:
        model.load_state_dict(checkpoint["weights"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random_state"])
        older = {"clips": 0, "bad_clips": 0}  # checkpoints of before there was a count
        state = TrainState(**{name: {**older, **checkpoint}[name] for name in _SAVED})
        if checkpoint["validation"] is not None:
            state.validation = Agreement(**checkpoint["validation"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{run.last} does not fit this run: it is of another network, or not one to continue "
            "from; choose another --out"
        ) from error
    log.info("continuing %s after step %d", run.path, state.step)
    threads, now = checkpoint.get("threads"), torch.get_num_threads()
    is_on_cpu = next(model.parameters()).device.type == "cpu"
    if threads not in (None, now) and is_on_cpu and state.epoch < epochs:
        log.warning(
            "%s was trained with %s CPU threads, and goes on with %d: sums in another order differ "
            "in their last digits from what it would have given (OMP_NUM_THREADS=%s keeps them)",
            *(run.path, threads, now, threads),
        )
    return state


def _describe(keys: list[ClipKey]) -> str:
    return ", ".join(f"{key.video}:{key.last}" for key in keys)
