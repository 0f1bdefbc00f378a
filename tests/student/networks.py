"""Networks that tests build: configurations, and weights that follow from names alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain import PlainTinyHD
from student.config import TinyHDConfig
from student.reference import import_weights, published_names
from student.tinyhd import TinyHD

ALL = ("d1", "d2", "d3")
GOLDENS = Path(__file__).parent / "goldens.json"


def _config(
    channel_reduction: int, single: str, output_frames: int, **other: object
) -> dict[str, Any]:
    return {
        "channel_reduction": channel_reduction,
        "decoders": other.pop("decoders", ALL),
        "single": [letter == "T" for letter in single],
        "output_frames": output_frames,
        **other,
    }


PUBLISHED: Mapping[str, dict[str, Any]] = {
    **{f"m_rc{n}": _config(n, "TFF", 16) for n in (1, 2, 4, 8)},
    **{f"s_rc{n}": _config(n, "TTT", 1) for n in (1, 2, 4, 8)},
    **{f"s_{d}only": _config(1, "T", 1, decoders=(d,)) for d in ALL},
    **{f"m_{d}only": _config(1, "F", 16, decoders=(d,)) for d in ALL},
    "m_rc1_d1last": _config(1, "TFF", 16, d1_last=True),
    "m_rc1_fff": _config(1, "FFF", 16),
    "m_rc4_fff": _config(4, "FFF", 16),
    "m_rc1_n8": _config(1, "TFF", 8),
    "m_rc1_force": _config(1, "TTT", 16, force_multi=True),
}
"""Those whose parameters and arithmetic are published."""

CONFIGS: Mapping[str, dict[str, Any]] = {
    **PUBLISHED,
    **{f"m_rc{n}_n8": _config(n, "TFF", 8) for n in (2, 4, 8)},
    **{f"m_rc{n}_force": _config(n, "TTT", 8, force_multi=True) for n in (4, 8)},
    "m_rc8_fff": _config(8, "FFF", 16),
    "m_rc2_d1last": _config(2, "TFF", 16, d1_last=True),
    "s_rc4_d1last": _config(4, "TTT", 1, d1_last=True),
    "s_rc8_d2d3": _config(8, "TT", 1, decoders=("d2", "d3")),
    "m_rc4_d2d1d3": _config(4, "FTT", 16, decoders=("d2", "d1", "d3")),
    "m_rc2_d3d1": _config(2, "TF", 16, decoders=("d3", "d1"), d1_last=True),
    "m_rc4_d1d2_tf": _config(4, "TF", 8, decoders=("d1", "d2")),
    "m_rc4_d1d2_ft": _config(4, "FT", 16, decoders=("d1", "d2")),
    "m_rc8_d2d3_tf": _config(8, "TF", 8, decoders=("d2", "d3")),
}
"""And more: every option at some reduction, orders and mixtures."""


def fill_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Make a tensor's values from its published name and its shape."""
    rng, last = np.random.default_rng(zlib.crc32(name.encode())), name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if last == "running_var" or (last == "weight" and len(shape) == 1):
        values = rng.uniform(0.5, 1.5, shape)
    elif last == "weight":
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    else:
        values = rng.standard_normal(shape) * 0.1
    return torch.from_numpy(np.asarray(values).astype(np.float32))


def fill_weights(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make weights with the published names for a configuration."""
    with torch.device("meta"):
        model = TinyHD(TinyHDConfig.from_dict({**config, "decoders": list(config["decoders"])}))
    names = published_names(model)
    return {
        names[key]: fill_value(names[key], tuple(value.shape))
        for key, value in model.state_dict().items()
    }


def build_pair(
    config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[TinyHD, PlainTinyHD]:
    """Build our network and the plain one with the same weights."""
    return import_weights(weights, **config), PlainTinyHD(weights, **config)


def synthetic_clip(height: int, width: int, *, batch: int = 1) -> Tensor:
    """Return noise; at 192x256 that of the published goldens."""
    values = np.random.default_rng(0).standard_normal((batch, 3, 16, height, width))
    return torch.from_numpy(values.astype(np.float32))


def describe(saliency: Tensor, maps: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Tell a network's output in few numbers: mean and four pixels of each kind of map."""
    numbers = {}
    for name, values in {"saliency": saliency, **maps}.items():
        flat = values.double().flatten()
        pixels = flat[torch.linspace(0, len(flat) - 1, 4).long()]
        numbers[name] = [round(float(value), 6) for value in (flat.mean(), *pixels)]
    return numbers


def make_goldens() -> dict[str, dict[str, list[float]]]:
    """Tell the plain network's output for every configuration, at 32x64."""
    clip = synthetic_clip(32, 64)
    with torch.inference_mode():
        return {
            name: describe(*PlainTinyHD(fill_weights(config), **config)(clip))
            for name, config in CONFIGS.items()
        }


if __name__ == "__main__":
    GOLDENS.write_text(json.dumps(make_goldens(), indent=1) + "\n")
