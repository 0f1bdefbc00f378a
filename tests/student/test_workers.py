"""A training shared by workers: the same gradients as of one process that does the same clips."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.multiprocessing.spawn import spawn

from student.checkpoints import read_checkpoint
from student.clips import load_batches
from student.config import build_config
from student.experiment import write_recipe
from student.job import TrainJob, prepare
from student.losses import Term
from student.processes import JoinedProcesses, Processes, synchronise_norms
from student.recipe import (
    GroundTruthTerm,
    LabelTerm,
    Optimisation,
    Sampling,
    Supervision,
    TrainConfig,
)
from student.supervision import Supervisor
from student.tinyhd import TinyHD, normalise_frames
from student.train import run_job, train
from student.trainer import TrainingError, Watch, build_optimizer
from student.workers import _cause_of, _room
from tests.student.counting import counting_request, make_store, record_eyes

pytest.importorskip("pyarrow", reason="Ray Train is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of its own settings

RECIPE = TrainConfig(
    student=build_config("tinyhd-s-rc4", height=32, width=64),
    supervision=Supervision(labels=(LabelTerm(),), flip="none"),
    sampling=Sampling(clips_per_video=4, holdout=0.3, holdout_of="frames", validation_clips=2),
    optimisation=Optimisation(epochs=1, batch_size=2, workers=2, schedule="constant"),
)


class Rank(Processes):
    """One of several, that are not there."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count


@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_items_are_shared_in_turns(number: int, count: int) -> None:
    items, size = list(range(number)), 2
    shares = [Rank(rank, count).share_of(items, size) for rank in range(count)]
    steps = [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]
    assert len({len(turns) for turns in steps}) == 1  # all have as many steps
    done = [item for turn in zip(*steps, strict=True) for part in turn for item in part]
    dropped = number % (count * size)
    assert done == items[: number - dropped if dropped < count else number]
    for turn in zip(*steps, strict=True):
        assert max(map(len, turn)) - min(map(len, turn)) <= 1


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workers") / "targets.zarr"
    make_store(path, {"a": 60, "b": 50}, [(counting_request(), 0)])
    return path


def by_hand(job: TrainJob) -> tuple[list[dict[str, torch.Tensor]], TinyHD]:
    """Train as two workers do, in one process: a step's micro-batches one after the other."""
    config, how = job.config, job.config.optimisation
    prepared = prepare(job)
    torch.manual_seed(config.seed)
    model = TinyHD(config.student).train()
    optimizer = build_optimizer(model, how)
    for group in optimizer.param_groups:
        group["lr"] = how.learning_rate * group["lr_scale"]
    supervisor = Supervisor(config, prepared.sources)
    read = load_batches(prepared.training, prepared.draw(config, 0), batch_size=how.batch_size)
    gradients = []
    for pair in zip(read, read, strict=True):
        found: list[dict[str, Term]] = []
        for batch in pair:
            clips = normalise_frames(batch.frames)
            output = model(clips)  # the norms take the statistics of this micro-batch
            found.append(supervisor.terms(output, batch, supervisor.targets(batch, clips)))
        total = torch.zeros(())
        for name, term in found[0].items():
            sums = sum(terms[name].totals for terms in found)
            counts = sum(terms[name].counts for terms in found)
            assert isinstance(counts, torch.Tensor)
            total = total + term.weight * (sums / counts.clamp(min=1)).sum()
        optimizer.zero_grad()
        total.backward()
        parameters = model.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in parameters if p.grad is not None})
        optimizer.step()
    return gradients, model


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_two_workers_have_the_gradients_of_one_process(store: Path, tmp_path: Path) -> None:
    """Also where one has clips without recorded eyes: maps count the same wherever they are."""
    from stores.targets import TargetStore

    eyes = record_eyes(TargetStore.open(store), tmp_path / "eyes", {"a": list(range(1, 60))})
    truth = GroundTruthTerm(data=str(eyes), cc=0.5)
    supervision = replace(RECIPE.supervision, ground_truth=truth)
    one_step = replace(RECIPE.sampling, clips_per_video=2)
    config = replace(RECIPE, supervision=supervision, sampling=one_step, seed=2)
    job = TrainJob(store=store, out=tmp_path / "run", config=config)
    drawn = [key.video for key in prepare(job).draw(config, 0)]
    assert sorted(drawn[:2]) != sorted(drawn[2:]), "choose another seed: the parts are alike"

    state = train(store, job.out, config)
    assert (state.step, state.is_complete) == (1, True)
    (gradients,), model = by_hand(job)
    last = read_checkpoint(job.out / "last.pt")
    names = [name for group in _groups(model, config) for name in group]
    moments = last["optimizer"]["state"]
    before = dict(TinyHD_at_start(config).named_parameters())
    for number, name in enumerate(names):
        decay = 0.0 if name.endswith("bias") else config.optimisation.weight_decay
        found = moments[number]["momentum_buffer"] - decay * before[name].detach()
        torch.testing.assert_close(found, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    for name, value in model.named_parameters():
        torch.testing.assert_close(last["weights"][name], value.detach(), rtol=1e-4, atol=1e-5)


def TinyHD_at_start(config: TrainConfig) -> TinyHD:
    torch.manual_seed(config.seed)
    return TinyHD(config.student)


def _groups(model: TinyHD, config: TrainConfig) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, config.optimisation).param_groups
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_what_ends_a_worker_is_said_in_one_line(store: Path, tmp_path: Path) -> None:
    how = replace(RECIPE.optimisation, learning_rate=1e18, epochs=3)
    with pytest.raises(TrainingError, match=r"^the loss of step \d is not finite, on the clips "):
        train(store, tmp_path / "run", replace(RECIPE, optimisation=how))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_workers_must_fit(store: Path, tmp_path: Path) -> None:
    how = replace(RECIPE.optimisation, workers=9)
    with pytest.raises(ValueError, match="8 clips, too few for 9 workers"):
        train(store, tmp_path / "run", replace(RECIPE, optimisation=how))
    how = replace(RECIPE.optimisation, synchronise_norms=True)
    with pytest.raises(ValueError, match="synchronise_norms takes GPUs"):
        train(store, tmp_path / "run", replace(RECIPE, optimisation=how))


def test_norms_are_synchronised_by_default_where_workers_have_few_clips() -> None:
    few, many = (
        replace(RECIPE.optimisation, batch_size=3),
        replace(RECIPE.optimisation, batch_size=4),
    )
    assert few.synchronises_norms("cuda")
    assert not many.synchronises_norms("cuda")
    assert not few.synchronises_norms("cpu")
    assert not replace(few, workers=1).synchronises_norms("cuda")
    assert not replace(few, synchronise_norms=False).synchronises_norms("cuda")
    assert replace(many, synchronise_norms=True).synchronises_norms("cuda")
    model = TinyHD(RECIPE.student)
    names = list(model.state_dict())
    synchronise_norms(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(model.state_dict()) == names  # checkpoints are the same


class StopAfter(Watch):
    """Ends a training after some steps of this process."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @property
    def is_stopping(self) -> bool:
        self._left -= 1
        return self._left <= 0


def train_in_three(rank: int, store: str, folder: str) -> None:
    """Train as a worker of three, once without a stop and once with one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=3)
    how = replace(RECIPE.optimisation, batch_size=1, workers=3)
    sampling = replace(RECIPE.sampling, clips_per_video=6)
    config = replace(RECIPE, optimisation=how, sampling=sampling)
    for name, steps in (("whole", 99), ("cut", 2), ("cut", 99)):
        job = TrainJob(store=store, out=Path(folder) / name, config=config)
        run_job(job, prepare(job), JoinedProcesses(), StopAfter(steps))
    dist.destroy_process_group()


def test_three_workers_continue_exactly(store: Path, tmp_path: Path) -> None:
    """Of three or more gradients the sum depends on their order, which must stay the same."""
    spawn(train_in_three, (str(store), str(tmp_path)), nprocs=3)
    whole, cut = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 4
    for name, values in whole["weights"].items():
        assert torch.equal(values, cut["weights"][name]), name
    curves = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert curves[0] == curves[1]


def command(store: Path, out: Path, recipe: Path) -> list[str]:
    options = ["--store", str(store), "--out", str(out), "--config", str(recipe)]
    return [sys.executable, "cli.py", "train", *options, "--device", "cpu"]


def worker_of(mark: str) -> int:
    """Return a worker of the training that has a mark in its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = (folder / "cmdline").read_text(), (folder / "environ").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if "RayTrainWorker" in told[0] and f"WHOSE={mark}" in told[1]:
            return int(folder.name)
    raise AssertionError("there is no worker")


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_workers_need_room() -> None:
    assert _room(1, None, is_gpu=False) >= 1
    with pytest.raises(TrainingError, match=r"^999 workers do not fit: there are \d+ CPUs"):
        _room(999, None, is_gpu=False)
    with pytest.raises(TrainingError, match="do not fit: there are 0 GPUs"):
        _room(1, None, is_gpu=True)


class Failed(Exception):
    """As Ray Train tells what happened."""

    def __init__(self, **told: object) -> None:
        super().__init__("many\nlines")
        self.__dict__.update(told)


def test_of_several_failures_the_cause_is_told() -> None:
    from ray.exceptions import RayActorError

    ours, others = TrainingError("the loss is not finite"), RuntimeError("connection closed")
    assert _cause_of(Failed(worker_failures={0: others, 1: ours})) is ours
    lost = Failed(health_check_failure=RayActorError())
    told = str(_cause_of(Failed(worker_failures={0: others, 2: lost})))
    assert told.startswith("worker 2 was lost: the worker's process died; run the same command")
    mistake = Failed(worker_failures={0: others})
    assert _cause_of(mistake) is mistake  # ours, which is shown as it is
    told = str(_cause_of(Failed(controller_failure=RuntimeError("no room\nmore"))))
    assert told == "Ray Train cannot go on: no room"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("killer", [signal.SIGINT, signal.SIGKILL])
def test_stopped_workers_continue_exactly(
    store: Path, tmp_path: Path, killer: signal.Signals
) -> None:
    """Interrupted as by Ctrl-C, or a worker killed: the same command gives the same weights."""
    how = replace(RECIPE.optimisation, epochs=12)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(write_recipe(replace(RECIPE, optimisation=how)))
    assert yaml.safe_load(recipe.read_text())["optimisation"]["workers"] == 2
    root = Path(__file__).parents[2]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert subprocess.run(command(store, whole, recipe), cwd=root, timeout=300).returncode == 0

    process = subprocess.Popen(
        command(store, cut, recipe),
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "WHOSE": (mark := str(tmp_path))},
    )
    metrics, deadline = cut / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_text().count("training") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if killer == signal.SIGINT:
        os.killpg(process.pid, killer)
    else:
        os.kill(worker_of(mark), killer)
    _, told = process.communicate(timeout=120)
    assert process.returncode == (130 if killer == signal.SIGINT else 1), told
    if killer == signal.SIGKILL:
        assert "was lost: the worker's process died" in told.splitlines()[-1]
    assert subprocess.run(command(store, cut, recipe), cwd=root, timeout=300).returncode == 0
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    first, second = (read_checkpoint(run / "last.pt")["weights"] for run in (whole, cut))
    for name, values in first.items():
        assert torch.equal(values, second[name]), name
