from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from stores.maps import render_maps
from teachers.base import Teacher
from teachers.pqft import BLUR_SIGMA, PqftTeacher


def quaternion_saliency(now: np.ndarray, before: np.ndarray, size: int) -> np.ndarray:
    """Guo & Zhang's formulas written with quaternions as 4-vectors and the transform as a sum."""

    def shrink(picture: np.ndarray) -> np.ndarray:
        step = picture.shape[0] // size
        return picture.reshape(size, step, size, step, -1).mean((1, 3))

    r, g, b = np.moveaxis(now.astype(np.float64), -1, 0)
    red, green, blue = r - (g + b) / 2, g - (r + b) / 2, b - (r + g) / 2
    yellow = (r + g) / 2 - np.abs(r - g) / 2 - b
    opponents = np.stack([red - green, blue - yellow, now.mean(-1)], -1)
    rg, by, intensity = np.moveaxis(shrink(opponents), -1, 0)
    motion = np.abs(intensity - shrink(before.mean(-1)[..., None])[..., 0])
    q = np.stack([motion, rg, by, intensity], -1)

    def multiply_left(cosine: np.ndarray, sine: np.ndarray, p: np.ndarray) -> np.ndarray:
        # (cosine + sine i) (w + x i + y j + z k)
        w, x, y, z = np.moveaxis(p, -1, 0)
        return np.stack(
            [
                cosine * w - sine * x,
                cosine * x + sine * w,
                cosine * y - sine * z,
                cosine * z + sine * y,
            ],
            -1,
        )

    def transform(p: np.ndarray, sign: int) -> np.ndarray:
        rows, columns = p.shape[:2]
        out = np.zeros_like(p)
        y, x = np.mgrid[:rows, :columns]
        for v in range(rows):
            for u in range(columns):
                angle = sign * 2 * np.pi * (v * y / rows + u * x / columns)
                out[v, u] = multiply_left(np.cos(angle), np.sin(angle), p).sum((0, 1))
        return out

    spectrum = transform(q, -1)
    phase = spectrum / np.linalg.norm(spectrum, axis=-1, keepdims=True)
    conspicuity = (transform(phase, 1) ** 2).sum(-1)
    smooth = gaussian_filter(conspicuity, BLUR_SIGMA, mode="mirror", radius=min(6, size - 1))
    return smooth / smooth.mean()


@pytest.fixture
def frames() -> np.ndarray:
    rng = np.random.default_rng(3)
    video = rng.integers(0, 90, (9, 64, 64, 3), np.uint8)
    for index in range(9):
        video[index, 20:32, 6 * index : 6 * index + 10] = (250, 200, 20)
    return video


def test_maps_are_those_of_the_paper(frames: np.ndarray) -> None:
    teacher = PqftTeacher(height=64, width=64)
    planes = teacher.label(teacher.prepare(frames), first=0, span=range(7, 8), num_frames=9)
    for size in (8, 4, 16):
        expected = quaternion_saliency(frames[7] / 255, frames[4] / 255, size)
        given = planes[f"maps_{size}x{size}"][0, 0].exp().numpy()
        np.testing.assert_allclose(given, expected, rtol=2e-4, atol=2e-5)


def test_shared_frames_give_the_numbers_of_whole_windows(frames: np.ndarray) -> None:
    teacher = PqftTeacher(height=64, width=64)
    prepared = teacher.prepare(frames[2:])
    shared = teacher.label(prepared, first=2, span=range(5, 9), num_frames=9)
    plain = Teacher.label_span(teacher, prepared, first=2, span=range(5, 9), num_frames=9)
    for name, values in plain.items():
        torch.testing.assert_close(shared[name], values, rtol=1e-5, atol=1e-6)


def test_first_frames_see_copies_of_frame_0(frames: np.ndarray) -> None:
    teacher = PqftTeacher(height=64, width=64)
    head = teacher.label(teacher.prepare(frames), first=0, span=range(3), num_frames=9)
    padded = np.concatenate([np.repeat(frames[:1], 3, axis=0), frames])
    later = teacher.label(teacher.prepare(padded), first=0, span=range(3, 6), num_frames=9)
    for name, values in head.items():
        torch.testing.assert_close(values, later[name], rtol=1e-5, atol=1e-6)


def test_saliency_is_a_density_that_finds_what_moves(frames: np.ndarray) -> None:
    teacher = PqftTeacher(height=64, width=64)
    layout = teacher.spec.layout
    planes = teacher.label(teacher.prepare(frames), first=0, span=range(4, 9), num_frames=9)
    maps = render_maps(planes, layout, [layout.saliency, *layout.hierarchical], height=64, width=64)
    for saliency in maps.values():
        torch.testing.assert_close(saliency.mean((1, 2)), torch.ones(5), rtol=0.05, atol=0)
    inside = [
        maps["saliency"][i, 16:36, 6 * f : 6 * f + 12].mean() for i, f in enumerate(range(4, 9))
    ]
    assert min(inside) > 2.0


def test_empty_pictures_are_uniform_and_finite() -> None:
    teacher = PqftTeacher(height=64, width=64)
    black = teacher.prepare(np.zeros((5, 64, 64, 3), np.uint8))
    for values in teacher.label(black, first=0, span=range(5), num_frames=9).values():
        torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-4, rtol=0)
    grey = teacher.prepare(np.full((5, 64, 64, 3), 128, np.uint8))
    for values in teacher.label(grey, first=0, span=range(5), num_frames=9).values():
        assert values.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(100, 128), (16, 64), (64, 8)])
def test_sizes_that_cannot_be_halved_four_times_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        PqftTeacher(height=height, width=width)
