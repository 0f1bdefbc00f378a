"""From a batch and the recipe to the terms of the loss: who says what of the student's maps."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from stores.catalogue import CatalogueVideo, open_catalogue
from stores.errors import LabelSetNotFoundError
from stores.maps import MapLayout, render_maps
from stores.shards import LabelSet
from stores.targets import TargetStore
from student.checkpoints import load_model
from student.clips import Batch, ClipContent
from student.config import TinyHDConfig
from student.losses import (
    HIERARCHICAL_MAPS,
    RecordedMaps,
    SourceMaps,
    Term,
    ground_truth_terms,
    source_terms,
)
from student.online import OnlineTeacher, TeacherView
from student.recipe import (
    AssistantTerm,
    HierarchicalRule,
    LabelTerm,
    OnlineTerm,
    Supervision,
    TermWeights,
    TrainConfig,
)
from student.tinyhd import StudentOutput, TinyHD

log = logging.getLogger(__name__)

ASSISTANT: Final = "assistant"
"""What the terms of an assistant are called by."""


@dataclass(frozen=True)
class LabelSource:
    """A label set that a student learns from."""

    name: str
    """Of its terms: the teacher's name, or the label set's where several are of one teacher."""
    labels: LabelSet
    twin: LabelSet | None
    """What the same teacher says of mirrored frames, if that is there."""
    term: LabelTerm

    @property
    def layout(self) -> MapLayout:
        """The maps of the label set."""
        return self.labels.layout


def find_sources(
    store: TargetStore,
    supervision: Supervision,
    terms: Sequence[LabelTerm] | None = None,
    *,
    known: Collection[str] = (),
) -> list[LabelSource]:
    """Open the label sets of a recipe, each with its twin of mirrored frames.

    Args:
        store: Where they are.
        supervision: Of the recipe.
        terms: Those of its label sets that are meant; all if not given.
        known: Names of the label sets that a run learns from; where the beginning of a name has
            come to fit others, too, these are meant.

    Raises:
        LabelSetNotFoundError: If there is none of a name, or several.
        ValueError: If one lacks hierarchical maps that are asked for.
    """
    terms = supervision.labels if terms is None else terms
    found = [(term, _open_labels(store, term.labels, known)) for term in terms]
    names = [labels.name for _, labels in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the recipe names the label set {twice[0]} twice")
    teachers = [labels.teacher for _, labels in found]
    if supervision.assistant is not None:
        teachers.append(ASSISTANT)
    sources = []
    for term, labels in found:
        layout = labels.layout
        if term.hierarchical and len(layout.hierarchical) != HIERARCHICAL_MAPS:
            raise ValueError(_lacks_maps(f"the label set {labels.name}", layout))
        twin = _twin(store, labels) if supervision.flip == "labels" else None
        is_only = teachers.count(labels.teacher) == 1
        sources.append(LabelSource(labels.teacher if is_only else labels.name, labels, twin, term))
    return sources


def flips(sources: Sequence[LabelSource], supervision: Supervision) -> bool:
    """Return whether clips are mirrored, and say why not, or what it costs."""
    if supervision.flip == "none":
        return False
    if supervision.flip == "mirror":
        if sources:
            log.warning(
                "targets are mirrored with their frames: a teacher says something else of mirrored "
                "frames (KL 0.054 in a measurement); label them with: tinyhd distill --variant both"
            )
        return True
    lacking = [source.labels.name for source in sources if source.twin is None]
    if lacking:
        log.info(
            "clips are not mirrored: the store does not hold what the teacher of %s says of "
            "mirrored frames; add it with: tinyhd distill --variant hflip",
            lacking[0],
        )
    return not lacking


def find_recorded(store: TargetStore, supervision: Supervision) -> dict[str, CatalogueVideo]:
    """Find the videos of the store that have recorded eyes, by their content.

    Raises:
        DatasetError: If the data set cannot be read.
        ValueError: If none is named, or it has recorded eyes of no video of the store.
    """
    term = supervision.ground_truth
    if term is None:
        return {}
    if not term.data:
        raise ValueError(
            "the recipe learns from recorded eyes, and does not say where they are; name the data "
            "set (--data), or set supervision.ground_truth to null"
        )
    catalogue = open_catalogue(Path(term.data))
    by_content = {v.record.content_hash: v for v in catalogue.videos if v.census.labelled}
    found = {
        row.id: by_content[row.content_hash]
        for row in store.videos
        if row.content_hash in by_content
    }
    if not found:
        raise ValueError(f"{term.data} has recorded eyes of no video in {store.url}")
    return found


def describe_content(
    config: TrainConfig,
    sources: Sequence[LabelSource],
    recorded: Mapping[str, CatalogueVideo],
    teacher: OnlineTeacher | None = None,
) -> ClipContent:
    """Return what has to be read of each clip."""
    student, supervision = config.student, config.supervision
    has_twins = all(source.twin is not None for source in sources)
    truth = supervision.ground_truth
    return ClipContent(
        height=student.height,
        width=student.width,
        labels=tuple(source.labels.name for source in sources),
        flipped=tuple(source.twin.name for source in sources if source.twin) if has_twins else (),
        target_frames=student.output_frames,
        lag=target_lag(config),
        recorded=recorded,
        with_fixations=bool(truth and truth.nss),
        eyes=teacher.eyes if teacher is not None else None,
    )


def target_lag(config: TrainConfig) -> int:
    """Return by how many frames a teacher's maps lie before the frames that they are for."""
    return int(config.supervision.alignment == "lagged" and config.student.is_multi)


class Target(NamedTuple):
    """What a source says of a batch, and what is asked of the student by it."""

    name: str
    """Its terms' names begin with it."""
    maps: SourceMaps
    term: TermWeights
    rule: HierarchicalRule
    """What becomes of its hierarchical maps where the student has one for the whole clip."""


class Supervisor:
    """Computes the terms of batches.

    Args:
        config: The recipe.
        sources: The label sets.
        assistant: A TinyHD that looks at the student's clips, if there is one.
        teacher: A teacher that looks at the videos in the step, if there is one.
    """

    def __init__(
        self,
        config: TrainConfig,
        sources: Sequence[LabelSource],
        assistant: TinyHD | None = None,
        teacher: OnlineTeacher | None = None,
    ) -> None:
        self._config, self._sources, self._assistant = config, sources, assistant
        self._teacher = teacher
        names = [source.name for source in sources]
        if assistant is not None:
            names.append(ASSISTANT)
        self._teacher_name = "online"
        if teacher is not None and teacher.request.teacher not in names:
            self._teacher_name = teacher.request.teacher

    def targets(self, batch: Batch, clips: Tensor) -> list[Target]:
        """Return what label sets, assistant and teacher say of a batch.

        Args:
            batch: What was read.
            clips: The normalised clips, which an assistant looks at.
        """
        supervision, device = self._config.supervision, clips.device
        rule, found = supervision.hierarchical, []
        for source, planes in zip(self._sources, batch.planes, strict=True):
            if planes:
                maps = self._render(planes, source.layout, source.term, device)
                found.append(Target(source.name, maps, source.term, rule))
        if self._assistant is not None and supervision.assistant is not None:
            maps = ask_assistant(self._assistant, clips, self._config.student.output_frames)
            found.append(Target(ASSISTANT, maps, supervision.assistant, "auto"))
        if self._teacher is not None and supervision.online is not None:
            layout, term = self._teacher.request.layout, supervision.online
            maps = self._render(ask_teacher(self._teacher, batch.views), layout, term, device)
            found.append(Target(self._teacher_name, maps, term, rule))
        return found

    def terms(
        self, output: StudentOutput, batch: Batch, targets: Sequence[Target]
    ) -> dict[str, Term]:
        """Hold the student's output against all that is said of a batch.

        Args:
            output: What the student said.
            batch: What was read.
            targets: What :meth:`targets` says of it.
        """
        supervision = self._config.supervision
        terms: dict[str, Term] = {}
        for name, maps, term, rule in targets:
            terms |= source_terms(name, output, maps, term, rule)
        if supervision.ground_truth is not None and batch.density is not None:
            device = output.saliency_logits.device
            fixations = None if batch.fixations is None else batch.fixations.to(device)
            recorded = RecordedMaps(batch.density.to(device), fixations)
            terms |= ground_truth_terms(output, recorded, supervision.ground_truth)
        return terms

    def _render(
        self,
        planes: Mapping[str, Tensor],
        layout: MapLayout,
        term: TermWeights,
        device: torch.device,
    ) -> SourceMaps:
        student = self._config.student
        names = layout.hierarchical if term.hierarchical else ()
        return render_batch(planes, layout, names, student.height, student.width, device)


def render_batch(
    planes: Mapping[str, Tensor],
    layout: MapLayout,
    hierarchical: Sequence[str],
    height: int,
    width: int,
    device: torch.device,
) -> SourceMaps:
    """Turn stored planes ``(B, T, map, y, x)`` into maps at the student's size."""
    clips, frames = next(iter(planes.values())).shape[:2]
    flat = {name: values.to(device).flatten(0, 1) for name, values in planes.items()}
    names = [layout.saliency, *hierarchical]
    maps = render_maps(flat, layout, names, height=height, width=width)
    unflat = {name: values.view(clips, frames, height, width) for name, values in maps.items()}
    stacked = torch.stack([unflat[name] for name in hierarchical], 1) if hierarchical else None
    return SourceMaps(unflat[layout.saliency], stacked)


def ask_teacher(teacher: OnlineTeacher, views: Sequence[TeacherView]) -> dict[str, Tensor]:
    """Return what a teacher says of clips: planes by array, ``(B, T, map, y, x)``."""
    labelled = [teacher.label(view) for view in views]
    return {name: torch.stack([planes[name] for planes in labelled]) for name in labelled[0]}


@torch.no_grad()
def ask_assistant(assistant: TinyHD, clips: Tensor, frames: int) -> SourceMaps:
    """Return what a TinyHD says of the newest frames of clips; of d1, all that it says.

    Args:
        assistant: The network.
        clips: Normalised clips, ``(B, 3, 16, H, W)``.
        frames: Newest frames that are wanted.
    """
    output = assistant(clips)
    # A sigmoid of few bits would be zero where a logit is small.
    saliency = output.saliency_logits.flatten(1, -3)[:, -frames:].float().sigmoid()
    logits = output.map_logits.get("d1")
    if logits is None:
        return SourceMaps(saliency)
    return SourceMaps(saliency, logits[:, :, -frames:].float().sigmoid())


def check_assistant(theirs: TinyHDConfig, term: AssistantTerm, config: TrainConfig) -> None:
    """Make sure that an assistant says what is asked of it.

    Raises:
        ValueError: If it does not.
    """
    ours = config.student
    if theirs.output_frames < ours.output_frames:
        raise ValueError(
            f"the assistant {term.checkpoint} maps {theirs.output_frames} frames of a clip, the "
            f"student {ours.output_frames}; have it label the videos instead: tinyhd distill "
            f"--teacher assistant --weights {term.checkpoint}"
        )
    if term.hierarchical and "d1" not in theirs.decoders:
        raise ValueError(
            f"the assistant {term.checkpoint} has no decoder d1, and so no hierarchical maps; give "
            "that term the weight 0"
        )
    if term.hierarchical and theirs.is_single("d1") and not ours.is_single("d1"):
        raise ValueError(
            f"the assistant {term.checkpoint} has one hierarchical map of a kind for a whole clip, "
            "the student one for every frame; give that term the weight 0"
        )


def load_assistant(term: AssistantTerm, config: TrainConfig, device: str) -> TinyHD:
    """Load the assistant, ready to look at the student's clips.

    Raises:
        CheckpointError: If its file cannot be read.
        ValueError: If it does not say what is asked of it.
    """
    model = load_model(Path(term.checkpoint))
    theirs, ours = model.config, config.student
    check_assistant(theirs, term, config)
    if (theirs.height, theirs.width) != (ours.height, ours.width):
        log.warning(
            "the assistant was trained on frames of %dx%d, and looks at %dx%d",
            *(theirs.height, theirs.width, ours.height, ours.width),
        )
    return model.for_inference().to(device).requires_grad_(requires_grad=False)


def check_teacher(teacher: OnlineTeacher, term: OnlineTerm) -> None:
    """Make sure that a teacher says what is asked of it.

    Raises:
        ValueError: If it has no hierarchical maps, and they are asked for.
    """
    layout = teacher.request.layout
    if term.hierarchical and len(layout.hierarchical) != HIERARCHICAL_MAPS:
        raise ValueError(_lacks_maps(f"the teacher {teacher.request.teacher}", layout))


def _lacks_maps(who: str, layout: MapLayout) -> str:
    return (
        f"{who} has {len(layout.hierarchical)} hierarchical maps, the student four; train with the "
        "saliency map alone (--hierarchical-weight 0), or choose a teacher that has them"
    )


def _open_labels(store: TargetStore, name: str, known: Collection[str]) -> LabelSet:
    """Open a label set; of a name that it shares with its twin, the one of frames as they are.

    Raises:
        LabelSetNotFoundError: If there is none of the name, or several.
        ValueError: If it is of mirrored frames.
    """
    try:
        labels = store.label_set(name or None)
    except LabelSetNotFoundError:
        found = [
            item
            for item in store.label_sets
            if item.name.startswith(name) and len(item.receipts)
            if item.request.variant == "identity"
        ]
        if len(found) > 1:
            found = [item for item in found if item.name in known]
        if len(found) != 1:
            raise
        labels = found[0]
    if labels.request.variant != "identity":
        raise ValueError(
            f"the label set {labels.name} is of mirrored frames; name the one of the frames as "
            "they are, and mirrored clips are held against this one"
        )
    return labels


def _twin(store: TargetStore, labels: LabelSet) -> LabelSet | None:
    """Return what the same teacher says of mirrored frames, if any of it is there."""
    name = replace(labels.request, variant="hflip").name
    try:
        twin = store.label_set(name)
    except LabelSetNotFoundError:
        return None
    return twin if len(twin.receipts) else None
