from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stores.targets import TargetStore
from student.pools import ClipKey, ClipPools, Spares, draw_epoch, find_pools, spread_clips
from student.recipe import Sampling


def pools_of(store: Path, *, holdout: float, target_frames: int = 1, lag: int = 0) -> ClipPools:
    labels = TargetStore.open(store).label_set()
    sampling = Sampling(holdout=holdout)
    return find_pools(labels.store.videos, [labels], sampling, target_frames=target_frames, lag=lag)


def test_training_and_validation_share_no_frame(labelled: Path) -> None:
    split = pools_of(labelled, holdout=0.4)
    assert split.training == {"long": [range(15, 42)], "sub/middle": [range(15, 24)]}
    assert split.validation == {"long": [range(57, 70)], "sub/middle": [range(39, 40)]}


def test_everything_is_trained_on_without_holdout(labelled: Path) -> None:
    split = pools_of(labelled, holdout=0)
    assert split.training == {
        "long": [range(15, 70)],
        "short": [range(15, 24)],
        "sub/middle": [range(15, 40)],
    }
    assert not split.validation


def test_missing_labels_are_left_out(labelled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "targets.zarr"
    shutil.copytree(labelled, copy)
    labels = TargetStore.open(copy, mode="r+").label_set()
    video = labels.store.video("long")
    labels.clear([labels.shards(video)[2]])  # frames 32 to 47
    split = pools_of(copy, holdout=0)
    assert split.training["long"] == [range(15, 32), range(48, 70)]


def test_nothing_to_train_on_is_an_error(labelled: Path) -> None:
    with pytest.raises(ValueError, match="no clip to train on"):
        pools_of(labelled, holdout=0.9)


THIRTY = Sampling(clips_per_video=30)


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    spans = {"a": [range(15, 40), range(60, 90)], "b": [range(15, 16)]}
    first = draw_epoch(spans, THIRTY, seed=1, epoch=2)
    assert first == draw_epoch(spans, THIRTY, seed=1, epoch=2)
    assert first != draw_epoch(spans, THIRTY, seed=1, epoch=3)
    assert first != draw_epoch(spans, THIRTY, seed=2, epoch=2)
    assert sorted(key.video for key in first) == ["a"] * 30 + ["b"] * 30
    lasts = {key.last for key in first if key.video == "a"}
    assert all(last in range(15, 40) or last in range(60, 90) for last in lasts)
    assert len(lasts) > 10


def test_validation_clips_are_spread() -> None:
    clips = spread_clips({"a": [range(10, 20), range(30, 41)], "b": [range(5, 7)]}, per_video=3)
    expected = [("a", 10), ("a", 30), ("a", 40), ("b", 5), ("b", 6)]
    assert [key[:2] for key in clips] == expected


SPARES = Spares({"long": [range(15, 32)], "sub/middle": [range(15, 24), range(30, 40)]}, seed=3)


def test_spares_depend_on_the_clip_and_the_seed_alone() -> None:
    keys = [ClipKey("long", last) for last in range(15, 45)]
    drawn = [SPARES.draw(key, 1) for key in keys]
    assert drawn == [SPARES.draw(key, 1) for key in keys]
    assert drawn != [SPARES.draw(key, 2) for key in keys]
    assert drawn != [Spares(SPARES.spans, seed=4).draw(key, 1) for key in keys]
    assert drawn != [SPARES.draw(ClipKey("short", key.last), 1) for key in keys]
    assert {key.video for key in drawn} == {"long", "sub/middle"}
    assert all(any(key.last in span for span in SPARES.spans[key.video]) for key in drawn)
