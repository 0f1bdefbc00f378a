"""A run of several stages: wider students teach narrower ones (TinyHD's teacher assistants)."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from stores.errors import TinyHDError
from stores.targets import TargetStore
from student.checkpoints import load_model
from student.config import TinyHDConfig
from student.experiment import RecipeError, build_recipe, merge_values
from student.job import OpenTeacher, check_start, find_teacher
from student.recipe import TrainConfig
from student.runs import label_sets_of
from student.supervision import ASSISTANT, check_assistant, find_recorded, find_sources
from student.train import TrainState, train

log = logging.getLogger(__name__)

STAGES: Final = "stages"
NAME: Final = re.compile(r"\w[\w.-]*")
REFERENCE: Final = "stage:"
NO_LABEL: Final = (
    "labels of a stage's student are to be made in the store, and nobody makes them: the command "
    "line does; in Python, give train_stages() a label function"
)


@dataclass(frozen=True)
class Stage:
    """One training of a run."""

    name: str
    """Of its folder, and of its student in later stages; empty where there is one stage alone."""
    config: TrainConfig

    @property
    def learns_through_store(self) -> bool:
        """Whether the student of another stage has to label the store for it."""
        return any(t.labels.startswith(REFERENCE) for t in self.config.supervision.labels)

    @property
    def needs(self) -> list[str]:
        """Names of the stages whose students it needs."""
        supervision = self.config.supervision
        given = [self.config.start, *(term.labels for term in supervision.labels)]
        if supervision.assistant is not None:
            given.append(supervision.assistant.checkpoint)
        return [path.removeprefix(REFERENCE) for path in given if path.startswith(REFERENCE)]


def build_stages(values: Mapping[str, Any]) -> list[Stage]:
    """Build the stages of a recipe: each is the recipe with its own values laid over it.

    Args:
        values: A recipe's values; ``stages`` is a list of such values, each with a ``name``.

    Raises:
        RecipeError: If a key is unknown, a value not allowed, or a stage needs one that does not
            come before it.
    """
    common = {key: value for key, value in values.items() if key != STAGES}
    if STAGES not in values:
        only = Stage("", build_recipe(common))
        if only.needs:
            raise RecipeError(f"the recipe names stage:{only.needs[0]}, and has no stages")
        return [only]
    given = values[STAGES]
    if not isinstance(given, list) or not given:
        raise RecipeError("stages must be a list of recipes, each with a name")
    stages: list[Stage] = []
    for number, own in enumerate(given):
        if not isinstance(own, Mapping) or not NAME.fullmatch(str(own.get("name", ""))):
            raise RecipeError(f"stages[{number}] needs a name of letters, digits, '.', '_' and '-'")
        name = str(own["name"])
        if name in [stage.name for stage in stages]:
            raise RecipeError(f"two stages are called {name!r}")
        rest = {key: value for key, value in own.items() if key != "name"}
        try:
            stage = Stage(name, build_recipe(merge_values(common, rest)))
        except RecipeError as error:
            raise RecipeError(f"stage {name}: {error}") from error
        before = [stage.name for stage in stages]
        if missing := [needed for needed in stage.needs if needed not in before]:
            raise RecipeError(
                f"stage {name} needs the student of {missing[0]!r}, which does not come before it; "
                f"there are {', '.join(before) or 'none'}"
            )
        stages.append(stage)
    _check_held_out(stages)
    return stages


def _check_held_out(stages: Sequence[Stage]) -> None:
    """Make sure that no stage trains on what another one is judged by."""
    first = stages[0]
    for stage in stages[1:]:
        for name in ("holdout", "holdout_of"):
            before, now = (getattr(item.config.sampling, name) for item in (first, stage))
            if now != before:
                raise RecipeError(
                    f"stage {stage.name} has sampling.{name} {now}, stage {first.name} {before}: "
                    "one would train on what the other validates on; let them be the same"
                )


class Label(Protocol):
    """Has the student of a checkpoint label a store."""

    def __call__(self, checkpoint: Path, /, *, is_mirrored: bool) -> str:
        """Return the label set's name; of mirrored frames there is another if that is so."""
        ...


def train_stages(
    store: str | Path,
    out: Path,
    stages: Sequence[Stage],
    *,
    label: Label | None = None,
    **options: Any,  # noqa: ANN401 - of train
) -> TrainState:
    """Train one stage after the other; what is finished is not begun anew.

    Each has a folder of its own below ``out``, a single stage ``out`` itself. A stage begins when
    the ones that it needs are finished, with their best weights.

    Args:
        store: Path or URL of the target store.
        out: Folder of the run.
        stages: What is trained, in this order.
        label: Labels the store for stages that learn from a stage through it; the only thing that
            writes there.
        options: As of :func:`student.train.train`.

    Returns:
        Where the last stage is, or the one that was stopped.
    """
    if len(stages) > 1:
        _check_all(TargetStore.open(store), out, stages, label, options.get("open_teacher"))
    state = TrainState()
    for number, stage in enumerate(stages):
        folder = out / stage.name if stage.name else out
        if stage.name:
            log.info("stage %d of %d: %s", number + 1, len(stages), stage.name)
        config = _with_students(stage.config, out, folder, label)
        state = train(store, folder, config, **options)
        if not state.is_complete:
            break
    return state


def _check_all(
    store: TargetStore,
    out: Path,
    stages: Sequence[Stage],
    label: Label | None,
    open_teacher: OpenTeacher | None,
) -> None:
    """Make sure, before the first stage is trained, that there is what the later ones take.

    Raises:
        RecipeError: If something is missing, or does not fit.
    """
    students = {stage.name: stage.config.student for stage in stages}
    for stage in stages:
        try:
            known = label_sets_of(out / stage.name)
            _check(stage.config, store, students, known=known)
            if stage.learns_through_store and label is None:
                raise ValueError(NO_LABEL)
            find_teacher(stage.config, open_teacher, "cpu")
        except (TinyHDError, ValueError) as error:
            raise RecipeError(f"stage {stage.name}: {error}") from error


def _check(
    config: TrainConfig,
    store: TargetStore,
    students: Mapping[str, TinyHDConfig],
    *,
    known: Collection[str],
) -> None:
    supervision = config.supervision
    stored = [term for term in supervision.labels if not term.labels.startswith(REFERENCE)]
    find_sources(store, supervision, stored, known=known)
    find_recorded(store, supervision)
    for term in supervision.labels:
        theirs = students.get(term.labels.removeprefix(REFERENCE))
        if term in stored or theirs is None:
            continue
        if term.hierarchical and (theirs.is_multi or "d1" not in theirs.decoders):
            raise ValueError(
                f"the student of {term.labels} labels its saliency maps alone; give the "
                "hierarchical term of these labels the weight 0"
            )

    def config_of(given: str) -> TinyHDConfig:
        if given.startswith(REFERENCE):
            return students[given.removeprefix(REFERENCE)]
        return load_model(Path(given)).config

    if config.start:
        check_start(config_of(config.start), config)
    if supervision.assistant is not None:
        assistant = config_of(supervision.assistant.checkpoint)
        check_assistant(assistant, supervision.assistant, config)


def _with_students(
    config: TrainConfig, out: Path, folder: Path, label: Label | None
) -> TrainConfig:
    """Return a stage's recipe with the checkpoints and label sets of the stages that it names."""
    supervision = config.supervision
    begun = label_sets_of(folder)
    labels = []
    for term in supervision.labels:
        name = term.labels
        if name.startswith(REFERENCE):
            checkpoint = Path(_checkpoint_of(name, out))
            name = _labels_of(checkpoint, begun, label, is_mirrored=supervision.flip == "labels")
        labels.append(replace(term, labels=name))
    assistant = supervision.assistant
    if assistant is not None:
        assistant = replace(assistant, checkpoint=_checkpoint_of(assistant.checkpoint, out))
    supervision = replace(supervision, labels=tuple(labels), assistant=assistant)
    return replace(config, start=_checkpoint_of(config.start, out), supervision=supervision)


def _labels_of(
    checkpoint: Path, begun: Collection[str], label: Label | None, *, is_mirrored: bool
) -> str:
    """Return the label set that a student makes; one that a stage has begun with is whole."""
    if label is None:
        raise RecipeError(NO_LABEL)
    ours = [name for name in begun if name.startswith(f"{ASSISTANT}-")]
    if len(ours) == 1:
        return ours[0]
    return label(checkpoint, is_mirrored=is_mirrored)


def _checkpoint_of(given: str, out: Path) -> str:
    if not given.startswith(REFERENCE):
        return given
    return str(out / given.removeprefix(REFERENCE) / "best.pt")
