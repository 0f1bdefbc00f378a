"""Where tasks run: in this process, or in Ray actors on one machine or many."""

from __future__ import annotations

import logging
import platform
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from distill.events import (
    Begun,
    Event,
    Failure,
    Labelled,
    Retry,
    ShardDone,
    Stumble,
    WorkerEvent,
    failure_of,
)
from distill.plan import Task, Unit
from distill.worker import LabelWorker, WorkerError, WorkerInfo, WorkerSettings
from stores.cluster import death_of, start_ray
from stores.errors import TargetStoreError
from stores.schema import LabelRequest

log = logging.getLogger(__name__)

TRIES: Final = 3
FAILED_IN_A_ROW: Final = 8
"""Units that fail, with nothing done in between, after which all are taken to."""
POLL_SECONDS: Final = 0.5
START_SECONDS: Final = 600.0
"""For a worker of this machine to load its teacher, at least."""
WAIT_SECONDS: Final = 60.0
"""Between two remarks that Ray does not start a worker."""
DEATH_SECONDS: Final = 10.0
"""How long a killed process of this machine is waited for."""
HANG_SECONDS: Final = 600.0
"""A worker that gets nothing done for so long is taken to hang."""
ALL: Final = 2**31


@dataclass
class _Attempt:
    """A task in a worker's hands."""

    task: Task
    done: set[tuple[int, str]] = field(default_factory=set)
    """Shard and set of what is done."""
    begun: set[int] = field(default_factory=set)
    labelled: int = 0
    """Frames of units that are not done."""

    def note(self, event: WorkerEvent) -> None:
        """Remember what a worker told."""
        if isinstance(event, Begun):
            self.begun.add(event.shard)
        elif isinstance(event, Labelled):
            self.labelled += event.num_frames
        elif isinstance(event, ShardDone):
            self.done.add((event.receipt.shard, event.set))
            if event.set.startswith(f"{LabelRequest.folder}/"):
                self.labelled -= event.num_frames

    @property
    def left(self) -> list[Unit]:
        """Units of which something is not done, and only that of them."""
        units = []
        for unit in self.task.units:
            keys = tuple(key for key in unit.sets if (unit.shard, key) not in self.done)
            if keys:
                units.append(Unit(unit.shard, keys))
        return units


class Executor(ABC):
    """Does tasks and says what came of them; use in a ``with``.

    A task that a worker could not finish is tried again: first the units that may be at fault, one
    by one, then the rest. After three tries a unit is a failure, and the others go on.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._waiting: deque[Task] = deque()
        self._tries: dict[tuple[int, int], int] = {}  # of a unit, by first frame and shard
        self._store_tries = 0  # in a row
        self._failed: list[int] = []  # first frames of videos of units that failed in a row
        self._num_videos = 0
        self._avoided: dict[tuple[int, int], set[str]] = {}  # workers that could not do a task
        self._is_draining = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.drain()

    @abstractmethod
    def run(self, tasks: Sequence[Task]) -> Generator[Event | None]:
        """Yield events as they come, and nothing now and then so that time can be looked at.

        Raises:
            WorkerError: If no worker can start, or all would fail.
        """

    def drain(self) -> None:
        """Begin no unit any more; what is being done is finished."""
        self._is_draining = True
        self._waiting.clear()

    def _take(self, tasks: Sequence[Task]) -> None:
        self._waiting.extend(tasks)
        self._num_videos = len({task.video.first for task in tasks})

    def _take_note(self, attempt: _Attempt, event: WorkerEvent) -> None:
        attempt.note(event)
        if isinstance(event, ShardDone):
            self._store_tries = 0
            self._failed.clear()

    def _recover(
        self, attempt: _Attempt, stumble: Stumble, worker: str = ""
    ) -> Iterator[Retry | Failure | Labelled]:
        """Put what is left of an attempt back, or give it up.

        Raises:
            WorkerError: If every other task would fail, too.
        """
        if attempt.labelled:
            yield Labelled(-attempt.labelled)
        if stumble.blame == "run":
            self._store_tries += 1
            if stumble.is_final or self._store_tries >= TRIES:
                raise WorkerError(stumble.reason)
        if not attempt.left:
            return
        if stumble.blame == "video":
            yield from self._blame_video(attempt, stumble, worker)
        else:
            yield from self._blame_units(attempt, stumble)

    def _blame_video(
        self, attempt: _Attempt, stumble: Stumble, worker: str
    ) -> Iterator[Retry | Failure]:
        """Let another worker try what is left: it may be able to read what this one cannot."""
        task, left = attempt.task, attempt.left
        name = (task.video.first, left[0].shard)
        tries = self._tries[name] = self._tries.get(name, 0) + 1
        if stumble.is_final or tries >= TRIES:
            yield failure_of(task, tuple(left), stumble, tries)
        elif not self._is_draining:
            self._avoided.setdefault(name, set()).add(worker)
            self._waiting.append(task.with_units(left))
            yield Retry(task.video.id, tries, stumble.reason)

    def _blame_units(self, attempt: _Attempt, stumble: Stumble) -> Iterator[Retry | Failure]:
        """Try units that may be at fault one by one, and the others together."""
        task, left = attempt.task, attempt.left
        suspects = [unit for unit in left if unit.shard == stumble.shard]
        suspects = suspects or [unit for unit in left if unit.shard in attempt.begun] or left[:1]
        rest = [unit for unit in left if unit not in suspects]
        if rest and not self._is_draining:
            self._waiting.append(task.with_units(rest))
        most = 0
        for unit in suspects:
            name = (task.video.first, unit.shard)
            tries = self._tries[name] = self._tries.get(name, 0) + 1
            if stumble.is_final or tries >= TRIES:
                yield failure_of(task, (unit,), stumble, tries)
                self._failed.append(task.video.first)
            elif not self._is_draining:
                self._waiting.appendleft(task.with_units([unit]))
                most = max(most, tries)
        if most:
            yield Retry(task.video.id, most, stumble.reason)
        # One video alone may be bad.
        is_all = len(set(self._failed)) >= min(2, self._num_videos)
        if is_all and len(self._failed) >= FAILED_IN_A_ROW:
            raise WorkerError(
                f"{len(self._failed)} units failed one after the other, at last: "
                f"{stumble.reason}; it may be the teacher"
            )


class InlineExecutor(Executor):
    """One worker in this very process, for debugging and for machines without Ray."""

    _worker: LabelWorker | None = None

    def run(self, tasks: Sequence[Task]) -> Generator[Event | None]:
        import torch

        threads = torch.get_num_threads()
        self._take(tasks)
        try:
            self._worker = LabelWorker(self._settings)
            self._worker.start()  # sets its own number of threads
            while self._waiting:
                attempt = _Attempt(self._waiting.popleft().ready())
                for events in self._worker.run(attempt.task):
                    for event in events:
                        self._take_note(attempt, event)
                        if isinstance(event, Stumble):
                            yield from self._recover(attempt, event)
                        else:
                            yield event
                    yield None
        finally:
            torch.set_num_threads(threads)

    def drain(self) -> None:
        super().drain()
        if self._worker is not None:
            self._worker.give_up(ALL)


class _Actor:
    """A Ray actor and what it is at."""

    def __init__(self, handle: Any) -> None:  # noqa: ANN401 - an actor handle
        self.handle = handle
        self.starting: Any = handle.start.remote()
        self.info: WorkerInfo | None = None
        self.attempt: _Attempt | None = None
        self.events: Any = None  # the stream of the attempt
        self.number = 0  # of its task
        self.giving: Any = None  # the answer to come of give_up
        self.living: Any = None  # the answer to come of signs_of_life
        self.signs_of_life = -1
        self.started_at = time.monotonic()
        self.has_nothing_to_give = 0  # units that were left when it last said so
        self.heard_at = time.monotonic()

    @property
    def is_idle(self) -> bool:
        return self.info is not None and self.attempt is None and self.events is None

    @property
    def awaited(self) -> list[Any]:
        """What Ray is to be asked about."""
        refs = (self.starting, self.events, self.giving, self.living)
        return [ref for ref in refs if ref is not None]


class RayExecutor(Executor):
    """Long-lived Ray actors, each with the teacher loaded once.

    Args:
        settings: What each worker is.
        actors: How many; as many as CPUs and GPUs allow if not given.
        cpus_per_actor: CPUs that Ray sets aside for each.
        gpus_per_actor: GPUs that Ray sets aside for each; a half means that two share one.
        address: A running cluster; a local Ray is started, and stopped, if not given.
        hang_seconds: Time without anything done after which a worker is killed.
        worker: The class of the actors.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        actors: int | None,
        cpus_per_actor: int = 1,
        gpus_per_actor: float = 0.0,
        address: str | None = None,
        hang_seconds: float = HANG_SECONDS,
        worker: type[Any] = LabelWorker,
    ) -> None:
        super().__init__(settings)
        self._number = actors
        self._cpus, self._gpus = cpus_per_actor, gpus_per_actor
        self._address, self._hang_seconds = address, hang_seconds
        self._worker = worker
        self._crew: list[_Actor] = []
        self._failed_starts = 0
        self._waiting_since = time.monotonic()
        self._is_ours = False

    def __enter__(self) -> Self:
        import ray

        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            start_ray(self._address, factory=self._settings.teacher)
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        for actor in self._crew:
            with suppress(ray.exceptions.RayError):
                ray.kill(actor.handle)
        self._crew.clear()
        if self._is_ours:
            ray.shutdown()

    def run(self, tasks: Sequence[Task]) -> Generator[Event | None]:
        import ray

        self._take(tasks)
        for _ in range(self._num_actors(sum(len(task.units) for task in tasks))):
            self._hire()
        while self._waiting or any(actor.attempt for actor in self._crew):
            self._hand_out()
            self._share()
            self._look_for_workers()
            awaited = {ref: actor for actor in self._crew for ref in actor.awaited}
            ready, _ = ray.wait(list(awaited), num_returns=1, timeout=POLL_SECONDS)
            if ready:  # all that came meanwhile at once
                ready, _ = ray.wait(list(awaited), num_returns=len(awaited), timeout=0)
            for ref in ready:
                if awaited[ref] in self._crew:
                    yield from self._hear(awaited[ref], ref)
            for actor in list(self._crew):
                yield from self._watch(actor)
            yield None

    def _watch(self, actor: _Actor) -> Iterator[Event]:
        """Look whether an actor lives; one that does nothing for too long is killed."""
        silence = time.monotonic() - actor.heard_at
        if actor.info is None:
            # On a cluster there may be no place for it yet.
            waited = time.monotonic() - actor.started_at
            if self._address is None and waited > max(START_SECONDS, self._hang_seconds):
                error = WorkerError(f"it did nothing for {waited:.0f} s")
                yield from self._start_again(actor, error)
        elif actor.attempt is not None and silence > self._hang_seconds:
            reason = (
                f"nothing was done for {self._hang_seconds:g} s and the worker was "
                "stopped; does the decoder or the teacher hang?"
            )
            yield from self._replace(actor, Stumble(reason, "", "unit"))
        elif actor.attempt is not None and silence > self._hang_seconds / 4 and not actor.living:
            # It may be passing frames, or reading a large file.
            actor.living = actor.handle.signs_of_life.remote()

    def _hand_out(self) -> None:
        ready = {actor.info.name for actor in self._crew if actor.info is not None}
        for actor in self._crew:
            if actor.is_idle and (task := self._next_task(actor, ready)) is not None:
                actor.attempt, actor.heard_at = _Attempt(task.ready()), time.monotonic()
                actor.number += 1
                actor.signs_of_life = -1
                run = actor.handle.run.options(num_returns="streaming")
                actor.events = run.remote(actor.attempt.task, actor.number)

    def _next_task(self, actor: _Actor, ready: set[str]) -> Task | None:
        """Return the first task that this actor has not failed at, if another one can do that."""
        for place, task in enumerate(self._waiting):
            avoided = self._avoided.get((task.video.first, task.units[0].shard), set())
            name = actor.info.name if actor.info is not None else ""
            if name not in avoided or ready <= avoided:
                del self._waiting[place]
                return task
        return None

    def _share(self) -> None:
        """Ask a busy worker for units that it has not begun, if another one has nothing to do."""
        busy = [actor for actor in self._crew if actor.attempt is not None]
        if self._is_draining:  # asked again and again, as a call may overtake the task
            for actor in busy:
                if actor.giving is None:
                    actor.giving = actor.handle.give_up.remote(ALL, actor.number)
            return
        is_wanted = not self._waiting and any(actor.is_idle for actor in self._crew)
        if not is_wanted or not self._settings.shares:
            return
        if any(actor.giving is not None for actor in busy):
            return
        left = {actor: len(actor.attempt.left) for actor in busy if actor.attempt is not None}
        left = {actor: n for actor, n in left.items() if n > 1 and n != actor.has_nothing_to_give}
        if left:
            actor = max(left, key=lambda actor: left[actor])
            actor.giving = actor.handle.give_up.remote(left[actor] // 2, actor.number)

    def _look_for_workers(self) -> None:
        """Say so if Ray starts no worker.

        Raises:
            WorkerError: If there is none and none to come.
        """
        if not self._crew:
            raise WorkerError("all workers failed to start")
        if any(actor.info for actor in self._crew):
            self._waiting_since = time.monotonic()
        elif time.monotonic() - self._waiting_since > WAIT_SECONDS:
            self._waiting_since = time.monotonic()
            log.warning(
                "waiting for Ray to start a worker with %d CPUs and %g GPUs; is there one free?",
                *(self._cpus, self._gpus),
            )

    def _hear(self, actor: _Actor, ref: Any) -> Iterator[Event]:  # noqa: ANN401 - a reference
        """Take what an actor has to say."""
        import ray

        try:
            if ref is actor.starting:
                actor.info, actor.starting = ray.get(ref), None
                self._failed_starts = 0
            elif ref is actor.giving:
                actor.giving = None
                self._take_over(actor, ray.get(ref))
            elif ref is actor.living:
                actor.living = None
                signs = int(ray.get(ref))
                if signs != actor.signs_of_life:
                    actor.signs_of_life, actor.heard_at = signs, time.monotonic()
            elif ref is actor.events:
                events = ray.get(next(ref))
                actor.heard_at = time.monotonic()
                yield from self._note(actor, events)
        except StopIteration:
            if actor.giving is not None:  # its answer may say why something is left
                with suppress(ray.exceptions.RayError):
                    self._take_over(actor, ray.get(actor.giving))
                actor.giving = None
            if actor.attempt is not None and actor.attempt.left and not self._is_draining:
                yield from self._replace(actor, Stumble("a worker ended too early", "", "unit"))
            actor.attempt = actor.events = None
        except ray.exceptions.RayError as error:
            if actor.info is None:
                yield from self._start_again(actor, error)
            else:
                yield from self._replace(actor, Stumble(death_of(error), str(error), "unit"))

    def _note(self, actor: _Actor, events: Sequence[WorkerEvent]) -> Iterator[Event]:
        for event in events:
            attempt = actor.attempt
            if attempt is None:
                return
            self._take_note(attempt, event)
            if not isinstance(event, Stumble):
                yield event
            elif event.blame == "unit" and not event.is_final:
                yield from self._replace(actor, event)  # who knows what state it is in
            else:
                actor.attempt = None
                name = actor.info.name if actor.info is not None else ""
                yield from self._recover(attempt, event, name)

    def _take_over(self, actor: _Actor, units: Sequence[Unit]) -> None:
        attempt = actor.attempt
        if attempt is None:
            return
        actor.has_nothing_to_give = 0 if units else len(attempt.left)
        if not units:
            return
        given = {unit.shard for unit in units}
        task = attempt.task
        attempt.task = task.with_units(u for u in task.units if u.shard not in given)
        if not self._is_draining:
            self._waiting.append(task.with_units(units))

    def _replace(self, actor: _Actor, stumble: Stumble) -> Iterator[Event]:
        """End an actor, and only then put its work back."""
        self._end(actor)
        if actor.attempt is not None:
            yield from self._recover(actor.attempt, stumble)
            actor.attempt = None
        if not self._is_draining:
            self._hire()

    def _start_again(self, actor: _Actor, error: Exception) -> Iterator[Event]:
        self._end(actor)
        self._failed_starts += 1
        reason = _reason(error)
        if self._failed_starts >= TRIES and not any(other.info for other in self._crew):
            raise WorkerError(f"no worker can start: {reason}")
        log.warning("a worker could not start: %s", reason)
        if self._failed_starts < TRIES * max(1, len(self._crew)):
            self._hire()
        return iter(())

    def _hire(self) -> None:
        import ray

        # Two threads: one works, the other answers when units are asked for.
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_concurrency": 2}
        worker = ray.remote(self._worker).options(**options)
        self._crew.append(_Actor(worker.remote(self._settings)))

    def _end(self, actor: _Actor) -> None:
        """Kill an actor; one of this machine is gone when this returns."""
        import ray

        self._crew.remove(actor)
        with suppress(ray.exceptions.RayError):
            ray.kill(actor.handle)
        if actor.info is not None and actor.info.host == platform.node():
            deadline = time.monotonic() + DEATH_SECONDS
            while _is_running(actor.info.pid) and time.monotonic() < deadline:
                time.sleep(0.01)

    def _num_actors(self, num_units: int) -> int:
        """Return how many actors there should be.

        Raises:
            ValueError: If this machine cannot hold them.
        """
        import ray

        there = ray.cluster_resources()
        most = min(
            int(there.get(name, 0) / each)
            for name, each in (("CPU", self._cpus), ("GPU", self._gpus))
            if each
        )
        if self._address is None and (most < 1 or most < (self._number or 1)):
            raise ValueError(
                f"{self._number or 1} actors with {self._cpus} CPUs and {self._gpus:g} GPUs each "
                f"do not fit into {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs; "
                + (f"use --actors {most}" if most else "lower --cpus-per-actor, --gpus-per-actor")
            )
        # A cluster may grow.
        return min(self._number or max(1, most), num_units)


def _reason(error: Exception) -> str:
    """Return in one line why Ray could not do something."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ValueError | TargetStoreError | WorkerError):
        return str(cause)
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
