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

from stores.errors import LabelSetNotFoundError, NotATargetStoreError, TinyHDError
from stores.targets import TargetStore
from student.checkpoints import CheckpointError, load_model, read_checkpoint, save_checkpoint
from student.clips import Batch
from student.config import TinyHDConfig, build_config
from student.losses import Losses
from student.recipe import (
    GroundTruthTerm,
    LabelTerm,
    Optimisation,
    Sampling,
    Supervision,
    TrainConfig,
)
from student.runs import RunDir, RunError
from student.tinyhd import TinyHD
from student.train import stop_on_signal, train
from student.trainer import Trainer, TrainingError, build_optimizer
from student.validation import Validation
from tests.student.counting import add_labels, counting_request, make_store, record_eyes

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

SMALL = TrainConfig(
    student=build_config("tinyhd-s-rc4", height=32, width=32),
    supervision=Supervision(labels=(LabelTerm(),)),
    sampling=Sampling(clips_per_video=4, holdout=0.3, holdout_of="frames", validation_clips=2),
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
from student.train import stop_on_signal, train
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
    for values, message in {
        ("learning_rate", 0.1): r"\(optimisation\.learning_rate was 0\.05, is 0\.1\)",
        (
            "labels",
            (LabelTerm(saliency=2),),
        ): r"\(supervision\.labels\[0\]\.saliency was 1.0, is 2\)",
        ("ema", 0.5): r"\(optimisation\.ema was None, is 0\.5\)",
    }.items():
        with pytest.raises(RunError, match=message):
            train(labelled, tmp_path / "run", change(SMALL, epochs=1, **dict([values])))
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


TINY = TrainConfig(
    student=TinyHDConfig(channel_reduction=8, height=32, width=64),
    supervision=Supervision(labels=(LabelTerm(labels="toy"),), flip="none"),
    sampling=Sampling(clips_per_video=2, holdout=0.4, holdout_of="frames", validation_clips=1),
    optimisation=Optimisation(epochs=3, batch_size=2, learning_rate=0.02),
)
TINY_M = change(
    TINY,
    student=TinyHDConfig(
        channel_reduction=8,
        single=(True, False, False),
        output_frames=16,
        height=32,
        width=64,
    ),
)
BOTH = (LabelTerm(labels="toy", d2=0.5), LabelTerm(labels="other", hierarchical=0))


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two teachers, both with what they say of mirrored frames."""
    path = tmp_path_factory.mktemp("counted") / "targets.zarr"
    sets = [
        (counting_request(teacher, variant=variant), first)
        for first, teacher in enumerate(("toy", "other"))
        for variant in ("identity", "hflip")
    ]
    make_store(path, {"a": 48, "b": 40}, sets)
    return path


class Killed(Exception):
    pass


def die_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let training end before it makes a step, as if it was killed there."""
    train_step = Trainer.train_step

    def make(self: Trainer, batch: Batch) -> Losses:
        if self.state.step == step:
            raise Killed
        return train_step(self, batch)

    patch.setattr(Trainer, "train_step", make)


def assert_same(first: object, second: object, where: str = "") -> None:
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert isinstance(second, dict)
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list):
        assert isinstance(second, list)
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    else:
        assert first == second, where


def assert_same_runs(first: Path, second: Path) -> None:
    assert training_curve(first) == training_curve(second)
    for name in ("last.pt", "best.pt"):
        assert_same(read_checkpoint(first / name), read_checkpoint(second / name), name)


EVERYTHING = {
    "S": change(
        TINY,
        labels=BOTH,
        mixing="one_per_batch",
        flip="labels",
        schedule="cosine",
        epochs=2,
        ema=0.7,
        clip_gradient=1.0,
        precision="bfloat16",
    ),
    "M": change(
        TINY_M, labels=BOTH, flip="labels", alignment="lagged", epochs=2, ema=0.7, reload_best=True
    ),
    "float16": change(TINY, epochs=1, clips_per_video=4, precision="float16", flip="mirror"),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_killed_run_continues_exactly_with_everything_that_there_is(
    counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In the middle of an epoch, from a checkpoint there or from the one at its beginning."""
    config, seconds = EVERYTHING[name], 1e9 if name == "M" else 0
    if name == "S":  # oneDNN's depthwise gradients in bfloat16 are not always the same
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert train(counted, tmp_path / "whole", config).is_complete
    with monkeypatch.context() as patch:
        die_at(patch, 3)
        with pytest.raises(Killed):
            train(counted, tmp_path / "cut", config, checkpoint_seconds=seconds)
    assert read_checkpoint(tmp_path / "cut" / "last.pt")["step"] == (2 if seconds else 3)
    assert train(counted, tmp_path / "cut", config).is_complete
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def validate_as(patch: pytest.MonkeyPatch, totals: list[float]) -> None:
    """Let the validation of each epoch have a total that is known before."""

    def validate(self: Trainer, batches: Any) -> Validation:  # noqa: ANN401
        list(batches)
        return Validation({"total": totals[self.state.epoch]}, maps=1)

    patch.setattr(Trainer, "_validate", validate)


def test_best_weights_come_back_where_the_rate_falls(
    counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those from before the epoch, also for a run that is killed when it has made better ones."""
    caplog.set_level("INFO")
    validate_as(monkeypatch, [5.0, 9.0, 1.0, 7.0])
    config = change(
        TINY, epochs=4, clips_per_video=1
    )  # the rate falls before the third and the fourth
    started: dict[int, dict[str, torch.Tensor]] = {}
    run_epoch = Trainer.run_epoch

    def look(self: Trainer, *arguments: Any) -> bool:  # noqa: ANN401
        weights = self._model.state_dict()
        started[self.state.epoch] = {name: value.clone() for name, value in weights.items()}
        return run_epoch(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", look)
        train(counted, tmp_path / "whole", config)
    assert "epoch 3: back to the weights of step 1" in caplog.text
    assert "epoch 4: back to the weights of step 3" in caplog.text
    assert_same(started[2], started[1])  # as after the first epoch
    best = read_checkpoint(tmp_path / "whole" / "best.pt")
    assert best["step"] == 3
    assert_same(started[3], best["weights"])

    def save(path: Path, model: TinyHD, **state: Any) -> None:  # noqa: ANN401
        if path.name == "last.pt" and state["epoch"] == 3:
            raise Killed
        save_checkpoint(path, model, **state)

    with monkeypatch.context() as patch:
        patch.setattr("student.runs.save_checkpoint", save)
        with pytest.raises(Killed):
            train(counted, tmp_path / "cut", config)
    assert read_checkpoint(tmp_path / "cut" / "best.pt")["step"] == 3
    train(counted, tmp_path / "cut", config)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")


def test_best_is_the_least_total(
    counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate_as(monkeypatch, [3.0, 1.0, 2.0])
    state = train(counted, tmp_path / "run", change(TINY, schedule="constant"))
    assert (state.best, state.validation) == (1.0, {"total": 1.0})
    assert read_checkpoint(tmp_path / "run" / "best.pt")["step"] == 4
    assert read_checkpoint(tmp_path / "run" / "last.pt")["step"] == 6


def test_validation_has_every_term_and_its_weighted_sum(counted: Path, tmp_path: Path) -> None:
    eyes = record_eyes(TargetStore.open(counted), tmp_path / "eyes", {"a": range(48)})
    truth = GroundTruthTerm(data=str(eyes), kl=0.5, cc=2)
    config = change(TINY_M, labels=BOTH, ground_truth=truth, epochs=1)
    state = train(counted, tmp_path / "run", config)
    weights = {
        "toy/saliency": 1,
        "toy/hierarchical": 1,
        "toy/d2": 0.5,
        "other/saliency": 1,
        "ground_truth/kl": 0.5,
        "ground_truth/cc": 2,
    }
    found = state.validation
    total = sum(weight * found[name] for name, weight in weights.items())
    assert found["total"] == state.best == pytest.approx(total)
    others = {"total", "toy/cc", "other/cc"}
    others |= {f"recorded/{name}" for name in ("auc_judd", "nss", "cc", "sim", "kld")}
    assert found.keys() == weights.keys() | others
    row = training_curve(tmp_path / "run")[0]
    assert weights.keys() <= row.keys()
    assert row["total"] == pytest.approx(sum(w * row[name] for name, w in weights.items()))


def test_batches_in_turn_have_the_terms_of_one_label_set(counted: Path, tmp_path: Path) -> None:
    config = change(TINY, labels=BOTH, mixing="one_per_batch", clips_per_video=8, epochs=1)
    train(counted, tmp_path / "run", config)
    rows = [row for row in training_curve(tmp_path / "run") if row["kind"] == "training"]
    sources = [{name.partition("/")[0] for name in row if "/" in name} for row in rows]
    assert {"toy"} in sources
    assert {"other"} in sources
    assert all(len(found) == 1 for found in sources)


def test_tinyhd_m_learns(counted: Path, tmp_path: Path) -> None:
    config = change(TINY_M, epochs=4, clips_per_video=6, learning_rate=0.1, holdout=0)
    train(counted, tmp_path / "run", config)
    totals = [row["total"] for row in training_curve(tmp_path / "run")]
    assert sum(totals[-4:]) < 0.9 * sum(totals[:4])
    assert load_model(tmp_path / "run" / "last.pt").config == config.student


def test_moving_average_is_validated_and_kept(
    counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = change(TINY, epochs=1, clips_per_video=3, ema=0.75)
    train_step = Trainer.train_step
    average: dict[str, torch.Tensor] = {}

    def follow(self: Trainer, batch: Batch) -> Losses:
        losses = train_step(self, batch)
        for name, value in self._model.named_parameters():
            before = average.get(name, value.detach())
            average[name] = 0.75 * before + 0.25 * value.detach()
        return losses

    monkeypatch.setattr(Trainer, "train_step", follow)
    train(counted, tmp_path / "run", config)
    best, last = (load_model(tmp_path / "run" / name) for name in ("best.pt", "last.pt"))
    raw = dict(last.named_parameters())
    for name, value in best.named_parameters():
        torch.testing.assert_close(value.detach(), average[name])
    assert any(not torch.equal(value, raw[name]) for name, value in best.named_parameters())


def test_gradients_are_no_longer_than_allowed(counted: Path, tmp_path: Path) -> None:
    config = change(TINY, epochs=1, weight_decay=0, batch_size=8, clip_gradient=1e-3)
    assert train(counted, tmp_path / "run", config).step == 1
    states = read_checkpoint(tmp_path / "run" / "last.pt")["optimizer"]["state"].values()
    norms = torch.stack([state["momentum_buffer"].norm() for state in states])
    assert norms.norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.usefixtures("learns_nothing")
def test_student_starts_from_a_checkpoint(counted: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = TinyHD(replace(TINY.student, height=64))  # size does not matter
    save_checkpoint(tmp_path / "start.pt", model)
    config = change(TINY, epochs=1, start=str(tmp_path / "start.pt"))
    train(counted, tmp_path / "run", config)
    last = load_model(tmp_path / "run" / "last.pt")
    assert last.config == TINY.student
    assert_same(dict(last.state_dict()), dict(model.state_dict()))
    with pytest.raises(ValueError, match=r"another network: its single is"):
        train(counted, tmp_path / "other", change(TINY_M, start=config.start))
    with pytest.raises(TinyHDError, match=r"cannot read .*none\.pt: No such file"):
        train(counted, tmp_path / "none", change(TINY, start=str(tmp_path / "none.pt")))
    save_checkpoint(tmp_path / "start.pt", TinyHD(TINY.student))
    with pytest.raises(RunError, match=r"files_sha256\.start was"):
        train(counted, tmp_path / "run", config)


def test_rates_of_the_other_schedules() -> None:
    cosine = Optimisation(schedule="cosine", epochs=4, learning_rate=2)
    rates = [cosine.learning_rate_at(epoch) for epoch in range(4)]
    assert rates == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])
    constant = Optimisation(schedule="constant", epochs=4)
    assert {constant.learning_rate_at(epoch) for epoch in range(4)} == {0.01}
    for epochs in (1, 2, 3):
        assert Optimisation(epochs=epochs).learning_rate_at(0) == 0.01


def test_epoch_without_clips_is_refused_before_anything_runs(counted: Path, tmp_path: Path) -> None:
    config = change(TINY, unlabelled=1.0)
    with pytest.raises(ValueError, match="an epoch has no clip"):
        train(counted, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_loss_of_no_number_names_its_clips(
    counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from student import trainer

    nothing = Losses(torch.tensor(float("nan")), {})
    monkeypatch.setattr(trainer, "add_terms", lambda *_, **__: nothing)
    with pytest.raises(TrainingError, match=r"loss of step 1 .* clips [ab]:\d+, [ab]:\d+;"):
        train(counted, tmp_path / "run", TINY)
    assert not (tmp_path / "run" / "last.pt").exists()


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


def test_moving_average_goes_back_with_the_weights(
    counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what was given up would be averaged in for as long as the average remembers."""
    validate_as(monkeypatch, [1.0, 9.0, 9.0])
    kept: dict[str, torch.Tensor] = {}
    begin_epoch = Trainer.begin_epoch

    def look(self: Trainer) -> None:
        begin_epoch(self)
        if self.state.epoch == 2:
            kept.update({n: v.clone() for n, v in self._averaged().state_dict().items()})

    monkeypatch.setattr(Trainer, "begin_epoch", look)
    train(counted, tmp_path / "run", change(TINY, epochs=3, ema=0.9))
    best = read_checkpoint(tmp_path / "run" / "best.pt")
    assert best["step"] == 2
    assert_same(kept, best["weights"])


def test_what_recorded_eyes_are_is_part_of_a_run(counted: Path, tmp_path: Path) -> None:
    opened = TargetStore.open(counted)
    datas = [
        record_eyes(opened, tmp_path / str(last), {"a": list(range(16, last))}) for last in (30, 40)
    ]
    config = change(TINY, epochs=1)
    for data in (datas[0], datas[0]):
        train(counted, tmp_path / "run", change(config, ground_truth=truth(data)))
    with pytest.raises(RunError, match=r"another configuration \(recorded_sha256"):
        train(counted, tmp_path / "run", change(config, ground_truth=truth(datas[1])))


def truth(data: Path) -> GroundTruthTerm:
    return GroundTruthTerm(data=str(data))


def test_a_label_set_may_be_named_in_part_or_in_full(counted: Path, tmp_path: Path) -> None:
    name = TargetStore.open(counted).label_set("toy-identity").name
    for given in ("toy", name):
        labels = (LabelTerm(labels=given),)
        state = train(counted, tmp_path / "run", change(TINY, epochs=1, labels=labels))
    assert state.is_complete


def test_a_wrong_start_leaves_no_run(counted: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    save_checkpoint(path, TinyHD(build_config("tinyhd-s-rc4")))
    with pytest.raises(ValueError, match="is of another network: its channel_reduction is 4"):
        train(counted, tmp_path / "run", change(TINY, start=str(path)))
    assert not (tmp_path / "run").exists()


def test_mirrored_frames_that_are_labelled_in_part_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They restrict what is trained on, not what validates."""
    request = counting_request()
    store = make_store(tmp_path / "t.zarr", {"a": 48, "b": 48}, [(request, 0)])
    twin = counting_request(variant="hflip")
    add_labels(store, twin, {"a": range(3)})
    config = change(TINY, epochs=1, flip="labels", clips_per_video=1)
    state = train(store.url, tmp_path / "run", config)
    assert state.is_complete
    assert "covers less: 14 of 28 clips are left to train on" in caplog.text
    whole = change(config, flip="none")
    assert train(store.url, tmp_path / "whole", whole).clips == state.clips + 1


def test_little_memory_is_said_in_one_line(
    counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer, batch: Batch) -> Losses:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_update", fail)
    with pytest.raises(TrainingError, match="not enough memory for a step of 2 clips; use a"):
        train(counted, tmp_path / "run", TINY)


def test_a_second_signal_interrupts_at_once() -> None:
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
