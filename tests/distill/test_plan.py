"""What is missing, what it will cost, how it is cut and shared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from cli import cli
from distill import Budget, DistillSettings, label_videos
from distill.forecast import forecast_run
from distill.plan import STRETCH_FRAMES, Found, Target, Task, plan_tasks
from distill.relabel import relabel_shards
from stores import decode
from stores.decode import FrameIndex
from stores.errors import TargetStoreError
from stores.schema import LabelRequest
from stores.table import VideoRow
from stores.targets import TargetStore
from stores.videos import FileStamp
from teachers.registry import build
from tests.distill.test_faults import FAKE, Stage, contents

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

SETTINGS = DistillSettings(teacher=FAKE, shard_frames=16, executor="inline")


@pytest.fixture
def stage(tmp_path: Path, video_folder: Path) -> Stage:
    return Stage(tmp_path, video_folder)


def request(shard_frames: int = 16) -> LabelRequest:
    return LabelRequest(
        teacher="pqft",
        provenance={"window": 4},
        layout=build("pqft", size=(64, 64)).spec.layout,
        shard_frames=shard_frames,
    )


def row(frames: int, first: int = 0, name: str = "a") -> VideoRow:
    return VideoRow(
        id=name,
        root="/",
        path=name,
        content_hash=name.encode() * 32,
        frames=frames,
        height=48,
        width=64,
        fps=25.0,
        first=first,
    )


def test_long_videos_are_cut_where_decoding_can_begin_anywhere() -> None:
    target = Target(request(), lambda shard: False)
    long, short = row(10_000), row(100, 10_240, "b")
    whole_index = FrameIndex(
        0, np.arange(10_000), np.zeros(10_000, np.uint32), np.arange(10_000) % 12 == 0
    )
    found = {long.content_hash: Found.of(FileStamp(1, 1), whole_index)}
    tasks = plan_tasks([short, long], [target], found=found)
    assert [task.video.id for task in tasks] == ["a"] * 5 + ["b"]  # the longest first
    assert [len(task.units) for task in tasks] == [128, 128, 128, 128, 113, 7]
    assert all(len(task.units) * 16 <= STRETCH_FRAMES for task in tasks)
    parts = [task.index for task in map(Task.ready, tasks[:5]) if task.index is not None]
    assert [part.first for part in parts] == [0, 1752, 3804, 5844, 7896]  # four keys before
    assert len(parts[1].timestamps) == 4096 + 256 - 1752
    shards = [unit.shard for task in tasks for unit in task.units]
    assert sorted(shards) == [*range(625), *range(640, 647)]
    (whole,) = plan_tasks([long], [target])  # from the beginning each time would take longer
    assert len(whole.units) == 625


def test_what_is_there_or_given_up_is_not_planned() -> None:
    target = Target(request(), lambda shard: shard in (1, 2))
    (task,) = plan_tasks([row(100)], [target], is_given_up=lambda video, shard: shard == 4)
    assert [unit.shard for unit in task.units] == [0, 3, 5, 6]
    assert task.num_windows == 16 + 16 + 16 + 4
    assert plan_tasks([row(30)], [Target(request(), lambda shard: True)]) == []


def test_forecast_is_what_the_run_then_does(stage: Stage, tmp_path: Path) -> None:
    for settings in (
        SETTINGS,
        replace(SETTINGS, budget=Budget(2, seed=3), variant="both", with_frames=(32, 32)),
    ):
        plan = forecast_run([stage.videos], stage.store, settings)
        there = contents(stage.store) if stage.store.exists() else {}
        report = label_videos([stage.videos], stage.store, settings)
        assert (plan.price.windows, plan.price.shards) == (report.frames, report.shards)
        files = {name for name in contents(stage.store) if "/c." in name}
        assert plan.price.files == len(files - there.keys())
        assert plan.label_sets == report.label_sets
    again = forecast_run([stage.videos], stage.store, SETTINGS)
    assert (again.price.windows, again.price.videos) == (0, 0)


def test_forecast_writes_nothing(stage: Stage) -> None:
    forecast_run([stage.videos], stage.store, SETTINGS, calibrate=True)
    assert not stage.store.exists()
    label_videos([stage.videos / "short.avi"], stage.store, SETTINGS)
    before = {file: file.read_bytes() for file in stage.store.rglob("*") if file.is_file()}
    plan = forecast_run([stage.videos], stage.store, SETTINGS, calibrate=True)
    assert {file: file.read_bytes() for file in stage.store.rglob("*") if file.is_file()} == before
    assert (plan.price.videos, plan.price.windows) == (2, 110)


def test_forecast_names_what_the_run_refuses(
    stage: Stage, tmp_path: Path, make_video: MakeVideo
) -> None:
    stage.videos = tmp_path / "videos"
    make_video(stage.videos / "a.avi", frames=20, seed=1)
    make_video(stage.videos / "b.avi", frames=20, seed=2)
    label_videos([stage.videos], stage.store, SETTINGS)
    make_video(stage.videos / "a.avi", frames=30, seed=3)
    plan = forecast_run([stage.videos], stage.store, SETTINGS)
    assert plan.price.windows == 0
    assert "a: " in str(plan)
    assert "has other content than the 'a'" in str(plan)
    changed = forecast_run([stage.videos], stage.store, replace(SETTINGS, replace_changed=True))
    assert changed.price.windows == 30


def test_budgets_are_priced_beside_what_is_asked_for(stage: Stage) -> None:
    plan = forecast_run([stage.videos], stage.store, SETTINGS)
    windows = {price.what: price.windows for price in (*plan.budgets, plan.price)}
    names = ["1 block of 16", *(f"{n} blocks of 16" for n in (2, 4, 8, 16)), "all frames"]
    assert list(windows) == names
    assert list(windows.values()) == sorted(windows.values())
    assert windows["1 block of 16"] in (16 + 16 + 16, 16 + 16 + 8)  # the shortest has no good one
    assert windows["8 blocks of 16"] == windows["all frames"] == 134
    text = str(plan)
    assert "to do: 3 videos, 134 windows, 10 shards, 20 files" in text
    assert "time and size: with --calibrate" in text


def test_calibration_says_what_it_measured(stage: Stage) -> None:
    settings = replace(SETTINGS, teacher="pqft", size=(64, 64), precision="bfloat16")
    plan = forecast_run([stage.videos], stage.store, settings, calibrate=True)
    assert plan.calibration is not None
    assert plan.calibration.windows == 134
    assert plan.calibration.windows_per_second > 1
    drift = plan.calibration.drift
    assert drift is not None
    assert 0 < drift.kl_nats <= drift.worst_kl_nats < 0.01
    assert 0 < drift.largest < 1
    label_videos([stage.videos], stage.store, replace(settings, precision="float32"))
    labels = TargetStore.open(stage.store).label_set()
    size = sum(n for name, n in labels.store.place.walk(labels.key) if "/c." in name)
    assert plan.calibration.bytes_per_window == pytest.approx(size / 134, rel=0.1)
    assert "it has paid for itself after 1.4 epochs of a TinyHD-M" in str(plan)  # 134/3/2/16


def test_dry_run_from_the_command_line(stage: Stage, tmp_path: Path) -> None:
    (stage.videos.parent / "list.txt").write_text(f"{stage.videos}/long.avi\n")
    arguments = ["distill", "--videos-from", stage.videos.parent / "list.txt", "--teacher", "pqft"]
    arguments += ["--size", "64x64", "--store", stage.store, "--dry-run"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "to do: 1 videos, 70 windows, 1 shards, 4 files" in result.output
    for wrong, message in (
        (["distill", "--teacher", "pqft", "--store", "t"], "name VIDEOS, or a list"),
        ([*arguments[:-1], "--calibrate"], "--calibrate goes with --dry-run"),
    ):
        result = CliRunner().invoke(cli, [str(argument) for argument in wrong])
        assert result.exit_code == 2
        assert message in result.output


def test_both_variants_decode_once(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count: list[int] = []
    raw_frames = decode._raw_frames

    def counted(*arguments: Any) -> Any:  # noqa: ANN401
        for frame in raw_frames(*arguments):
            count.append(1)
            yield frame

    one, other, both = (tmp_path / f"{name}.zarr" for name in ("one", "other", "both"))
    label_videos([stage.videos], one, SETTINGS)
    label_videos([stage.videos], other, replace(SETTINGS, variant="hflip"))
    monkeypatch.setattr(decode, "_raw_frames", counted)
    report = label_videos([stage.videos], both, replace(SETTINGS, variant="both"))
    assert len(count) == 134
    assert (report.frames, report.shards, len(report.label_sets)) == (2 * 134, 20, 2)
    assert contents(both) == contents(one) | contents(other)


def test_recurrent_teacher_sees_every_video_from_its_beginning(
    tmp_path: Path, video_folder: Path
) -> None:
    settings = replace(SETTINGS, teacher="tests.distill.fakes:RecurrentTeacher", variant="both")
    whole, grown = tmp_path / "whole.zarr", tmp_path / "grown.zarr"
    label_videos([video_folder], whole, replace(settings, with_frames=(32, 32)))
    label_videos([video_folder], grown, replace(settings, budget=Budget(2, seed=1)))
    labels = TargetStore.open(grown).label_set("recurrent-identity")
    spans = [(name, span) for name in ("long", "short") for span in labels.coverage(name)]
    teacher = build("tests.distill.fakes:RecurrentTeacher")
    for name, span in spans:
        frames = decode.decode_video(video_folder / f"{name}.avi")
        prepared = teacher.prepare(np.stack([teacher.resize(frame) for frame in frames]))
        teacher.reset()
        expected = teacher.label(
            prepared, first=0, span=range(len(prepared)), num_frames=len(prepared)
        )
        for array, values in labels.read(name, span.start, span.stop).items():
            planes = expected[array][span.start : span.stop].numpy()
            assert np.abs(values - planes).max() <= 1 / 64 + 1e-3
    report = label_videos([video_folder], grown, replace(settings, with_frames=(32, 32)))
    assert report.failures == []
    assert contents(grown) == contents(whole)
    with pytest.raises(TargetStoreError, match="if you trust it, name it with --teacher"):
        relabel_shards(str(whole), 100, labels="recurrent-hflip")
    name = settings.teacher
    anew = relabel_shards(str(whole), 100, labels="recurrent-hflip", teacher=name)
    assert (anew.shards, anew.wrong) == (10, 0)


@pytest.mark.ray
def test_idle_actor_takes_over_what_a_straggler_has_not_begun(
    stage: Stage, tmp_path: Path, local_ray: None
) -> None:
    stage.act({"do": "sleep", "seconds": 0.3})
    settings = DistillSettings(teacher=FAKE, shard_frames=16, actors=2, weights=stage.script)
    report = label_videos([stage.videos / "long.avi"], stage.store, settings)
    assert (report.shards, report.retries) == (5, 0)
    pids = {path.read_text() for path in tmp_path.glob("script.sleep.*")}
    assert len(pids) == 2


def test_log_tells_how_far_a_run_was(stage: Stage) -> None:
    label_videos([stage.videos], stage.store, SETTINGS)
    start, progress, end = stage.log
    assert (start["event"], start["tasks"], start["device"]) == ("start", 3, "cpu")
    assert progress["event"] == "progress"
    assert {key: progress[key] for key in ("videos", "frames", "shards", "failures")} == {
        "videos": 3,
        "frames": 134,
        "shards": 10,
        "failures": 0,
    }
    assert progress["seconds_left"] == 0
    (usage,) = progress["workers"].values()
    assert usage["memory_bytes"] > 2**20
    assert {"cpu", "teacher", "waiting"} <= usage.keys()
    assert (end["event"], end["frames"], end["shards"]) == ("end", 134, 10)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hours_of_video_fit_into_two_gigabytes(tmp_path: Path, make_video: MakeVideo) -> None:
    """The largest process is that of the worker, which is this one."""
    video = make_video(tmp_path / "long.avi", frames=2 * 3600 * 25)
    settings = DistillSettings(
        teacher="pqft", size=(64, 64), executor="inline", with_frames=(64, 96)
    )
    report = label_videos([video], tmp_path / "targets.zarr", settings)
    assert report.frames == 180_000
    (log,) = (tmp_path / "targets.zarr" / "runs" / "log").iterdir()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    (usage,) = [e for e in entries if e["event"] == "progress"][-1]["workers"].values()
    assert usage["memory_bytes"] < 2 * 10**9
    (span,) = TargetStore.open(tmp_path / "targets.zarr").label_set().coverage("long")
    assert span == range(180_000)
