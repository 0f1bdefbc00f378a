"""Checkpoints: files that carry weights together with the configuration they belong to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from stores.errors import TinyHDError
from student.config import TinyHDConfig
from student.tinyhd import TinyHD

FORMAT: Final = "tinyhd-checkpoint"
VERSION: Final = 1
CODE: Final = re.compile(r"GLOBAL ([\w.]+)")
"""What PyTorch says of a pickle that names something else than tensors and plain values."""
CUT_OFF: Final = ("failed finding central directory", "unexpected EOF", "Ran out of input")
"""What it says of a file that ends too early."""


class CheckpointError(TinyHDError):
    """A file is no checkpoint of ours, is damaged, or does not fit what it is wanted for."""


def save_checkpoint(path: Path, model: TinyHD, **state: Any) -> None:  # noqa: ANN401 - plain values
    """Write a checkpoint, whole or not at all.

    Args:
        path: The file; an older one is replaced.
        model: Its weights and configuration are kept.
        state: What else must survive; tensors and plain values only.

    Raises:
        CheckpointError: If the file cannot be written.
        ValueError: If the network is in its form for inference.
    """
    if model.is_folded:
        raise ValueError("the form for inference is not kept; save the network that it was made of")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": model.config.to_dict(),
        "weights": model.state_dict(),
        **state,
    }
    save_whole(path, content)


def save_whole(path: Path, content: Mapping[str, Any]) -> None:
    """Write a PyTorch file, whole or not at all.

    Raises:
        CheckpointError: If it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        partial.unlink(missing_ok=True)
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot write {path}: {reason}") from error
    partial.replace(path)


def read_whole(path: Path, *, kind: str) -> Any:  # noqa: ANN401 - whatever the file holds
    """Read a PyTorch file that should be of a ``kind``; nothing in it is run.

    Raises:
        CheckpointError: If it is not there, or no such file, or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except Exception as error:  # damaged bytes make an unpickler fail in any way there is
        if code := CODE.search(str(error)):
            raise CheckpointError(
                f"{path} is refused: reading it would run code ({code[1]}); only tensors and plain "
                "values are read"
            ) from error
        if isinstance(error, EOFError) or any(words in str(error) for words in CUT_OFF):
            raise CheckpointError(
                f"{path} is not {kind} as a whole: its end is missing; copy or download it again"
            ) from error
        raise CheckpointError(f"{path} is not {kind}, or is damaged") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in the file is run.

    Raises:
        CheckpointError: If it is not there, damaged, or something else.
    """
    content = read_whole(path, kind="a checkpoint")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a PyTorch file, but not a checkpoint of TinyHD Toolkit")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content.get('version')}, this program reads {VERSION}"
        )
    return content


def load_model(path: Path) -> TinyHD:
    """Build the network of a checkpoint, with its weights, ready to predict.

    Raises:
        CheckpointError: If the file cannot be read or its parts do not fit each other.
    """
    content = read_checkpoint(path)
    try:
        model = TinyHD(TinyHDConfig.from_dict(content["config"]))
        model.load_state_dict(content["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__
        raise CheckpointError(
            f"the weights in {path} do not fit its configuration: {reason}"
        ) from error
    return model.eval()
