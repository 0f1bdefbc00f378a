"""A store is read without this project's code: with plain zarr, and with xarray."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr

from distill import DistillSettings, label_videos
from stores.targets import TargetStore


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, video_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("format") / "targets.zarr"
    settings = DistillSettings(
        teacher="pqft", size=(64, 64), executor="inline", with_frames=(32, 32), shard_frames=16
    )
    label_videos([video_folder], path, settings)
    return path


@pytest.fixture(autouse=True)
def _without_zarrs_remark() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr")
        yield


def test_plain_zarr_reads_the_same_numbers(path: Path) -> None:
    ours = TargetStore.open(path)
    labels = ours.label_set()
    root: Any = zarr.open_group(path, mode="r")
    assert dict(root.attrs) == {"format": "tinyhd-targets", "version": 1}
    ids = np.asarray(root["videos/id"][:]).tolist()
    row = ids.index("sub/middle")
    first, frames = int(root["videos/first"][row]), int(root["videos/frames"][row])
    assert (first % 256, frames) == (0, 40)
    for name, values in labels.read("sub/middle", 0, frames).items():
        plain = root[f"labels/{labels.name}/{name}"][first : first + frames]
        assert plain.dtype == np.float32
        np.testing.assert_array_equal(plain, values)
    receipts = np.asarray(root[f"labels/{labels.name}/receipts"][:])
    assert receipts[first // 16 : first // 16 + 3].any((1, 2)).all()
    assert not receipts[first // 16 + 3].any()
    beyond = root[f"labels/{labels.name}/maps_32x32"][first + 48]
    assert np.isnan(beyond).all()


def test_xarray_opens_every_group(path: Path) -> None:
    labels = TargetStore.open(path).label_set()
    videos = xarray.open_zarr(path, group="videos", consolidated=False)
    assert videos["id"].dims == ("video",)
    assert videos["id"].values.tolist() == ["long", "short", "sub/middle"]
    assert videos["content_hash"].sizes == {"video": 3, "byte": 32}
    dataset = xarray.open_zarr(path, group=f"labels/{labels.name}", consolidated=False)
    assert dataset["maps_32x32"].dims == ("frame", "map_32x32", "y_32x32", "x_32x32")
    first = int(videos["first"][0])
    expected = labels.read("long", 3, 9)["maps_32x32"]
    np.testing.assert_array_equal(dataset["maps_32x32"][first + 3 : first + 9], expected)
    (frame_set,) = (path / "frames").glob("rgb-*")
    frames = xarray.open_zarr(path, group=f"frames/{frame_set.name}", consolidated=False)
    assert frames["rgb_32x32"].dims == ("frame", "y", "x", "channel")


def test_only_types_of_the_zarr_specification_are_used(path: Path) -> None:
    allowed = {"uint8", "int64", "float32", "float64", "string"}
    for metadata in path.rglob("zarr.json"):
        node = json.loads(metadata.read_text())
        if node["node_type"] == "array":
            assert node["data_type"] in allowed, metadata
            assert all(node["dimension_names"]), metadata
