from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from student.losses import (
    RecordedMaps,
    SourceMaps,
    Term,
    TermSums,
    add_terms,
    ground_truth_terms,
    source_terms,
)
from student.metrics import correlation, kl_divergence, nss
from student.recipe import GroundTruthTerm, HierarchicalRule, TermWeights
from student.tinyhd import StudentOutput


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
    density = labels[:, 0] * torch.tensor(labelled)[:, None, None, None]
    output = StudentOutput(y.logit(), {"d1": d1.logit(), "d2": d2.logit(), "d3": d3.logit()})
    maps = SourceMaps(teacher, hierarchical.transpose(0, 1))
    by_teacher = source_terms("hd2s", output, maps, TermWeights(hierarchical=hierarchical_weight))
    eyes = GroundTruthTerm(d2=d2_weight, d3=d3_weight)
    by_eyes = ground_truth_terms(output, RecordedMaps(density), eyes)
    losses = add_terms({**by_teacher, **by_eyes})
    terms = {name: term.item() for name, term in losses.terms.items()}
    inter = (
        terms.get("hd2s/hierarchical", 0.0)
        + d2_weight * terms.get("ground_truth/d2", 0.0)
        + d3_weight * terms.get("ground_truth/d3", 0.0)
    )
    found = (terms["ground_truth/kl"], terms["hd2s/saliency"], inter, losses.total.item())
    assert found == pytest.approx(tuple(golden), rel=1e-4)


def small_output(logits: Tensor) -> StudentOutput:
    """A TinyHD-S whose every map is the fused one."""
    decoders = {name: logits[:, :, None] for name in ("d2", "d3")}
    return StudentOutput(logits, {"d1": logits[:, :, None].expand(-1, 4, -1, -1, -1), **decoders})


def plain_kl(target: Tensor, prediction: Tensor) -> Tensor:
    q, p = target / target.sum((-2, -1), keepdim=True), prediction
    p = p / p.sum((-2, -1), keepdim=True)
    return (q * (q / p).log()).sum((-2, -1))


def test_weights_scale_the_terms() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 8, 8)
    maps = SourceMaps(torch.rand(2, 1, 8, 8), torch.rand(2, 4, 1, 8, 8))
    weights = TermWeights(saliency=0.5, hierarchical=2.0)
    losses = add_terms(source_terms("toy", small_output(logits), maps, weights))
    expected = 0.5 * losses.terms["toy/saliency"] + 2 * losses.terms["toy/hierarchical"]
    torch.testing.assert_close(losses.total, expected)


def test_empty_target_says_nothing_and_underflow_stays_finite() -> None:
    logits = torch.full((2, 1, 8, 8), -200.0)
    logits[:, :, 0, 0] = 50.0
    logits.requires_grad_()
    saliency = torch.rand(2, 1, 8, 8)
    saliency[1] = 0
    maps = SourceMaps(saliency, torch.rand(2, 4, 1, 8, 8))
    losses = add_terms(source_terms("toy", small_output(logits), maps, TermWeights()))
    alone = kl_divergence(saliency[0, 0], torch.nn.functional.logsigmoid(logits[0, 0]))
    torch.testing.assert_close(losses.terms["toy/saliency"], alone)
    losses.total.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_terms_of_a_source_are_named_after_it() -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 1, 8, 8)
    saliency, hierarchical = torch.rand(2, 1, 8, 8), torch.rand(2, 4, 1, 8, 8)
    weights = TermWeights(saliency=0, hierarchical=1, d2=0.5, d3=2)
    terms = source_terms("toy", small_output(logits), SourceMaps(saliency, hierarchical), weights)
    assert list(terms) == ["toy/hierarchical", "toy/d2", "toy/d3"]
    found = {name: term.value for name, term in terms.items()}
    of_fused = plain_kl(saliency, logits.sigmoid()).mean()
    torch.testing.assert_close(found["toy/d2"], of_fused)
    torch.testing.assert_close(found["toy/d3"], of_fused)
    every = plain_kl(hierarchical, logits[:, :, None].sigmoid())
    torch.testing.assert_close(found["toy/hierarchical"], every.mean((0, 2)).sum())
    torch.testing.assert_close(
        add_terms(terms).total, found["toy/hierarchical"] + 2.5 * found["toy/d2"]
    )


def test_hierarchical_term_needs_hierarchical_maps() -> None:
    logits, saliency = torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match="toy has no hierarchical maps"):
        source_terms("toy", small_output(logits), SourceMaps(saliency), TermWeights())
    weights = TermWeights(hierarchical=0)
    terms = source_terms("toy", small_output(logits), SourceMaps(saliency), weights)
    assert list(terms) == ["toy/saliency"]


def test_hierarchical_maps_of_a_clip_are_the_mean_over_its_frames() -> None:
    torch.manual_seed(2)
    saliency, hierarchical = torch.rand(2, 16, 8, 8), torch.rand(2, 4, 16, 8, 8)
    d1 = torch.randn(2, 4, 1, 8, 8)
    output = StudentOutput(torch.randn(2, 1, 16, 8, 8), {"d1": d1})
    maps, weights = SourceMaps(saliency, hierarchical), TermWeights(saliency=0)
    expected = plain_kl(hierarchical.mean(2), d1[:, :, 0].sigmoid()).mean(0).sum()
    rules: tuple[HierarchicalRule, ...] = ("mean", "auto")
    for rule in rules:
        terms = source_terms("toy", output, maps, weights, rule)
        torch.testing.assert_close(terms["toy/hierarchical"].value, expected)
    with pytest.raises(ValueError, match="toy has maps of 16 frames, a decoder of 1"):
        source_terms("toy", output, maps, weights, "identity")
    every = torch.randn(2, 4, 16, 8, 8)
    output = StudentOutput(output.saliency_logits, {"d1": every})
    expected = plain_kl(hierarchical, every.sigmoid()).mean((0, 2)).sum()
    rules = ("identity", "auto")
    for rule in rules:
        terms = source_terms("toy", output, maps, weights, rule)
        torch.testing.assert_close(terms["toy/hierarchical"].value, expected)


def test_recorded_eyes_are_compared_as_the_measures_do() -> None:
    torch.manual_seed(3)
    logits = torch.randn(3, 1, 8, 8)
    density, fixations = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8) > 0.9
    weights = GroundTruthTerm(kl=1, cc=0.5, nss=0.1, d2=0.5)
    maps = RecordedMaps(density, fixations)
    terms = ground_truth_terms(small_output(logits), maps, weights)
    assert list(terms) == [f"ground_truth/{name}" for name in ("kl", "cc", "nss", "d2")]
    found = {name.partition("/")[2]: term.value for name, term in terms.items()}
    prediction = logits.sigmoid()
    torch.testing.assert_close(found["kl"], plain_kl(density, prediction).mean())
    torch.testing.assert_close(found["d2"], found["kl"])
    pairs = zip(density.flatten(1).numpy(), prediction.flatten(1).numpy(), strict=True)
    assert found["cc"].item() == pytest.approx(np.mean([1 - np.corrcoef(*p)[0, 1] for p in pairs]))
    official = [nss(prediction[i, 0], fixations[i, 0]) for i in range(3)]
    assert found["nss"].item() == pytest.approx(-float(np.mean(official)), rel=1e-5)


def test_clips_without_recorded_eyes_change_nothing() -> None:
    torch.manual_seed(4)
    values = torch.randn(2, 1, 8, 8)
    density, fixations = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8, 8) > 0.9
    density[1], fixations[1] = 0, False
    weights = GroundTruthTerm(kl=1, cc=1, nss=1, d2=1, d3=1)
    gradients = []
    for clips in (2, 1):
        logits = values[:clips].clone().requires_grad_()
        maps = RecordedMaps(density[:clips], fixations[:clips])
        total = add_terms(ground_truth_terms(small_output(logits), maps, weights)).total
        total.backward()
        assert logits.grad is not None
        gradients.append((total.detach(), logits.grad[0]))
        assert not logits.grad[1:].any()  # False for NaN, too
    torch.testing.assert_close(*gradients)


def test_batch_without_recorded_eyes_costs_nothing() -> None:
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    maps = RecordedMaps(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool))
    weights = GroundTruthTerm(kl=1, cc=1, nss=1)
    total = add_terms(ground_truth_terms(small_output(logits), maps, weights)).total
    total.backward()
    assert total.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_nss_needs_fixations() -> None:
    maps = RecordedMaps(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="needs fixations"):
        ground_truth_terms(small_output(torch.randn(1, 1, 8, 8)), maps, GroundTruthTerm(nss=1))


def test_targets_of_another_shape_are_refused() -> None:
    logits, maps = torch.randn(2, 1, 8, 8), SourceMaps(torch.rand(2, 1, 8, 4))
    with pytest.raises(ValueError, match=r"targets must be \(2, 1, 1, 8, 8\)"):
        source_terms("toy", small_output(logits), maps, TermWeights(hierarchical=0))


def test_maps_count_the_same_in_whatever_process_and_batch_they_are() -> None:
    """The loss of two processes that share a step is that of one with all clips."""
    torch.manual_seed(5)
    logits, saliency = torch.randn(4, 1, 8, 8), torch.rand(4, 1, 8, 8)
    saliency[1] = 0
    weights = TermWeights(hierarchical=0)

    def terms_of(clips: slice) -> dict[str, Term]:
        maps = SourceMaps(saliency[clips])
        return source_terms("toy", small_output(logits[clips]), maps, weights)

    whole = add_terms(terms_of(slice(4))).total
    parts = [terms_of(slice(1)), terms_of(slice(1, 4))]
    counts = [part["toy/saliency"].counts for part in parts]
    shared = torch.stack(counts).sum(0)
    totals = [add_terms(part, lambda _: shared, processes=2).total for part in parts]
    torch.testing.assert_close(torch.stack(totals).mean(), whole)  # as gradients are averaged
    sums = TermSums()
    for part in parts:
        sums.add(part)
    assert sums.means["toy/saliency"] == pytest.approx(whole.item())
    assert sums.total == pytest.approx(whole.item())


def test_nothing_to_learn_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="no term"):
        add_terms({})
