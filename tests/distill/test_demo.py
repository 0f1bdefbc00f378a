from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.demo import CONFIG, run_demo
from stores.decode import decode_video
from student.config import build_config


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trained_student_is_clearly_better_than_the_untrained_one(
    tmp_path: Path, local_ray: None
) -> None:
    """The demo as users run it."""
    report = run_demo(tmp_path / "demo")
    assert report is not None
    assert report.trained.kl < 0.7 * report.untrained.kl
    assert report.trained.kl < 0.7 * report.uniform_kl
    assert report.trained.cc > 0.5 > report.untrained.cc


@pytest.mark.ray
def test_demo_makes_report_picture_and_video(tmp_path: Path, local_ray: None) -> None:
    """The demo's own path on its own clips, but so small that the student hardly learns."""
    config = replace(
        CONFIG,
        student=build_config("tinyhd-s-rc4", height=32, width=32),
        sampling=replace(CONFIG.sampling, clips_per_video=2),
        optimisation=replace(CONFIG.optimisation, epochs=1),
    )
    report = run_demo(tmp_path / "demo", config)
    assert report is not None
    read = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert read["steps"] == report.steps == 3
    assert read["trained"]["maps"] == read["untrained"]["maps"] == 18 + 47 + 15
    assert read["uniform_kl"] > 0
    assert all(
        np.isfinite(
            [read[who][score] for who in ("trained", "untrained") for score in ("kl", "cc")]
        )
    )
    sheet = np.asarray(Image.open(tmp_path / "demo" / "contact_sheet.png"))
    assert sheet.shape[1] == 3 * 320
    assert sheet.std() > 20
    frames = list(decode_video(tmp_path / "demo" / "overlay.mp4"))
    assert len(frames) == report.trained.maps
