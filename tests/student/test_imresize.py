from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from student.imresize import resize_maps


@pytest.mark.shared
def test_maps_are_resized_as_matlab_does(shared: Path) -> None:
    golden = np.load(shared / "goldens" / "metrics" / "_imresize.npz")
    for index in range(len(golden.files) // 2):
        expected = golden[f"out{index}"]
        resized = resize_maps(torch.from_numpy(golden[f"in{index}"]), *expected.shape)
        np.testing.assert_allclose(resized, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(40, 70), (12, 11), (40, 11), (160, 9), (21, 33)])
def test_far_from_the_edges_it_is_torchs_antialiased_bicubic(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    maps = torch.rand(2, 20, 33, dtype=torch.float64)
    expected = F.interpolate(maps[:, None], size, mode="bicubic", antialias=True)[:, 0]
    resized = resize_maps(maps, *size)
    edges = [max(3, round(3 * new / old)) for new, old in zip(size, (20, 33), strict=True)]
    inner = (slice(None), *(slice(edge, new - edge) for edge, new in zip(edges, size, strict=True)))
    torch.testing.assert_close(resized[inner], expected[inner], rtol=0, atol=1e-9)


def test_edges_are_reflected_and_repeated() -> None:
    torch.manual_seed(1)
    maps = torch.rand(5, 7, dtype=torch.float64)
    mirrored = torch.cat([maps, maps.flip(0)]).repeat(3, 1)
    mirrored = torch.cat([mirrored, mirrored.flip(1)], 1).repeat(1, 3)
    large = F.interpolate(mirrored[None, None], scale_factor=3.0, mode="bicubic", antialias=True)
    expected = large[0, 0, 30:45, 42:63]
    torch.testing.assert_close(resize_maps(maps, 15, 21), expected, rtol=0, atol=1e-9)


def test_doubling_a_step_overshoots_by_the_kernels_weights() -> None:
    # A quarter of a pixel away from a centre the weights are -9, 111, 29 and -3 of 128.
    resized = resize_maps(torch.tensor([[0, 0, 0, 1, 1, 1]]), 1, 12) * 128
    expected = torch.tensor([[0, 0, 0, -3, -9, 26, 102, 137, 131, 128, 128, 128]])
    torch.testing.assert_close(resized, expected.double())


@settings(max_examples=25, deadline=None)
@given(*[st.integers(1, 40)] * 4, st.integers(0, 99))
def test_constants_flips_and_transposes_are_kept(
    rows: int, columns: int, height: int, width: int, seed: int
) -> None:
    maps = torch.rand(rows, columns, dtype=torch.float64, generator=torch.manual_seed(seed))
    resized = resize_maps(maps, height, width)
    torch.testing.assert_close(resize_maps(maps.flip(1), height, width), resized.flip(1))
    torch.testing.assert_close(resize_maps(maps.T, width, height), resized.T)
    ones = resize_maps(torch.ones(rows, columns), height, width)
    torch.testing.assert_close(ones, torch.ones(height, width, dtype=torch.float64))


def test_batches_are_resized_map_by_map_and_equal_sizes_pass() -> None:
    maps = torch.rand(2, 3, 9, 8, dtype=torch.float64)
    resized = resize_maps(maps, 5, 13)
    assert resized.shape == (2, 3, 5, 13)
    torch.testing.assert_close(resized[1, 2], resize_maps(maps[1, 2], 5, 13))
    assert resize_maps(maps, 9, 8) is maps


def test_sizes_without_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="4x4 to 0x3"):
        resize_maps(torch.rand(4, 4), 0, 3)
