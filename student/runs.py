"""The directory of a training run: configuration, checkpoints, loss curve."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stores.errors import TinyHDError
from student.checkpoints import read_checkpoint, save_checkpoint
from student.pictures import Picture
from student.tinyhd import TinyHD


class RunError(TinyHDError):
    """A run directory cannot be used."""


class RunSink:
    """Where a run's outcome goes: nowhere, of a process that leaves it to another."""

    checkpoint: Mapping[str, Any] | None = None
    """What an earlier process left to continue from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last, self.best = path / "last.pt", path / "best.pt"

    def read_best(self) -> Mapping[str, Any] | None:
        """Return the checkpoint with the best weights, if there is one."""
        return None

    def save(self, model: TinyHD, *, best_model: TinyHD | None, **state: Any) -> None:  # noqa: ANN401
        """Keep a checkpoint that training continues from, after the best weights if they are new.

        In this order: whoever is killed in between comes to the same best weights again.
        """

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add values to the loss curve and to ``metrics.jsonl``."""

    def keep_recipe(self, text: str) -> None:
        """Leave the recipe, complete, as a file that can be trained from again."""

    def show(self, name: str, step: int, picture: Picture) -> None:
        """Add a picture to what TensorBoard shows."""


class RunDir(RunSink):
    """A folder with ``config.json``, ``last.pt``, ``best.pt``, ``metrics.jsonl`` and event files.

    Use :meth:`open` in a ``with``; one process at a time may have it open.
    """

    def __init__(self, path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(path)
        self._metrics_path = path / "metrics.jsonl"
        if self.last.exists():
            self.checkpoint = read_checkpoint(self.last)
        position = self.checkpoint or {}
        step = int(position.get("step", 0))
        self._forget_after(step, is_mid_epoch=bool(position.get("batch", 0)))
        self._metrics = self._metrics_path.open("a", buffering=1)
        self._curve = SummaryWriter(str(path), purge_step=step + 1 if step else None)

    @classmethod
    @contextmanager
    def open(cls, path: Path, config: Mapping[str, Any]) -> Iterator[RunDir]:
        """Make the folder, or open that of an earlier run of the same configuration.

        Raises:
            RunError: If the folder holds something else, or another configuration, or is in use.
            CheckpointError: If the last checkpoint is damaged.
        """
        config_path = path / "config.json"
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        check_run(path, config)
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(f"{path} is in use by another training process") from error
        with lock:
            if not config_path.exists():
                _write_whole(config_path, text)
            run = cls(path)
            try:
                yield run
            finally:
                run._metrics.close()
                run._curve.close()

    def read_best(self) -> Mapping[str, Any] | None:
        return read_checkpoint(self.best) if self.best.exists() else None

    def save(self, model: TinyHD, *, best_model: TinyHD | None, **state: Any) -> None:  # noqa: ANN401
        if best_model is not None:
            save_checkpoint(self.best, best_model, step=state["step"])
        save_checkpoint(self.last, model, **state)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        row = {"kind": kind, "step": step, **values}
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        for name, value in values.items():
            self._curve.add_scalar(f"{kind}/{name}", value, step)

    def keep_recipe(self, text: str) -> None:
        _write_whole(self.path / "recipe.yaml", text)

    def show(self, name: str, step: int, picture: Picture) -> None:
        self._curve.add_image(name, picture, step, dataformats="HWC")

    def _forget_after(self, step: int, *, is_mid_epoch: bool) -> None:
        """Drop what a killed process logged behind its last checkpoint; it will be done again."""
        if not self._metrics_path.exists():
            return
        kept = []
        for line in self._metrics_path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break  # the line that the process was killed in
            will_come_again = is_mid_epoch and row["kind"] == "validation" and row["step"] == step
            if row["step"] <= step and not will_come_again:
                kept.append(line + "\n")
        _write_whole(self._metrics_path, "".join(kept))


def check_run(path: Path, config: Mapping[str, Any]) -> None:
    """Make sure that a folder is of the same configuration, or free.

    Raises:
        RunError: If it is not.
    """
    config_path = path / "config.json"
    if config_path.exists():
        _check_same(config_path, json.loads(json.dumps(config)))
    elif path.exists() and not _is_fresh(path):
        raise RunError(f"{path} is there already and is no training run; choose another --out")


def label_sets_of(path: Path) -> dict[str, str]:
    """Return names and fingerprints of the label sets that a run learns from; none if it is new."""
    try:
        found = json.loads((path / "config.json").read_text())["label_sets"]
        return {str(name): str(value) for name, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _check_same(path: Path, config: Mapping[str, Any]) -> None:
    try:
        before = json.loads(path.read_text())
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise RunError(f"{path} is damaged; choose another --out")
    old, new = _flat(before), _flat(config)
    changed = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise RunError(
            f"{path.parent} holds a run of another configuration ({'; '.join(changed)}); "
            "choose another --out"
        )


def _flat(config: object, where: str = "") -> dict[str, Any]:
    """Return single values by their path, as keys of recipes are written."""
    if isinstance(config, Mapping) and config:
        parts = [(f"{where}.{key}".lstrip("."), value) for key, value in config.items()]
    elif isinstance(config, list) and config:
        parts = [(f"{where}[{number}]", value) for number, value in enumerate(config)]
    else:
        return {where: config}
    return {path: value for part, inner in parts for path, value in _flat(inner, part).items()}


def _is_fresh(path: Path) -> bool:
    """Whether nothing, or only a process that was killed at once, has used a folder."""
    return path.is_dir() and {file.name for file in path.iterdir()} <= {"lock"}


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
