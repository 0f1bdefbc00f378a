"""A store grows by variants, budgets and changed videos; shards are labelled anew to compare."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

from cli import cli
from distill import Budget, DistillSettings, label_videos
from distill.relabel import relabel_shards
from stores.decode import decode_video
from stores.errors import LabelSetNotFoundError, TargetStoreError
from stores.targets import TargetStore
from stores.verify import verify_store
from teachers.registry import build

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

SETTINGS = DistillSettings(teacher="pqft", size=(64, 64), executor="inline", shard_frames=16)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, video_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("growth") / "targets.zarr"
    label_videos([video_folder], path, SETTINGS)
    return path


@pytest.fixture
def path(tmp_path: Path, labelled: Path) -> Path:
    return Path(shutil.copytree(labelled, tmp_path / "targets.zarr"))


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_flipped_variant_is_what_the_teacher_says_of_mirrored_frames(
    path: Path, video_folder: Path
) -> None:
    video = video_folder / "short.avi"
    label_videos([video], path, replace(SETTINGS, variant="hflip"))
    store = TargetStore.open(path)
    flipped = store.label_set("pqft-hflip")
    teacher = build("pqft", size=(64, 64))
    mirrored = [np.ascontiguousarray(frame[:, ::-1]) for frame in decode_video(video)]
    prepared = teacher.prepare(np.stack([teacher.resize(frame) for frame in mirrored]))
    expected = teacher.label(prepared, first=0, span=range(24), num_frames=24)
    for name, values in flipped.read("short", 0, 24).items():
        assert np.abs(values - expected[name].numpy()).max() <= 1 / 64 + 1e-4
    with pytest.raises(LabelSetNotFoundError):
        store.label_set()


def test_growing_by_budget_equals_the_larger_budget_at_once(
    tmp_path: Path, video_folder: Path
) -> None:
    grown, once = tmp_path / "grown.zarr", tmp_path / "once.zarr"
    with_frames = replace(SETTINGS, with_frames=(32, 32))
    first = label_videos([video_folder], grown, replace(with_frames, budget=Budget(1, seed=5)))
    assert (first.videos, first.frames) == (3, 16 + 16 + 8)  # the short one has no full block
    second = label_videos([video_folder], grown, replace(with_frames, budget=Budget(3, seed=5)))
    assert second.frames > 0
    label_videos([video_folder], once, replace(with_frames, budget=Budget(3, seed=5)))
    one, two = TargetStore.open(grown), TargetStore.open(once)
    for video in one.videos:
        spans = one.label_set().coverage(video.id)
        assert spans == two.label_set().coverage(video.id)
        frames = one.frame_sets[0].coverage(video.id)
        assert frames == two.frame_sets[0].coverage(video.id)
        for span in spans:  # a clip that ends in a labelled frame has all its frames
            assert any(f.start <= max(0, span.start - 15) and span.stop <= f.stop for f in frames)
            for name, values in one.label_set().read(video.id, span.start, span.stop).items():
                other = two.label_set().read(video.id, span.start, span.stop)[name]
                np.testing.assert_array_equal(values, other)
    again = label_videos([video_folder], grown, replace(with_frames, budget=Budget(3, seed=5)))
    assert again.shards == 0
    assert verify_store(grown).problems == []


def test_changed_video_is_labelled_anew_on_request(tmp_path: Path, make_video: MakeVideo) -> None:
    video, path = tmp_path / "a.avi", tmp_path / "targets.zarr"
    make_video(video, frames=20, seed=1)
    label_videos([video], path, SETTINGS)
    make_video(video, frames=30, seed=2)
    refused = label_videos([video], path, SETTINGS)
    assert "--replace-changed" in refused.failures[0].reason
    report = label_videos([video], path, replace(SETTINGS, replace_changed=True))
    assert (report.videos, report.frames, report.failures) == (1, 30, [])
    store = TargetStore.open(path)
    assert store.label_set().coverage("a") == [range(30)]
    assert run("store", "drop", path, "--replaced", "--yes")[0] == 0
    assert verify_store(path).problems == []


def test_what_was_repaired_is_labelled_again_and_nothing_else(
    path: Path, labelled: Path, video_folder: Path
) -> None:
    file = next(path.glob("labels/*/maps_32x32/c.1.0.0.0"))
    file.write_bytes(b"damaged" + file.read_bytes()[7:])
    code, text = run("store", "verify", path)
    assert code == 1
    assert file.relative_to(path).as_posix() in text
    assert run("store", "verify", path, "--repair")[0] == 1
    report = label_videos([video_folder], path, SETTINGS)
    assert report.shards == 1
    assert run("store", "verify", path)[0] == 0
    original = labelled / file.relative_to(path)
    assert file.read_bytes() == original.read_bytes()


def test_shards_labelled_anew_are_the_stored_ones(path: Path) -> None:
    report = relabel_shards(str(path), 4, seed=1)
    assert (report.shards, report.wrong) == (4, 0)
    assert report.moved <= report.values / 1000


def test_teacher_that_says_something_else_is_found(path: Path) -> None:
    store = TargetStore.open(path, mode="r+")
    labels, video = store.label_set(), store.video("short")
    shard = labels.shards(video)[0]
    other = labels.read("long", 32, 48)
    labels.commit([labels.write_shard(shard, other, video)])
    report = relabel_shards(str(path), 100)
    assert not report.is_within_bounds
    assert "'short', frames 0-16" in str(report)
    code, text = run("store", "verify", path, "--relabel", 100)
    assert code == 1
    assert "more than that" in text


def test_relabelling_names_what_is_missing(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no weights"):
        relabel_shards(str(path), 1, weights=path / "zarr.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TargetStoreError, match="empty"):
        relabel_shards(str(path), 1, videos_root=tmp_path / "empty")


def test_info_and_ls_say_what_is_there(path: Path) -> None:
    code, text = run("store", "info", path)
    assert code == 0
    assert "3 videos, 134 frames" in text
    assert "134 frames (100.0%) in 10 shards" in text
    assert "KL within 0.00012 nats" in text
    info = json.loads(run("store", "info", path, "--json")[1])
    (labels,) = info["sets"]
    sizes = labels["bytes_of_arrays"]
    name = labels["name"]
    assert sizes["maps_32x32"] == sum(
        file.stat().st_size for file in (path / "labels" / name / "maps_32x32").iterdir()
    )
    assert (labels["frames"], labels["coverage"]) == (134, 1.0)
    assert len(labels["made"]) == 1
    assert "sub/middle  40 frames" in run("store", "ls", path)[1]
    videos = json.loads(run("store", "ls", path, "--json")[1])
    assert videos[1]["spans"] == {name: [[0, 24]]}


def test_merge_and_drop_from_the_command_line(path: Path, tmp_path: Path) -> None:
    code, text = run("store", "merge", tmp_path / "new.zarr", path)
    assert code == 0
    assert "3 new videos, 10 shards copied" in text
    assert run("store", "drop", tmp_path / "new.zarr", "--video", "short", "--yes")[0] == 0
    assert run("store", "verify", tmp_path / "new.zarr")[0] == 0
    code, text = run("store", "drop", tmp_path / "new.zarr", "--video", "short", "--yes")
    assert (code, "no video 'short'" in text) == (0, True)  # a stopped command may be repeated
    assert run("store", "drop", tmp_path / "new.zarr")[0] == 0


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for verb in ("info", "ls", "verify", "drop"):
        code, text = run("store", verb, tmp_path / "nowhere.zarr")
        assert code == 1
        assert text.startswith("Error: ")
        assert "does not exist" in text
        assert len(text.splitlines()) == 1
