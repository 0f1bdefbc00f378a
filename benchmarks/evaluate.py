"""How fast maps are scored end to end: PNGs of predictions, maps and fixations are read, too.

    python benchmarks/evaluate.py [--frames N] [--workers N] [--measures NAME,...]

Made-up data of DHF1K's layout and size: 17 observers who look at points that move, maps that are
sums of Gaussians, predictions that are the maps with noise.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import torch
from PIL import Image

from stores.catalogue import scan
from stores.memory import keep_freed_memory
from student.evaluate import evaluate
from student.metrics import MEASURES
from student.scored_set import EvaluateSettings
from student.sources import FolderSource

SIZE = (360, 640)
VIDEOS = 4
OBSERVERS = 17
SIGMA = 12.74
DHF1K_FRAMES = 60_273


def main() -> None:
    """Make the data, score it, print frames per second."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--measures", default=",".join(MEASURES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    measures = tuple(options.measures.split(","))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_data(root, options.frames // VIDEOS)
        os.environ["TINYHD_CACHE"] = str(root / "cache")
        scan(root / "DHF1K", split="val").save(root / "catalogue.jsonl")
        settings = EvaluateSettings(
            measures=measures, workers=options.workers, baselines=False, device=options.device
        )
        rates = []
        for number in range(options.rounds):
            source = FolderSource("predictions", root / "predictions")
            began = time.monotonic()
            evaluate([source], root / "catalogue.jsonl", root / f"scores{number}", settings)
            rates.append(options.frames / (time.monotonic() - began))
    rate = statistics.median(rates)
    print(
        f"{options.frames} frames of {SIZE[0]}x{SIZE[1]}, {options.workers} workers, "
        f"{options.device}, {', '.join(measures)}: {rate:.1f} frames/s "
        f"({min(rates):.1f} to {max(rates):.1f}); DHF1K's {DHF1K_FRAMES:,} validation frames in "
        f"{DHF1K_FRAMES / rate / 60:.1f} min"
    )


def make_data(root: Path, frames: int) -> None:
    """Write videos, recorded eyes and predictions."""
    jobs = []
    for number in range(601, 601 + VIDEOS):
        write_video(root / "DHF1K" / "video" / f"{number:03d}.AVI", frames)
        for kind in ("maps", "fixation"):
            (root / "DHF1K" / "annotation" / f"{number:04d}" / kind).mkdir(parents=True)
        (root / "predictions" / f"{number:04d}").mkdir(parents=True)
        jobs += [(root, number, frame) for frame in range(frames)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: write_frame(*job), jobs))


def write_video(path: Path, frames: int) -> None:
    """Write a video of a few small frames' content at DHF1K's size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for index in range(frames):
            picture = np.full((*SIZE, 3), index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_frame(root: Path, number: int, frame: int) -> None:
    """Write map, fixation map and prediction of one frame."""
    rng = np.random.default_rng([number, frame])
    height, width = SIZE
    centres = rng.uniform(0.2, 0.8, (3, 2)) * SIZE
    points = centres[rng.integers(3, size=OBSERVERS)] + rng.normal(0, 25, (OBSERVERS, 2))
    rows, columns = np.clip(points.round().astype(int), 0, (height - 1, width - 1)).T
    fixations = np.zeros(SIZE, np.uint8)
    fixations[rows, columns] = 255
    y, x = np.arange(height)[:, None], np.arange(width)[None]
    blobs = [
        np.exp(-((y - row) ** 2) / (2 * SIGMA**2)) * np.exp(-((x - column) ** 2) / (2 * SIGMA**2))
        for row, column in zip(rows, columns, strict=True)
    ]
    density = np.sum(blobs, 0)
    coarse = torch.from_numpy(rng.random((1, 1, 12, 20)))
    noise = torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic")[0, 0].numpy()
    annotation = root / "DHF1K" / "annotation" / f"{number:04d}"
    name = f"{frame + 1:04d}.png"
    save(annotation / "fixation" / name, fixations)
    save(annotation / "maps" / name, density / density.max() * 255)
    prediction = np.clip(density / density.max() + 0.3 * noise, 0, None)
    save(root / "predictions" / f"{number:04d}" / name, prediction / prediction.max() * 255)


def save(path: Path, values: np.ndarray) -> None:
    """Write a gray PNG."""
    Image.fromarray(values.round().astype(np.uint8)).save(path)


if __name__ == "__main__":
    main()
