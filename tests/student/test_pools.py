from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stores.shards import LabelSet
from stores.targets import TargetStore
from student.pools import (
    ClipKey,
    ClipPools,
    Spares,
    draw_epoch,
    find_pools,
    flip_some,
    spread_clips,
    take_turns,
)
from student.recipe import Sampling
from tests.student.counting import add_labels, counting_request, make_store


def pools_of(store: Path, *, holdout: float, target_frames: int = 1, lag: int = 0) -> ClipPools:
    labels = TargetStore.open(store).label_set()
    sampling = Sampling(holdout=holdout, holdout_of="frames")
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
    expected = [("a", 10), ("b", 5), ("a", 30), ("b", 6), ("a", 40)]
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


@pytest.fixture
def store(tmp_path: Path) -> TargetStore:
    return make_store(tmp_path / "counting.zarr", {"a": 80, "b": 40}, [])


def find(store: TargetStore, labels: Sequence[LabelSet], **options: Any) -> ClipPools:  # noqa: ANN401
    """Find clips, all for training unless something else is said."""
    frames, lag = options.pop("target_frames", 1), options.pop("lag", 0)
    sampling = Sampling(**{"holdout": 0, "holdout_of": "frames", **options})
    return find_pools(
        TargetStore.open(store.url).videos, labels, sampling, target_frames=frames, lag=lag
    )


def test_clips_are_where_all_label_sets_are(store: TargetStore) -> None:
    one = add_labels(store, counting_request("one"), {"a": range(4), "b": range(1, 3)})
    two = add_labels(store, counting_request("two"), {"a": range(2, 5), "b": range(1)})
    assert find(store, [one]).training == {"a": [range(15, 64)], "b": [range(16, 40)]}
    assert find(store, [two]).training == {"a": [range(32, 80)], "b": [range(15, 16)]}
    assert find(store, [one, two]).training == {"a": [range(32, 64)]}
    assert find(store, []).training == {"a": [range(15, 80)], "b": [range(15, 40)]}


def test_all_target_frames_of_a_clip_are_there(store: TargetStore) -> None:
    one = add_labels(store, counting_request("one"), {"a": range(1, 4)})  # frames 16 to 63
    assert find(store, [one], target_frames=16).training == {"a": [range(31, 64)]}
    assert find(store, [one], target_frames=16, lag=1).training == {"a": [range(32, 65)]}
    assert find(store, [one], target_frames=8).training == {"a": [range(23, 64)]}
    every = add_labels(store, counting_request("every"), {"a": range(5)})
    assert find(store, [every], target_frames=16).training == {"a": [range(15, 80)]}
    assert find(store, [every], target_frames=16, lag=1).training == {"a": [range(16, 80)]}


@pytest.mark.parametrize(
    ("window", "frame", "full"),
    [(16, "last", range(15, 80)), (20, "last", range(19, 80)), (20, "middle", range(19, 61))],
)
def test_targets_are_from_full_windows(
    store: TargetStore, window: int, frame: str, full: range
) -> None:
    request = counting_request(window=window, middle=frame == "middle")
    labels = add_labels(store, request, {"a": range(5)})
    assert find(store, [labels]).training == {"a": [full]}
    assert find(store, [labels], full_windows=False).training == {"a": [range(15, 80)]}


def test_video_shorter_than_a_window_has_no_full_one(store: TargetStore) -> None:
    request = counting_request(window=48, middle=True)
    labels = add_labels(store, request, {"a": range(5), "b": range(3)})
    with pytest.raises(ValueError, match="no clip to train on"):
        find(store, [labels])
    assert "b" in find(store, [labels], full_windows=False).training


@pytest.mark.parametrize("lag", [0, 1])
def test_held_out_frames_and_their_targets_are_of_no_clip_that_is_trained_on(
    store: TargetStore, lag: int
) -> None:
    labels = add_labels(store, counting_request(), {"a": range(5), "b": range(3)})
    pools = find(store, [labels], target_frames=16, lag=lag, holdout=0.4)
    assert pools.training == {"a": [range(15 + lag, 48)], "b": [range(15 + lag, 24)]}
    late = {"a": [range(48 + 15 + lag, 80)], "b": [range(39, 40)]}
    assert pools.validation == late if not lag else {"a": late["a"]}


def test_held_out_videos_are_the_same_in_every_store(tmp_path: Path) -> None:
    """Whatever their ids, their order, and what is labelled; copies of a video go with it."""
    contents = {f"v{i}": str(i).encode() for i in range(10)}
    one = make_store(tmp_path / "1.zarr", dict.fromkeys(contents, 20), [], contents=contents)
    renamed = {f"w{i}": contents[f"v{i}"] for i in reversed(range(10))}
    renamed |= {f"copy{i}": contents[f"v{i}"] for i in range(10)}
    two = make_store(tmp_path / "2.zarr", dict.fromkeys(renamed, 20), [], contents=renamed)
    chosen: list[set[bytes]] = []
    for store, known in ((one, contents), (two, renamed)):
        pools = find(store, [], holdout=0.3, holdout_of="videos")
        assert pools.training.keys().isdisjoint(pools.validation)
        assert pools.training.keys() | pools.validation.keys() == known.keys()
        chosen.append({known[video] for video in pools.validation})
        assert not chosen[-1] & {known[video] for video in pools.training}
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 3


def test_some_video_is_held_out_and_some_is_not(store: TargetStore) -> None:
    for holdout in (0.01, 0.99):
        pools = find(store, [], holdout=holdout, holdout_of="videos")
        assert len(pools.training) == len(pools.validation) == 1
    assert not find(store, [], holdout=0, holdout_of="videos").validation


MIXED: dict[str, list[range]] = {
    "seen": [range(15, 40)],
    "seen too": [range(15, 30)],
    "one": [range(15, 25), range(30, 35)],
    "two": [range(15, 20)],
}
SEEN = ("seen", "seen too", "not in the store")


@pytest.mark.parametrize(("share", "per_video"), [(0, 3), (1, 1), (2.5, 2), (5, 2)])
def test_clips_without_recorded_eyes_are_drawn_by_their_share(share: float, per_video: int) -> None:
    sampling = Sampling(clips_per_video=per_video, unlabelled=share)
    for epoch in range(3):
        clips = draw_epoch(MIXED, sampling, labelled=SEEN, seed=0, epoch=epoch)
        videos = [key.video for key in clips]
        assert videos.count("seen") == videos.count("seen too") == per_video
        others = [key for key in clips if key.video not in SEEN]
        assert len(others) == round(share * 2 * per_video)
        assert len(set(others)) == len(others)  # none twice: there are 20
        assert all(any(key.last in span for span in MIXED[key.video]) for key in clips)


def test_all_clips_without_recorded_eyes_come_before_one_comes_again() -> None:
    sampling = Sampling(clips_per_video=5, unlabelled=4.5)
    clips = draw_epoch(MIXED, sampling, labelled=SEEN, seed=0, epoch=0)
    others = [key for key in clips if key.video not in SEEN]
    assert len(others) == 45
    counts = {key: others.count(key) for key in others}
    assert len(counts) == 20
    assert set(counts.values()) == {2, 3}


def test_clips_of_videos_without_recorded_eyes_are_equally_likely() -> None:
    sampling = Sampling(clips_per_video=5, unlabelled=1)
    drawn = [
        (key.video, key.last)
        for epoch in range(400)
        for key in draw_epoch(MIXED, sampling, labelled=SEEN, seed=0, epoch=epoch)
        if key.video not in SEEN
    ]
    counts = [drawn.count(key) for key in sorted(set(drawn))]
    assert len(counts) == 20
    assert min(counts) > 150  # of 200 that are expected
    assert max(counts) < 250


def test_draws_do_not_depend_on_what_was_drawn_before() -> None:
    sampling = Sampling(clips_per_video=2, unlabelled=1)
    epochs = [5, 0, 3, 5]
    drawn = [draw_epoch(MIXED, sampling, labelled=SEEN, seed=7, epoch=epoch) for epoch in epochs]
    assert drawn[0] == drawn[3]
    assert drawn[0] != drawn[1] != drawn[2]
    np.random.default_rng(0).random()
    assert draw_epoch(MIXED, sampling, labelled=set(SEEN), seed=7, epoch=5) == drawn[0]


def test_half_of_the_clips_are_mirrored_by_seed_and_epoch() -> None:
    keys = [ClipKey("a", last) for last in range(1000)]
    first = flip_some(keys, seed=1, epoch=2)
    assert first == flip_some(keys, seed=1, epoch=2)
    flips = [key.is_flipped for key in first]
    assert 440 < sum(flips) < 560
    assert [key._replace(is_flipped=False) for key in first] == keys
    for seed, epoch in ((1, 3), (2, 2)):
        assert flips != [key.is_flipped for key in flip_some(keys, seed=seed, epoch=epoch)]


def test_turns_are_of_whole_batches_by_seed_and_epoch() -> None:
    keys = [ClipKey("a", last) for last in range(301)]
    options = {"sources": 3, "batch_size": 3}
    first = take_turns(keys, **options, seed=1, epoch=2)
    assert first == take_turns(keys, **options, seed=1, epoch=2)
    turns = [key.source for key in first[::3]]
    assert len(turns) == 101
    assert all(turns.count(source) > 15 for source in range(3))
    assert [key.source for key in first] == [turns[i // 3] for i in range(301)]
    for seed, epoch in ((1, 3), (2, 2)):
        other = take_turns(keys, **options, seed=seed, epoch=epoch)
        assert turns != [key.source for key in other[::3]]


def test_spares_keep_what_else_is_wanted_of_a_clip() -> None:
    key = ClipKey("long", 20, is_flipped=True, source=1)
    assert SPARES.draw(key, 1)[2:] == (True, 1)


def test_unlabelled_clips_need_video_without_recorded_eyes() -> None:
    with pytest.raises(ValueError, match="there is no video without recorded eyes"):
        draw_epoch(MIXED, Sampling(unlabelled=2.0), labelled=list(MIXED), seed=0, epoch=0)
    drawn = draw_epoch(MIXED, Sampling(unlabelled=0.0), labelled=list(MIXED), seed=0, epoch=0)
    assert len(drawn) == 2 * len(MIXED)
