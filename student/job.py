"""What a training takes: found, looked at and checked before anything runs or is written."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stores.catalogue import CatalogueVideo
from stores.schema import fingerprint
from stores.targets import TargetStore
from stores.videos import hash_file
from student.checkpoints import load_model
from student.clips import ClipDataset
from student.config import TinyHDConfig
from student.online import OnlineTeacher
from student.pools import (
    ClipKey,
    ClipPools,
    draw_epoch,
    find_pools,
    flip_some,
    spread_clips,
    take_turns,
)
from student.recipe import OnlineTerm, TrainConfig
from student.runs import label_sets_of
from student.supervision import (
    LabelSource,
    check_assistant,
    check_teacher,
    describe_content,
    find_recorded,
    find_sources,
    flips,
    target_lag,
)
from student.trainer import TrainingError

log = logging.getLogger(__name__)

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
    identity: Mapping[str, Any]
    """All that decides what training gives."""

    def named(self, config: TrainConfig) -> TrainConfig:
        """Return a recipe with the whole names of its label sets."""
        terms = zip(config.supervision.labels, self.sources, strict=True)
        labels = tuple(replace(term, labels=source.labels.name) for term, source in terms)
        return replace(config, supervision=replace(config.supervision, labels=labels))

    def draw(self, config: TrainConfig, epoch: int) -> list[ClipKey]:
        """Draw the clips of an epoch; of each is said whether it is mirrored and who speaks."""
        when = {"seed": config.seed, "epoch": epoch}
        clips = draw_epoch(self.pools.training, config.sampling, labelled=self.recorded, **when)
        if self.is_flipping:
            clips = flip_some(clips, **when)
        sources, how = len(self.sources), config.optimisation
        if config.supervision.mixing == "one_per_batch" and sources > 1:
            size = how.batch_size * how.workers
            clips = take_turns(clips, sources=sources, batch_size=size, **when)
        return clips


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
    sources = find_sources(store, supervision, known=label_sets_of(job.out))
    recorded = find_recorded(store, supervision)
    _check_device(job.device)
    teacher = find_teacher(config, job.open_teacher, job.device)
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
    return prepared


def find_teacher(
    config: TrainConfig, open_teacher: OpenTeacher | None, device: str
) -> OnlineTeacher | None:
    """Make the teacher that a recipe has label in the step, if it has one.

    Raises:
        ValueError: If nobody makes it, or it does not say what is asked of it.
        TinyHDError: Whatever is wrong with it.
    """
    term = config.supervision.online
    if term is None:
        return None
    if open_teacher is None:
        raise ValueError(
            f"the recipe has the teacher {term.teacher!r} label in the step, and nobody handed it "
            "in: the command line does; in Python, give train() an open_teacher"
        )
    teacher = open_teacher(term, device)
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
