"""Names to teachers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from teachers.assistant import AssistantTeacher
from teachers.base import Precision, Teacher
from teachers.hd2s import Hd2sTeacher
from teachers.pqft import PqftTeacher
from teachers.tased import TasedTeacher
from teachers.unisal import UnisalTeacher
from teachers.vinet import VinetTeacher
from teachers.vinet_s import VinetATeacher, VinetSTeacher

TEACHERS: Final[dict[str, Callable[..., Teacher]]] = {
    "pqft": PqftTeacher,
    "hd2s": Hd2sTeacher,
    "tased": TasedTeacher,
    "vinet": VinetTeacher,
    "vinet-s": VinetSTeacher,
    "vinet-a": VinetATeacher,
    "unisal": UnisalTeacher,
    "assistant": AssistantTeacher,
}
"""Factories, called with ``device``, ``precision`` and, where they are given, ``height`` and
``width`` of the frames fed to the network and ``weights``, the path of its file."""
WITH_WEIGHTS: Final = frozenset(TEACHERS) - {"pqft"}
"""Teachers that say nothing of use without a file of weights."""


def build(
    name: str,
    *,
    size: tuple[int, int] | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
    weights: Path | None = None,
    **options: str,
) -> Teacher:
    """Make a teacher.

    Args:
        name: One of ``TEACHERS``, or ``package.module:factory`` for one of your own.
        size: Height and width of the frames fed to it; the published one if not given.
        device: Where it runs.
        precision: What it computes in.
        weights: File of its weights, for a teacher that has any; random ones if not given.
        options: What else the teacher takes, as HD2S ``head_mode`` and ViNet-S ``upsampling``.

    Raises:
        ValueError: If there is no such teacher, the size does not fit it, or weights are missing or
            given to one that has none, or an assistant has no checkpoint.
        TinyHDError: If the weights cannot be read.
    """
    factory = TEACHERS.get(name) or _own_factory(name)
    if weights is not None and name in TEACHERS and name not in WITH_WEIGHTS:
        raise ValueError(f"the teacher {name!r} has no weights, got {weights}")
    if weights is None and name == "assistant":
        raise ValueError(f"the teacher {name!r} needs its weights; give them with --weights FILE")
    given: dict[str, Any] = {"device": device, "precision": precision, **options}
    if size is not None:
        given |= {"height": size[0], "width": size[1]}
    if weights is not None:
        given["weights"] = weights
    try:
        teacher = factory(**given)
    except TypeError as error:
        if name in TEACHERS and not options:
            raise
        raise ValueError(f"{name} cannot be made with {', '.join(given)}: {error}") from error
    if not isinstance(teacher, Teacher):
        raise ValueError(f"{name} gave a {type(teacher).__name__}, not a Teacher")
    return teacher


def _own_factory(name: str) -> Callable[..., Teacher]:
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"no teacher {name!r}; there are: {', '.join(TEACHERS)}, and your own as "
            "package.module:factory"
        )
    try:
        factory: Callable[..., Teacher] = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a module of one's own may fail in any way
        raise ValueError(
            f"the teacher {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return factory
