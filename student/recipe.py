"""How a student is trained: everything that decides the outcome, checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Final, Literal

from student.config import DecoderName, TinyHDConfig

Precision = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["paper", "cosine", "constant"]
Mixing = Literal["sum", "one_per_batch"]
Alignment = Literal["aligned", "lagged"]
HierarchicalRule = Literal["auto", "identity", "mean"]
Flip = Literal["labels", "mirror", "none"]

MAX_SEED: Final = 2**32
FEW_CLIPS: Final = 4
"""Fewer give batch norms poor statistics."""
MILESTONES: Final = (0.5, 0.75, 0.9)
"""Shares of all epochs after which the learning rate falls to a tenth (TinyHD: 100, 150, 180)."""


def _weights_of(term: object) -> dict[str, float]:
    values = {item.name: getattr(term, item.name) for item in fields(term)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _check_weights(term: object) -> None:
    for name, value in _weights_of(term).items():
        if not 0 <= value < math.inf:
            raise ValueError(f"the weight {name} must not be negative, got {value}")


@dataclass(frozen=True, kw_only=True)
class TermWeights:
    """What one source of targets asks of a student's maps; a term of weight 0 is left out."""

    saliency: float = 1.0
    """KL of the fused map to the source's saliency map."""
    hierarchical: float = 1.0
    """Sum over the decoder d1's four maps of the KL to the source's hierarchical map."""
    d2: float = 0.0
    """KL of the map of the decoder d2 to the source's saliency map, so that one can look at it."""
    d3: float = 0.0
    """The same for the decoder d3."""

    def __post_init__(self) -> None:
        _check_weights(self)

    @property
    def has_weight(self) -> bool:
        """Whether any of the terms counts."""
        return any(_weights_of(self).values())

    @property
    def decoders(self) -> tuple[DecoderName, ...]:
        """Decoders that the terms are about."""
        weights: dict[DecoderName, float] = {"d1": self.hierarchical, "d2": self.d2, "d3": self.d3}
        return tuple(name for name, weight in weights.items() if weight)


@dataclass(frozen=True, kw_only=True)
class LabelTerm(TermWeights):
    """Targets from a label set of the store."""

    labels: str = ""
    """Its name, or the beginning of it; the only one if not given."""


@dataclass(frozen=True, kw_only=True)
class AssistantTerm(TermWeights):
    """Targets from a TinyHD that looks at the very clip that the student sees."""

    checkpoint: str
    """Its checkpoint; in a run of stages, ``stage:NAME``."""


@dataclass(frozen=True, kw_only=True)
class OnlineTerm(TermWeights):
    """Targets from a teacher that looks at each clip in the step, as in the paper.

    What a store spares: the trainer imports no teacher, and is handed one.
    """

    teacher: str
    """Its name, or ``package.module:factory``."""
    weights: str = ""
    """File of its weights, if it has any."""
    options: dict[str, str] = field(default_factory=dict)
    """What else it takes."""
    size: str = ""
    """HEIGHTxWIDTH fed to it; as published if not given."""
    precision: Precision = "float32"
    """What it computes in."""


@dataclass(frozen=True, kw_only=True)
class GroundTruthTerm:
    """Targets from recorded eyes, where a clip has them."""

    data: str = ""
    """Catalogue or folder of the data set; videos are known by their content."""
    kl: float = 1.0
    """KL of the fused map to the map of recorded eyes."""
    cc: float = 0.0
    """1 less the correlation of the two."""
    nss: float = 0.0
    """Minus the normalised scanpath saliency of the fused map at the fixations."""
    d2: float = 0.0
    """KL of the map of the decoder d2; 0.5 in the published recipe, where it is used."""
    d3: float = 0.0
    """The same for the decoder d3."""

    def __post_init__(self) -> None:
        _check_weights(self)

    @property
    def has_weight(self) -> bool:
        """Whether any of the terms counts."""
        return any(_weights_of(self).values())

    @property
    def decoders(self) -> tuple[DecoderName, ...]:
        """Decoders that the terms are about."""
        weights: dict[DecoderName, float] = {"d2": self.d2, "d3": self.d3}
        return tuple(name for name, weight in weights.items() if weight)


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What a student is held against."""

    labels: tuple[LabelTerm, ...] = field(default_factory=lambda: (LabelTerm(),))
    mixing: Mixing = "sum"
    """Of several label sets: all in every batch, or one for each batch, in turn at random."""
    assistant: AssistantTerm | None = None
    online: OnlineTerm | None = None
    ground_truth: GroundTruthTerm | None = None
    alignment: Alignment = "aligned"
    """``lagged`` reproduces the paper's TinyHD-M: the teacher's map is of the frame before."""
    hierarchical: HierarchicalRule = "auto"
    """Where d1 makes one map for the whole clip: ``mean`` of the source's over the clip's frames.
    ``identity``: the source has as many maps as d1. ``auto`` is whichever fits."""
    flip: Flip = "labels"
    """Half of the clips are mirrored: with the teacher's own targets of mirrored frames (hflip),
    where a label set has its twin; with mirrored targets; or never."""

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError(
                "there is nothing to learn from: name labels, assistant, online or ground_truth"
            )
        if not any(term.has_weight for term in self.terms):
            raise ValueError("there is nothing to learn from: all terms have the weight 0")
        weightless = [term.labels for term in self.labels if not term.has_weight]
        if weightless and self.mixing == "one_per_batch":
            raise ValueError(
                f"the label set {weightless[0]!r} has no weight, and so its batches nothing to "
                "learn from; leave it out"
            )
        names = [term.labels for term in self.labels]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the label set {twice[0]!r} is named twice")

    @property
    def terms(self) -> list[TermWeights | GroundTruthTerm]:
        """What each source of targets asks of a student."""
        others = (self.assistant, self.online, self.ground_truth)
        return [*self.labels, *(term for term in others if term is not None)]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which clips an epoch draws, and which are kept for validation."""

    clips_per_video: int = 2
    """Random clips of each video in an epoch; with ``unlabelled``, of each video with recorded
    eyes. The paper's: 1 with Kinetics, 2 without."""
    unlabelled: float | None = None
    """Clips of videos without recorded eyes in an epoch, for each clip of one with; drawn without
    replacement (the paper's: 1 for DHF1K, 10 for UCF-Sports). All videos alike if not given."""
    holdout: float = 0.1
    """Share that is kept for validation; of what, ``holdout_of`` says."""
    holdout_of: Literal["videos", "frames"] = "videos"
    """Whole videos, the same whatever is trained; or the end of each video, of which students
    then have seen the beginning."""
    validation_clips: int = 5
    """Clips of each video, at even distances, that are validated on."""
    full_windows: bool = True
    """Only clips all of whose targets the teacher made from full windows."""
    max_bad_share: float = 0.05
    """Of the clips, how many may be unreadable; not part of what decides a run."""

    def __post_init__(self) -> None:
        for name in ("clips_per_video", "validation_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be at least 0 and less than 1, got {self.holdout}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be from 0 to 1, got {self.max_bad_share}")
        if self.unlabelled is not None and not 0 <= self.unlabelled < math.inf:
            raise ValueError(f"unlabelled must not be negative, got {self.unlabelled}")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How weights are changed."""

    epochs: int = 200
    batch_size: int = 2
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "paper"
    """``paper``: a tenth after half, three quarters and nine tenths of the epochs."""
    reload_best: bool = True
    """With ``paper``: go back to the best weights where the rate falls."""
    clip_gradient: float | None = None
    """Largest norm of the gradient; not limited if not given."""
    ema: float | None = None
    """Decay per step of a moving average of the weights, which is validated and kept beside."""
    precision: Precision = "float32"
    """What the forward pass computes in; losses are float32."""
    compile: bool = False
    """Have PyTorch compile the network."""
    workers: int = 1
    """Processes that share each step, each with ``batch_size`` clips, on a GPU of its own where
    there are; gradients are those of all their clips together."""
    synchronise_norms: bool | None = None
    """Whether batch norms take their statistics from the clips of all workers, which takes GPUs;
    if not given, where a worker has fewer than 4 clips. Else each takes those of its own clips,
    and the running statistics are the first one's."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and less than 1, got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay must not be negative or infinite, got {self.weight_decay}"
            )
        if self.clip_gradient is not None and not self.clip_gradient > 0:
            raise ValueError(f"clip_gradient must be positive, got {self.clip_gradient}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be between 0 and 1, got {self.ema}")

    def synchronises_norms(self, device: str) -> bool:
        """Return whether batch norms see the clips of all workers.

        Raises:
            ValueError: If they are to, and cannot.
        """
        is_gpu = device.startswith("cuda")
        if self.synchronise_norms and not is_gpu:
            raise ValueError(
                f"optimisation.synchronise_norms takes GPUs, and training runs on {device}; "
                "set it to null"
            )
        is_small = self.batch_size < FEW_CLIPS
        wanted = is_small if self.synchronise_norms is None else self.synchronise_norms
        return bool(wanted) and is_gpu and self.workers > 1

    def learning_rate_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return self.learning_rate * 0.1 ** sum(epoch >= at for at in self.milestones)

    @property
    def milestones(self) -> tuple[int, ...]:
        """Epochs, counted from 0, that begin with a lower rate in the paper's schedule."""
        return tuple(max(1, round(share * self.epochs)) for share in MILESTONES)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides what a training run gives, beside the store.

    The defaults are the paper's, but for what every field says.
    """

    student: TinyHDConfig = field(default_factory=TinyHDConfig)
    start: str = ""
    """Checkpoint whose weights the student starts from; random if not given."""
    supervision: Supervision = field(default_factory=Supervision)
    sampling: Sampling = field(default_factory=Sampling)
    optimisation: Optimisation = field(default_factory=Optimisation)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"seed must be from 0 to {MAX_SEED - 1}, got {self.seed}")
        supervision = self.supervision
        for term in supervision.terms:
            if missing := [name for name in term.decoders if name not in self.student.decoders]:
                raise ValueError(
                    f"a term is about the decoder {missing[0]}, the student has "
                    f"{', '.join(self.student.decoders)}; give the term the weight 0"
                )
        teachers = (*supervision.labels, supervision.online)
        is_compared = any(term is not None and term.hierarchical for term in teachers)
        is_mixed = self.student.is_multi and is_compared and self.student.is_single("d1")
        if supervision.hierarchical == "identity" and is_mixed:
            raise ValueError(
                "the decoder d1 makes one map for a whole clip, a teacher one for every frame: the "
                "rule for hierarchical maps must be mean, or d1 not be single"
            )
