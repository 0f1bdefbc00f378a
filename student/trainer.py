"""The verbs of the training loop: step, validate, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stores.errors import TinyHDError
from student.checkpoints import CheckpointError
from student.clips import Batch, ClipError
from student.losses import Losses, add_terms
from student.pools import ClipKey
from student.processes import Processes
from student.recipe import Optimisation, TrainConfig
from student.runs import RunSink
from student.snapshots import draw_snapshot
from student.supervision import Supervisor
from student.tinyhd import TinyHD, normalise_frames
from student.validation import Validation, validate

log = logging.getLogger(__name__)

FEW_BAD_CLIPS: Final = 5
"""So many do not end training: at its beginning they would be a large share."""


class TrainingError(TinyHDError):
    """Training cannot start or go on."""


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
    best: float = math.inf
    """Least total of a validation."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """Of the best weights; empty where nothing validates."""
    reloaded: int = 0
    """The last epoch, counted from 0, that began with the best weights; 0 if none did."""
    is_complete: bool = False


class Watch:
    """Who looks at a training: is told how far it is, and says when it is to end."""

    @property
    def is_stopping(self) -> bool:
        """Whether training is to end after the current step."""
        return False

    def begin(self, total: int, done: int) -> None:
        """Be told of how many clips there are, and how many were trained on before."""

    def advance(self, clips: int, note: str) -> None:
        """Be told of clips that were trained on."""


def build_optimizer(model: TinyHD, config: Optimisation) -> torch.optim.SGD:
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


class Trainer:
    """A student, and all that changes while it is trained.

    Args:
        model: The student, where it is trained.
        config: How.
        supervisor: Computes the terms.
        run: Where the outcome goes.
        processes: Those that share each step.
    """

    def __init__(
        self,
        model: TinyHD,
        config: TrainConfig,
        supervisor: Supervisor,
        run: RunSink,
        processes: Processes | None = None,
    ) -> None:
        how = config.optimisation
        self._processes = processes or Processes()
        self._model, self._config, self._how = model, config, how
        self._supervisor, self._run = supervisor, run
        self._device = next(model.parameters()).device
        self.optimizer = build_optimizer(model, how)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=how.precision == "float16")
        self._average = (
            AveragedModel(model, multi_avg_fn=_moving_average(how.ema), use_buffers=True)
            if how.ema is not None
            else None
        )
        joined = self._processes.join(model)
        self._joined, self._forward = joined, torch.compile(joined) if how.compile else joined
        self.state = TrainState()
        self._saved_at = time.monotonic()
        self._warned: set[str] = set()
        self._bad_told = 0

    def resume(self) -> None:
        """Go on from the run's last checkpoint, if it has one.

        Raises:
            CheckpointError: If that is of another network, or none to continue from.
        """
        run = self._run
        checkpoint = self._processes.of_first(run.checkpoint)
        if checkpoint is None:
            return
        try:
            self._model.load_state_dict(checkpoint["weights"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self._scaler.load_state_dict(checkpoint["scaler"])
            if self._average is not None:
                self._average.load_state_dict(checkpoint["average"])
            torch.set_rng_state(checkpoint["random_state"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _misfit(run.last) from error
        self.state = state_of(checkpoint, run.last)
        self._bad_told = self.state.bad_clips
        if not self._processes.is_first:
            return
        log.info("continuing %s after step %d", run.path, self.state.step)
        threads, now = checkpoint.get("threads"), torch.get_num_threads()
        is_unfinished = self.state.epoch < self._how.epochs
        if threads not in (None, now) and self._device.type == "cpu" and is_unfinished:
            log.warning(
                "%s was trained with %s CPU threads, and goes on with %d: sums in another order "
                "differ in their last digits from what it would have given (OMP_NUM_THREADS=%s "
                "keeps them)",
                *(run.path, threads, now, threads),
            )

    def begin_epoch(self) -> None:
        """Set the learning rate; where it falls, go back to the best weights (TinyHD's recipe)."""
        how, state = self._how, self.state
        rate = how.learning_rate_at(state.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        falls = how.schedule == "paper" and state.epoch in how.milestones
        is_due = how.reload_best and falls and state.reloaded != state.epoch
        if is_due and not state.batch:
            best = self._processes.of_first(self._run.read_best())
            if best is None:
                return
            self._model.load_state_dict(best["weights"])
            if self._average is not None:  # else what was given up would be averaged in
                self._average.module.load_state_dict(best["weights"])
            # Better ones may lie there when this epoch has to be done again.
            state.reloaded = state.epoch
            self.save(is_best=False)
            self._tell(
                "epoch %d: back to the weights of step %d, the best", state.epoch + 1, best["step"]
            )

    def run_epoch(
        self, batches: Iterator[Batch], watch: Watch, clips: int, checkpoint_seconds: float
    ) -> bool:
        """Train on what is left of an epoch, or until it is to end.

        Args:
            batches: What this process reads of it.
            watch: Is told, and asked.
            clips: Those of the whole epoch, of all processes.
            checkpoint_seconds: At least so often is a checkpoint written.

        Returns:
            Whether the epoch is done.
        """
        state, processes = self.state, self._processes
        rate = self._how.learning_rate_at(state.epoch)
        at_once = processes.count * self._how.batch_size
        self._joined.train()
        for batch in _reading(batches):
            self._count_all(batch)
            losses = self.train_step(batch)
            state.step += 1
            state.batch += 1
            values, is_stopping = self._agree(losses, watch)
            rest = {"learning_rate": rate, "bad_clips": state.bad_clips}
            self._run.log("training", state.step, {**values, **rest})
            done = [min(clips, batch * at_once) for batch in (state.batch - 1, state.batch)]
            note = f"epoch {state.epoch + 1} of {self._how.epochs}, loss {values['total']:.3f}"
            watch.advance(done[1] - done[0], note)
            if is_stopping or time.monotonic() - self._saved_at >= checkpoint_seconds:
                self.save(is_best=False)
            if is_stopping:
                return False
        return True

    def _agree(self, losses: Losses, watch: Watch) -> tuple[dict[str, float], bool]:
        """Return what all processes found together, and whether one of them is to end."""
        names = ["total", *losses.terms]
        found = torch.stack([losses.total, *losses.terms.values()]).detach().float()
        is_stopping = found.new_tensor([float(watch.is_stopping)])
        *values, stopping = self._processes.sum(torch.cat([found, is_stopping])).tolist()
        means = [value / self._processes.count for value in values]
        return dict(zip(names, means, strict=True)), stopping > 0

    def train_step(self, batch: Batch) -> Losses:
        """Make one update.

        Raises:
            TrainingError: If the loss is not finite, or the device has not enough memory.
        """
        try:
            return self._update(batch)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"{self._device} has not enough memory for a step of {len(batch.keys)} clips; use "
                "a smaller --batch or --size, or --set optimisation.precision=float16"
            ) from error

    def _update(self, batch: Batch) -> Losses:
        clips = normalise_frames(batch.frames.to(self._device))
        with self._autocast():
            output = self._forward(clips)
            terms = self._supervisor.terms(output, batch, self._supervisor.targets(batch, clips))
        losses = add_terms(terms, self._processes.sum, processes=self._processes.count)
        if not losses.total.isfinite():
            raise TrainingError(
                f"the loss of step {self.state.step + 1} is not finite, on the clips "
                f"{_describe(batch.keys)}; the last checkpoint is from before it; "
                "try a smaller learning rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        scaled: Tensor = self._scaler.scale(losses.total)
        torch.autograd.backward(scaled)
        if self._how.clip_gradient is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._model.parameters(), self._how.clip_gradient)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self._model)
        return losses

    def end_epoch(self, validation: Iterator[Batch] | None) -> None:
        """Validate, keep a checkpoint, and go on to the next epoch.

        Raises:
            TrainingError: If the validation gives no number.
        """
        state = self.state
        is_best = True
        if validation is not None:
            found = self._validate(validation)
            self._run.log("validation", state.step, found.values)
            is_best = found.total < state.best
            if is_best:
                state.best, state.validation = found.total, dict(found.values)
            self._tell(
                "epoch %d of %d, step %d, held out: %s%s",
                *(state.epoch + 1, self._how.epochs, state.step, found),
                " (the best so far)" if is_best else "",
            )
        if state.bad_clips > self._bad_told and self._processes.is_first:
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
        self._run.save(
            self._model,
            best_model=self._averaged() if is_best else None,
            optimizer=self.optimizer.state_dict(),
            scaler=self._scaler.state_dict(),
            average=self._average.state_dict() if self._average is not None else None,
            random_state=torch.get_rng_state(),
            threads=torch.get_num_threads(),
            **{name: getattr(self.state, name) for name in _SAVED},
        )
        self._saved_at = time.monotonic()

    def _tell(self, message: str, *values: object) -> None:
        """Log what all processes know once."""
        if self._processes.is_first:
            log.info(message, *values)

    def _averaged(self) -> TinyHD:
        """Return the model that is validated: the moving average, if there is one."""
        if self._average is None:
            return self._model
        model: Any = self._average.module
        assert isinstance(model, TinyHD)
        return model

    def _validate(self, batches: Iterator[Batch]) -> Validation:
        shown: list[Batch] = []
        before = self.state.clips, self.state.bad_clips

        def counted() -> Iterator[Batch]:
            for batch in _reading(batches):
                shown[:] = shown or [batch]  # the same clips in every epoch
                self._count(batch, len(batch.keys) + len(batch.bad), len(batch.bad))
                yield batch

        model = self._averaged()
        self._processes.share_buffers(model)  # all score the model that is kept
        found = validate(model, counted(), self._supervisor, self._processes)
        # What others have counted meanwhile is known only now.
        now = self.state.clips, self.state.bad_clips
        own = torch.tensor([now[0] - before[0], now[1] - before[1]], device=self._device)
        clips, bad = self._processes.sum(own).tolist()
        self.state.clips, self.state.bad_clips = before[0] + clips, before[1] + bad
        if shown and self._processes.is_first:
            picture = draw_snapshot(model, shown[0], self._supervisor)
            self._run.show("held out", self.state.step, picture)
        if not math.isfinite(found.total):
            raise TrainingError(
                f"the validation after step {self.state.step} gave a total of {found.total}; the "
                "last checkpoint is from before it"
            )
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._how.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=getattr(torch, self._how.precision))

    def _count_all(self, batch: Batch) -> None:
        """Count what all processes had to replace in this step; see :meth:`_count`."""
        own = [len(batch.keys) + len(batch.bad), len(batch.bad)]
        clips, bad = self._processes.sum(torch.tensor(own, device=self._device)).tolist()
        self._count(batch, clips, bad)

    def _count(self, batch: Batch, clips: int, bad: int) -> None:
        """Count clips, and those of them that were replaced.

        Raises:
            TrainingError: If too many clips could not be read.
        """
        state, limit = self.state, self._config.sampling.max_bad_share
        state.clips += clips
        state.bad_clips += bad
        for clip in batch.bad:
            if clip.source not in self._warned:
                self._warned.add(clip.source)
                log.warning("%s; other clips are taken instead", clip.reason)
        few = FEW_BAD_CLIPS if limit else 0
        if bad and state.bad_clips > max(few, limit * state.clips):
            reason = f"; at last: {batch.bad[-1].reason}" if batch.bad else ""
            raise TrainingError(
                f"{state.bad_clips} of the {state.clips} clips so far could not be read, more than "
                f"the share of {limit:g} that may be{reason}; mend what "
                "is damaged, or allow more with --max-bad-share, and continue the run"
            )


def _reading(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches.

    Raises:
        TrainingError: If clips cannot be read, nor others in their place.
    """
    try:
        yield from batches
    except ClipError as error:
        raise TrainingError(str(error)) from error


_SAVED: Final = ("epoch", "step", "batch", "best", "clips", "bad_clips", "validation", "reloaded")


def state_of(checkpoint: Mapping[str, Any], path: Path) -> TrainState:
    """Return where the training of a checkpoint is.

    Raises:
        CheckpointError: If it is not one to continue from.
    """
    try:
        return TrainState(**{name: checkpoint[name] for name in _SAVED})
    except (KeyError, TypeError) as error:
        raise _misfit(path) from error


def _misfit(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} does not fit this run: it is of another network, or not one to continue from; "
        "choose another --out"
    )


def _moving_average(decay: float) -> Any:  # noqa: ANN401 - PyTorch's, which has no types
    make: Any = get_ema_multi_avg_fn
    return make(decay)


def _describe(keys: list[ClipKey]) -> str:
    return ", ".join(f"{key.video}:{key.last}" for key in keys)
