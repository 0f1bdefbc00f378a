"""Whatever fails: the run goes on, and afterwards the store is the undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from cli import cli
from distill import DistillReport, DistillSettings, label_videos
from distill.failures import KEY
from distill.plan import Target, plan_tasks
from distill.worker import LabelWorker, WorkerError, WorkerSettings
from stores.errors import VideoError
from stores.targets import TargetStore
from stores.verify import verify_store

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

PROJECT = Path(__file__).resolve().parents[2]
FAKE = "tests.distill.fakes:FakeTeacher"
ON_RAY = DistillSettings(teacher=FAKE, shard_frames=16, actors=2)
ALWAYS = 10**6


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
    report = label_videos([video_folder], path, replace(ON_RAY, executor="inline"))
    assert (report.videos, report.shards) == (3, 10)
    return path


class Stage:
    """A store to be filled while a teacher follows a script."""

    def __init__(self, folder: Path, videos: Path) -> None:
        self.videos, self.store, self.script = videos, folder / "targets.zarr", folder / "script"
        self.script.write_text("[]")

    def act(self, *acts: dict[str, Any]) -> None:
        self.script.write_text(json.dumps(acts))

    def times(self, what: str) -> int:
        return len(list(self.script.parent.glob(f"script.{what.replace(' ', '-')}.*")))

    def run(self, settings: DistillSettings = ON_RAY, **changes: Any) -> DistillReport:  # noqa: ANN401
        settings = replace(settings, weights=self.script, **changes)
        return label_videos([self.videos], self.store, settings)

    @property
    def failures(self) -> list[dict[str, Any]]:
        return list(json.loads((self.store / KEY).read_text()))

    @property
    def log(self) -> list[dict[str, Any]]:
        files = sorted((self.store / "runs" / "log").iterdir())
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def stage(tmp_path: Path, video_folder: Path) -> Stage:
    return Stage(tmp_path, video_folder)


@pytest.mark.ray
@pytest.mark.parametrize("what", ["die", "fail"])
def test_what_fails_once_is_done_by_another_actor(
    stage: Stage, undisturbed: Path, local_ray: None, what: str
) -> None:
    stage.act({"do": what, "video": 70, "at": 35, "times": 1})
    report = stage.run()
    assert (report.videos, report.retries, report.failures) == (3, 1, [])
    assert stage.times(what) == 1
    assert contents(stage.store) == contents(undisturbed)
    assert sum(entry["event"] == "retry" for entry in stage.log) == 1


@pytest.mark.ray
def test_what_always_fails_is_listed_passed_over_and_taken_up_on_request(
    stage: Stage, undisturbed: Path, local_ray: None
) -> None:
    stage.act(
        {"do": "sleep", "seconds": 0.1},  # so long that it is known what was begun
        {"do": "die", "video": 70, "at": 35},
        {"do": "fail", "video": 24, "at": 3},
    )
    report = stage.run()
    assert (report.videos, report.shards) == (1, 8)  # two units of 16 frames are missing
    assert (stage.times("die"), stage.times("fail")) == (3, 3)
    died, failed = sorted(stage.failures, key=lambda entry: str(entry["video"]))
    assert (died["video"], died["shards"], died["tries"]) == ("long", [2], 3)
    assert (failed["video"], failed["shards"], failed["tries"]) == ("short", [0], 3)
    assert failed["reason"] == "RuntimeError: in two lines"
    assert "label_span" in failed["traceback"]
    assert "something went wrong" in failed["traceback"]
    assert "2 videos failed" in str(report)
    assert sum(entry["event"] == "failure" for entry in stage.log) == 2

    again = stage.run()  # costs no tries
    assert (stage.times("die"), stage.times("fail")) == (3, 3)
    assert (again.shards, again.passed_over, len(again.failures)) == (0, 2, 2)

    stage.act()
    taken_up = stage.run(retry_failed=True)
    assert (taken_up.shards, taken_up.failures, stage.failures) == (2, [], [])
    assert contents(stage.store) == contents(undisturbed)


@pytest.mark.ray
def test_what_one_worker_cannot_read_is_done_by_another(
    stage: Stage, undisturbed: Path, local_ray: None
) -> None:
    stage.act({"do": "not see the video", "times": 2})
    report = stage.run()
    assert (report.videos, report.failures) == (3, [])
    assert 1 <= report.retries <= 2
    assert contents(stage.store) == contents(undisturbed)


@pytest.mark.parametrize("variant", ["identity", "both"])
def test_maps_that_are_no_numbers_are_blamed_on_their_own_unit(stage: Stage, variant: Any) -> None:  # noqa: ANN401
    stage.act({"do": "say nan", "video": 70, "at": 35})
    report = stage.run(executor="inline", variant=variant)
    assert (report.videos, report.retries) == (2, 0)
    assert {tuple(entry["shards"]) for entry in stage.failures} == {(2,)}
    assert all("frame 32 of 'long' has the value nan" in e["reason"] for e in stage.failures)
    labels = TargetStore.open(stage.store).label_set("fake-identity")
    assert labels.coverage("long") == [range(32), range(48, 70)]


def test_teacher_that_fails_everywhere_ends_the_run(stage: Stage) -> None:
    stage.act({"do": "fail"})
    with pytest.raises(WorkerError, match=r"8 units failed one after the other, at last: Runtime"):
        stage.run(executor="inline")
    assert len(stage.failures) == 8
    stage.act()
    assert stage.run(executor="inline", retry_failed=True).videos == 3


def test_one_video_that_always_fails_does_not_end_the_run(
    stage: Stage, tmp_path: Path, make_video: MakeVideo
) -> None:
    stage.videos = tmp_path / "videos"
    make_video(stage.videos / "bad.avi", frames=160, seed=1)
    make_video(stage.videos / "good.avi", frames=20, seed=2)
    stage.act({"do": "fail", "video": 160})
    report = stage.run(executor="inline")
    assert (report.videos, len(report.failures)) == (1, 10)
    assert stage.times("fail") == 30


def test_worker_gives_up_units_of_the_task_that_is_meant(stage: Stage) -> None:
    stage.run(executor="inline")
    store = TargetStore.open(stage.store)
    labels = store.label_set()
    settings = WorkerSettings(
        store=str(stage.store),
        token=json.loads((stage.store / "runs" / "driver").read_text())["token"],
        sets=(labels.key,),
        teacher=FAKE,
        weights=stage.script,
        batch=8,
    )
    stage.act({"do": "sleep", "seconds": 0.6, "times": 1})  # so that the first report is early
    worker = LabelWorker(settings)
    worker.start()
    (task,) = plan_tasks([store.video("long")], [Target(labels.request, lambda shard: False)])
    events = worker.run(task, 7)
    next(events)
    assert worker.give_up(2, 6) == ()  # that one has ended
    assert worker.give_up(2, 8) == ()  # and that one has not begun
    assert worker.give_up(2, 7) == task.units[-2:]
    assert worker.signs_of_life() > 0
    list(events)
    assert worker.give_up(2, 7) == ()


@pytest.mark.ray
def test_command_exits_with_3_and_says_what_failed(stage: Stage, local_ray: None) -> None:
    stage.act({"do": "fail", "video": 24, "at": 3})
    arguments = ["distill", stage.videos, "--teacher", FAKE, "--weights", stage.script]
    arguments += ["--store", stage.store, "--shard-frames", "16", "--executor", "inline"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 3
    assert "  failed: short: RuntimeError: in two lines" in result.output
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 3
    assert "do so with --retry-failed" in result.output


@pytest.mark.ray
def test_dead_worker_is_told_of_in_one_line(stage: Stage) -> None:
    stage.act({"do": "sleep", "seconds": 0.1}, {"do": "die", "video": 70, "at": 35, "times": 1})
    process = _start(stage)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert len(output.splitlines()) == 1
    assert "3 videos complete, 10 shards written" in output
    said = errors.strip().splitlines()
    assert [line for line in said if "probing" not in line and "labelling" not in line] == [
        "long: try 1 failed: the worker's process died"
    ]


@pytest.mark.ray
@pytest.mark.parametrize(
    "act",
    [
        pytest.param({"do": "hang", "video": 40, "at": 20}, marks=pytest.mark.slow),
        {"do": "hang decoding", "after": 20},
    ],
    ids=["teacher", "decoder"],
)
def test_worker_that_hangs_is_killed_before_its_work_is_handed_on(
    stage: Stage, undisturbed: Path, local_ray: None, act: dict[str, Any]
) -> None:
    stage.act({**act, "times": 1})
    report = stage.run(hang_seconds=4.0)
    assert (report.videos, report.retries, report.failures) == (3, 1, [])
    assert contents(stage.store) == contents(undisturbed)
    name = act["do"].replace(" ", "-")
    pid = int(stage.script.with_name(f"script.{name}.0").read_text())
    assert not Path(f"/proc/{pid}").exists()
    (retry,) = [entry for entry in stage.log if entry["event"] == "retry"]
    assert "nothing was done for 4 s and the worker was stopped" in retry["reason"]


@pytest.mark.ray
def test_teacher_that_cannot_be_loaded_ends_the_run_in_one_line(
    stage: Stage, local_ray: None
) -> None:
    stage.act({"do": "not load", "but": os.getpid()})  # the driver loads it, and no worker
    with pytest.raises(WorkerError, match=r"no worker can start: this teacher cannot be loaded"):
        stage.run()
    assert stage.run(executor="inline").shards == 10


@pytest.mark.ray
def test_store_that_cannot_be_written_ends_the_run(stage: Stage, local_ray: None) -> None:
    stage.run(executor="inline")
    labels = TargetStore.open(stage.store, mode="r+").label_set()
    labels.clear(range(10**3))
    folder = stage.store / labels.key / "maps_4x6"
    stage.act({"do": "spoil the store", "times": 1, "folder": str(folder)})
    with pytest.raises(WorkerError, match=r"cannot write .*maps_4x6"):
        stage.run()
    folder.unlink()
    folder.with_name("away").rename(folder)
    assert stage.run().videos == 3  # nothing was half done
    assert verify_store(str(stage.store)).problems == []


@pytest.mark.ray
def test_batch_that_does_not_fit_is_halved_from_the_start_of_its_shard(
    stage: Stage, tmp_path: Path, video_folder: Path, local_ray: None
) -> None:
    stage.act({"do": "want memory", "video": 70, "at": 40, "windows": 3})
    report = stage.run()
    assert (report.videos, report.smaller_batches, report.failures) == (3, 1, [])
    assert "1 shards in smaller batches" in str(report)
    (entry,) = [entry for entry in stage.log if entry["event"] == "smaller batch"]
    assert (entry["video"], entry["batch"]) == ("long", 2)
    # The shard is the one that such batches give, the others are those of whole ones.
    small = tmp_path / "small.zarr"
    label_videos([video_folder], small, replace(ON_RAY, executor="inline", batch=2))
    labels = TargetStore.open(stage.store).label_set()
    other = TargetStore.open(small).label_set()
    shard = labels.shards(labels.store.video("long"))[2]
    assert labels.receipts[shard].digests == other.receipts[shard].digests


@pytest.mark.ray
def test_teacher_too_large_for_one_window_ends_the_run(stage: Stage, local_ray: None) -> None:
    stage.act({"do": "want memory", "windows": 0})
    with pytest.raises(WorkerError, match="a batch of 1 of fake does not fit"):
        stage.run()


@pytest.mark.ray
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_interrupted_run_finishes_what_is_begun(
    stage: Stage, undisturbed: Path, number: signal.Signals
) -> None:
    stage.act({"do": "sleep", "seconds": 0.5})
    process = _start(stage)
    _wait_for_shards(stage, process, 1)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "finishing what is begun; interrupt again to stop at once" in errors
    assert errors.strip().splitlines()[-1].startswith("interrupted; run the same command again")
    assert "Traceback" not in errors
    labels = TargetStore.open(stage.store).label_set()
    written = {file.name for file in (stage.store / labels.key / "maps_4x6").glob("c.*")}
    assert written == {f"c.{shard}.0.0.0" for shard in labels.receipts.shards()}
    assert 1 <= len(written) < 10
    stage.act()
    assert stage.run(executor="inline").shards == 10 - len(written)
    assert contents(stage.store) == contents(undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_second_interruption_stops_at_once(stage: Stage, undisturbed: Path) -> None:
    stage.act({"do": "sleep", "seconds": 0.2}, {"do": "hang", "video": 40, "at": 20})
    process = _start(stage)
    _wait_for_shards(stage, process, 3)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(3)
    assert process.poll() is None  # a worker hangs
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    stage.act()
    stage.run(executor="inline")
    assert contents(stage.store) == contents(undisturbed)


def _start(stage: Stage) -> subprocess.Popen[str]:
    command = [sys.executable, "cli.py", "distill", str(stage.videos), "--teacher", FAKE]
    command += ["--weights", str(stage.script), "--store", str(stage.store)]
    command += ["--shard-frames", "16"]
    return subprocess.Popen(
        command,
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for_shards(stage: Stage, process: subprocess.Popen[str], number: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(stage.store.glob("labels/*/maps_4x6/c.*"))) < number:
        assert process.poll() is None, "the run ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_file_that_is_no_video_is_passed_over_until_it_changes(
    stage: Stage, tmp_path: Path, make_video: MakeVideo
) -> None:
    stage.videos = tmp_path / "videos"
    make_video(stage.videos / "good.avi", frames=20)
    (stage.videos / "bad.avi").write_bytes(b"no video")
    inline = replace(ON_RAY, executor="inline")
    first = stage.run(inline)
    assert (first.passed_over, [failure.video for failure in first.failures]) == (0, ["bad"])
    second = stage.run(inline)
    assert (second.passed_over, [failure.video for failure in second.failures]) == (1, ["bad"])
    assert stage.run(inline, retry_failed=True).passed_over == 0
    make_video(stage.videos / "bad.avi", frames=20, seed=4)
    third = stage.run(inline)
    assert (third.videos, third.failures, stage.failures) == (2, [], [])


def test_damaged_failure_list_costs_tries_only(stage: Stage, undisturbed: Path) -> None:
    stage.act({"do": "fail", "video": 24, "at": 3})
    inline = replace(ON_RAY, executor="inline")
    stage.run(inline)
    for damaged in (b"{", b"[1, 2]", b'[{"video": "short"}]', b"\xff"):
        (stage.store / KEY).write_bytes(damaged)
        stage.run(inline)
        assert stage.times("fail") % 3 == 0
    assert stage.times("fail") == 15
    stage.act()
    stage.run(inline, retry_failed=True)
    assert contents(stage.store) == contents(undisturbed)


def test_only_failures_is_an_error(stage: Stage, tmp_path: Path) -> None:
    stage.videos = tmp_path / "videos"
    stage.videos.mkdir()
    (stage.videos / "bad.avi").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"cannot open .*bad\.avi"):
        stage.run(executor="inline")
