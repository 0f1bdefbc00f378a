from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from distill import DistillSettings, label_videos
from distill.events import Failure, Retry, ShardDone
from distill.executors import RayExecutor
from distill.label import label_video
from distill.plan import Target, Task, Unit, plan_tasks
from distill.worker import WorkerError, WorkerSettings
from stores.decode import decode_video
from stores.errors import StoreBusyError, TargetStoreError, VideoError
from stores.targets import TargetStore
from teachers.registry import build

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

MakeExecutor = Callable[..., tuple[RayExecutor, list[Task]]]
PROJECT = Path(__file__).resolve().parents[2]
INLINE = DistillSettings(
    teacher="pqft", size=(64, 64), executor="inline", with_frames=(32, 32), shard_frames=16
)
ON_RAY = DistillSettings(
    teacher="pqft", size=(64, 64), executor="ray", with_frames=(32, 32), shard_frames=16
)


def contents(store: Path) -> dict[str, bytes]:
    """What two equal stores have in common: all files but those of ``runs``."""
    return {
        file.relative_to(store).as_posix(): file.read_bytes()
        for file in sorted(store.rglob("*"))
        if file.is_file() and file.relative_to(store).parts[0] != "runs"
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, video_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "targets.zarr"
    label_videos([video_folder], path, INLINE)
    return path


def test_all_frames_are_labelled_by_the_teacher(undisturbed: Path, video_folder: Path) -> None:
    store = TargetStore.open(undisturbed)
    teacher = build("pqft", size=(64, 64))
    frames = np.stack([teacher.resize(f) for f in decode_video(video_folder / "long.avi")])
    expected = teacher.label(teacher.prepare(frames), first=0, span=range(70), num_frames=70)
    stored = store.label_set().read("long", 0, 70)
    for name, values in expected.items():
        # Half a grid step, and rounding: windows are batched differently here.
        assert np.abs(stored[name] - values.numpy()).max() <= 1 / 64 + 1e-4


def test_second_run_does_nothing(
    tmp_path: Path, undisturbed: Path, video_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "targets.zarr"
    shutil.copytree(undisturbed, path)
    before = contents(path)

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("there was nothing to decode")

    monkeypatch.setattr("stores.probing.hash_file", refuse)
    monkeypatch.setattr("distill.label.decode_spans", refuse)
    report = label_videos([video_folder], path, INLINE)
    assert (report.shards, report.videos, report.failures) == (0, 3, [])
    assert "nothing to do" in str(report)
    assert contents(path) == before


@pytest.mark.ray
def test_ray_writes_the_bytes_of_one_process(
    tmp_path: Path, undisturbed: Path, video_folder: Path, local_ray: None
) -> None:
    path = tmp_path / "targets.zarr"
    report = label_videos([video_folder], path, ON_RAY)
    assert (report.videos, report.frames, report.shards) == (3, 134, 2 * (5 + 3 + 2))
    assert contents(path) == contents(undisturbed)


def committed(store: Path) -> int:
    try:
        return len(TargetStore.open(store).label_set().receipts)
    except TargetStoreError:
        return 0  # not there yet, or in the making


@pytest.mark.ray
def test_killed_run_continues_to_the_same_bytes(tmp_path: Path, sample_folder: Path) -> None:
    """Killed half way with SIGKILL, and continued by the same command."""
    whole, cut = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    clip = sample_folder / "bikes.mp4"
    # So large that the run goes on for several seconds after its first receipts.
    settings = DistillSettings(teacher="pqft", size=(288, 384), executor="inline", shard_frames=16)
    label_videos([clip], whole, settings)
    command = [
        *(sys.executable, "cli.py", "distill", str(clip), "--store", str(cut)),
        *("--teacher", "pqft", "--size", "288x384", "--shard-frames", "16"),
    ]
    process = subprocess.Popen(command, cwd=PROJECT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not committed(cut):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = committed(cut)
    assert 0 < kept < 16

    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f" {16 - kept} shards written" in result.stdout
    assert contents(cut) == contents(whole)


def test_broken_video_among_good_ones_is_skipped(
    tmp_path: Path, make_video: MakeVideo, undisturbed: Path
) -> None:
    make_video(tmp_path / "videos" / "good.avi", frames=20)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"not a video")
    (tmp_path / "videos" / "empty.avi").write_bytes(b"")
    report = label_videos([tmp_path / "videos"], tmp_path / "targets.zarr", INLINE)
    assert report.videos == 1
    assert {failure.video for failure in report.failures} == {"bad", "empty"}
    store = TargetStore.open(tmp_path / "targets.zarr")
    assert [video.id for video in store.videos] == ["good"]
    assert store.label_set().coverage(store.videos[0].id) == [range(20)]
    (file,) = Path(store.url, "runs", "log").iterdir()
    log = file.read_text().splitlines()
    assert sum(json.loads(line)["event"] == "failure" for line in log) == 2


def test_only_broken_videos_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    (tmp_path / "worse.mp4").write_bytes(b"")
    with pytest.raises(VideoError, match=r"cannot open .*bad\.mp4.*1 more videos failed too"):
        label_videos([tmp_path], tmp_path / "targets.zarr", INLINE)
    assert not (tmp_path / "targets.zarr").exists()


def test_changed_video_is_reported_and_the_old_labels_stay(
    tmp_path: Path, make_video: MakeVideo
) -> None:
    videos, path = tmp_path / "videos", tmp_path / "targets.zarr"
    make_video(videos / "a.avi", frames=20, seed=1)
    make_video(videos / "b.avi", frames=20, seed=2)
    label_videos([videos], path, INLINE)
    before = TargetStore.open(path).label_set().read("a", 0, 20)
    make_video(videos / "a.avi", frames=30, seed=3)
    make_video(videos / "c.avi", frames=20, seed=4)
    report = label_videos([videos], path, INLINE)
    assert [failure.video for failure in report.failures] == ["a"]
    assert "other content" in report.failures[0].reason
    after = TargetStore.open(path)
    assert [video.id for video in after.videos] == ["a", "b", "c"]
    for name, values in after.label_set().read("a", 0, 20).items():
        np.testing.assert_array_equal(values, before[name])


def test_copies_of_a_video_are_labelled_once(tmp_path: Path, make_video: MakeVideo) -> None:
    one = make_video(tmp_path / "videos" / "one.avi", frames=20)
    shutil.copy(one, tmp_path / "videos" / "two.avi")
    report = label_videos([tmp_path / "videos"], tmp_path / "targets.zarr", INLINE)
    assert (report.videos, report.frames) == (2, 20)
    labels = TargetStore.open(tmp_path / "targets.zarr").label_set()
    for name, values in labels.read("one", 0, 20).items():
        np.testing.assert_array_equal(values, labels.read("two", 0, 20)[name])


def test_new_videos_and_frames_are_added_to_what_is_there(
    tmp_path: Path, make_video: MakeVideo
) -> None:
    videos, path = tmp_path / "videos", tmp_path / "targets.zarr"
    make_video(videos / "b.avi", frames=20, seed=1)
    assert label_videos([videos], path, replace(INLINE, with_frames=None)).shards == 2
    make_video(videos / "a.avi", frames=20, seed=2)
    report = label_videos([videos], path, INLINE)
    assert (report.frames, report.shards) == (20, 2 + 4)  # labels of a; frames of both
    found = TargetStore.open(path)
    frames = found.find_frame_set(height=32, width=32)
    assert frames is not None
    assert all(not frames.missing(video) for video in found.videos)


def test_moved_videos_are_completed_where_they_lie_now(
    tmp_path: Path, make_video: MakeVideo
) -> None:
    make_video(tmp_path / "before" / "a.avi", frames=20)
    path = tmp_path / "targets.zarr"
    label_videos([tmp_path / "before"], path, replace(INLINE, with_frames=None))
    (tmp_path / "before").rename(tmp_path / "after")
    report = label_videos([tmp_path / "after"], path, INLINE)
    assert (report.failures, report.shards) == ([], 2)


def test_video_that_changes_after_the_probe_is_not_labelled(
    tmp_path: Path, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make_video(tmp_path / "videos" / "a.avi", frames=20, seed=1)

    def change_then_plan(*arguments: Any, **options: Any) -> list[Task]:  # noqa: ANN401
        make_video(video, frames=30, seed=2)
        return plan_tasks(*arguments, **options)

    monkeypatch.setattr("distill.run.plan_tasks", change_then_plan)
    report = label_videos([tmp_path / "videos"], tmp_path / "targets.zarr", INLINE)
    assert (report.shards, report.videos) == (0, 0)
    assert "has changed since it was probed" in report.failures[0].reason


def test_any_failure_of_one_video_leaves_the_others(
    tmp_path: Path, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video(tmp_path / "videos" / "a.avi", frames=20, seed=1)
    make_video(tmp_path / "videos" / "b.avi", frames=20, seed=2)

    def fail_once(task: Task, **options: Any) -> Any:  # noqa: ANN401
        if task.video.id == "a":
            raise OSError("no space left on device")
        return label_video(task, **options)

    monkeypatch.setattr("distill.worker.label_video", fail_once)
    report = label_videos([tmp_path / "videos"], tmp_path / "targets.zarr", INLINE)
    said = {(failure.video, failure.reason, failure.tries) for failure in report.failures}
    assert said == {("a", "OSError: no space left on device", 3)}
    assert report.videos == 1


def test_names_that_are_no_text_are_skipped(tmp_path: Path, make_video: MakeVideo) -> None:
    good = make_video(tmp_path / "videos" / "good.avi", frames=20)
    (tmp_path / "videos" / os.fsdecode(b"bad\xff.avi")).write_bytes(good.read_bytes() + b" ")
    report = label_videos([tmp_path / "videos"], tmp_path / "targets.zarr", INLINE)
    assert report.videos == 1
    assert "rename the file" in report.failures[0].reason


def test_empty_folder_becomes_a_store(tmp_path: Path, video_folder: Path) -> None:
    (tmp_path / "store").mkdir()
    assert label_videos([video_folder / "short.avi"], tmp_path / "store", INLINE).videos == 1


def test_store_in_use_is_refused(tmp_path: Path, undisturbed: Path, video_folder: Path) -> None:
    path = tmp_path / "targets.zarr"
    shutil.copytree(undisturbed, path)
    with TargetStore.open(path, mode="r+").writer(), pytest.raises(StoreBusyError):
        label_videos([video_folder], path, INLINE)


@pytest.fixture
def ray_executor(tmp_path: Path, undisturbed: Path, local_ray: None) -> MakeExecutor:
    """An executor on a store without receipts, and the tasks that fill it."""
    path = tmp_path / "targets.zarr"
    shutil.copytree(undisturbed, path)
    store = TargetStore.open(path, mode="r+")
    labels = store.label_set()
    labels.clear(labels.receipts.shards())
    settings = WorkerSettings(
        store=str(path),
        token=json.loads((path / "runs" / "driver").read_text())["token"],
        sets=(labels.key,),
        teacher="pqft",
        size=(64, 64),
        batch=32,
    )
    tasks = plan_tasks(store.videos, [Target.of(labels)])
    return lambda **change: (RayExecutor(replace(settings, **change), actors=1), tasks)


def run_all(executor: RayExecutor, tasks: list[Task]) -> list[Any]:
    with executor:
        return [event for event in executor.run(tasks) if event is not None]


@pytest.mark.ray
def test_task_of_a_dead_actor_is_done_by_another(ray_executor: MakeExecutor) -> None:
    import ray

    executor, tasks = ray_executor()
    shards: list[int] = []
    retries = 0
    with executor:
        for event in executor.run(tasks):
            retries += isinstance(event, Retry)
            if isinstance(event, ShardDone):
                shards.append(event.receipt.shard)
                if len(shards) == 2:
                    ray.kill(executor._crew[0].handle)
    assert retries == 1
    assert set(shards) == {unit.shard for task in tasks for unit in task.units}


@pytest.mark.ray
def test_unit_that_fails_three_times_is_given_up_and_the_rest_is_done(
    ray_executor: MakeExecutor,
) -> None:
    executor, tasks = ray_executor()
    first, *others = tasks[0].units
    beyond = Unit(10**9, first.sets)  # there is no such shard
    events = run_all(executor, [tasks[0].with_units([first, beyond, *others]), *tasks[1:]])
    (failure,) = [event for event in events if isinstance(event, Failure)]
    assert (failure.video, failure.tries, len(failure.shards)) == (tasks[0].video.id, 3, 1)
    assert "Traceback" in failure.traceback
    done = {event.receipt.shard for event in events if isinstance(event, ShardDone)}
    assert done == {unit.shard for task in tasks for unit in task.units}


@pytest.mark.ray
def test_teacher_that_cannot_be_made_ends_the_run(ray_executor: MakeExecutor) -> None:
    executor, tasks = ray_executor(size=(50, 50))
    with pytest.raises(WorkerError, match=r"no worker can start: .*multiples of 16"):
        run_all(executor, tasks)


@pytest.mark.ray
def test_more_actors_than_cpus_are_refused(
    tmp_path: Path, video_folder: Path, local_ray: None
) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        label_videos([video_folder], tmp_path / "t.zarr", replace(ON_RAY, actors=500))
    with pytest.raises(ValueError, match=r"do not fit.*--cpus-per-actor"):
        label_videos([video_folder], tmp_path / "t.zarr", replace(ON_RAY, cpus_per_actor=500))
