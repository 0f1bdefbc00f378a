"""Ray: a cluster that is there, or a quiet one of our own on this machine."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from stores.errors import TinyHDError
from stores.memory import KEEP_FREED

log = logging.getLogger(__name__)

REACH_SECONDS: Final = 10.0
"""For a cluster to take a connection."""
OBJECT_STORE_BYTES: Final = 256 * 2**20
"""Of a Ray of our own; only small messages pass through it."""
PACKAGES: Final = ("distill", "stores", "student", "teachers")


class ClusterError(TinyHDError):
    """A Ray cluster cannot be used."""


def start_ray(address: str | None, *, factory: str = "", is_background: bool = True) -> None:
    """Connect to a cluster, or start a quiet Ray of our own on this machine.

    Args:
        address: Of the cluster, whose machines are sent the code that they need.
        factory: A teacher of one's own, as ``package.module:factory``; its package is sent, too.
        is_background: Whether workers of this machine yield to whatever else runs on it, as Ray has
            them do.

    Raises:
        ClusterError: If the cluster cannot be used.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    quiet: dict[str, Any] = {}
    if not log.isEnabledFor(logging.DEBUG):
        logging.getLogger("ray").setLevel(logging.ERROR)
        # Ray prints to the standard output what it thinks of a dead worker, whatever it is told;
        # that it need not, only its debugger can say.
        ray._private.worker._worker_logs_enabled = False
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": False}
    if address is not None:
        _check_reachable(address)
        # Every machine works with the code of this one, installed there or not.
        here = Path(__file__).resolve().parent.parent
        modules = [str(here / name) for name in PACKAGES] + _package_of(factory)
        environment = {"py_modules": modules, "env_vars": dict(KEEP_FREED)}
        try:
            ray.init(address=address, runtime_env=environment, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            lines = str(error).strip().splitlines()
            said = lines[0].strip("'").rstrip(".") if lines else type(error).__name__
            raise ClusterError(f"cannot use the Ray cluster at {address}: {said}") from error
        return
    with _environment_of_children(is_background=is_background):
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **quiet,
        )


def _check_reachable(address: str) -> None:
    """Find out at once what Ray takes long, and many words, to find out."""
    import ray

    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"cannot reach a Ray cluster at {address} ({error}); start one with: ray start --head"
        ) from error
    refused = getattr(ray.exceptions, "AuthenticationError", ClusterError)
    try:
        ray._raylet.GcsClient(address=address)
    except refused as error:
        raise ClusterError(
            f"the Ray cluster at {address} asks for a token; set RAY_AUTH_MODE=token and have its "
            "~/.ray/auth_token here"
        ) from error
    except Exception as error:  # whatever it is, connecting will tell
        log.debug("%s", error)


def _package_of(factory: str) -> list[str]:
    """Return the folder of the package that a teacher of one's own is in."""
    name, colon, _ = factory.partition(":")
    spec = importlib.util.find_spec(name.partition(".")[0]) if colon else None
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return folders[:1]


def death_of(error: Exception) -> str:
    """Return in one line how a worker was lost, which Ray tells in many words."""
    said = str(error)
    if any(
        words in said for words in ("running low on memory", "OutOfMemory", "OOM killer policy")
    ):
        return (
            "Ray stopped the worker, as its machine was running out of memory; use fewer "
            "--actors or --workers, or a smaller --batch"
        )
    if "node" in said and any(
        words in said for words in ("node died", "node has died", "node was")
    ):
        return "the machine of the worker was lost"
    return "the worker's process died"


@contextmanager
def _environment_of_children(*, is_background: bool) -> Iterator[None]:
    """Let processes started inside import these packages, and keep the memory that they free."""
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    changed = {"PYTHONPATH": path} | {
        name: value for name, value in KEEP_FREED.items() if name not in os.environ
    }
    if not is_background:
        changed["RAY_worker_niceness"] = "0"
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
