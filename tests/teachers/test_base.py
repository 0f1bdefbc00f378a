from __future__ import annotations

import pytest

from teachers.base import window_of
from teachers.registry import build


@pytest.mark.parametrize(("frame", "first"), [(15, 0), (0, -15), (40, 25)])
def test_window_ends_on_its_frame(frame: int, first: int) -> None:
    window = window_of(frame, length=16)
    assert (window[0], window[-1], len(window)) == (first, frame, 16)


def test_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        window_of(3, length=0)


def test_unknown_teacher_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no teacher 'nobody'; there are: pqft"):
        build("nobody")
