from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from student.averages import Average, average_frames, paired_bootstrap

NAN = float("nan")


@pytest.mark.shared
def test_averages_are_the_published_rule(shared: Path) -> None:
    golden = np.load(shared / "goldens" / "metrics" / "_aggregate.npz")
    names, index = np.unique(golden["video"], return_inverse=True)
    np.testing.assert_array_equal(names, golden["video_ids"])
    for column, scores in enumerate(golden["frame_values"].T):
        average = average_frames(scores, index)
        np.testing.assert_allclose(average.per_video, golden["per_video"][:, column], atol=1e-12)
        assert average.macro == pytest.approx(golden["macro"][column], abs=1e-12)
        assert average.micro == pytest.approx(golden["micro"][column], abs=1e-12)
        assert average.frames == golden["n_valid_frames"][column]
        assert average.videos == golden["n_valid_videos"][column]


def test_undefined_scores_are_left_out_of_every_mean() -> None:
    average = average_frames([1.0, 3.0, NAN, NAN, 8.0], [0, 0, 0, 1, 3])
    assert average.macro == 5.0
    assert average.micro == 4.0
    np.testing.assert_array_equal(average.per_video, [2.0, NAN, NAN, 8.0])
    assert (average.videos, average.frames) == (2, 3)


@pytest.mark.parametrize("scores", [[], [NAN, NAN]])
def test_without_scores_averages_are_undefined(scores: list[float]) -> None:
    average = average_frames(scores, [0] * len(scores))
    assert np.isnan([average.macro, average.micro]).all()
    assert (average.videos, average.frames) == (0, 0)


def test_frames_may_come_in_any_order() -> None:
    rng = np.random.default_rng(0)
    scores, videos = rng.random(50), rng.integers(0, 7, 50)
    order = rng.permutation(50)
    first, second = average_frames(scores, videos), average_frames(scores[order], videos[order])
    for name in Average._fields:
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-12)


def test_scores_and_videos_must_match() -> None:
    with pytest.raises(ValueError, match="one for one"):
        average_frames([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="start at 0, got -1"):
        average_frames([1.0, 2.0], [0, -1])


def test_interval_is_that_of_the_normal_approximation_for_many_videos() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.3, 1.0, 400), rng.normal(0.0, 1.0, 400)
    found = paired_bootstrap(a, b)
    half = 1.96 * (a - b).std(ddof=1) / 20
    assert found.difference == pytest.approx((a - b).mean())
    assert found.low == pytest.approx(found.difference - half, abs=0.05 * half)
    assert found.high == pytest.approx(found.difference + half, abs=0.05 * half)


def test_bootstrap_is_paired_and_deterministic() -> None:
    rng = np.random.default_rng(2)
    a = rng.random(30)
    shifted = paired_bootstrap(a, a - 0.25)
    np.testing.assert_allclose(shifted, 0.25)
    b = rng.random(30)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    assert paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)
    wide, narrow = paired_bootstrap(a, b, level=0.99), paired_bootstrap(a, b, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_more_videos_than_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(10), rng.random(10)
    whole = paired_bootstrap(a, b, samples=500)
    monkeypatch.setattr("student.averages.RESAMPLED_TOGETHER", 70)
    assert paired_bootstrap(a, b, samples=500) == whole


def test_videos_without_both_scores_are_left_out() -> None:
    assert paired_bootstrap([1.0, NAN, 3.0], [0.5, 1.0, NAN]) == (0.5, 0.5, 0.5)
    assert np.isnan(paired_bootstrap([NAN], [1.0])).all()


def test_bootstrap_refuses_what_it_cannot_pair() -> None:
    with pytest.raises(ValueError, match="as many of both"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        paired_bootstrap([1.0], [1.0], level=95)
