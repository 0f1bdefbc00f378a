"""What it costs to score predictions: plain formulas against the batched measures.

Run: python benchmarks/metrics.py [--threads 2] [--device cpu] [--batch 16] [--each] [--cpu-time]
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project's root: a file here has the name of the package student.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain_metrics import plain_scores
from stores.memory import keep_freed_memory
from student.metrics import MEASURES, score_batch
from student.protocols import Measure

SIZES = ((360, 640), (192, 256))
MODEL_SIZE = (192, 256)
FIXATIONS, OTHERS = 40, 400


class Frames:
    """Random predictions with ground truth: blobs over noise, fixations where the density is."""

    def __init__(self, count: int, height: int, width: int, device: str) -> None:
        torch.manual_seed(0)
        self.size = (height, width)
        coarse = torch.rand(count, 1, 6, 8, dtype=torch.float64) ** 6
        density = F.interpolate(coarse, self.size, mode="bicubic").clamp(min=0)[:, 0]
        noise = torch.rand(count, height, width, dtype=torch.float64)
        draws = torch.multinomial(density.flatten(1), FIXATIONS)
        other_draws = torch.randint(height * width, (count, OTHERS))
        self.plain = [
            (density * (1 + noise)).numpy(),
            density.numpy(),
            _mask(draws, self.size).numpy(),
            _mask(other_draws, self.size).numpy(),
            density.mean(0).expand_as(density).numpy(),
        ]
        self.predictions = (density * (1 + noise)).to(device)
        self.small = F.interpolate(self.predictions[:, None].float(), MODEL_SIZE)[:, 0]
        self.densities = density.to(device)
        self.baseline = density.mean(0).to(device)
        self.masks = [_mask(pixels, self.size).to(device) for pixels in (draws, other_draws)]
        self.points = [
            [torch.stack([row // width, row % width], 1) for row in pixels]
            for pixels in (draws, other_draws)
        ]

    def score_plainly(self) -> dict[str, Tensor]:
        rows = [plain_scores(*frame) for frame in zip(*self.plain, strict=True)]
        values = {name: [row[name] for row in rows] for name in MEASURES}
        return {name: torch.tensor(row, dtype=torch.float64) for name, row in values.items()}

    def score(
        self, *, points: bool = False, small: bool = False, measures: Collection[Measure] = MEASURES
    ) -> dict[str, Tensor]:
        fixations, others = self.points if points else self.masks
        predictions = self.small if small else self.predictions
        scores = score_batch(
            predictions, self.densities, fixations, others, self.baseline, measures=measures
        )
        return {name: values.cpu() for name, values in scores.items()}


def _mask(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    flat = torch.zeros(len(pixels), size[0] * size[1], dtype=torch.bool)
    return flat.scatter_(1, pixels, torch.ones_like(pixels, dtype=torch.bool)).view(-1, *size)


def take_turns(
    forms: Sequence[Callable[[], object]],
    *,
    rounds: int,
    frames: int,
    clock: Callable[[], float],
) -> list[float]:
    """Return the median milliseconds per frame of each form."""
    seconds: list[list[float]] = [[] for _ in forms]
    for form in forms:
        form()
    for _ in range(rounds):
        for form, times in zip(forms, seconds, strict=True):
            began = clock()
            form()
            times.append(clock() - began)
    return [statistics.median(times) / frames * 1000 for times in seconds]


def main() -> None:
    """Let all forms take turns on the same frames."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep-memory", action="store_true", help="let the process keep memory")
    parser.add_argument("--each", action="store_true", help="also time every measure by itself")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process, where others disturb the clock"
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    if options.keep_memory:
        keep_freed_memory()
    print(
        f"{options.device}, {options.threads} threads, batches of {options.batch}, milliseconds "
        "per frame (times as fast as the plain formulas)\n"
        "| maps | plain formulas | masks | points | points, predictions of 192x256 |\n"
        "|---|---|---|---|---|"
    )
    for size in SIZES:
        frames = Frames(options.batch, *size, options.device)
        batched = frames.score()
        for name, values in frames.score_plainly().items():
            np.testing.assert_allclose(batched[name], values, rtol=1e-8, atol=1e-8, err_msg=name)
        forms: list[Callable[[], object]] = [
            frames.score_plainly,
            frames.score,
            partial(frames.score, points=True),
            partial(frames.score, points=True, small=True),
        ]
        plain, *others = take_turns(forms, rounds=options.rounds, frames=options.batch, clock=clock)
        cells = " | ".join(f"{ms:.2f} ({plain / ms:.1f})" for ms in others)
        print(f"| {size[0]}x{size[1]} | {plain:.2f} | {cells} |")
        for measure in MEASURES if options.each else ():
            (ms,) = take_turns(
                [partial(frames.score, points=True, measures=[measure])],
                rounds=options.rounds,
                frames=options.batch,
                clock=clock,
            )
            print(f"  {measure}: {ms:.2f}")


if __name__ == "__main__":
    main()
