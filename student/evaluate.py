"""Score saliency maps against recorded eyes: students, folders of maps, label sets, baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from stores.errors import VideoError
from stores.progress import Progress
from student.baselines import (
    CentrePriorSource,
)
from student.report import EvaluationReport
from student.scored_set import EvaluateSettings, ScoredSet
from student.scores import ScoresFile, SourceScores
from student.scoring import VideoScorer
from student.sources import Source, SourceError

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
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"several sources are called {min(twice)!r}; name them with NAME=SOURCE")
    with ScoredSet(data, split, settings) as scored:
        runs: list[tuple[str, Mapping[str, Any], Source | None]] = [
            (source.name, source.identity, source) for source in sources
        ]
        if settings.baselines:
            prior = CentrePriorSource(scored.prior, scored.numbers)
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


def _stamp(source: Source | None, number: int, scored: ScoredSet) -> list[int]:
    """Return by what maps and recorded eyes of a video are taken to be the same as before."""
    truth = scored.truths[number].stamp()
    stamp = [truth.num_bytes, truth.modified_ns]
    try:
        return stamp if source is None else stamp + source.stamp(scored.videos[number])
    except (SourceError, VideoError):
        if not scored.settings.skip_bad:
            raise
        return stamp
