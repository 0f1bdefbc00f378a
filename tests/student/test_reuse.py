"""A store is made once; whoever likes trains from it, at the same time, without a teacher."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from cli import cli
from distill import DistillSettings, label_videos

SCRIPT = """
import sys
for name in ("teachers", "distill", "ray"):
    sys.modules[name] = None  # whoever imports it fails
import torch
torch.set_num_threads(1)
from pathlib import Path
from student.stages import build_stages, train_stages
from student.experiment import gather_values
values = gather_values(changes={changes!r})
state = train_stages({store!r}, Path({out!r}), build_stages(values))
sys.exit(0 if state.is_complete else 7)
"""
COMMON = (
    "optimisation.epochs=1",
    "sampling.clips_per_video=2",
    "sampling.holdout=0.3",
    "sampling.holdout_of=frames",
    'supervision.labels=[{"labels": "pqft"}]',
)
EXPERIMENTS = {
    "s": ("student={variant: tinyhd-s-rc4, size: 32x32}",),
    "m": ("student={variant: tinyhd-m-rc4, size: 32x32}",),
    "mixed": (
        "student={variant: tinyhd-s-rc4, size: 128x160}",
        'supervision.labels=[{"labels": "pqft", "hierarchical": 0, "d2": 0.5}]',
    ),
}


def fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def start(name: str, store: Path, runs: Path) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(
        changes=(*COMMON, *EXPERIMENTS[name]), store=str(store), out=str(runs / name)
    )
    return subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])


def test_three_experiments_share_a_store(video_folder: Path, tmp_path: Path) -> None:
    store, runs = tmp_path / "targets.zarr", tmp_path / "runs"
    settings = DistillSettings(
        teacher="pqft", size=(64, 64), executor="inline", with_frames=(32, 32), shard_frames=16
    )
    label_videos([video_folder], store, settings)
    for path in (*store.rglob("*"), store):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = fingerprint(store)
    together = [start(name, store, runs) for name in ("s", "m")]
    assert [process.wait(120) for process in together] == [0, 0]
    assert start("mixed", store, runs).wait(120) == 0
    assert fingerprint(store) == before
    table = CliRunner().invoke(cli, ["runs", str(runs)]).output
    assert table.count("from pqft-identity") == 1
    for words in ("S rc4 32x32", "M rc4 32x32", "S rc4 128x160"):
        assert words in table
    for path in (store, *store.rglob("*")):  # so that it can be removed
        path.chmod(0o755)
