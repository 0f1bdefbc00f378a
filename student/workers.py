"""A training shared by several workers, on Ray Train (data-parallel, PyTorch's DDP).

Each worker takes its part of every step's clips; gradients and losses are those of all of them. The
first one keeps the checkpoints and tells the driver, here, how far it is.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from stores.cluster import death_of, start_ray
from stores.errors import TinyHDError
from stores.memory import keep_freed_memory
from student.job import TrainJob, prepare
from student.processes import JoinedProcesses
from student.train import BarWatch, run_job, stop_on_signal
from student.trainer import TrainingError, TrainState, Watch

log = logging.getLogger(__name__)

News = tuple[str, tuple[Any, ...]]
LAST_SECONDS: Final = 30.0
"""For the last words of a worker."""
GROUP_SECONDS: Final = 4 * 3600
"""For which workers wait for each other: each machine may have to look at all videos first."""
LOOK_SECONDS: Final = 0.3
"""Between two looks of the driver at what the first worker told."""


class Board:
    """An actor on which the first worker writes how far it is, and the driver that it is to end."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._is_stopping = False

    def tell(self, news: list[News]) -> bool:
        """Add what happened, and return whether training is to end."""
        self._news += news
        return self._is_stopping

    def look(self, *, is_stopping: bool) -> list[News]:
        """Return what happened since the last look, and say whether training is to end."""
        self._is_stopping = is_stopping
        news, self._news = self._news, []
        return news


class BoardWatch(Watch):
    """Writes on the board; what it answers to one message is known at the next.

    Args:
        board: Ray's handle of it.
        is_first: Whether this worker says how far all are.
    """

    def __init__(self, board: Any, *, is_first: bool) -> None:  # noqa: ANN401 - Ray's
        self._board, self._is_first = board, is_first
        self._asked: Any = None
        self._news: list[News] = []
        self._is_stopping = False

    @property
    def is_stopping(self) -> bool:
        """Whether the driver says so; what there is to tell goes with the question."""
        self.send()
        return self._is_stopping

    def begin(self, total: int, done: int) -> None:
        self._tell("begin", total, done)

    def advance(self, clips: int, note: str) -> None:
        self._tell("advance", clips, note)

    def log(self, record: logging.LogRecord) -> None:
        """Pass on what was logged."""
        if self._is_first or record.levelno > logging.INFO:
            self._news.append(("log", (record.name, record.levelno, record.getMessage())))

    def send(self) -> None:
        """Send what has gathered, if the last message was answered."""
        import ray

        if self._asked is not None:
            if not ray.wait([self._asked], timeout=0)[0]:
                return
            self._is_stopping = ray.get(self._asked)
        self._asked = self._board.tell.remote(self._news)
        self._news = []

    def finish(self, state: TrainState | None) -> None:
        """Send all that is left, and where training is, unless it failed."""
        import ray

        if state is not None:
            self._tell("end", state)
        pending = [self._asked] if self._asked is not None else []
        pending.append(self._board.tell.remote(self._news))
        ray.wait(pending, num_returns=len(pending), timeout=LAST_SECONDS)

    def _tell(self, name: str, *values: object) -> None:
        if self._is_first:
            self._news.append((name, values))


class _Forwarder(logging.Handler):
    """Passes log records of a worker to the driver, which shows them above its bar."""

    def __init__(self, watch: BoardWatch) -> None:
        super().__init__()
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        self._watch.log(record)


def train_on_workers(job: TrainJob, identity: Mapping[str, Any]) -> TrainState:
    """Train on as many workers as the recipe says, each on a GPU where the device is one.

    Args:
        job: What to do; its store and its folder must lie where all machines reach them.
        identity: All that decides what it gives.

    Raises:
        TrainingError: If a worker is lost, or there is no room for them.
        TinyHDError: Whatever ended a worker.
    """
    try:
        import ray.train
    except ImportError as error:
        raise TrainingError(
            "several workers need Ray Train, which is not installed: pip install '.[workers]'"
        ) from error
    # Workers would have directories of their own, and take relative paths from there.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    is_ours = not ray.is_initialized()
    if is_ours:
        online = job.config.supervision.online
        factory = online.teacher if online is not None else ""
        start_ray(job.address, factory=factory, is_background=False)
    try:
        return _train_on_ray(job, identity)
    finally:
        if is_ours:
            ray.shutdown()


def _train_on_ray(job: TrainJob, identity: Mapping[str, Any]) -> TrainState:
    import ray.train.torch
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    is_gpu = job.device.startswith("cuda")
    cpus = _room(job.config.optimisation.workers, job.address, is_gpu=is_gpu)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    folder = job.out.absolute().with_name(f".{job.out.name}-{uuid.uuid4().hex[:8]}")
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={
            "job": _with_absolute_paths(job),
            "identity": identity,
            "board": board,
        },
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if is_gpu else "gloo", timeout_s=GROUP_SECONDS
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.config.optimisation.workers,
            use_gpu=is_gpu,
            resources_per_worker={"CPU": cpus},
        ),
        # Ray Train wants a folder that all reach, and leaves next to nothing in it.
        run_config=ray.train.RunConfig(name=folder.name, storage_path=str(folder.parent)),
    )
    failed: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # raised again by the thread that waits
            failed.append(error)

    # In a thread: Ray Train would put a handler of its own in the place of ours.
    thread = threading.Thread(target=fit, name="ray train", daemon=True)
    try:
        with stop_on_signal() as stop, BarWatch(stop) as bar:
            thread.start()
            state, has_begun = None, False
            while True:
                is_last = not thread.is_alive()  # asked before the look, which then is the last
                news = ray.get(board.look.remote(is_stopping=stop.is_set()))
                has_begun |= bool(news)
                state = _show(news, bar) or state
                if is_last:
                    break
                if stop.is_set() and not has_begun:
                    raise KeyboardInterrupt  # nobody is there who could look at the flag
                thread.join(LOOK_SECONDS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if failed:
        raise _cause_of(failed[0]) from failed[0]
    if state is None:
        raise TrainingError("the workers ended without a word; run the same command again")
    return state


def _work(told: dict[str, Any]) -> None:
    """Do a worker's part; runs in its process, whose group Ray Train has made."""
    import ray.train.torch

    job: TrainJob = told["job"]
    processes = JoinedProcesses()
    watch = BoardWatch(told["board"], is_first=processes.is_first)
    if job.device.startswith("cuda"):
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)  # of what is gathered and broadcast, too
        job = replace(job, device=str(device))
    keep_freed_memory()
    prepared = prepare(job, told["identity"])  # whose remarks the driver has made already
    root = logging.getLogger()
    root.handlers = [_Forwarder(watch)]
    for name in ("student", "stores"):
        logging.getLogger(name).setLevel(logging.INFO)
    state = None
    try:
        state = run_job(job, prepared, processes, watch)
    finally:
        root.handlers = []
        watch.finish(state)


def _show(news: Sequence[News], bar: BarWatch) -> TrainState | None:
    """Show what the workers told; return where training is if they are done."""
    for name, values in news:
        if name == "begin":
            bar.begin(*values)
        elif name == "advance":
            bar.advance(*values)
        elif name == "log":
            origin, level, message = values
            logging.getLogger(origin).log(level, "%s", message)
        elif name == "end":
            state: TrainState = values[0]
            return state
    return None


def _room(workers: int, address: str | None, *, is_gpu: bool) -> int:
    """Return the CPUs of each worker.

    Raises:
        TrainingError: If this machine cannot hold them.
    """
    import ray

    there = ray.cluster_resources()
    cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    lacking = ""
    if is_gpu and gpus < workers:
        lacking = f"{gpus} GPUs"
    elif cpus < workers:
        lacking = f"{cpus} CPUs"
    if lacking and address is None:
        raise TrainingError(f"{workers} workers do not fit: there are {lacking}; use fewer")
    if lacking:  # a cluster may grow
        log.warning("the cluster has %s now: waiting until %d workers fit", lacking, workers)
    return max(1, cpus // workers) if address is None else 1


def _with_absolute_paths(job: TrainJob) -> TrainJob:
    """Return a job that means the same in processes of other directories."""
    config, supervision = job.config, job.config.supervision
    assistant, truth, online = supervision.assistant, supervision.ground_truth, supervision.online
    if assistant is not None:
        assistant = replace(assistant, checkpoint=_absolute(assistant.checkpoint))
    if truth is not None:
        truth = replace(truth, data=_absolute(truth.data))
    if online is not None:
        online = replace(online, weights=_absolute(online.weights))
    supervision = replace(supervision, assistant=assistant, ground_truth=truth, online=online)
    store = str(job.store)
    return replace(
        job,
        config=replace(config, start=_absolute(config.start), supervision=supervision),
        store=store if "://" in store else _absolute(store),
        out=job.out.absolute(),
        videos_root=job.videos_root.absolute() if job.videos_root is not None else None,
    )


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path else path


def _cause_of(error: Exception) -> Exception:
    """Return what a user is to know of a training that failed; our own mistakes as they are."""
    import ray

    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        # Others end because of the one that has something to say.
        if isinstance(failure, TinyHDError | ValueError | MemoryError):
            return failure
    for rank, failure in failures.items():
        lost = getattr(failure, "health_check_failure", failure)
        if isinstance(lost, ray.exceptions.RayError):
            return TrainingError(
                f"worker {rank} was lost: {death_of(lost)}; run the same command again to "
                "continue from the last checkpoint"
            )
    if not failures:
        reason = str(getattr(error, "controller_failure", error)).strip().partition("\n")[0]
        return TrainingError(f"Ray Train cannot go on: {reason}")
    return error
