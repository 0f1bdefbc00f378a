from __future__ import annotations

import pytest

from student.config import VARIANTS, TinyHDConfig, build_config


@pytest.mark.parametrize(
    ("field", "value"),
    [("channel_reduction", 3), ("height", 100), ("width", 0), ("height", 96.0)],
)
def test_values_that_no_network_has_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        TinyHDConfig(**{field: value})  # type: ignore[arg-type]


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
