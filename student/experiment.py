"""Training recipes as files: YAML, named presets, and single values set on the command line."""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import dacite
import yaml

from stores.errors import TinyHDError
from student.config import VARIANTS
from student.recipe import TrainConfig

Plain = dict[str, Any]
MAX_DEPTH: Final = 32
"""Lists and mappings in each other that a recipe may have; no recipe needs half as many."""
SIZES: Final = ("height", "width")
"""Fields of a student that its variant does not decide."""


class RecipeError(TinyHDError):
    """A recipe cannot be read, or asks for what there is not."""


def _preset(variant: str, *, unlabelled: float | None, clips: int, validation: int) -> Plain:
    return {
        "student": {"variant": variant},
        "supervision": {"ground_truth": {}},
        "sampling": {
            "clips_per_video": clips,
            "unlabelled": unlabelled,
            "validation_clips": validation,
            "holdout_of": "videos",
        },
        "optimisation": {"precision": "float16", "schedule": "paper"},
    }


DATA_PRESETS: Final[Mapping[str, Plain]] = {
    "dhf1k": {"unlabelled": None, "clips": 2, "validation": 5},
    "dhf1k-kinetics": {"unlabelled": 1.0, "clips": 1, "validation": 5},
    "ucf": {"unlabelled": None, "clips": 11, "validation": 20},
    "ucf-kinetics": {"unlabelled": 10.0, "clips": 1, "validation": 20},
    "hollywood2": {"unlabelled": None, "clips": 2, "validation": 5},
}
"""Epochs of the paper for its data sets (Hu et al., WACV 2023; release code)."""


def presets() -> dict[str, Plain]:
    """Return the named recipes: each student on each data set, and on video without labels."""
    found: dict[str, Plain] = {}
    for variant in VARIANTS:
        unlabelled = _preset(variant, unlabelled=None, clips=2, validation=5)
        del unlabelled["supervision"]
        found[variant] = unlabelled
        for name, data in DATA_PRESETS.items():
            found[f"{variant}-{name}"] = _preset(variant, **data)
    return found


def read_recipe(
    file: Path | None = None, *, preset: str | None = None, changes: Iterable[str] = ()
) -> TrainConfig:
    """Put a recipe together: a preset, then a file, then single values.

    Args:
        file: YAML, with the fields of :class:`TrainConfig`; a student may be named by ``variant``
            and ``size``.
        preset: One of :func:`presets`.
        changes: ``KEY=VALUE``, with dots between the keys of nested fields and YAML for a value.

    Raises:
        RecipeError: If a key is unknown or a value is not allowed; it says where.
    """
    return build_recipe(gather_values(file, preset=preset, changes=changes))


def gather_values(
    file: Path | None = None, *, preset: str | None = None, changes: Iterable[str] = ()
) -> Plain:
    """Put the values of a recipe together, as :func:`read_recipe`, without a look at them.

    Raises:
        RecipeError: If there is no such preset, or a file or a change cannot be read.
    """
    values: Plain = {}
    if preset is not None:
        known = presets()
        if preset not in known:
            raise RecipeError(f"there is no preset {preset!r}{_nearest(preset, known)}")
        values = known[preset]
    if file is not None:
        values = merge_values(values, _read_yaml(file))
    for change in changes:
        values = lay_over(values, _parse_change(change))
    return values


def lay_over(values: Mapping[str, Any], change: Mapping[str, Any]) -> Plain:
    """Lay values over a recipe, and over what its stages say of their own."""
    changed = merge_values(values, change)
    stages = values.get("stages")
    if isinstance(stages, list) and "stages" not in change:
        changed["stages"] = [
            _override(stage, change) if isinstance(stage, Mapping) else stage for stage in stages
        ]
    return changed


def _override(own: Mapping[str, Any], change: Mapping[str, Any]) -> Plain:
    """Change what a stage says of its own; what it leaves to the recipe, or out, it still does."""
    changed = dict(own)
    for key, value in change.items():
        before = own.get(key)
        if key == "student" and isinstance(before, str):
            before = {"variant": before}
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            changed[key] = _override(before, value)
        elif key in own and not isinstance(value, Mapping):
            changed[key] = value
    return changed


def change_label_set(values: Mapping[str, Any], change: Mapping[str, Any]) -> Plain:
    """Change the label set of a recipe, of which there must be one, and keep the rest of it.

    Raises:
        RecipeError: If there are several, or the stages have their own.
    """
    term = _only_label_set(values, "--labels, --teacher-weight and --hierarchical-weight")
    term |= change
    return merge_values(values, {"supervision": {"labels": [term]}})


def _only_label_set(values: Mapping[str, Any], who: str) -> Plain:
    if "stages" in values:
        raise RecipeError(f"{who} change a recipe of one stage; write the stages' own in its file")
    supervision = values.get("supervision")
    labels = supervision.get("labels", [{}]) if isinstance(supervision, Mapping) else [{}]
    if not isinstance(labels, list | tuple) or len(labels) != 1:
        raise RecipeError(
            f"{who} change a recipe with one label set; write those of this one in its file"
        )
    if not isinstance(labels[0], Mapping):
        raise RecipeError(_not_a_mapping("supervision.labels[0]", labels[0]))
    return dict(labels[0])


def _not_a_mapping(path: str, value: object) -> str:
    told = reprlib.repr(value)
    return f"{path}: {told} is not allowed there; it is a mapping, such as {{labels: hd2s}}"


def build_recipe(values: Mapping[str, Any]) -> TrainConfig:
    """Build a recipe of plain values.

    Raises:
        RecipeError: If a key is unknown or a value is not allowed; it says where.
    """
    values = dict(values)
    if "student" in values:
        values["student"] = _student(values["student"])
    _check_keys(values, TrainConfig, "")
    try:
        return dacite.from_dict(
            TrainConfig,
            _tuples(values, TrainConfig),
            dacite.Config(strict=True, type_hooks={float: _number}),
        )
    except dacite.WrongTypeError as error:
        raise RecipeError(
            f"{error.field_path}: {reprlib.repr(error.value)} is not allowed there; it is "
            f"{_type_name(error.field_type)}"
        ) from error
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise RecipeError(f"the recipe is not possible: {error}") from error


def write_recipe(config: TrainConfig) -> str:
    """Return a recipe as YAML, complete, so that it can be read again."""
    text: str = yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)
    return text


def _student(given: object) -> object:
    """Spell out a student that is named by its variant and size."""
    if isinstance(given, str):
        given = {"variant": given}
    if not isinstance(given, Mapping):
        return given
    rest = dict(given)
    variant = rest.pop("variant", None)
    size = rest.pop("size", None)
    if variant is not None:
        if not isinstance(variant, str) or variant not in VARIANTS:
            told = reprlib.repr(variant)
            raise RecipeError(f"student.variant: there is no {told}{_nearest(told, VARIANTS)}")
        fields_of_it = VARIANTS[variant].to_dict()
        rest = {**{n: v for n, v in fields_of_it.items() if n not in SIZES}, **rest}
    if size is not None:
        rest["height"], rest["width"] = read_size(size, "student.size")
    return rest


def read_size(given: object, where: str) -> tuple[int, int]:
    """Return height and width of what is written 192x256.

    Raises:
        RecipeError: If it is something else.
    """
    height, _, width = str(given).partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        told = reprlib.repr(given)
        raise RecipeError(f"{where}: {told} is not HEIGHTxWIDTH, such as 192x256")
    return int(height), int(width)


def put_online(values: Mapping[str, Any], teacher: Mapping[str, Any]) -> Plain:
    """Have a teacher label in the step what a recipe would take from its label set.

    Args:
        values: A recipe's values.
        teacher: Values of ``supervision.online``; weights of the terms are those of the label set.

    Raises:
        RecipeError: If the recipe has several label sets, or stages.
    """
    term = _only_label_set(values, "--teacher and its options")
    weights = {key: value for key, value in term.items() if key != "labels"}
    return merge_values(values, {"supervision": {"labels": [], "online": {**weights, **teacher}}})


class _Loader(yaml.SafeLoader):
    """Reads plain values, without what makes a few lines endless: depth, and aliases."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias (*) is not read", problem_mark=mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="too many levels", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _load(text: str) -> Any:  # noqa: ANN401 - plain values
    return yaml.load(text, Loader=_Loader)


def _read_yaml(file: Path) -> Plain:
    try:
        content = _load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        told = " ".join(str(error).split())
        raise RecipeError(f"{file} is no YAML of plain values: {told}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"{file} holds no keys, but {type(content).__name__}")
    return content


def _parse_change(change: str) -> Plain:
    key, equals, text = change.partition("=")
    if not (key and equals):
        raise RecipeError(f"--set takes KEY=VALUE, got {change!r}")
    try:
        value = _load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"--set {change}: the value is no YAML of plain values") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def merge_values(below: Mapping[str, Any], above: Mapping[str, Any]) -> Plain:
    """Lay values over others; nested ones are laid over each other, lists replaced.

    A student's variant decides all its fields but the size, whatever they were below.
    """
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        if key == "student":
            before, value = _student(before), _student(value)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = merge_values(before, value)
        merged[key] = value
    return merged


def _check_keys(values: Mapping[str, Any], kind: type, where: str) -> None:
    """Refuse keys that there are not, with the nearest that there is."""
    known: dict[str, Field[Any]] = {item.name: item for item in fields(kind)}
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in known:
            names = [f"{where}{name}" for name in known]
            raise RecipeError(f"there is no key {path!r}{_nearest(path, names)}")
        hint = hints[key]
        kinds = (hint, *typing.get_args(hint))
        # Python takes truth for a number.
        is_truth = isinstance(value, bool) and bool not in kinds and {int, float} & {*kinds}
        if is_truth or (typing.get_origin(hint) is tuple and not isinstance(value, list | tuple)):
            told = reprlib.repr(value)
            raise RecipeError(f"{path}: {told} is not allowed there; it is {_type_name(hint)}")
        inner = _inner_class(hints[key])
        if inner is None:
            continue
        if isinstance(value, Mapping):
            _check_keys(value, inner, f"{path}.")
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                if not isinstance(item, Mapping):
                    raise RecipeError(_not_a_mapping(f"{path}[{number}]", item))
                _check_keys(item, inner, f"{path}[{number}].")
    for name, item in known.items():
        if item.default is MISSING and item.default_factory is MISSING and name not in values:
            raise RecipeError(f"the key '{where}{name}' is missing")


def _inner_class(hint: object) -> type | None:
    """Return the dataclass that a field holds, alone, optionally, or several of."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    return next((found for part in typing.get_args(hint) if (found := _inner_class(part))), None)


def _tuples(values: Any, kind: type) -> Any:  # noqa: ANN401 - nested plain values
    """Return values with tuples where fields are tuples: YAML has lists alone."""
    if not isinstance(values, Mapping):
        return values
    hints = typing.get_type_hints(kind)
    found: Plain = {}
    for key, value in values.items():
        inner = _inner_class(hints[key])
        if isinstance(value, list | tuple) and typing.get_origin(hints[key]) is tuple:
            found[key] = tuple(_tuples(item, inner) if inner else item for item in value)
        else:
            found[key] = _tuples(value, inner) if inner else value
    return found


def _number(value: object) -> object:
    """Take whole numbers, and numbers that YAML takes for text (1e-3), where fractions may be."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"


def _type_name(kind: object) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list"
    if kind is type(None):
        return "nothing (null)"
    return getattr(kind, "__name__", str(kind))


def _plain(values: Any) -> Any:  # noqa: ANN401 - nested plain values
    if isinstance(values, Mapping):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    return values
