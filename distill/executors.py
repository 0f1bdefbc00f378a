"""Where tasks run: in this process, or in Ray actors on one machine or many."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from distill.label import ShardDone
from distill.plan import Failure, Task
from distill.worker import Event, LabelWorker, WorkerSettings

log = logging.getLogger(__name__)

TRIES: Final = 3
POLL_SECONDS: Final = 0.5
OBJECT_STORE_BYTES: Final = 80 * 1024**2
"""Ray's smallest: only paths and receipts pass through it."""


class Executor(Protocol):
    """Does tasks and says what came of them."""

    def run(self, tasks: Sequence[Task]) -> Generator[Event | None]:
        """Yield events as they come, and nothing now and then so that time can be looked at."""


class InlineExecutor:
    """One worker in this very process, for debugging and for machines without Ray."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings

    def run(self, tasks: Sequence[Task]) -> Generator[Event | None]:
        import torch

        threads = torch.get_num_threads()
        try:
            worker = LabelWorker(self._settings)  # sets its own number of threads
            for task in tasks:
                try:
                    yield from worker.run(task)
                except Exception as error:  # as an actor may fail in any way, and others go on
                    yield Failure(task.video.id, _last_line(error))
        finally:
            torch.set_num_threads(threads)


@dataclass
class _Attempt:
    """A task and what happened to it so far."""

    task: Task
    tries: int = 0
    done: dict[str, set[int]] = field(default_factory=lambda: {"labels": set(), "frames": set()})


class RayExecutor:
    """Long-lived Ray actors, each with the teacher loaded once.

    A task whose actor dies is given to another one, three times in all, less the shards whose
    receipts had already arrived.

    Args:
        settings: What each worker is.
        actors: How many; as many as the CPUs allow if not given.
        cpus_per_actor: CPUs that Ray sets aside for each.
        address: A running cluster; a local Ray is started, and stopped, if not given.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        actors: int | None,
        cpus_per_actor: int,
        address: str | None = None,
    ) -> None:
        self._settings = settings
        self._actors, self._cpus, self._address = actors, cpus_per_actor, address

    def run(self, tasks: Sequence[Task]) -> Generator[Event | None]:
        import ray

        is_ours = not ray.is_initialized()
        if is_ours:
            start_ray(self._address)
        try:
            yield from self._run(tasks)
        finally:
            if is_ours:
                ray.shutdown()

    def _run(self, tasks: Sequence[Task]) -> Generator[Event | None]:
        import ray

        waiting = deque(_Attempt(task) for task in tasks)
        running: dict[Any, tuple[Any, _Attempt]] = {}  # stream of events -> actor, attempt
        idle = [self._new_actor() for _ in range(self._num_actors(len(tasks)))]
        while waiting or running:
            while waiting and idle:
                actor, attempt = idle.pop(), waiting.popleft()
                attempt.tries += 1
                left = attempt.task.without(attempt.done["labels"], attempt.done["frames"])
                events = actor.run.options(num_returns="streaming").remote(left)
                running[events] = (actor, attempt)
            ready, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            if not ready:
                yield None
            for events in ready:
                actor, attempt = running[events]
                try:
                    event: Event = ray.get(next(events))
                except StopIteration:
                    del running[events]
                    idle.append(actor)
                except ray.exceptions.RayError as error:
                    del running[events]
                    # Killed first, so that nobody else writes what another actor will write.
                    with suppress(ray.exceptions.RayError):
                        ray.kill(actor)
                    idle.append(self._new_actor())
                    yield from self._try_again(attempt, waiting, error)
                else:
                    if isinstance(event, ShardDone):
                        attempt.done[event.kind].add(event.receipt.shard)
                    yield event

    def _try_again(
        self, attempt: _Attempt, waiting: deque[_Attempt], error: Exception
    ) -> Iterator[Failure]:
        reason = _last_line(error)
        if attempt.tries < TRIES:
            log.warning("%s: try %d failed: %s", attempt.task.video.id, attempt.tries, reason)
            waiting.append(attempt)
        else:
            yield Failure(attempt.task.video.id, f"failed {TRIES} times, at last with: {reason}")

    def _new_actor(self) -> Any:  # noqa: ANN401 - an actor handle
        import ray

        worker = ray.remote(LabelWorker).options(num_cpus=self._cpus)
        return worker.remote(self._settings)

    def _num_actors(self, num_tasks: int) -> int:
        import ray

        cpus = int(ray.cluster_resources().get("CPU", 1))
        if self._cpus > cpus:
            raise ValueError(
                f"an actor with {self._cpus} CPUs does not fit into {cpus}; "
                f"use --cpus-per-actor {cpus} or less"
            )
        most = cpus // self._cpus
        if self._actors is not None and self._actors > most:
            raise ValueError(
                f"{self._actors} actors with {self._cpus} CPUs each do not fit into {cpus} CPUs; "
                f"use --actors {most}"
            )
        return min(self._actors or most, num_tasks)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def start_ray(address: str | None) -> None:
    """Connect to a cluster, or start a quiet Ray of our own on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    if address is not None:
        ray.init(address=address, **quiet)
        return
    with _importable_by_children():
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **quiet,
        )


@contextmanager
def _importable_by_children() -> Iterator[None]:
    """Let processes started inside import these packages, wherever the working directory is."""
    before = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
