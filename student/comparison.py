"""Runs side by side: what each was trained from, with what, and how far it came."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stores.errors import TinyHDError

CONFIG: Final = "config.json"
METRICS: Final = "metrics.jsonl"
TOTAL: Final = "total"


@dataclass(frozen=True)
class RunSummary:
    """What a run's folder tells."""

    path: Path
    label_sets: Mapping[str, str]
    """Names and fingerprints of what it was trained from: label sets, be they stored or said in the
    step, and an assistant's checkpoint."""
    config: Mapping[str, Any]
    epochs: int
    """Epochs that were validated, or all that were trained where nothing is."""
    steps: int
    best: Mapping[str, float]
    """The validation with the least total."""

    @property
    def student(self) -> str:
        """The student in few words."""
        student = self.config.get("student", {})
        kind = "S" if student.get("output_frames") == 1 else "M"
        size = f"{student.get('height')}x{student.get('width')}"
        online = " (teacher in the step)" if self.config.get("online_sets") else ""
        return f"{kind} rc{student.get('channel_reduction')} {size}{online}"


def find_runs(folders: Sequence[Path]) -> list[RunSummary]:
    """Return the runs in folders, at any depth, by path.

    Raises:
        TinyHDError: If there are none.
    """
    found = [summary for folder in folders for summary in _runs_in(folder)]
    if not found:
        raise TinyHDError(f"no training run in {', '.join(map(str, folders))}")
    return sorted(found, key=lambda run: str(run.path))


def compare_runs(runs: Sequence[RunSummary]) -> str:
    """Return a table of runs for each group of label sets that they were trained from."""
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        names = [f"{name} ({print_[:8]})" for name, print_ in sorted(run.label_sets.items())]
        groups.setdefault(", ".join(names) or "no label set", []).append(run)
    lines: list[str] = []
    for name, members in groups.items():
        measures = list(dict.fromkeys(key for run in members for key in run.best))
        rows = [["run", "student", "steps", *measures]]
        for run in members:
            values = [f"{run.best[key]:.4f}" if key in run.best else "-" for key in measures]
            rows.append([str(run.path), run.student, f"{run.steps:,}", *values])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["", f"from {name}"] if lines else [f"from {name}"]
        for path, student, *cells in rows:
            right = [cell.rjust(w) for cell, w in zip(cells, widths[2:], strict=True)]
            lines.append(
                "  ".join([f"  {path.ljust(widths[0])}", student.ljust(widths[1]), *right])
            )
    return "\n".join(lines)


def _runs_in(folder: Path) -> Iterator[RunSummary]:
    for path in sorted({folder / CONFIG, *folder.rglob(CONFIG)}):
        if (summary := _read(path.parent)) is not None:
            yield summary


def _read(folder: Path) -> RunSummary | None:
    """Return what a folder tells; nothing if it is no run's."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        lines = (folder / METRICS).read_text().splitlines()
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or "label_sets" not in config:
        return None
    rows = [row for line in lines if (row := _parse(line)) is not None]
    validations = [row for row in rows if row.get("kind") == "validation" and TOTAL in row]
    best = min(validations, key=lambda row: float(row[TOTAL]), default={})
    values = {key: float(value) for key, value in best.items() if key not in ("kind", "step")}
    steps = max((int(row["step"]) for row in rows), default=0)
    sets = {**config["label_sets"], **config.get("online_sets", {})}
    files = config.get("files_sha256", {})
    sets |= {name: files[name] for name in ("assistant",) if name in files}
    return RunSummary(folder, sets, config, len(validations), steps, values)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
