"""Score saliency maps against recorded eyes: students, folders of maps, label sets, baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from stores.errors import VideoError
from stores.progress import Progress
from student.baselines import (
    CentrePriorSource,
)
from student.report import EvaluationReport
from student.scored_set import EvaluateSettings, ScoredSet
from student.scores import ScoresError, ScoresFile, SourceScores, file_name
from student.scoring import VideoScorer
from student.sources import Source, SourceError

CENTRE_PRIOR: Final = "centre prior"
OBSERVERS: Final = "other observers"


def evaluate(
    sources: Sequence[Source],
    data: Path,
    out: Path,
    settings: EvaluateSettings,
    *,
    split: str | None = None,
) -> EvaluationReport:
    """Score sources on a data set; what an earlier run scored is kept.

    Args:
        sources: Whose maps; the first is what the others are compared with.
        data: Folder of a data set, or its catalogue.
        out: Folder for scores and reports; made if needed.
        settings: How.
        split: Which videos; that which the field reports on if not given.

    Raises:
        DatasetError: If there is nothing to score on.
        SourceError: If a map is missing or damaged and that is not to be left out.
        GroundTruthError: The same of recorded eyes.
        VideoError: The same of a video.
        ScoresError: If ``out`` holds another evaluation, or cannot be written.
    """
    _check_names([source.name for source in sources], settings)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ScoresError(f"{out} is in use by another evaluation") from error
    try:
        return _evaluate(sources, data, out, settings, split)
    finally:
        lock.release()


def _check_names(names: Sequence[str], settings: EvaluateSettings) -> None:
    """Raise a ValueError if two sources would have the same files."""
    known: dict[str, str] = {}
    baselines = (CENTRE_PRIOR, OBSERVERS) if settings.baselines else ()
    for name in (*baselines, *names):
        if (file := file_name(name)) in known:
            raise ValueError(
                f"two sources are called {known[file]!r} and {name!r}, and would have the same "
                "files; name one otherwise with NAME=SOURCE"
            )
        known[file] = name


def _evaluate(
    sources: Sequence[Source],
    data: Path,
    out: Path,
    settings: EvaluateSettings,
    split: str | None,
) -> EvaluationReport:
    with ScoredSet(data, split, settings) as scored:
        runs: list[tuple[str, Mapping[str, Any], Source | None]] = [
            (source.name, source.identity, source) for source in sources
        ]
        if settings.baselines:
            prior = CentrePriorSource(CENTRE_PRIOR, scored.prior)
            runs.append((prior.name, prior.identity, prior))
            if scored.has_observers:
                runs.append((OBSERVERS, {"kind": OBSERVERS}, None))
        total = len(runs) * sum(len(frames) for frames in scored.frames)
        scores = []
        with Progress(total, unit="frames", label="scoring") as progress:
            for name, identity, source in runs:
                file = ScoresFile(
                    out / "scores", name, {**scored.identity, **identity}, settings.measures
                )
                with file:
                    scores.append(_score_source(name, source, scored, file, progress))
        report = EvaluationReport(
            data=str(scored.catalogue.root),
            kind=scored.catalogue.kind,
            split=scored.split,
            protocol=settings.protocol,
            prior=scored.prior.source if settings.baselines or "ig" in settings.measures else "",
            seed=settings.seed,
            scores=scores,
            num_sources=len(sources),
            left_out=scored.left_out,
        )
    report.save(out)
    return report


def _score_source(
    name: str, source: Source | None, scored: ScoredSet, file: ScoresFile, progress: Progress
) -> SourceScores:
    """Score one source on all videos; ``None`` stands for the other observers."""
    settings = scored.settings
    scores = SourceScores(name, settings.measures)
    for number, video in enumerate(scored.videos):
        frames = scored.frames[number]
        stamp = _stamp(source, number, scored)
        known = file.known.get(video.record.id)
        # What was left out before is an error now, if it is not to be left out.
        if known is not None and known.stamp == stamp and (settings.skip_bad or not known.skipped):
            scores.videos.append(known)
            progress.advance(len(frames), note=name)
            continue
        done = VideoScorer(scored, number, source, progress, note=f"{name}, {video.record.id}")
        found = done.score(frames, stamp)
        file.add(found)
        scores.videos.append(found)
    return scores


def _stamp(source: Source | None, number: int, scored: ScoredSet) -> str:
    """Return by what maps and recorded eyes of a video are taken to be the same as before."""
    truth = scored.truths[number].stamp()
    try:
        return truth if source is None else f"{truth} {source.stamp(scored.videos[number])}"
    except (SourceError, VideoError):
        if not scored.settings.skip_bad:
            raise
        return truth
