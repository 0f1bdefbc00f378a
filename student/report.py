"""What an evaluation found: tables, differences with intervals, and files of them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from stores.datasets import KIND_NAMES, Kind
from student.averages import Difference, paired_bootstrap
from student.protocols import PROTOCOLS, Measure
from student.scores import Skipped, SourceScores, file_name, to_plain, write_whole

TITLES: Final[dict[Measure, str]] = {
    "auc_judd": "AUC-J",
    "auc_borji": "AUC-B",
    "auc_shuffled": "s-AUC",
    "nss": "NSS",
    "cc": "CC",
    "sim": "SIM",
    "kld": "KLD",
    "ig": "IG",
}
SHOWN_SKIPPED: Final = 10
LEAST_VIDEOS: Final = 5
"""Of fewer, an interval is shown to nobody: the bootstrap would have too little to draw from."""


@dataclass
class EvaluationReport:
    """Scores of several sources on the same frames."""

    data: str
    kind: Kind
    split: str | None
    protocol: str
    prior: str
    """What the centre prior was learnt from; empty if there is none."""
    seed: int
    scores: list[SourceScores]
    """The first is what the others are compared with; baselines come last."""
    num_sources: int
    """Of the scores, how many are not of baselines."""
    left_out: list[Skipped]
    """What could not be scored by anything."""

    @property
    def measures(self) -> tuple[Measure, ...]:
        """What was scored."""
        return self.scores[0].measures

    @property
    def skipped(self) -> list[tuple[str, Skipped]]:
        """All that was left out, with whose maps."""
        found = [("", item) for item in self.left_out]
        return found + [(scores.name, item) for scores in self.scores for item in scores.skipped]

    def difference(self, other: SourceScores, measure: Measure) -> Difference:
        """Return how much higher the first source scores than another, on the same frames."""
        first, second = common_means(self.scores[0], other, measure)
        return paired_bootstrap(first, second, seed=self.seed)

    def __str__(self) -> str:
        first = self.scores[0]
        where = KIND_NAMES[self.kind] + (f" {self.split}" if self.split else "")
        frames = sum(len(video.frames) for video in first.videos)
        lines = [
            f"{where} in {self.data}: {len(first.videos):,} videos, {frames:,} frames; "
            f"protocol {self.protocol}"
        ]
        headline = PROTOCOLS[self.protocol].headline
        other = "macro" if headline == "micro" else "micro"
        means = {"micro": "mean over frames", "macro": "mean over videos of their means"}
        for mean in (headline, other):
            rows = [(means[mean], *(TITLES[measure] for measure in self.measures))]
            rows += [self._row(scores, mean) for scores in self.scores]
            lines += ["", *_table(rows)]
        titles = [TITLES[measure] for measure in self.measures]
        if len({count for _, *counts in self._counts() for count in counts}) > 1:
            lines += ["", *_table([("frames with a score", *titles), *self._counts()])]
        if len(self.scores) > 1:
            rows = [(f"{first.name} less", *(scores.name for scores in self.scores[1:]))]
            rows += [self._differences(measure) for measure in self.measures]
            lines += ["", *_table(rows)]
            told = "  means over videos, of the frames that both have a score for"
            if len(first.videos) >= LEAST_VIDEOS:
                told += "; 95 % intervals of the bootstrap, * leaves out 0"
            lines += [told]
        if self.prior:
            lines += ["", f"centre prior: {self.prior}"]
        skipped = self.skipped
        if skipped:
            lines += ["", f"{len(skipped)} times something was left out:"]
            lines += [f"  {_skipped(name, item)}" for name, item in skipped[:SHOWN_SKIPPED]]
            if len(skipped) > SHOWN_SKIPPED:
                lines.append(f"  and {len(skipped) - SHOWN_SKIPPED} more, all in report.json")
        return "\n".join(lines)

    def _row(self, scores: SourceScores, mean: str) -> tuple[str, ...]:
        averages = [scores.average(measure) for measure in self.measures]
        return (scores.name, *(_number(getattr(average, mean)) for average in averages))

    def _counts(self) -> list[tuple[str, ...]]:
        return [
            (scores.name, *(f"{scores.average(measure).frames:,}" for measure in self.measures))
            for scores in self.scores
        ]

    def _differences(self, measure: Measure) -> tuple[str, ...]:
        cells = [f"{TITLES[measure]} (less is better)" if measure == "kld" else TITLES[measure]]
        for other in self.scores[1:]:
            found = self.difference(other, measure)
            if math.isnan(found.difference):
                cells.append("-")
                continue
            cell = f"{found.difference:+.4f}"
            if len(self.scores[0].videos) >= LEAST_VIDEOS:
                sure = "*" if found.low > 0 or found.high < 0 else " "
                cell += f"{sure} [{found.low:+.4f}, {found.high:+.4f}]"
            cells.append(cell)
        return tuple(cells)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        sources = []
        for index, scores in enumerate(self.scores):
            measures: dict[str, Any] = {}
            for measure in self.measures:
                average = scores.average(measure)
                measures[measure] = {
                    "micro": to_plain(average.micro),
                    "macro": to_plain(average.macro),
                    "frames": average.frames,
                    "videos": average.videos,
                }
                if index:
                    found = self.difference(scores, measure)
                    measures[measure]["first_less_this"] = {
                        key: to_plain(value) for key, value in found._asdict().items()
                    }
            sources.append(
                {
                    "name": scores.name,
                    "is_baseline": index >= self.num_sources,
                    "frames": sum(len(video.frames) for video in scores.videos),
                    "measures": measures,
                    "skipped": [asdict(item) for item in scores.skipped],
                }
            )
        return {
            "data": self.data,
            "kind": self.kind,
            "split": self.split,
            "protocol": self.protocol,
            "headline": PROTOCOLS[self.protocol].headline,
            "centre_prior": self.prior,
            "seed": self.seed,
            "videos": len(self.scores[0].videos),
            "left_out": [asdict(item) for item in self.left_out],
            "sources": sources,
        }

    def save(self, out: Path) -> None:
        """Write ``report.json`` and, for each source, a ``.csv`` with a row per video.

        Raises:
            ScoresError: If they cannot be written.
        """
        for scores in self.scores:
            write_whole(out / f"{file_name(scores.name)}.csv", self._csv(scores))
        write_whole(out / "report.json", json.dumps(self.to_dict(), indent=1) + "\n")

    def _csv(self, scores: SourceScores) -> str:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["video", "frames", "skipped", *self.measures])
        columns = [scores.average(measure).per_video for measure in self.measures]
        for row, video in enumerate(scores.videos):
            values = [float(column[row]) for column in columns]
            cells = ["" if math.isnan(value) else f"{value:z.6f}" for value in values]
            table.writerow([video.video, len(video.frames), len(video.skipped), *cells])
        return text.getvalue()


def common_means(
    first: SourceScores, second: SourceScores, measure: Measure
) -> tuple[list[float], list[float]]:
    """Return the means of both over each video's frames for which both have a score."""
    means: tuple[list[float], list[float]] = ([], [])
    for one, other in zip(first.videos, second.videos, strict=True):
        scores = [
            {frame: float(v) for frame, v in zip(video.frames, video.values[measure], strict=True)}
            for video in (one, other)
        ]
        common = [
            frame
            for frame in one.frames
            if frame in scores[1]
            and not (math.isnan(scores[0][frame]) or math.isnan(scores[1][frame]))
        ]
        for mean, values in zip(means, scores, strict=True):
            of_common = [values[frame] for frame in common]
            mean.append(sum(of_common) / len(of_common) if of_common else math.nan)
    return means


def _skipped(name: str, item: Skipped) -> str:
    frame = "" if item.frame is None else f", frame {item.frame}"
    return f"{name + ': ' if name else ''}{item.video}{frame}: {item.reason}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:z.4f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  " + "  ".join([name.ljust(widths[0]), *right]))
    return lines
