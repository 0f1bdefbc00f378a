from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory, video_folder: Path) -> Path:
    """A store with the labels of the three small videos, and their frames at 32x32."""
    from distill import DistillSettings, label_videos

    path = tmp_path_factory.mktemp("labelled") / "targets.zarr"
    settings = DistillSettings(
        teacher="pqft", size=(64, 64), executor="inline", with_frames=(32, 32), shard_frames=16
    )
    label_videos([video_folder], path, settings)
    return path
