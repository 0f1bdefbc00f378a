"""Areas under ROC curves of saliency maps, without sorting their pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from student.map_statistics import MapStatistics, computed_once
from student.pixel_sets import PixelSets, find_true
from student.protocols import Denominator, Grid, Ties

Floats = npt.NDArray[np.float64]

BINS: Final = 8192
JITTER: Final = 1e-7
STEPS: Final = 10
"""Steps from 0 to 1 of the thresholds of AUC-Borji and shuffled AUC."""


class RankedPixels:
    """Counts pixels at or above values near those at fixations, without sorting them all.

    A histogram of the maps counts the pixels; only those in bins where a value may be asked for,
    the candidates, are ever compared.

    Args:
        maps: B maps of N pixels.
        fixations: Where maps have the values that will be asked for; those of the grid may be, too.
    """

    def __init__(self, maps: MapStatistics, fixations: PixelSets) -> None:
        self.maps, self.fixations = maps, fixations
        frames, device = len(maps.values), maps.values.device
        self.grid = torch.arange(STEPS + 1, dtype=torch.float64, device=device) / STEPS
        self._starts = torch.arange(frames, device=device)[:, None] * (BINS + 1)

    @computed_once
    def _counts(self) -> tuple[Tensor, PixelSets]:
        """For each bin the pixels in higher ones, ``(B * bins,)``, candidates left out; these."""
        unit = self.maps.unit
        frames, size = unit.shape
        bins = (
            torch.mul(unit, BINS, out=self.maps.scratch)
            .to(torch.int32)
            .add_(self._starts.int())
            .flatten()
        )
        fixated = self.fixations.read(unit, padding=1.0)
        places = torch.cat([fixated, self.grid[1:].expand(frames, -1)], 1)
        marked = torch.zeros(frames * (BINS + 1), dtype=torch.bool, device=unit.device)
        marked[self._bins_of(places).flatten()] = True
        counts = torch.bincount(bins, minlength=len(marked)).masked_fill_(marked, 0)
        counts = counts.view(frames, BINS + 1)
        higher = (counts.sum(1, keepdim=True) - counts.cumsum(1)).flatten()
        candidates = find_true(marked.index_select(0, bins))
        return higher, PixelSets.from_flat(candidates, frames, size)

    @computed_once
    def share_of_fixations(self) -> Tensor:
        """Which share of the fixations reaches each threshold of the grid, ``(B, STEPS + 1)``."""
        return self.share_at_least(self.fixations)

    def share_at_least(self, pixels: PixelSets) -> Tensor:
        """Return which share of the pixels reaches each threshold, ``(B, STEPS + 1)``."""
        places = pixels.read(self.maps.unit, padding=-torch.inf)
        return (places[:, :, None] >= self.grid).sum(1).double() / pixels.counts[:, None]

    def count_at_least(self, values: Tensor, asked: Tensor, places: Tensor) -> Tensor:
        """Count the pixels of each map that reach each value asked for.

        Args:
            values: What is compared, ``(B, N)``: ordered as ``maps.unit``, or more finely.
            asked: Values, ``(B, Q)``, in any order.
            places: ``maps.unit`` of the pixels that have these values, ``(B, Q)``.

        Returns:
            ``(B, Q)``, float64: quotients of integers would be float32.
        """
        above_bin, sets = self._counts
        candidates = sets.read(values, padding=-torch.inf)
        ordered, order = asked.sort(1)
        reached = torch.searchsorted(ordered, candidates, right=True)
        slots = ordered.shape[1] + 1
        reached += torch.arange(len(reached), device=reached.device)[:, None] * slots
        hits = torch.bincount(reached.flatten(), minlength=len(reached) * slots).view(-1, slots)
        at_least = candidates.shape[1] - hits.cumsum(1)[:, :-1]
        higher = above_bin[self._bins_of(places)]
        return (higher + torch.empty_like(at_least).scatter_(1, order, at_least)).double()

    def count_around(self, positives: Tensor) -> tuple[Tensor, Tensor]:
        """Count the pixels at or above each fixated value, and those above it, each ``(B, n)``."""
        places = self.fixations.read(self.maps.unit, padding=1.0)
        next_higher = positives.nextafter(positives.new_tensor(torch.inf))
        asked, places = torch.cat([positives, next_higher], 1), torch.cat([places, places], 1)
        at_least, above = self.count_at_least(self.maps.values, asked, places).chunk(2, 1)
        return at_least, above

    def _bins_of(self, places: Tensor) -> Tensor:
        return (places * BINS).long() + self._starts


def judd_auc(ranks: RankedPixels, *, ties: Ties, seed: int) -> Tensor:
    """Return AUC-Judd ``(B,)``; ``metrics.auc_judd`` says what the options mean."""
    n, size = ranks.fixations.counts.double(), ranks.maps.values.shape[1]
    if ties == "expected":
        area = _expected_judd(ranks)
    elif ties == "joined":
        area = _judd_curve(ranks.maps.values, ranks, joined=True)
    else:
        if ties == "jitter":
            noise = torch.from_numpy(np.random.RandomState(seed).rand(size) * JITTER)
            maps = MapStatistics(ranks.maps.values + noise.to(n.device))
            ranks = RankedPixels(maps, ranks.fixations)
        area = _judd_curve(ranks.maps.unit, ranks, joined=False)
    return area.where((n > 0) & (n < size), torch.nan)


def borji_auc(ranks: RankedPixels, *, grid: Grid, splits: int | None, seed: int) -> Tensor:
    """Return AUC-Borji ``(B,)``; ``metrics.auc_borji`` says what the options mean."""
    maps, fixations = ranks.maps, ranks.fixations
    size = maps.values.shape[1]
    if grid == "full":
        at_least, above = ranks.count_around(fixations.read(maps.values, padding=torch.inf))
        return fixations.mean(1 - (at_least + above) / 2 / size)
    if splits is None:
        asked = ranks.grid[1:].expand(len(maps.unit), -1)  # every pixel reaches 0
        counts = ranks.count_at_least(maps.unit, asked, asked)
        counts = torch.cat([torch.full_like(counts[:, :1], size), counts], 1)
        area = _grid_area(ranks.share_of_fixations, counts / size)
    else:
        areas = []
        for positives, unit in _frames(maps, fixations):
            drawn = np.random.RandomState(seed).randint(0, size, [len(positives), splits])
            areas.append(_sampled_area(positives, unit[drawn], len(positives), grid))
        area = torch.tensor(areas, dtype=torch.float64, device=maps.unit.device)
    return area.where(~maps.constant & (fixations.counts > 0), torch.nan)


def shuffled_auc(
    ranks: RankedPixels,
    others: PixelSets,
    *,
    grid: Grid,
    splits: int | None,
    seed: int,
    denominator: Denominator,
) -> Tensor:
    """Return shuffled AUC ``(B,)``; ``metrics.auc_shuffled`` says what the options mean."""
    maps, fixations = ranks.maps, ranks.fixations
    defined = (fixations.counts > 0) & (others.counts > 0)
    if grid == "full":
        area = _mann_whitney_of_others(maps, fixations, others)
        return area.where(defined, torch.nan)
    if splits is None:
        area = _grid_area(ranks.share_of_fixations, ranks.share_at_least(others))
    else:
        areas = []
        for frame, (positives, unit) in enumerate(_frames(maps, fixations)):
            pool = others.pixels[frame, : int(others.counts[frame])].cpu().numpy()
            random = np.random.RandomState(seed)
            drawn = [random.permutation(len(pool))[: len(positives)] for _ in range(splits)]
            negatives = unit[pool[np.stack(drawn, 1)]]
            count = len(negatives) if denominator == "negatives" else len(positives)
            areas.append(_sampled_area(positives, negatives, count, grid))
        area = torch.tensor(areas, dtype=torch.float64, device=maps.unit.device)
    return area.where(~maps.constant & defined, torch.nan)


def _expected_judd(ranks: RankedPixels) -> Tensor:
    """Return the expectation over jitter that is too small to change the order of values."""
    fixations = ranks.fixations
    size, n = ranks.maps.values.shape[1], fixations.counts.double()
    positives = fixations.read(ranks.maps.values, padding=torch.inf)
    at_least, above = ranks.count_around(positives)
    below = size - at_least + (at_least - above) / 2  # of all pixels, fixated ones, too
    mann_whitney = below.masked_fill(fixations.padding, 0.0).sum(1) - n * n / 2
    lowest = positives.argmin(1, keepdim=True)
    k = (positives == positives.gather(1, lowest)).sum(1).double()
    above_lowest = above.gather(1, lowest)[:, 0]
    tied = at_least.gather(1, lowest)[:, 0] - above_lowest - k
    half_step = (above_lowest - (n - k) + tied * k / (k + 1)) / 2
    return (mann_whitney + half_step) / (n * (size - n))


def _judd_curve(values: Tensor, ranks: RankedPixels, *, joined: bool) -> Tensor:
    """Return the area under the curve through the thresholds at the fixations, high to low.

    Joined, equal fixated values are one threshold; otherwise the i-th has i fixations at or above
    it, whatever their values, and the thresholds of a constant map are beyond all its values.
    """
    maps, fixations = ranks.maps, ranks.fixations
    n, size = fixations.counts.double()[:, None], values.shape[1]
    positives = fixations.read(values, padding=-torch.inf).sort(1, descending=True).values
    places = fixations.read(maps.unit, padding=-torch.inf).sort(1, descending=True).values
    places = places.masked_fill(fixations.padding, 1.0)
    at_least = ranks.count_at_least(values, positives, places)
    if joined:
        found = torch.searchsorted(-positives, -positives, right=True)
    else:
        found = torch.arange(1, positives.shape[1] + 1, device=values.device)
        at_least = at_least.masked_fill(maps.constant[:, None], 0)
    true = (found / n).masked_fill(fixations.padding, 1.0)
    false = ((at_least - found) / (size - n)).masked_fill(fixations.padding, 1.0)
    return _trapezoids(true, false)


def _mann_whitney_of_others(maps: MapStatistics, fixations: PixelSets, others: PixelSets) -> Tensor:
    negatives = others.read(maps.values, padding=torch.inf).sort(1).values
    positives = fixations.read(maps.values, padding=0.0)
    below = torch.searchsorted(negatives, positives)
    not_above = torch.searchsorted(negatives, positives, right=True)
    return fixations.mean((below + not_above).double() / 2 / others.counts[:, None])


def _grid_area(true: Tensor, false: Tensor) -> Tensor:
    """Return the area under curves given for ascending thresholds."""
    return _trapezoids(true.flip(1), false.flip(1))


def _trapezoids(true: Tensor, false: Tensor) -> Tensor:
    """Return the area under curves ``(B, n)`` continued to (0, 0) and (1, 1)."""
    true, false = (torch.nn.functional.pad(rates, (1, 0)) for rates in (true, false))
    true, false = (torch.nn.functional.pad(rates, (0, 1), value=1.0) for rates in (true, false))
    return torch.trapezoid(true, false)


def _frames(maps: MapStatistics, fixations: PixelSets) -> Iterator[tuple[Floats, Floats]]:
    """Yield the values at the fixations and all values of each frame, from 0 to 1."""
    for pixels, count, unit in zip(fixations.pixels, fixations.counts, maps.unit, strict=True):
        values = unit.cpu().numpy()
        yield values[pixels[: int(count)].cpu().numpy()], values


def _sampled_area(positives: Floats, negatives: Floats, count: int, grid: Grid) -> float:
    """Return the mean area over splits.

    Args:
        positives: ``(n,)``, from 0 to 1.
        negatives: ``(k, splits)``, from 0 to 1.
        count: Negatives that a false positive rate is a share of.
        grid: "closed" or "open".
    """
    if not len(positives) or not len(negatives):
        return float("nan")
    if grid == "closed":
        thresholds = np.arange(STEPS + 1) / STEPS
        used = np.ones((1, STEPS + 1), dtype=bool)
    else:  # arange(0, highest, 0.1)
        thresholds = np.arange(STEPS, dtype=np.float64) * 0.1
        highest = np.maximum(positives.max(), negatives.max(0))[:, None]
        used = np.arange(STEPS) < np.ceil(highest / 0.1)
    true = (positives[:, None] >= thresholds).sum(0) / len(positives) * used
    false = (negatives[:, :, None] >= thresholds).sum(0) / count * used
    return _grid_area(torch.from_numpy(true), torch.from_numpy(false)).mean().item()
