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


@pytest.mark.shared
@pytest.mark.parametrize(("case", "seed"), [("s_I", 11), ("s_none", 13), ("s_I_unlabeled", 14)])
def test_terms_are_the_published_ones(shared: Path, case: str, seed: int) -> None:
    _, teacher_term, hierarchical_term, _ = np.load(shared / "goldens" / "student" / "loss.npz")[
        f"{case}_f64"
    ]
    rng = np.random.default_rng(seed)
    plain, volume = (2, 1, 192, 256), (2, 1, 1, 192, 256)
    shapes = (plain, (2, 4, 1, 192, 256), volume, volume, plain, (4, 2, 1, 192, 256))
    y, d1, d2, d3, teacher, hierarchical = (
        torch.from_numpy(rng.uniform(0.05, 0.95, shape).astype(np.float32)) for shape in shapes
    )
    output = StudentOutput(y.logit(), {"d1": d1.logit(), "d2": d2.logit(), "d3": d3.logit()})
    targets = {"out": teacher[:, 0]}
    targets |= {name: hierarchical[i, :, 0] for i, name in enumerate(NAMES)}
    weights = LossWeights(hierarchical=0.0 if case == "s_none" else 1.0)
    losses = distillation_loss(output, targets, layout(), weights)
    assert losses.terms["teacher"].item() == pytest.approx(teacher_term, rel=1e-4)
    given = losses.terms.get("hierarchical", torch.tensor(0.0)).item()
    assert given == pytest.approx(hierarchical_term, rel=1e-4)


def small_output(logits: torch.Tensor) -> StudentOutput:
    return StudentOutput(logits, {"d1": logits[:, :, None].expand(-1, 4, -1, -1, -1)})


def test_weights_scale_the_terms() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 8, 8)
    targets = {name: torch.rand(2, 8, 8) for name in (*NAMES, "out")}
    losses = distillation_loss(
        small_output(logits), targets, layout(), LossWeights(teacher=0.5, hierarchical=2.0)
    )
    expected = 0.5 * losses.terms["teacher"] + 2 * losses.terms["hierarchical"]
    torch.testing.assert_close(losses.total, expected)


def test_empty_target_says_nothing_and_underflow_stays_finite() -> None:
    logits = torch.full((2, 1, 8, 8), -200.0)
    logits[:, :, 0, 0] = 50.0
    logits.requires_grad_()
    targets = {name: torch.rand(2, 8, 8) for name in (*NAMES, "out")}
    targets["out"][1] = 0
    losses = distillation_loss(small_output(logits), targets, layout(), LossWeights())
    alone = kl_divergence(targets["out"][0], torch.nn.functional.logsigmoid(logits[0, 0]))
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
