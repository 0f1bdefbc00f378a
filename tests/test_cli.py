"""The commands as a user types them; bad input ends in one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from click.testing import CliRunner, Result

from cli import VARIANT_NAMES, cli
from tests.student.networks import CONFIGS, fill_weights

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

Run = Callable[..., Result]
SMALL = ("--executor", "inline", "--size", "64x64", "--shard-frames", "16")
TRAIN_SMALL = ("--size", "32x32", "--epochs", "1", "--clips-per-video", "1", "--device", "cpu")


@pytest.fixture
def run() -> Run:
    def call(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return call


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    lines = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert result.exit_code == code, result.output
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    for part in parts:
        assert part in lines[0]


def test_two_commands_make_a_student(run: Run, video_folder: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "targets.zarr", tmp_path / "run"
    arguments = ("distill", video_folder, "--teacher", "pqft", "--store", store, *SMALL)
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert "3 videos complete, 10 shards written, 134 frames labelled" in first.output
    assert "nothing to do, 3 videos are complete" in run(*arguments).output
    trained = run("train", "--store", store, "--out", out, *TRAIN_SMALL)
    assert trained.exit_code == 0, trained.output
    assert "1 steps done" in trained.output  # a clip of each video but the one that is held out
    assert "on held-out clips: pqft/saliency" in trained.output
    assert (out / "last.pt").is_file()


def test_recipes_are_put_together(run: Run, video_folder: Path, tmp_path: Path) -> None:
    """An option over --set over a file; what a run leaves can be trained from again."""
    store, out = tmp_path / "targets.zarr", tmp_path / "run"
    run("distill", video_folder, "--teacher", "pqft", "--store", store, *SMALL)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "student: tinyhd-m-rc4\nsampling: {clips_per_video: 9, holdout: 0}\nseed: 3\n"
    )
    small = ("--set", "student.variant=tinyhd-s-rc4", "--set", "seed=4", *TRAIN_SMALL)
    train = ("train", "--store", store, "--out", out, "--config", recipe, *small)
    trained = run(*train, "--hierarchical-weight", "0")
    assert trained.exit_code == 0, trained.output
    config = json.loads((out / "config.json").read_text())
    assert (config["seed"], config["sampling"]["clips_per_video"]) == (4, 1)
    assert config["student"]["output_frames"] == 1
    assert (config["student"]["channel_reduction"], config["student"]["height"]) == (4, 32)
    recipe.write_text("supervision: {flip: none}\n")
    plain = run(
        "train", "--store", store, "--out", tmp_path / "plain", "--config", recipe, *TRAIN_SMALL
    )
    assert plain.exit_code == 0, plain.output
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["student"]["channel_reduction"] == 4  # as where no file is given
    again = run("train", "--store", store, "--out", out, "--config", out / "recipe.yaml")
    assert again.exit_code == 0, again.output
    other = ("train", "--store", store, "--out", tmp_path / "other", *TRAIN_SMALL)
    trained = run(*other, "--set", "student.channel_reduction=8")
    assert trained.exit_code == 0, trained.output
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["student"]["channel_reduction"] == 8


def test_mistakes_in_recipes_are_one_line(run: Run, tmp_path: Path) -> None:
    train = ("train", "--store", tmp_path / "none.zarr", "--out", tmp_path / "run")
    assert_one_line(run(*train, "--set", "optimisation.epoch=3"), 1, "did you mean", "epochs")
    assert_one_line(run(*train, "--preset", "tinyhd-s-dhf"), 1, "did you mean")
    (tmp_path / "bad.yaml").write_text("seed: !!python/name:os.system ''")
    assert_one_line(run(*train, "--config", tmp_path / "bad.yaml"), 1, "bad.yaml is no YAML")
    assert "tinyhd-m-rc4-ucf-kinetics" in run("train", "--list-presets").output
    assert not (tmp_path / "run").exists()


def test_clips_that_were_replaced_are_told(run: Run, video_folder: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "targets.zarr", tmp_path / "run"
    run("distill", video_folder, "--teacher", "pqft", "--store", store, *SMALL)
    for shard in store.glob("labels/*/maps_*/c.2.0.0.0"):
        shard.unlink()
    options = (*TRAIN_SMALL, "--clips-per-video", "2", "--max-bad-share", "1")
    trained = run("train", "--store", store, "--out", out, *options)
    assert trained.exit_code == 0, trained.output
    assert "clips could not be read, and were replaced" in trained.output


@pytest.mark.parametrize(
    "command",
    [
        *("distill", "train", "demo", "predict", "export", "models"),
        *("weights import", "weights export", "weights inflate", "data scan"),
    ],
)
def test_help_shows_an_example(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"python cli.py {command}" in result.output


def test_unreadable_video(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    store = tmp_path / "t.zarr"
    result = run("distill", tmp_path / "bad.mp4", "--teacher", "pqft", "--store", store, *SMALL)
    assert_one_line(result, 1, "bad.mp4", "cannot open")
    assert not store.exists()


def test_broken_video_among_good_ones(run: Run, make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "videos" / "good.avi", frames=20)
    (tmp_path / "videos" / "bad.avi").write_bytes(b"no video")
    store = tmp_path / "t.zarr"
    result = run("distill", tmp_path / "videos", "--teacher", "pqft", "--store", store, *SMALL)
    assert result.exit_code == 3
    assert "1 videos complete" in result.output
    assert "failed: bad: cannot open" in result.output


def test_empty_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    store = tmp_path / "t.zarr"
    result = run("distill", tmp_path / "videos", "--teacher", "pqft", "--store", store, *SMALL)
    assert_one_line(result, 1, "no videos in", ".mp4")
    assert not store.exists()


def test_missing_folder_and_missing_option(run: Run, tmp_path: Path) -> None:
    result = run(
        "distill", tmp_path / "nowhere", "--teacher", "pqft", "--store", tmp_path / "t.zarr"
    )
    assert_one_line(result, 2, "nowhere", "does not exist")
    assert_one_line(run("distill", tmp_path, "--teacher", "pqft"), 2, "Missing option '--store'")
    assert_one_line(run("train", "--out", tmp_path / "run"), 2, "Missing option '--store'")
    assert_one_line(
        run("distill", tmp_path, "--teacher", "hd3s", "--store", "t"), 1, "hd3s", "pqft"
    )


@pytest.mark.parametrize("size", ["192", "192x", "x", "0x64", "-3x4", "axb"])
def test_size_that_is_none(run: Run, tmp_path: Path, size: str) -> None:
    result = run("distill", tmp_path, "--teacher", "pqft", "--store", "t", "--size", size)
    assert_one_line(result, 2, size, "192x256")


def test_size_that_does_not_fit_the_network(run: Run, video_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "t.zarr"
    arguments = ("distill", video_folder, "--teacher", "pqft", "--store", store)
    assert_one_line(run(*arguments, "--size", "100x100"), 1, "multiples of 16", "100x100")
    assert not store.exists()
    assert run(*arguments, *SMALL).exit_code == 0
    result = run("train", "--store", store, "--out", tmp_path / "run", "--size", "100x100")
    assert_one_line(result, 1, "height must be a positive multiple of 32, got 100")
    assert not (tmp_path / "run").exists()


def test_store_of_another_format_version(run: Run, video_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "t.zarr"
    arguments = ("distill", video_folder, "--teacher", "pqft", "--store", store, *SMALL)
    assert run(*arguments).exit_code == 0
    metadata = json.loads((store / "zarr.json").read_text())
    metadata["attributes"]["version"] = 7
    (store / "zarr.json").write_text(json.dumps(metadata))
    assert_one_line(run(*arguments), 1, "format version 7", "reads version 1")
    result = run("train", "--store", store, "--out", tmp_path / "run")
    assert_one_line(result, 1, "format version 7")


def test_folder_that_is_no_store(run: Run, video_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear reader")
    result = run("distill", video_folder, "--teacher", "pqft", "--store", tmp_path / "mine", *SMALL)
    assert_one_line(result, 1, "not a target store")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_checkpoint_that_does_not_fit(run: Run, video_folder: Path, tmp_path: Path) -> None:
    store, out = tmp_path / "t.zarr", tmp_path / "run"
    run("distill", video_folder, "--teacher", "pqft", "--store", store, *SMALL)
    train = ("train", "--store", store, "--out", out, *TRAIN_SMALL)
    assert run(*train).exit_code == 0
    assert_one_line(run(*train, "--seed", "4"), 1, "another configuration", "seed was 0, is 4")
    (out / "last.pt").write_bytes(b"half a checkpoint")
    assert_one_line(run(*train), 1, "last.pt is not a checkpoint, or is damaged")


def test_videos_that_are_gone(run: Run, make_video: MakeVideo, tmp_path: Path) -> None:
    make_video(tmp_path / "videos" / "a.avi", frames=40)
    store = tmp_path / "t.zarr"
    run("distill", tmp_path / "videos", "--teacher", "pqft", "--store", store, *SMALL)
    shutil.rmtree(tmp_path / "videos")
    result = run("train", "--store", store, "--out", tmp_path / "run", *TRAIN_SMALL)
    assert_one_line(result, 1, "a.avi is not there", "--videos-root")
    assert not (tmp_path / "run").exists()


def test_our_own_mistakes_are_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("distill.demo.run_demo", fail)
    assert isinstance(run("demo").exception, ZeroDivisionError)


def test_weights_go_in_and_out(run: Run, tmp_path: Path) -> None:
    """Published names to a checkpoint and back, bit for bit, and on to ONNX."""
    weights = fill_weights(CONFIGS["m_rc4"])
    torch.save({"student_model": weights}, tmp_path / "published.pth")
    flags = ("--variant", "tinyhd-m-rc4", "--size", "32x64")
    checkpoint = tmp_path / "model.pt"
    result = run("weights", "import", tmp_path / "published.pth", *flags, "--out", checkpoint)
    assert result.exit_code == 0, result.output
    assert "515,281 parameters" in result.output
    result = run("weights", "export", checkpoint, "--out", tmp_path / "again.pth")
    assert result.exit_code == 0, result.output
    again = torch.load(tmp_path / "again.pth", weights_only=True)["student_model"]
    assert list(again) == list(weights)
    assert all(torch.equal(again[key], weights[key]) for key in weights)
    result = run("export", checkpoint, "--out", tmp_path / "model.onnx")
    assert result.exit_code == 0, result.output
    assert "clip (1, 3, 16, 32, 64) float32" in result.output
    assert (tmp_path / "model.onnx").is_file()
    wrong = run(
        "weights", "import", tmp_path / "published.pth", "--variant", "tinyhd-s", *flags[2:]
    )
    assert_one_line(wrong, 2, "Missing option '--out'")
    out = ("--out", tmp_path / "wrong.pt")
    wrong = run("weights", "import", tmp_path / "published.pth", "--variant", "tinyhd-s", *out)
    assert_one_line(wrong, 1, "encoder.encoder.0.0.weight", "instead of")
    assert not (tmp_path / "wrong.pt").exists()


def test_nothing_is_written_over_what_is_read(run: Run, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    checkpoint.write_bytes(b"kept")
    flags = ("--variant", "tinyhd-s", "--out", checkpoint)
    assert_one_line(run("weights", "import", checkpoint, *flags), 2, "the file that is read")
    assert_one_line(run("weights", "inflate", checkpoint, *flags), 2, "the file that is read")
    out = ("--out", checkpoint)
    assert_one_line(run("weights", "export", checkpoint, *out), 2, "the file that is read")
    assert_one_line(run("export", checkpoint, *out), 2, "must end in .onnx")
    assert checkpoint.read_bytes() == b"kept"


def test_models_are_listed_with_what_they_cost(run: Run) -> None:
    lines = run("models").output.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[1:7]}
    assert list(rows) == list(VARIANT_NAMES)
    assert rows["tinyhd-m-rc4"][1:5] == ["515,281", "3,556,525,056", "16", "222,282,816"]
    assert rows["tinyhd-s"][1:5] == ["3,940,981", "5,129,318,400", "1", "5,129,318,400"]
