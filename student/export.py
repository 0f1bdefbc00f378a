"""Write a student as ONNX, for runtimes that have no PyTorch."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stores.errors import TinyHDError
from student.config import CLIP_FRAMES, TinyHDConfig
from student.tinyhd import IMAGENET_MEAN, IMAGENET_STD, TinyHD

OPSET: Final = 18
CONFIG_ENTRY: Final = "tinyhd.config"
"""Where the file's metadata has the configuration, as JSON."""
INPUT_ENTRY: Final = "tinyhd.input"
TOLERANCE: Final = 1e-4
"""Largest difference between a map of the file and the network's, of values in 0..1."""
RELATIVE_TOLERANCE: Final = 1e-3
"""The same as a share of each value: maps mean something only up to their sum, and may be small."""


class ExportError(TinyHDError):
    """A network cannot be exported, a file is no export of ours, or a package is missing."""


class _Saliency(nn.Module):
    """The part of a network that an exported file computes."""

    def __init__(self, model: TinyHD) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor) -> Tensor:
        saliency: Tensor = self.model(clip).saliency
        return saliency


def export_onnx(model: TinyHD, path: Path, *, batch: int = 1) -> float:
    """Write a network as ONNX and compare the file with the network.

    The file has one input, ``clip``: float32 ``(batch, 3, 16, H, W)``, RGB in 0..1 centred and
    scaled as :func:`student.tinyhd.normalise_frames` does, and one output, ``saliency``. Its
    metadata tells the configuration and the normalisation.

    Args:
        model: The network, whatever form it is in.
        path: The file, written whole or not at all.
        batch: Clips at once.

    Returns:
        The largest difference between the file's maps, run with ONNX Runtime, and the network's.

    Raises:
        ExportError: If a package is missing or the file's maps are not the network's.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    onnx = _import_onnx()
    import_onnxruntime()
    if not path.parent.is_dir():
        raise ExportError(f"the folder {path.parent} does not exist; make it or choose another")
    config = model.config
    plain = _Saliency(model.for_inference()).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    clip = torch.randn(batch, 3, CLIP_FRAMES, config.height, config.width, generator=generator)
    clip = clip.to(next(model.parameters()).device)
    with torch.inference_mode(), _quietly():
        program = torch.onnx.export(
            plain,
            (clip,),
            input_names=["clip"],
            output_names=["saliency"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ExportError("PyTorch's exporter gave nothing")
    proto = program.model_proto
    for node in proto.graph.node:  # lines of this program's source, with this machine's paths
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    notes = {
        CONFIG_ENTRY: json.dumps(config.to_dict()),
        INPUT_ENTRY: json.dumps(
            {"colour": "RGB", "range": [0, 1], "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        ),
    }
    onnx.helper.set_model_props(proto, notes)
    partial = path.with_name(f"{path.name}.partial")
    try:
        onnx.save(proto, str(partial))
        with torch.inference_mode():
            expected = plain(clip).cpu().numpy()
        differences = np.abs(_run(partial, clip.cpu().numpy()) - expected)
        share = float((differences / expected).max())
        difference = float(differences.max())
        if not (difference <= TOLERANCE and share <= RELATIVE_TOLERANCE):
            raise ExportError(
                f"the exported file's maps differ from the network's by {difference:.1e}, or "
                f"{share:.1e} of a value; nothing was written"
            )
        partial.replace(path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return difference


def read_onnx_config(path: Path) -> TinyHDConfig:
    """Read the configuration that an exported file carries.

    Raises:
        ExportError: If the file is not one of :func:`export_onnx`.
    """
    onnx = _import_onnx()
    try:
        proto = onnx.load(str(path), load_external_data=False)
        notes = {entry.key: entry.value for entry in proto.metadata_props}
        config = TinyHDConfig.from_dict(json.loads(notes[CONFIG_ENTRY]))
        (clip,) = (_shape_of(value) for value in proto.graph.input)
        (saliency,) = (_shape_of(value) for value in proto.graph.output)
        others = [w.name for w in proto.graph.initializer if w.data_location == w.EXTERNAL]
    except FileNotFoundError as error:
        raise ExportError(f"{path} does not exist") from error
    except Exception as error:  # protobuf's and JSON's errors have no common base
        raise ExportError(f"{path} is not an ONNX file of tinyhd export, or is damaged") from error
    if others:  # a file that makes a program read other files is not trusted
        raise ExportError(f"{path} keeps weights in other files ({others[0]}); ours do not")
    size = (config.height, config.width)
    frames = (config.output_frames,) if config.is_multi else ()
    if clip[1:] != (3, CLIP_FRAMES, *size) or saliency[1:] != (1, *frames, *size):
        raise ExportError(
            f"{path} takes {clip} and gives {saliency}, which is not its configuration's "
            f"{CLIP_FRAMES} frames of {config.height}x{config.width} to {config.output_frames} maps"
        )
    return config


def _shape_of(value: Any) -> tuple[int, ...]:  # noqa: ANN401 - protobuf's ValueInfo
    return tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)


def _run(path: Path, clip: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    onnxruntime = import_onnxruntime()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    saliency: npt.NDArray[np.float32] = session.run(None, {"clip": clip})[0]
    return saliency


def import_onnxruntime() -> Any:  # noqa: ANN401 - the module
    """Import an optional package, or say how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(missing_package("onnxruntime", "onnx")) from error
    return onnxruntime


def _import_onnx() -> Any:  # noqa: ANN401 - the module
    try:
        import onnx
        import onnxscript  # noqa: F401 - PyTorch's exporter needs it
    except ImportError as error:
        raise ExportError(missing_package(error.name or "onnx", "onnx")) from error
    return onnx


def missing_package(package: str, extra: str) -> str:
    """Say how to install what an optional feature needs."""
    return f"the package {package} is not installed; install it with: pip install 'tinyhd[{extra}]'"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's notes on itself from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
