from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.plain_metrics import plain_scores
from student.imresize import resize_maps
from student.metrics import (
    MEASURES,
    PROTOCOLS,
    auc_borji,
    auc_judd,
    auc_shuffled,
    cc,
    ig,
    kld,
    nss,
    score,
    score_batch,
    sim,
)
from student.protocols import Protocol

Map = npt.NDArray[Any]
Case = tuple[Map, Map, Map, Map, Map]  # prediction, density, fixations, others, baseline
NAN = float("nan")

GOLDEN_CASES = (
    *("binary_pred", "coarse_ties", "const_dens", "constant_pred", "corner_fix", "dense_fix"),
    *("downsample_pred", "empty_fix", "empty_other", "few_other", "fix_all_same_value"),
    *("float32_pred", "good", "inverted", "many_other", "mask255", "negative_values"),
    *("odd_resize_pred", "perfect", "random_smooth", "s30x40_coarse_ties"),
    *("s30x40_downsample_pred", "s30x40_good", "s30x40_many_other", "s30x40_uint8_ties"),
    *("s30x40_upsample_pred", "single_fix_max", "single_fix_min", "single_fix_random"),
    *("tiny_scale", "uint8_resize_pred", "uint8_ties", "upsample_pred", "zero_dens", "zero_pred"),
)
GOLDEN_KEYS: Mapping[str, Mapping[str, str]] = {
    "dhf1k": {measure: measure for measure in MEASURES},
    "tinyhd": {
        "auc_judd": "auc_judd_jitter_seed0",
        "auc_borji": "auc_borji_seed0",
        "auc_shuffled": "auc_shuffled_seed0",
        **{measure: measure for measure in ("nss", "cc", "sim")},
    },
    "pysaliency": {
        "auc_judd": "auc_judd_nojitter",
        "auc_borji": "auc_uniform",
        "auc_shuffled": "auc_shuffled_all",
        **{measure: measure for measure in ("nss", "cc", "sim")},
        "kld": "kld_mit",
        "ig": "ig_min1e-20",
    },
}
MATLAB_TOLERANCES = {
    **dict.fromkeys(("nss", "cc", "sim", "kld", "ig"), 1e-6),
    "auc_judd_jitter": 0.03,
    "auc_borji_mean": 0.03,
    "auc_shuffled_mean": 0.03,
}
MATLAB_FRACTIONAL = {"nss": 2e-2, "ig": 2e-2, "cc": 1e-3, "sim": 1e-3, "kld": 1e-3}


def load(shared: Path, name: str) -> tuple[Case, dict[str, float]]:
    golden = np.load(shared / "goldens" / "metrics" / f"{name}.npz")
    prediction, density, fixations, others, baseline = (
        golden[key] for key in ("pred", "dens", "fix", "other", "base")
    )
    case = prediction, density, fixations, others, baseline
    return case, dict(zip(golden["names"].tolist(), golden["values"].tolist(), strict=True))


def score_quietly(case: Case, protocol: str) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* have negative values")
        return score(*case, protocol=protocol)


@pytest.mark.shared
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_scores_are_the_published_ones(shared: Path, name: str, protocol: str) -> None:
    case, golden = load(shared, name)
    if case[0].shape != case[2].shape and not PROTOCOLS[protocol].resize:
        with pytest.raises(ValueError, match="does not resize"):
            score(*case, protocol=protocol)
        return
    found = score_quietly(case, protocol)
    for measure, key in GOLDEN_KEYS[protocol].items():
        expected = golden[f"{protocol}/{key}"]
        assert found[measure] == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True), measure


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_without_jitter_ties_are_miscounted_as_published(shared: Path, name: str) -> None:
    (prediction, _, fixations, _, _), golden = load(shared, name)
    if prediction.shape == fixations.shape:
        found = auc_judd(prediction, fixations, ties="none").item()
        assert found == pytest.approx(golden["tinyhd/auc_judd_nojitter"], abs=1e-9, nan_ok=True)


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_scores_agree_with_matlab(shared: Path, name: str) -> None:
    case, golden = load(shared, name)
    found = score_quietly(case, "dhf1k")
    for key, tolerance in MATLAB_TOLERANCES.items():
        measure = key.removesuffix("_jitter").removesuffix("_mean")
        expected = golden[f"matlab_via_octave/{key}"]
        if np.isnan(expected) or (name == "tiny_scale" and measure == "auc_judd"):
            continue
        if name == "odd_resize_pred":
            tolerance = MATLAB_FRACTIONAL.get(measure, tolerance)
        assert found[measure] == pytest.approx(expected, rel=1e-6, abs=tolerance), key


def random_frame(
    seed: int, *, height: int = 9, width: int = 11, fixations: int = 7, levels: int | None = None
) -> Case:
    rng = np.random.default_rng(seed)
    prediction, density, baseline = rng.random((3, height, width)) ** 3
    if levels is not None:
        prediction = np.floor(prediction * levels) / levels
    masks = np.zeros((2, height * width), dtype=bool)
    for mask, count in zip(masks, (fixations, 20), strict=True):
        mask[rng.choice(height * width, min(count, height * width), replace=False)] = True
    fixated, others = masks.reshape(2, height, width)
    return prediction, density, fixated, others, baseline


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(0, 40),
    st.sampled_from([None, 1, 2, 5, 10, 51, 255]),
)
def test_scores_are_the_formulas(seed: int, fixations: int, levels: int | None) -> None:
    case = random_frame(seed, fixations=fixations, levels=levels)
    expected = plain_scores(*case)
    for measure, found in score(*case).items():
        assert found == pytest.approx(expected[measure], rel=1e-9, abs=1e-9, nan_ok=True), measure


# Hand-computed, on the map 0 1 2 3 / 4 5 6 7.
LADDER = np.arange(8.0).reshape(2, 4)


def at(*pixels: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(8, dtype=bool)
    mask[list(pixels)] = True
    return mask.reshape(2, 4)


def test_auc_judd_by_hand() -> None:
    assert auc_judd(LADDER, at(7)).item() == 1.0
    assert auc_judd(LADDER, at(0)).item() == 0.5  # the last trapezoid rises from (1, 1)
    # Thresholds 6 and 3: (0, 0), (1/6, 1/2), (3/6, 1), (1, 1).
    assert auc_judd(LADDER, at(3, 6)).item() == pytest.approx(1 / 24 + 1 / 4 + 1 / 2)
    for n in (1, 3, 7):
        constant = auc_judd(np.ones((2, 4)), at(*range(n))).item()
        assert constant == pytest.approx(0.5 + 1 / (2 * (n + 1)))


def test_expected_auc_judd_is_the_mean_over_jitter() -> None:
    prediction, _, fixated, _, _ = random_frame(3, levels=3)
    drawn = [auc_judd(prediction, fixated, ties="jitter", seed=s).item() for s in range(1500)]
    error = np.std(drawn) / np.sqrt(len(drawn))
    assert np.mean(drawn) == pytest.approx(auc_judd(prediction, fixated).item(), abs=4 * error)


def test_auc_borji_by_hand() -> None:
    # Scaled to 0..1 the pixels are k/7. Of 7, 4 are reached by thresholds 1.0 and 0.5 first.
    true = np.array([0, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1, 1, 1])
    reached = np.array([0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 8, 8])
    expected = np.trapezoid(true, reached / 8)
    assert auc_borji(LADDER, at(4, 7)).item() == pytest.approx(expected)
    assert auc_shuffled(LADDER, at(4, 7), at(*range(8))).item() == pytest.approx(expected)


def test_grid_reaches_values_that_lie_on_it() -> None:
    levels = np.arange(11)[None]  # after scaling exactly 0, 0.1 .. 1
    for level in range(11):
        fixated = levels == level
        found = auc_shuffled(levels * 51.0, fixated, levels == 5).item()
        assert found == (0.5 if level == 5 else float(level > 5))


@pytest.mark.parametrize("measure", [auc_borji, auc_shuffled])
def test_expectation_is_the_mean_over_splits(measure: Callable[..., torch.Tensor]) -> None:
    prediction, _, fixated, others, _ = random_frame(5)
    truth = (fixated,) if measure is auc_borji else (fixated, others)
    drawn = [measure(prediction, *truth, splits=400, seed=seed).item() for seed in range(8)]
    exact = measure(prediction, *truth).item()
    assert np.mean(drawn) == pytest.approx(exact, abs=0.01)
    assert len(set(drawn)) == 8
    assert measure(prediction, *truth, splits=400, seed=3).item() == drawn[3]


def test_full_grid_is_the_share_of_pairs_in_order() -> None:
    prediction, _, fixated, others, _ = random_frame(6, levels=4)
    positives = prediction[fixated][:, None]
    for negatives, found in (
        (prediction.ravel(), auc_borji(prediction, fixated, grid="full")),
        (prediction[others], auc_shuffled(prediction, fixated, others, grid="full")),
    ):
        expected = ((positives > negatives) + (positives == negatives) / 2).mean()
        assert found.item() == pytest.approx(expected)


def test_nss_by_hand() -> None:
    assert nss(LADDER, at(7)).item() == pytest.approx(3.5 / np.sqrt(6.0))
    assert nss(LADDER, at(7), ddof=0).item() == pytest.approx(3.5 / np.sqrt(5.25))
    assert nss(LADDER, at(0, 7)).item() == pytest.approx(0)


def test_distributions_by_hand() -> None:
    first, second = np.array([[1.0, 3.0]]), np.array([[2.0, 1.0]])
    assert cc(first, second).item() == pytest.approx(-1)
    assert sim(first, second).item() == 0  # (0, 1) and (1, 0) after taking the minimum off
    assert sim(first, second, minmax=False).item() == pytest.approx(1 / 4 + 1 / 3)
    expected = 2 / 3 * np.log(2 / 3 / (1 / 4)) + 1 / 3 * np.log(1 / 3 / (3 / 4))
    assert kld(first, second).item() == pytest.approx(expected)


def test_information_gain_by_hand() -> None:
    prediction, baseline = np.array([[0.0, 1.0, 3.0]]), np.array([[1.0, 0.0, 1.0]])
    fixated = np.array([[False, False, True]])
    assert ig(prediction, fixated, baseline).item() == pytest.approx(np.log2(0.75 / 0.5))
    assert ig(prediction, fixated).item() == pytest.approx(np.log2(0.75))
    assert ig(prediction, prediction == 0).item() == pytest.approx(-52)
    raised = ig(prediction + 1, fixated, baseline, normalise="density").item()
    assert raised == pytest.approx(np.log2(4 / 7 / 0.5))


def test_what_is_undefined_is_nan() -> None:
    prediction, density, fixated, others, baseline = random_frame(7)
    everywhere, nowhere = np.ones_like(fixated), np.zeros_like(fixated)
    constant = np.full_like(prediction, 0.25)
    at_fixations = {"auc_judd", "auc_borji", "auc_shuffled", "nss", "ig"}

    def undefined(
        prediction: Map,
        density: Map | None,
        fixated: Map | None,
        others: Map | None,
        base: Map | None,
    ) -> set[str]:
        scores = score(prediction, density, fixated, others, base)
        return {name for name, value in scores.items() if np.isnan(value)}

    assert undefined(prediction, density, fixated, others, baseline) == set()
    assert undefined(prediction, density, nowhere, others, baseline) == at_fixations
    assert undefined(prediction, density, None, others, baseline) == at_fixations
    assert undefined(prediction, None, fixated, others, baseline) == {"cc", "sim", "kld"}
    assert undefined(prediction, density, everywhere, others, baseline) == {"auc_judd"}
    assert undefined(prediction, density, fixated, nowhere, baseline) == {"auc_shuffled"}
    assert undefined(prediction, density, fixated, None, None) == {"auc_shuffled"}
    assert undefined(prediction, constant, fixated, others, baseline) == {"cc", "sim"}
    grid_and_scale = {"auc_borji", "auc_shuffled", "nss", "cc", "ig"}
    assert undefined(constant, density, fixated, others, baseline) == {*grid_and_scale, "sim"}
    assert undefined(constant * 0, density, fixated, others, baseline) == grid_and_scale
    assert undefined(constant * 0, constant, fixated, others, baseline) == {*grid_and_scale, "sim"}
    assert undefined(prediction, density, fixated, others, constant) == {"ig"}


def test_zero_maps_have_a_similarity_of_zero_and_a_divergence() -> None:
    prediction, density, *_ = random_frame(8)
    zero = np.zeros_like(density)
    assert sim(prediction, zero).item() == sim(zero, density).item() == 0
    assert kld(prediction, zero).item() == 0
    p = density / density.sum()
    expected = (p * np.log(2.0**-52 + p / 2.0**-52)).sum()
    assert kld(zero, density).item() == pytest.approx(expected)


INVARIANT = ("auc_judd", "auc_borji", "auc_shuffled", "nss", "cc", "sim")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(-20, 20), st.integers(-16, 16))
def test_scale_and_shift_change_nothing(seed: int, exponent: int, shift: int) -> None:
    prediction, density, fixated, others, base = random_frame(seed)
    prediction = np.round(prediction * 1024)  # so that scaling and shifting are exact
    expected = score_quietly((prediction, density, fixated, others, base), "dhf1k")
    moved = (prediction + shift) * 2.0**exponent
    found = score_quietly((moved, density, fixated, others, base), "dhf1k")
    for measure in INVARIANT:
        assert found[measure] == pytest.approx(expected[measure], abs=1e-9), measure


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0, 1, (0, 1)]), st.sampled_from([(9, 11), (5, 17)]))
def test_flips_of_everything_change_nothing(
    seed: int, axis: int | tuple[int, int], size: tuple[int, int]
) -> None:
    case = random_frame(seed)
    case = (random_frame(seed, height=size[0], width=size[1])[0], *case[1:])
    flipped = [np.flip(values, axis) for values in case]
    expected = score_quietly(case, "dhf1k")
    found = score_quietly((flipped[0], flipped[1], flipped[2], flipped[3], flipped[4]), "dhf1k")
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


def test_a_map_is_most_like_itself() -> None:
    density = random_frame(9)[1]
    assert cc(density, 3 * density + 1).item() == pytest.approx(1)
    assert cc(density, -density).item() == pytest.approx(-1)
    assert sim(density, 5 * density).item() == pytest.approx(1)
    assert kld(density, 5 * density).item() == pytest.approx(0, abs=1e-10)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_batch(frames: int, levels: int | None = None) -> Batch:
    cases = [random_frame(i, fixations=3 * i, levels=levels) for i in range(frames)]
    maps = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*cases, strict=True)]
    return maps[0], maps[1], maps[2], maps[3], maps[4]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("frames_in_chunk", [1, 2, 100])
@pytest.mark.parametrize("levels", [None, 2])
def test_a_batch_is_scored_as_its_frames(
    monkeypatch: pytest.MonkeyPatch, protocol: str, frames_in_chunk: int, levels: int | None
) -> None:
    monkeypatch.setattr("student.scored_frames.CHUNK_PIXELS_CPU", 99 * frames_in_chunk)
    batch = random_batch(5, levels)
    batch[0][3] = 0
    found = score_batch(*batch, protocol=protocol)
    for index, (prediction, density, fixated, others, base) in enumerate(zip(*batch, strict=True)):
        alone = score(prediction, density, fixated, others, base, protocol=protocol)
        for measure, expected in alone.items():
            value = found[measure][index].item()
            assert value == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True), measure
    assert all(values.dtype == torch.float64 for values in found.values())


def test_threads_change_neither_scores_nor_the_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("student.scored_frames.CHUNK_PIXELS_CPU", 99)
    batch = random_batch(9)
    torch.set_num_threads(3)
    found = score_batch(*batch)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    torch.testing.assert_close(found, score_batch(*batch), rtol=0, atol=0, equal_nan=True)


def test_points_are_as_good_as_masks() -> None:
    predictions, densities, fixations, others, baselines = random_batch(4)
    expected = score_batch(predictions, densities, fixations, others, baselines)
    points = [[mask.nonzero() for mask in masks] for masks in (fixations, others)]
    twice = [[torch.cat([pixels, pixels.flip(0)]) for pixels in sets] for sets in points]
    for sets, other_sets in (points, twice):
        found = score_batch(predictions, densities, sets, other_sets, baselines)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    alone = score_batch(predictions, None, points[0], measures=["nss"])
    torch.testing.assert_close(alone["nss"], expected["nss"], rtol=0, atol=0, equal_nan=True)


def test_a_batch_may_be_part_of_a_larger_one() -> None:
    batch = random_batch(9)
    whole = score_batch(*batch)
    predictions, densities, fixations, others, baselines = (values[1:] for values in batch)
    part = score_batch(predictions, densities, fixations, others, baselines)
    for measure, values in part.items():
        torch.testing.assert_close(values, whole[measure][1:], rtol=0, atol=0, equal_nan=True)


def test_ground_truth_of_points_has_the_size_that_is_said() -> None:
    predictions, _, fixations, _, _ = random_batch(3)
    small = predictions[:, ::2, ::2]
    found = score_batch(small, None, [m.nonzero() for m in fixations], size=(9, 11))
    expected = score_batch(small, None, fixations)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=r"at \(\d+, \d+\) .* outside of frame 1 .* 5x6"):
        score_batch(small, None, [m.nonzero() for m in fixations])


def test_one_baseline_serves_all_frames() -> None:
    predictions, _, fixations, _, baselines = random_batch(4)
    found = score_batch(predictions, None, fixations, None, baselines[0], measures=["ig"])
    repeated = baselines[:1].expand_as(baselines)
    expected = score_batch(predictions, None, fixations, None, repeated, measures=["ig"])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_only_what_is_asked_for_is_computed() -> None:
    predictions, densities, fixations, *_ = random_batch(2)
    found = score_batch(predictions, densities * NAN, fixations, measures=["nss", "auc_judd"])
    assert list(found) == ["auc_judd", "nss"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32, ">f8", np.uint16])
def test_any_real_type_is_scored_as_float64(dtype: npt.DTypeLike) -> None:
    prediction, density, fixated, others, _ = random_frame(10)
    prediction, density = np.round(prediction * 255), np.round(density * 255)
    expected = score(prediction, density, fixated, others)
    mask, other_mask = (255 * mask.astype(np.uint8) for mask in (fixated, others))
    found = score(prediction.astype(dtype), density.astype(dtype), mask, other_mask)
    assert found == expected
    read_only = prediction.copy()
    read_only.flags.writeable = False
    assert score(read_only, density, fixated, others) == expected
    assert score(torch.from_numpy(prediction).float(), density, fixated, others) == expected


def test_predictions_are_brought_to_the_ground_truths_size() -> None:
    _, density, fixated, others, baseline = random_frame(11)
    prediction = random_frame(12, height=6, width=20)[0]
    resized = resize_maps(torch.from_numpy(prediction), 9, 11)
    found = score(prediction, density, fixated, others, baseline)
    negative = (resized < 0).any()
    assert found == pytest.approx(
        score_quietly((resized.numpy(), density, fixated, others, baseline), "dhf1k"), nan_ok=True
    )
    assert negative or not np.isnan(found["kld"])


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_maps_that_are_not_finite_are_refused(
    monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr("student.scored_frames.CHUNK_PIXELS_CPU", 2 * 99)
    for name, position in (("predictions", 0), ("densities", 1), ("baselines", 4)):
        batch = random_batch(5)
        batch[position][3, 2, 2] = value
        with pytest.raises(ValueError, match=f"{name} .* at index 3"):
            score_batch(*batch)


def test_negative_densities_are_taken_as_they_are_with_a_warning() -> None:
    prediction, density, fixated, _, _ = random_frame(13)
    shifted = prediction - 0.01
    with pytest.warns(UserWarning, match="KLD .* predictions have negative"):
        found = kld(shifted, density).item()
    assert np.isnan(found)
    with pytest.warns(UserWarning, match="IG .* predictions have negative"):
        ig(shifted, fixated, normalise="density")
    g = density / density.sum()
    negative = -prediction / -prediction.sum()
    expected = (g * np.log(2.0**-52 + g / (negative + 2.0**-52))).sum()
    with pytest.warns(UserWarning, match="KLD"):
        assert kld(-prediction, density).item() == pytest.approx(expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    predictions, densities, fixations, others, _ = random_batch(3)
    with pytest.raises(ValueError, match=r"fixations must be .* 9, 11.*, as the other"):
        score_batch(predictions, densities, fixations[:, :5])
    with pytest.raises(ValueError, match="densities are of 2 frames"):
        score_batch(predictions, densities[:2], fixations)
    with pytest.raises(ValueError, match="predictions must be"):
        score_batch(predictions[0], densities, fixations)
    with pytest.raises(ValueError, match="none of them 0"):
        score_batch(predictions[:0], densities[:0], fixations[:0])
    with pytest.raises(ValueError, match="baselines must be one map"):
        score_batch(predictions, densities, fixations, others, densities[:2])
    with pytest.raises(ValueError, match="row and column"):
        score_batch(predictions, None, [torch.rand(2, 2)] * 3)
    with pytest.raises(ValueError, match="real numbers"):
        score(predictions[0].numpy() * 1j, densities[0], fixations[0])


def test_unknown_names_are_refused() -> None:
    predictions, densities, fixations, *_ = random_batch(1)
    with pytest.raises(ValueError, match="no protocol 'mit'; there are dhf1k"):
        score_batch(predictions, densities, fixations, protocol="mit")
    with pytest.raises(ValueError, match="no measure 'auc'"):
        score_batch(predictions, densities, fixations, measures=["auc"])  # type: ignore[list-item]


def test_rules_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="number of splits"):
        Protocol(grid="open")
    with pytest.raises(ValueError, match="no meaning"):
        Protocol(grid="full", splits=3)


@pytest.mark.gpu
def test_an_accelerator_gives_the_same_scores() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    batch = random_batch(6)
    for protocol in PROTOCOLS:
        expected = score_batch(*batch, protocol=protocol)
        on_device = [values.cuda() for values in batch]
        found = score_batch(on_device[0], *on_device[1:], protocol=protocol)
        for measure, values in found.items():
            torch.testing.assert_close(values.cpu(), expected[measure], equal_nan=True)
