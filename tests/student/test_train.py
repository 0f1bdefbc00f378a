from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from stores.errors import LabelSetNotFoundError, NotATargetStoreError
from stores.targets import TargetStore
from student.checkpoints import CheckpointError, load_model, read_checkpoint, save_checkpoint
from student.clips import Batch
from student.config import build_config
from student.losses import Losses
from student.recipe import LabelTerm, Optimisation, Sampling, Supervision, TrainConfig
from student.runs import RunDir, RunError
from student.tinyhd import TinyHD
from student.train import train
from student.trainer import Trainer, TrainingError, build_optimizer

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

SMALL = TrainConfig(
    student=build_config("tinyhd-s-rc4", height=32, width=32),
    supervision=Supervision(labels=(LabelTerm(),)),
    sampling=Sampling(clips_per_video=4, holdout=0.3, validation_clips=2),
    optimisation=Optimisation(epochs=3, batch_size=3, learning_rate=0.05),
)


def change(config: TrainConfig, **values: Any) -> TrainConfig:  # noqa: ANN401
    """Return a configuration with other values, wherever in it their fields are."""
    for name, value in values.items():
        if hasattr(config, name):
            config = replace(config, **{name: value})
            continue
        (part,) = [part for part in PARTS if hasattr(getattr(config, part), name)]
        config = replace(config, **{part: replace(getattr(config, part), **{name: value})})
    return config


PARTS = ("student", "supervision", "sampling", "optimisation")


def training_curve(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_training_lowers_the_loss_and_leaves_a_model(labelled: Path, tmp_path: Path) -> None:
    config = change(SMALL, epochs=6, clips_per_video=6)
    state = train(labelled, tmp_path / "run", config)
    assert state.is_complete
    assert state.step == 6 * 6  # 3 videos x 6 clips in batches of 3
    totals = [row["total"] for row in training_curve(tmp_path / "run") if row["kind"] == "training"]
    assert sum(totals[-4:]) < 0.9 * sum(totals[:4])
    validations = [r for r in training_curve(tmp_path / "run") if r["kind"] == "validation"]
    assert len(validations) == 6
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    for name in ("last.pt", "best.pt"):
        model = load_model(tmp_path / "run" / name)
        assert model.config == config.student
        assert not model.training


def test_tensorboard_finds_the_loss_curve(labelled: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(labelled, tmp_path / "run", change(SMALL, epochs=1))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    scalars = {event.step: event.value for event in events.Scalars("training/total")}
    rows = [row for row in training_curve(tmp_path / "run") if row["kind"] == "training"]
    assert scalars == pytest.approx({row["step"]: row["total"] for row in rows})


STOPPED = change(SMALL, epochs=2, clips_per_video=8)


@pytest.fixture(scope="module")
def whole_run(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(labelled, run, STOPPED)
    return run


@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGINT])
def test_stopped_run_continues_exactly(
    labelled: Path, whole_run: Path, tmp_path: Path, killer: signal.Signals
) -> None:
    """A process is killed in the middle of an epoch; the rest is done by another."""
    store, out = labelled, tmp_path / "cut"
    script = f"""
import sys
from pathlib import Path
import torch
from student.experiment import build_recipe
from student.train import train
torch.set_num_threads({torch.get_num_threads()})
config = build_recipe({asdict(STOPPED)!r})
state = train(Path({str(store)!r}), Path({str(out)!r}), config, checkpoint_seconds=0)
sys.exit(0 if state.is_complete else 7)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("training") < 4:
        assert process.poll() is None, "the process ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, killer)
    assert process.wait(60) == (7 if killer == signal.SIGINT else -signal.SIGKILL)
    step = read_checkpoint(out / "last.pt")["step"]
    assert 3 <= step < 16

    state = train(labelled, out, STOPPED)
    assert state.is_complete
    assert training_curve(out) == training_curve(whole_run)
    whole, cut = (read_checkpoint(run / "last.pt") for run in (whole_run, out))
    for name, values in whole["weights"].items():
        assert torch.equal(values, cut["weights"][name]), name
    assert whole["best"] == cut["best"]


def test_other_threads_are_said_when_a_run_continues(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    threads = torch.get_num_threads()
    config, last = change(SMALL, epochs=1), tmp_path / "run" / "last.pt"
    for now in (threads, threads, threads + 1):  # the last two find nothing left to do
        torch.set_num_threads(now)
        train(labelled, tmp_path / "run", config)
    assert "last digits" not in caplog.text
    torch.save({**read_checkpoint(last), "epoch": 0, "batch": 0}, last)
    train(labelled, tmp_path / "run", config)
    assert f"with {threads} CPU threads, and goes on with {threads + 1}" in caplog.text


def test_finished_run_is_not_done_again(labelled: Path, tmp_path: Path) -> None:
    config = change(SMALL, epochs=1)
    first = train(labelled, tmp_path / "run", config)
    curve = training_curve(tmp_path / "run")
    again = train(labelled, tmp_path / "run", config)
    assert again.is_complete
    assert again.validation == first.validation
    assert training_curve(tmp_path / "run") == curve


def test_folder_of_another_configuration_is_refused(labelled: Path, tmp_path: Path) -> None:
    train(labelled, tmp_path / "run", change(SMALL, epochs=1))
    with pytest.raises(RunError, match=r"seed was 0, is 1.*choose another"):
        train(labelled, tmp_path / "run", change(SMALL, epochs=1, seed=1))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(RunError, match="no training run"):
        train(labelled, tmp_path / "notes", SMALL)


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    with (
        RunDir.open(tmp_path / "run", {}),
        pytest.raises(RunError, match="in use"),
        RunDir.open(tmp_path / "run", {}),
    ):
        pass


def test_store_that_has_grown_is_another_run(
    labelled: Path, tmp_path: Path, make_video: MakeVideo
) -> None:
    from distill import DistillSettings, label_videos

    store = tmp_path / "targets.zarr"
    shutil.copytree(labelled, store)
    config = change(SMALL, epochs=1)
    train(store, tmp_path / "run", config)
    make_video(tmp_path / "more" / "new.avi", frames=30)
    settings = DistillSettings(teacher="pqft", size=(64, 64), executor="inline", shard_frames=16)
    label_videos([tmp_path / "more"], store, settings)
    with pytest.raises(RunError, match="clips_sha256"):
        train(store, tmp_path / "run", config)


def test_checkpoint_of_something_else_is_named(labelled: Path, tmp_path: Path) -> None:
    config = change(SMALL, epochs=1)
    train(labelled, tmp_path / "run", config)
    best = (tmp_path / "run" / "best.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(best)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        train(labelled, tmp_path / "run", config)
    (tmp_path / "run" / "config.json").write_text("[]")
    with pytest.raises(RunError, match="damaged"):
        train(labelled, tmp_path / "run", config)


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_device_that_is_not_there_is_named(labelled: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(TrainingError, match=f"device '{device}' cannot be used"):
        train(labelled, tmp_path / "run", SMALL, device=device)
    assert not (tmp_path / "run").exists()


def test_lost_shards_stop_training(labelled: Path, tmp_path: Path) -> None:
    store = tmp_path / "targets.zarr"
    shutil.copytree(labelled, store)
    for path in store.glob("labels/*/maps_*/c.*"):
        path.unlink()
    with pytest.raises(TrainingError, match=r"none can be read.*gone, though its receipt is there"):
        train(store, tmp_path / "run", SMALL)


def lose_targets(labelled: Path, path: Path, shard: int) -> Path:
    """Copy the store without the targets of 16 frames of a video."""
    shutil.copytree(labelled, path)
    labels = TargetStore.open(path).label_set()
    number = labels.shards(labels.store.video("long"))[shard]
    (path / labels.shard_key(labels.array_names[0], number)).unlink()
    return path


@pytest.fixture
def learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training read its clips and do nothing with them."""
    nothing = Losses(torch.zeros(()), {})
    monkeypatch.setattr(Trainer, "train_step", lambda self, batch: nothing)


def test_bad_clips_are_counted_and_training_goes_on_exactly(
    labelled: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = lose_targets(labelled, tmp_path / "damaged.zarr", 2)
    config = change(SMALL, epochs=2, max_bad_share=0.5)
    whole = train(store, tmp_path / "whole", config)
    assert whole.step == 8
    assert whole.bad_clips > 1
    assert whole.clips - whole.bad_clips == 2 * (3 * 4 + 2)  # the other videos are too short
    curve = training_curve(tmp_path / "whole")
    assert [row["bad_clips"] for row in curve if "bad_clips" in row][-1] == whole.bad_clips
    assert caplog.text.count("other clips are taken instead") == 1
    assert f"{whole.bad_clips} of {whole.clips} clips so far" in caplog.text

    train_step = Trainer.train_step

    def stop_at_step_6(self: Trainer, batch: Batch) -> Losses:
        if self.state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_at_step_6)
        stopped = train(store, tmp_path / "cut", config)
    assert not stopped.is_complete
    assert stopped.step == 6
    assert stopped.bad_clips > 0
    again = train(store, tmp_path / "cut", config)
    assert (again.clips, again.bad_clips) == (whole.clips, whole.bad_clips)
    assert training_curve(tmp_path / "cut") == curve
    first, second = (read_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "cut"))
    for name, values in first["weights"].items():
        assert torch.equal(values, second["weights"][name]), name


@pytest.mark.usefixtures("learns_nothing")
def test_too_many_bad_clips_stop_training_until_more_are_allowed(
    labelled: Path, tmp_path: Path
) -> None:
    store = lose_targets(labelled, tmp_path / "damaged.zarr", 2)
    config = change(SMALL, clips_per_video=40, epochs=1)
    with pytest.raises(TrainingError, match=r"^6 of the \d+ clips .* 0\.05 .*--max-bad-share"):
        train(store, tmp_path / "run", config)
    state = train(store, tmp_path / "run", change(config, max_bad_share=1.0))
    assert state.is_complete
    assert state.bad_clips > 6
    with pytest.raises(TrainingError, match=r"^[12] of the \d+ clips .* share of 0 that may be"):
        train(store, tmp_path / "strict", change(config, max_bad_share=0.0))


@pytest.mark.usefixtures("learns_nothing")
def test_clips_to_validate_on_are_replaced_too(labelled: Path, tmp_path: Path) -> None:
    store = lose_targets(labelled, tmp_path / "damaged.zarr", 4)  # of the last frames
    state = train(store, tmp_path / "run", change(SMALL, epochs=1, holdout=0.5))
    assert state.bad_clips > 0
    assert state.clips - state.bad_clips == 2 * 4 + 2 * 2  # one video is too short for either
    assert state.validation["total"] > 0


def test_validation_row_is_not_doubled_by_a_kill_behind_it(tmp_path: Path) -> None:
    model = TinyHD(SMALL.student)
    with RunDir.open(tmp_path / "run", {}) as run:
        run.log("training", 6, {"total": 1.0})
        run.save(model, best_model=None, step=6, batch=6)  # before the epoch's validation
        run.log("validation", 6, {"kl": 1.0})
    with RunDir.open(tmp_path / "run", {}) as run:
        run.log("validation", 6, {"kl": 1.0})
    assert [row["kind"] for row in training_curve(tmp_path / "run")] == ["training", "validation"]


def test_damaged_checkpoint_is_named(labelled: Path, tmp_path: Path) -> None:
    config = change(SMALL, epochs=1)
    train(labelled, tmp_path / "run", config)
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"last\.pt is not a checkpoint, or is damaged"):
        train(labelled, tmp_path / "run", config)


def test_missing_store_and_label_set_are_named(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(NotATargetStoreError):
        train(tmp_path / "nothing.zarr", tmp_path / "run", SMALL)
    with pytest.raises(LabelSetNotFoundError, match="hd2s"):
        train(labelled, tmp_path / "run", change(SMALL, labels=(LabelTerm(labels="hd2s"),)))
    assert not (tmp_path / "run").exists()


def test_loss_that_is_no_number_stops_training(labelled: Path, tmp_path: Path) -> None:
    config = change(SMALL, learning_rate=1e18)
    with pytest.raises(TrainingError, match=r"not finite, on the clips .*:"):
        train(labelled, tmp_path / "run", config)


def test_learning_rate_falls_at_the_milestones() -> None:
    config = Optimisation()
    rates = [round(config.learning_rate_at(epoch), 8) for epoch in (0, 99, 100, 150, 180, 199)]
    assert rates == [0.01, 0.01, 0.001, 0.0001, 0.00001, 0.00001]


def test_parameters_are_grouped_as_published() -> None:
    model = TinyHD(build_config("tinyhd-s-rc4"))
    config = Optimisation()
    optimizer = build_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(found) == 491
    for name, values in found.items():
        is_encoder, is_bias = name.startswith("encoder."), name.endswith(".bias")
        scale = {(True, False): 0.5, (True, True): 1.0, (False, False): 1.0, (False, True): 2.0}
        assert values == (scale[is_encoder, is_bias], 0.0 if is_bias else 5e-4), name


def test_an_update_moves_each_tensor_at_its_own_rate() -> None:
    """The first step moves each tensor by its group's rate times gradient plus decay."""
    torch.manual_seed(SMALL.seed)
    model = TinyHD(SMALL.student)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, SMALL.optimisation)
    for group in optimizer.param_groups:
        group["lr"] = SMALL.optimisation.learning_rate * group["lr_scale"]
    output = model(torch.randn(2, 3, 16, 32, 32))
    output.saliency_logits.square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        is_bias = name.endswith("bias")
        rate = (
            SMALL.optimisation.learning_rate
            * (0.5 if name.startswith("encoder") else 1)
            * (1 + is_bias)
        )
        gradient = parameter.grad + (0 if is_bias else 5e-4) * before[name]
        torch.testing.assert_close(parameter.detach(), before[name] - rate * gradient)


@pytest.mark.parametrize("field", ["epochs", "clips_per_video", "batch_size", "learning_rate"])
def test_settings_that_make_no_sense_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        change(TrainConfig(), **{field: 0})


def test_zero_hierarchical_weight_trains_on_the_saliency_map_alone(
    labelled: Path, tmp_path: Path
) -> None:
    config = change(SMALL, epochs=1, labels=(LabelTerm(hierarchical=0),))
    train(labelled, tmp_path / "run", config)
    row = training_curve(tmp_path / "run")[0]
    assert row["total"] == row["pqft/saliency"]
    assert "pqft/hierarchical" not in row


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "none.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of TinyHD"):
        load_model(tmp_path / "other.pt")
    model = TinyHD(SMALL.student)
    save_checkpoint(tmp_path / "model.pt", model)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["config"]["channel_reduction"] = 2
    torch.save(content, tmp_path / "mixed.pt")
    with pytest.raises(CheckpointError, match="do not fit"):
        load_model(tmp_path / "mixed.pt")
    content["version"] = 9
    torch.save(content, tmp_path / "newer.pt")
    with pytest.raises(CheckpointError, match="version 9"):
        load_model(tmp_path / "newer.pt")


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


def test_checkpoint_that_wants_to_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "tinyhd-checkpoint", "weights": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "harmed").exists()
