"""A teacher in the training step says what the store holds of it: a student learns the same."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cli import cli
from distill import DistillSettings, label_videos
from distill.assist import label_with_student
from distill.online import TeacherInStep, open_teacher
from stores.targets import TargetStore
from student.checkpoints import load_model, save_checkpoint
from student.clips import Batch, ClipDataset, load_batches
from student.config import TinyHDConfig, build_config
from student.losses import add_terms
from student.pools import ClipKey
from student.recipe import Alignment, LabelTerm, OnlineTerm, Supervision, TrainConfig
from student.supervision import (
    Supervisor,
    ask_teacher,
    describe_content,
    find_sources,
)
from student.tinyhd import TinyHD, normalise_frames
from teachers.registry import TEACHERS, build

SIZE = (32, 64)
S = build_config("tinyhd-s-rc4", height=SIZE[0], width=SIZE[1])
M = build_config("tinyhd-m-rc4", height=SIZE[0], width=SIZE[1])
TEACHER_SIZE = "64x96"
KEYS = [ClipKey("long", 30), ClipKey("sub/middle", 39), ClipKey("long", 16)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TinyHD-S that teaches: hierarchical maps, and windows of 16 frames."""
    torch.manual_seed(7)
    model = TinyHD(build_config("tinyhd-s-rc4", height=64, width=96)).train()
    with torch.no_grad():
        for _ in range(3):  # norms whose statistics fit, so that maps differ from each other
            model(torch.randn(4, 3, 16, 64, 96))
    path = tmp_path_factory.mktemp("online") / "teacher.pt"
    save_checkpoint(path, model.eval())
    return path


@pytest.fixture(scope="module")
def store(
    weights: Path, video_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TargetStore:
    path = tmp_path_factory.mktemp("online") / "targets.zarr"
    settings = DistillSettings(
        teacher="assistant",
        weights=weights,
        variant="both",
        with_frames=SIZE,
        executor="inline",
        batch=5,
    )
    label_videos([video_folder], path, settings)
    return TargetStore.open(path)


def recipes(
    weights: Path,
    student: TinyHDConfig,
    alignment: Alignment = "aligned",
) -> tuple[TrainConfig, TrainConfig]:
    """Return recipes of a student that learns from the store, and from the teacher in the step."""
    stored = Supervision(labels=(LabelTerm(labels="assistant", d2=0.5),), alignment=alignment)
    online = OnlineTerm(teacher="assistant", weights=str(weights), d2=0.5)
    return (
        TrainConfig(student=student, supervision=stored),
        TrainConfig(student=student, supervision=replace(stored, labels=(), online=online)),
    )


def read_both(
    store: TargetStore, config: tuple[TrainConfig, TrainConfig], teacher: TeacherInStep
) -> tuple[Batch, Batch, Any]:
    keys = [*KEYS, *(key._replace(is_flipped=True) for key in KEYS)]
    sources = find_sources(store, config[0].supervision)
    contents = (
        describe_content(config[0], sources, {}),
        describe_content(config[1], [], {}, teacher),
    )
    datasets = [ClipDataset(store.url, content) for content in contents]
    assert [dataset.find_frames(["long", "sub/middle"]) for dataset in datasets] == [True, False]
    stored, online = (
        next(load_batches(dataset, keys, batch_size=len(keys))) for dataset in datasets
    )
    return stored, online, sources


@pytest.mark.parametrize(("student", "alignment"), [(S, "aligned"), (M, "aligned"), (M, "lagged")])
def test_teacher_in_the_step_says_what_the_store_holds(
    store: TargetStore,
    weights: Path,
    student: TinyHDConfig,
    alignment: Alignment,
) -> None:
    config = recipes(weights, student, alignment)
    assert config[1].supervision.online is not None
    teacher = open_teacher(config[1].supervision.online, "cpu")
    stored, online, sources = read_both(store, config, teacher)
    assert torch.equal(stored.frames, online.frames)
    planes = ask_teacher(teacher, online.views)
    step = store.label_set(sources[0].labels.name).request.grid_step
    rounded, ties = {}, 0
    for name, values in stored.planes[0].items():
        assert values.shape == planes[name].shape
        assert (planes[name] - values).abs().max() <= step / 2 + 1e-4
        assert (planes[name] - values).abs().max() > step / 4  # it is not the store that is read
        rounded[name] = torch.round(planes[name] / step) * step
        differs = rounded[name] != values
        ties += int(differs.sum())
        offsets = (planes[name] / step - torch.floor(planes[name] / step) - 0.5)[differs]
        assert (offsets.abs() < 1e-2).all()
    assert ties < 1e-3 * sum(values.numel() for values in rounded.values())

    clips = normalise_frames(stored.frames)
    torch.manual_seed(0)
    output = TinyHD(student).eval()(clips)
    by_store = Supervisor(config[0], sources)
    terms = by_store.terms(output, stored, by_store.targets(stored, clips))
    # Once rounded to the grid, what the teacher says in the step is what the store says.
    on_grid = by_store.terms(
        output, stored, by_store.targets(stored._replace(planes=(rounded,)), clips)
    )
    in_step = Supervisor(config[1], [], teacher=teacher)
    exact = in_step.terms(output, online, in_step.targets(online, clips))
    assert list(terms) == list(on_grid) == list(exact)
    for name, term in terms.items():
        torch.testing.assert_close(on_grid[name].value, term.value, rtol=1e-4, atol=0)
        torch.testing.assert_close(exact[name].value, term.value, rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(add_terms(on_grid).total, add_terms(terms).total, rtol=1e-4, atol=0)


def test_frames_are_those_of_the_videos_also_where_the_store_keeps_some(
    store: TargetStore, weights: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "targets.zarr"
    shutil.copytree(store.url, copy)
    for path in (copy / "frames").rglob("c"):
        shutil.rmtree(path)
    config = recipes(weights, S)
    assert config[1].supervision.online is not None
    teacher = open_teacher(config[1].supervision.online, "cpu")
    content = describe_content(config[1], [], {}, teacher)
    (batch,) = load_batches(ClipDataset(copy, content), KEYS, batch_size=3, workers=1)
    whole = ClipDataset(store.url, replace(content, eyes=None))
    for key, frames in zip(KEYS, batch.frames, strict=True):
        np.testing.assert_array_equal(frames.numpy(), whole[key].frames)
    assert [view.frames.shape[1:] for view in batch.views] == [(64, 96, 3)] * 3


@pytest.mark.parametrize("name", [name for name in TEACHERS if name != "assistant"])
def test_what_readers_are_sent_of_a_teacher_is_small(name: str) -> None:
    teacher = build(name)
    eyes = pickle.loads(pickle.dumps(teacher.without_network()))
    assert len(pickle.dumps(eyes)) < 20_000
    assert eyes.context_of(range(20, 24), 60) == teacher.context_of(range(20, 24), 60)
    frame = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    np.testing.assert_array_equal(eyes.resize(frame), teacher.resize(frame))


def test_recurrent_teacher_is_refused() -> None:
    term = OnlineTerm(teacher="tests.distill.fakes:RecurrentTeacher")
    with pytest.raises(ValueError, match="sees every frame of a video in turn"):
        open_teacher(term, "cpu")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_same_run_from_the_store_and_with_the_teacher(
    store: TargetStore, weights: Path, tmp_path: Path
) -> None:
    """One command each; both know the same fingerprint, draw the same clips and learn the same."""
    common = ["train", "--store", store.url, "--size", "32x64", "--epochs", 2, "--device", "cpu"]
    common += ["--holdout", 0.3, "--holdout-of", "frames", "--lr", 0.001]
    run(*common, "--out", tmp_path / "stored", "--labels", "assistant")
    run(*common, "--out", tmp_path / "online", "--teacher", "assistant", "--weights", weights)
    known = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("stored", "online")]
    assert known[0]["label_sets"] == known[1]["online_sets"]
    assert known[0]["clips_sha256"] == known[1]["clips_sha256"]
    curves = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("stored", "online")
    ]
    first = [next(row for row in curve if row["kind"] == "training") for curve in curves]
    assert first[0]["total"] == pytest.approx(first[1]["total"], rel=1e-3)
    for stored, online in zip(*curves, strict=True):
        assert stored.keys() == online.keys()
        assert stored.pop("kind") == online.pop("kind")
        for key in (key for key in stored if not key.endswith("/cc")):
            assert stored[key] == pytest.approx(online[key], rel=0.05, abs=1e-4), key
    assert curves[0] != curves[1]
    table = run("runs", tmp_path)
    assert table.count("from assistant-identity") == 1
    assert "(teacher in the step)" in table


def test_a_teacher_that_nobody_hands_in_is_missed(store: TargetStore, weights: Path) -> None:
    from student.train import train

    with pytest.raises(ValueError, match="give train\\(\\) an open_teacher"):
        train(store.url, Path("nowhere"), recipes(weights, S)[1])
    assert not Path("nowhere").exists()


@pytest.mark.usefixtures("local_ray")
def test_a_stage_teaches_through_the_store(store: TargetStore, tmp_path: Path) -> None:
    """Its student labels the store, once; the next stage learns from that."""
    copy = tmp_path / "targets.zarr"
    shutil.copytree(store.url, copy)
    recipe = tmp_path / "stages.yaml"
    recipe.write_text(
        """
student: {size: 32x64}
sampling: {holdout: 0.3, holdout_of: frames, clips_per_video: 1}
optimisation: {epochs: 1}
stages:
  - {name: wide, student: {variant: tinyhd-s-rc2}}
  - name: narrow
    student: {variant: tinyhd-s-rc4}
    supervision: {labels: [{labels: "stage:wide"}]}
"""
    )
    train = ["train", "--store", copy, "--out", tmp_path / "run", "--config", recipe]
    run(*train, "--device", "cpu")
    best = tmp_path / "run" / "wide" / "best.pt"
    assert load_model(best).config.channel_reduction == 2
    name = label_with_student(copy, best, is_mirrored=True, inline=True)  # nothing is left to do
    labels = TargetStore.open(copy).label_set(name)
    assert len(labels.request.layout.hierarchical) == 4
    # There are two label sets now, and the same command still knows which it began with.
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert "the best weights in" in run(*train, "--device", "cpu")
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    text = (tmp_path / "run" / "wide" / "recipe.yaml").read_text()
    assert f"labels: {store.label_set('assistant-identity').name}" in text
    config = json.loads((tmp_path / "run" / "narrow" / "config.json").read_text())
    assert list(config["label_sets"]) == [name]
    assert config["flipped_sets"][0].startswith("assistant-hflip")
