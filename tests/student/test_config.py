from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from student.config import VARIANTS, TinyHDConfig, build_config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("channel_reduction", 3),
            ("channel_reduction", True),
            ("output_frames", 1.0),
            ("output_frames", 4),
        ),
        *(("height", 100), ("width", 0), ("height", 96.0), ("d1_last", 1), ("force_multi", None)),
        *(("decoders", ("d1", "d4")), ("decoders", ("d1", "d1", "d2")), ("decoders", ())),
        *(("decoders", "d1"), ("single", (True,)), ("single", (True, 1, True)), ("single", "TTT")),
    ],
)
def test_values_that_no_network_has_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        TinyHDConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"single": (True, False, False)}, "16 or 8 output_frames, got 1"),
        ({"force_multi": True}, "force_multi.* 16 or 8 output_frames, got 1"),
        ({"output_frames": 16}, "has 1 output frame, got output_frames=16"),
        (
            {"single": (True, False, False), "output_frames": 16, "force_multi": True},
            "a TinyHD-M already",
        ),
        ({"single": (False, False, False), "output_frames": 8}, "d1 makes 16 maps"),
        ({"decoders": ("d1",), "single": (False,), "output_frames": 8}, "d1 makes 16 maps"),
        ({"decoders": ("d2", "d3"), "single": (True, True), "d1_last": True}, "d1_last needs d1"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TinyHDConfig(**fields)


def test_configuration_of_lists_is_that_of_tuples() -> None:
    listed = TinyHDConfig(decoders=["d3", "d1"], single=[True, True])  # type: ignore[arg-type]
    assert listed == TinyHDConfig(decoders=("d3", "d1"), single=(True, True))
    assert hash(listed) == hash(replace(listed))


def test_configuration_survives_its_plain_form() -> None:
    for config in VARIANTS.values():
        assert TinyHDConfig.from_dict(config.to_dict()) == config


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ValueError, match="depth"):
        TinyHDConfig.from_dict({"depth": 3})


def test_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="tinyhd-s-rc4"):
        build_config("tinyhd-xl")


def test_command_line_offers_what_there_is() -> None:
    from cli import TEACHER_NAMES, VARIANT_NAMES
    from teachers.registry import TEACHERS

    assert tuple(VARIANTS) == VARIANT_NAMES
    assert tuple(TEACHERS) == TEACHER_NAMES
