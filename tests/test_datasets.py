"""Every kind of data set goes the whole way: scan, distill, train, evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import cli
from tests.miniature import Kind

SIZE = "32x64"
TRAINED = {  # split that is trained on; frames labelled; frames scored
    "dhf1k": ("train540", 125, 90),
    "ucf": ("train", 54, 42),
    "hollywood2": ("train", 64, 24),
    "kinetics": ("train", 154, 0),
    "plain": (None, 58, 0),
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", TRAINED)
def test_the_whole_way(miniatures: Callable[[Kind], Path], tmp_path: Path, kind: Kind) -> None:
    split, labelled, scored = TRAINED[kind]
    catalogue, store, out = (tmp_path / name for name in ("data.jsonl", "targets.zarr", "run"))
    scanned = run("data", "scan", miniatures(kind), "--out", catalogue)
    assert scanned.exit_code == 0, scanned.output

    distill = ["distill", catalogue, "--teacher", "pqft", "--store", store, "--size", SIZE]
    distill += ["--with-frames", SIZE, "--executor", "inline", "--shard-frames", "16"]
    labels = run(*distill, *(["--split", split] if split else []))
    assert labels.exit_code == 0, labels.output
    assert f"{labelled} frames labelled" in labels.output

    train = ["train", "--store", store, "--out", out, "--size", SIZE, "--epochs", 1, "--batch", 1]
    trained = run(*train, "--clips-per-video", 1, "--holdout", 0, "--device", "cpu")
    assert trained.exit_code == 0, trained.output
    assert (out / "last.pt").is_file()

    evaluate = ["evaluate", f"ours={out / 'last.pt'}", "--data", catalogue, "--device", "cpu"]
    found = run(*evaluate, "--out", tmp_path / "scores", "--skip-bad")
    if not scored:
        assert found.exit_code == 1
        assert "has no recorded eyes" in found.output
        return
    assert found.exit_code == 0, found.output
    report = json.loads((tmp_path / "scores" / "report.json").read_text())
    ours, prior = report["sources"]
    assert ours["frames"] == prior["frames"] == scored
    assert ours["measures"]["nss"]["frames"] == scored
    assert prior["measures"]["auc_judd"]["micro"] > 0.6
