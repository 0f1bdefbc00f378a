from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stores.decode import decode_video
from student.pictures import (
    colour_map,
    contact_sheet,
    fit_picture,
    overlay_map,
    save_picture,
    save_video,
)


def test_brighter_colours_mean_more_salient() -> None:
    ramp = np.linspace(3, 7, 50, dtype=np.float32)[None]
    brightness = colour_map(ramp).astype(int).sum(-1)[0]
    assert (np.diff(brightness) > 0).all()
    assert (brightness[0], brightness[-1]) == (0, 765)


def test_constant_map_is_black_and_hides_nothing() -> None:
    flat = np.full((4, 5), 0.3, np.float32)
    assert colour_map(flat).max() == 0
    frame = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    np.testing.assert_array_equal(overlay_map(frame, flat), frame)


def test_overlay_shows_the_map_where_it_is_high() -> None:
    frame = np.full((20, 20, 3), 60, np.uint8)
    saliency = np.zeros((20, 20), np.float32)
    saliency[5:9, 5:9] = 1
    overlay = overlay_map(frame, saliency)
    assert overlay[6, 6].min() > 150
    np.testing.assert_array_equal(overlay[15, 15], frame[15, 15])


@pytest.mark.parametrize("shape", [(10, 40, 3), (40, 10, 3), (7, 7, 3)])
def test_pictures_keep_their_aspect_in_a_panel(shape: tuple[int, int, int]) -> None:
    panel = fit_picture(np.full(shape, 255, np.uint8), 60, 80)
    rows, columns = (int((panel.max(axis).max(-1) > 0).sum()) for axis in (1, 0))
    assert panel.shape == (60, 80, 3)
    assert rows / columns == pytest.approx(shape[0] / shape[1], rel=0.05)
    assert rows == 60 or columns == 80


def test_contact_sheet_holds_every_picture(tmp_path: Path) -> None:
    rows = [
        [np.full((20, 90, 3), 50 * r + 20 * c + 5, np.uint8) for c in range(2)] for r in range(3)
    ]
    sheet = contact_sheet(rows, titles=("a", "b"), captions=("x", "y", "z"))
    save_picture(tmp_path / "sheet.png", sheet)
    read = np.asarray(Image.open(tmp_path / "sheet.png"))
    np.testing.assert_array_equal(read, sheet)
    assert all((read == row[0, 0, 0]).all(-1).sum() >= 20 * 90 for r in rows for row in r)


def test_video_can_be_read_again(tmp_path: Path) -> None:
    frames = [np.full((48, 64, 3), 20 * index, np.uint8) for index in range(10)]
    save_video(tmp_path / "out.mp4", frames)
    read = list(decode_video(tmp_path / "out.mp4"))
    assert len(read) == 10
    assert max(abs(int(a.mean()) - int(b.mean())) for a, b in zip(read, frames, strict=True)) <= 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
