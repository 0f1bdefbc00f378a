from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stores.maps import MapLayout, MapSpec
from student.losses import LossWeights, distillation_loss, wanted_maps
from student.metrics import correlation, kl_divergence
from student.tinyhd import StudentOutput

NAMES = ("sal2", "sal3", "sal4", "sal5")
INTERMEDIATE_TERMS = ("hierarchical", "d2_ground_truth", "d3_ground_truth")


def layout(*, hierarchical: tuple[str, ...] = NAMES) -> MapLayout:
    maps = tuple(
        MapSpec(name=name, height=8, width=8, activation="sigmoid", order="activate_first")
        for name in (*NAMES, "out")
    )
    return MapLayout(height=8, width=8, maps=maps, saliency="out", hierarchical=hierarchical)


def test_kl_is_the_sum_over_pixels() -> None:
    rng = np.random.default_rng(0)
    target, prediction = rng.random((3, 5, 6)), rng.random((3, 5, 6))
    target[0, :2] = 0
    q = target / target.sum((1, 2), keepdims=True)
    p = prediction / prediction.sum((1, 2), keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nansum(q * np.log(q / p), axis=(1, 2))
    given = kl_divergence(torch.from_numpy(target), torch.from_numpy(prediction).log())
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-12)


def test_correlation_is_numpys() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((4, 7, 5)), rng.random((4, 7, 5))
    expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)]
    given = correlation(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-12)


CASES = {  # seed, weight of the hierarchical, d2 and d3 terms, which clip has a ground truth
    "s_I": (11, 1, 0, 0, (True, False)),
    "s_I_GT_GT": (12, 1, 0.5, 0.5, (True, False)),
    "s_none": (13, 0, 0, 0, (True, False)),
    "s_I_unlabeled": (14, 1, 0, 0, (False, False)),
    "s_I_alllabeled": (15, 1, 0.5, 0, (True, True)),
    "m_M": (21, 1, 0, 0, (False, True)),
    "m_M_GT_GT": (22, 1, 0.5, 0.5, (False, True)),
    "m_fff_I": (23, 1, 0, 0, (True, False)),
    "m_M_unlabeled": (24, 1, 0, 0, (False, False)),
}


@pytest.mark.shared
@pytest.mark.parametrize("case", CASES)
def test_terms_are_the_published_ones(shared: Path, case: str) -> None:
    golden = np.load(shared / "goldens" / "student" / "loss.npz")[f"{case}_f64"]
    seed, hierarchical_weight, d2_weight, d3_weight, labelled = CASES[case]
    frames = 16 if case.startswith("m") else 1
    d1_frames = 16 if case == "m_fff_I" else 1
    volume, plain = (2, 1, frames, 192, 256), (2, frames, 192, 256)
    shapes = (
        *(volume if frames > 1 else plain, (2, 4, d1_frames, 192, 256), volume, volume),
        *(plain, (4, *plain), volume),
    )
    rng = np.random.default_rng(seed)
    y, d1, d2, d3, teacher, hierarchical, labels = (
        torch.from_numpy(rng.uniform(0.05, 0.95, shape).astype(np.float32)) for shape in shapes
    )
    ground_truth = labels[:, 0] * torch.tensor(labelled)[:, None, None, None]
    output = StudentOutput(y.logit(), {"d1": d1.logit(), "d2": d2.logit(), "d3": d3.logit()})
    targets = {"out": teacher} | dict(zip(NAMES, hierarchical, strict=True))
    weights = LossWeights(
        hierarchical=hierarchical_weight, d2_ground_truth=d2_weight, d3_ground_truth=d3_weight
    )
    losses = distillation_loss(output, targets, layout(), weights, ground_truth=ground_truth)
    terms = {name: term.item() for name, term in losses.terms.items()}
    inter = sum(getattr(weights, name) * terms.get(name, 0.0) for name in INTERMEDIATE_TERMS)
    found = (terms["ground_truth"], terms["teacher"], inter, losses.total.item())
    assert found == pytest.approx(tuple(golden), rel=1e-4)


def small_output(logits: torch.Tensor) -> StudentOutput:
    return StudentOutput(logits, {"d1": logits[:, :, None].expand(-1, 4, -1, -1, -1)})


def test_weights_scale_the_terms() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 8, 8)
    targets = {name: torch.rand(2, 1, 8, 8) for name in (*NAMES, "out")}
    losses = distillation_loss(
        small_output(logits), targets, layout(), LossWeights(teacher=0.5, hierarchical=2.0)
    )
    expected = 0.5 * losses.terms["teacher"] + 2 * losses.terms["hierarchical"]
    torch.testing.assert_close(losses.total, expected)


def test_empty_target_says_nothing_and_underflow_stays_finite() -> None:
    logits = torch.full((2, 1, 8, 8), -200.0)
    logits[:, :, 0, 0] = 50.0
    logits.requires_grad_()
    targets = {name: torch.rand(2, 1, 8, 8) for name in (*NAMES, "out")}
    targets["out"][1] = 0
    losses = distillation_loss(small_output(logits), targets, layout(), LossWeights())
    alone = kl_divergence(targets["out"][0, 0], torch.nn.functional.logsigmoid(logits[0, 0]))
    torch.testing.assert_close(losses.terms["teacher"], alone)
    losses.total.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_hierarchical_term_needs_hierarchical_maps() -> None:
    without = layout(hierarchical=())
    with pytest.raises(ValueError, match="0 hierarchical maps"):
        wanted_maps(without, LossWeights())
    assert wanted_maps(without, LossWeights(hierarchical=0)) == ["out"]


def test_weights_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="not all zero"):
        LossWeights(teacher=0, hierarchical=0)
