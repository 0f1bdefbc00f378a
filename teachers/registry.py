"""Names to teachers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from teachers.base import Teacher
from teachers.pqft import PqftTeacher

TEACHERS: Final[dict[str, Callable[..., Teacher]]] = {"pqft": PqftTeacher}


def build(
    name: str,
    *,
    size: tuple[int, int] | None = None,
    device: str = "cpu",
    weights: Path | None = None,
) -> Teacher:
    """Make a teacher.

    Args:
        name: One of ``TEACHERS``.
        size: Height and width of the frames fed to it; the published one if not given.
        device: Where it runs.
        weights: File of its weights, for a teacher that has any.

    Raises:
        ValueError: If there is no such teacher, the size does not fit it, or it has no weights.
    """
    if name not in TEACHERS:
        raise ValueError(f"no teacher {name!r}; there are: {', '.join(TEACHERS)}")
    if weights is not None:
        raise ValueError(f"the teacher {name!r} has no weights, got {weights}")
    if size is None:
        return TEACHERS[name](device=device)
    return TEACHERS[name](height=size[0], width=size[1], device=device)
