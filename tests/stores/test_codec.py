from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stores import codec
from stores.errors import TargetValueError
from stores.shard_file import GridPacking, ShardFormat

GRID = codec.GRID_STEP


def round_trip(planes: codec.Planes, tmp: str) -> codec.Planes:
    """Through a real array in a real store."""
    import zarr

    codec.silence_codec_remark()
    packing = GridPacking((planes.shape[1], planes.shape[2], planes.shape[3]), GRID)
    shards = ShardFormat(packing, shard_frames=len(planes), chunk_frames=len(planes))
    array: Any = zarr.create_array(
        tmp,
        shape=planes.shape,
        shards=planes.shape,
        chunks=planes.shape,
        dtype="float32",
        overwrite=True,
        **packing.codecs,
    )
    packed = shards.pack(planes)
    Path(tmp, "c/0/0/0/0").parent.mkdir(parents=True, exist_ok=True)
    Path(tmp, "c/0/0/0/0").write_bytes(packed)
    values = np.asarray(array[:])
    np.testing.assert_array_equal(shards.unpack(packed), values)
    return values


def log_density(logits: np.ndarray, kind: str) -> np.ndarray:
    values = logits.astype(np.float64)
    log = -np.logaddexp(0, -values) if kind == "sigmoid" else values
    peak = log.max((2, 3), keepdims=True)
    return log - (peak + np.log(np.exp(log - peak).sum((2, 3), keepdims=True)))


@settings(max_examples=60, deadline=None)
@given(
    planes=hnp.arrays(
        np.float32,
        (3, 1, 6, 7),
        elements=st.floats(-codec.LIMIT, codec.LIMIT, width=32),
    )
    | hnp.arrays(  # the worst case: all values half way between two of the grid
        np.float32,
        (3, 1, 6, 7),
        elements=st.integers(-640, 640).map(lambda k: np.float32((k + 0.5) * GRID)),
    )
)
def test_error_stays_within_the_proven_bounds(
    tmp_path_factory: pytest.TempPathFactory, planes: codec.Planes
) -> None:
    stored = round_trip(planes, str(tmp_path_factory.getbasetemp() / "codec.zarr"))
    assert np.abs(stored - planes).max() <= codec.logit_error_bound(GRID)
    for kind in ("sigmoid", "exp"):
        exact, kept = log_density(planes, kind), log_density(stored, kind)
        kl = (np.exp(exact) * (exact - kept)).sum((2, 3))
        assert (kl >= -1e-12).all()
        assert (kl <= codec.kl_error_bound(GRID) + 1e-12).all()


def test_limits_of_the_grid_are_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    planes = np.array([-codec.LIMIT, codec.LIMIT, 0.0, -0.0], np.float32).reshape(1, 1, 2, 2)
    codec.check_planes(planes, video="v", first_frame=0)
    path = str(tmp_path_factory.getbasetemp() / "limits.zarr")
    np.testing.assert_array_equal(round_trip(planes, path), planes)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1000.5, -1024.1, 4e4])
def test_values_that_the_grid_would_falsify_are_refused_with_their_place(value: float) -> None:
    planes = np.zeros((3, 2, 4, 5), np.float32)
    planes[2, 1, 3, 4] = value
    with pytest.raises(TargetValueError, match=r"map 1 for frame 102 of 'clip' .* row 3, column 4"):
        codec.check_planes(planes, video="clip", first_frame=100)


def test_small_shapes_are_read_by_zarr_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for shape in itertools.product((1, 2, 8), (1, 2, 4), (1, 2, 3), (1, 2, 5)):
        planes = (rng.integers(-900, 900, shape) * GRID).astype(np.float32)
        if sum(length > 1 for length in shape[1:]) == 1:
            with pytest.raises(ValueError, match="single line"):
                GridPacking((shape[1], shape[2], shape[3]), GRID)
            refused += 1
        else:
            np.testing.assert_array_equal(round_trip(planes, str(tmp_path / "a.zarr")), planes)
    assert refused == 3 * 6


@pytest.mark.parametrize("step", [0.0, -1 / 32, 1 / 33, 1 / 64, 2.0])
def test_other_grid_steps_are_refused(step: float) -> None:
    with pytest.raises(ValueError, match="grid_step"):
        codec.check_grid_step(step)
