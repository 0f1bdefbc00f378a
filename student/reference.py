"""Published weights: TinyHD's own checkpoints, and 2-D MobileNetV2 weights to start from.

The published files name and nest layers in their own way and do not tell the configuration that
they belong to. Ours carry it: import a file once, and nobody has to know its flags again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from stores.errors import TinyHDError
from student.blocks import InvertedResidual
from student.checkpoints import FORMAT, CheckpointError, read_whole, save_whole
from student.config import TinyHDConfig
from student.tinyhd import TinyHD

PUBLISHED_ENTRY: Final = "student_model"
"""Where a published file holds the weights."""
SHOWN_KEYS: Final = 3
InflationRule = Literal["aligned", "reference"]


class WeightsError(TinyHDError, ValueError):
    """Weights do not fit the network, or a file holds none."""


def import_weights(
    state_dict: Mapping[str, Tensor],
    *,
    channel_reduction: int,
    decoders: Sequence[str],
    single: Sequence[bool],
    d1_last: bool = False,
    force_multi: bool = False,
    output_frames: int,
    height: int = 192,
    width: int = 256,
) -> TinyHD:
    """Build a network from weights with the published names.

    The flags have to be known: files of different flags have the same names and shapes.

    Args:
        state_dict: Tensors by published name; nothing may be missing or left over.
        channel_reduction: See :class:`student.config.TinyHDConfig`, also for the other flags.
        decoders: Decoders in their order.
        single: For each decoder, whether it makes one map for the whole clip.
        d1_last: Whether the fusion takes the maps of ``d1`` last.
        force_multi: Whether this is a TinyHD-M though all decoders are single.
        output_frames: Saliency maps per clip.
        height: Height of the frames that the network is for, in pixels.
        width: Their width.

    Returns:
        The network, in evaluation mode.

    Raises:
        ValueError: If the flags do not go together.
        WeightsError: If a tensor is missing, not expected, or of another shape or type.
    """
    config = TinyHDConfig.from_dict(
        {
            "channel_reduction": channel_reduction,
            "decoders": decoders if isinstance(decoders, str) else list(decoders),
            "single": single if isinstance(single, bool) else list(single),
            "d1_last": d1_last,
            "force_multi": force_multi,
            "output_frames": output_frames,
            "height": height,
            "width": width,
        }
    )
    model = TinyHD(config)
    names = published_names(model)
    ours = model.state_dict()
    _check_fit(state_dict, {names[key]: tensor for key, tensor in ours.items()})
    model.load_state_dict({key: state_dict[names[key]] for key in ours})
    return model.eval()


def export_weights(model: TinyHD) -> dict[str, Tensor]:
    """Return a network's weights under the published names, in the published order.

    Raises:
        ValueError: If the network is in its form for inference, which has no such weights.
    """
    if model.is_folded:
        raise ValueError("the form for inference has no published names; export its original")
    names = published_names(model)
    return {
        names[key]: tensor.detach().clone(memory_format=torch.contiguous_format)
        for key, tensor in model.state_dict().items()
    }


def published_names(model: TinyHD) -> dict[str, str]:
    """Return the published name of each tensor of the network's state dict."""
    prefixes = {
        "encoder.stem": "encoder.encoder.0",
        "fusion": "decoder.decoder.0",
        f"encoder.blocks.{len(model.encoder.blocks) - 1}": f"encoder.encoder."
        f"{len(model.encoder.blocks)}",
    }
    block_number = count()
    for path, module in model.named_modules():
        if not isinstance(module, InvertedResidual):
            continue
        if path.startswith("encoder."):
            target = f"encoder.encoder.{int(path.rsplit('.', 1)[1]) + 1}.conv"
        else:
            target = f"aggregator.aggregate_adapter.{next(block_number)}.conv"
        expands = not isinstance(module.expand, torch.nn.Identity)
        if expands:
            prefixes[f"{path}.expand"] = f"{target}.0"
        first = int(expands)
        prefixes[f"{path}.depthwise"] = f"{target}.{first}"
        prefixes[f"{path}.project.0"] = f"{target}.{first + 1}"
        prefixes[f"{path}.project.1"] = f"{target}.{first + 2}"
    names = {}
    for key in model.state_dict():
        prefix = next(p for p in _prefixes_of(key) if p in prefixes)
        names[key] = prefixes[prefix] + key[len(prefix) :]
    return names


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of published weights; nothing in the file is run.

    Both a bare state dict and one in the entry ``student_model`` are taken.

    Raises:
        WeightsError: If the file holds no such weights.
    """
    try:
        content = read_whole(path, kind="a file of PyTorch weights")
    except CheckpointError as error:
        raise WeightsError(str(error)) from error
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise WeightsError(
            f"{path} is a checkpoint of TinyHD Toolkit already, not published weights"
        )
    if isinstance(content, dict) and isinstance(content.get(PUBLISHED_ENTRY), dict):
        content = content[PUBLISHED_ENTRY]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{path} holds no weights by name")
    if odd := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        raise WeightsError(f"{path} holds no weights by name: {odd[0]!r} is not a tensor")
    return content


def save_published_weights(path: Path, model: TinyHD) -> None:
    """Write a network's weights as the published files have them.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    save_whole(path, {PUBLISHED_ENTRY: export_weights(model)})


def inflate_encoder(
    model: TinyHD, weights: Mapping[str, Tensor], *, rule: InflationRule = "aligned"
) -> None:
    """Start the encoder from a 2-D MobileNetV2, in place (Hu et al., WACV 2023).

    Each picture kernel is repeated over time. Norms take weight and bias; their statistics start
    anew. Reducing channels merges groups of ``channel_reduction`` channels whose indices are
    congruent:

    - ``aligned`` divides a repeated kernel by its length in time, so that a clip of equal frames
      gives what the picture gives, and merges the same groups everywhere: outputs are averaged,
      inputs added up.
    - ``reference`` does what the published code does: kernels are not divided (a kernel of three
      frames responds up to three times as strongly), and weights are averaged in the order in
      which they lie in memory, which mixes inputs and outputs.

    Args:
        model: Its encoder is overwritten, and nothing else.
        weights: State dict of torchvision's ``mobilenet_v2``; its classifier is not used.
        rule: How kernels and channels are carried over.

    Raises:
        ValueError: If there is no such rule.
        WeightsError: If a tensor is missing or of another shape.
    """
    if rule not in get_args(InflationRule):
        raise ValueError(f"rule must be one of {get_args(InflationRule)}, got {rule!r}")
    state = model.state_dict()
    for key, published in published_names(model).items():
        if not key.startswith("encoder."):
            continue
        name = published.replace("encoder.encoder", "features", 1)
        target, last = state[key], name.rsplit(".", 1)[-1]
        if last in ("running_mean", "running_var", "num_batches_tracked"):
            target.fill_(float(last == "running_var"))  # statistics of pictures do not fit clips
        else:
            target.copy_(_inflate(name, weights, target, model.config.channel_reduction, rule))


def _inflate(
    name: str, weights: Mapping[str, Tensor], target: Tensor, reduction: int, rule: InflationRule
) -> Tensor:
    outputs = len(target)
    if target.ndim == 1:
        source = _picture_tensor(name, weights, (outputs * reduction,))
        return source.reshape(reduction, outputs).mean(0)
    inputs, frames, *kernel = target.shape[1:]
    # Depthwise layers have one input, the stem a picture's three: those are not reduced.
    input_reduction = reduction if kernel == [1, 1] else 1
    wide = (outputs * reduction, inputs * input_reduction, *kernel)
    source = _picture_tensor(name, weights, wide)
    if rule == "reference":
        narrow = source.reshape(-1, outputs, inputs, *kernel).mean(0)
    else:
        groups = source.reshape(reduction, outputs, input_reduction, inputs, *kernel)
        narrow = groups.mean(0).sum(1) / frames
    return narrow[:, :, None].expand_as(target)


def _picture_tensor(name: str, weights: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    if name not in weights:
        raise WeightsError(
            f"the MobileNetV2 weights have no {name}; torchvision's names are wanted"
        )
    if tuple(weights[name].shape) != shape:
        raise WeightsError(
            f"{name} has shape {tuple(weights[name].shape)}, MobileNetV2 of width 1 has {shape}"
        )
    return weights[name].to(torch.float32)


def _check_fit(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    faults = []
    if missing := [key for key in wanted if key not in given]:
        faults.append(f"missing {_some(missing)}")
    if extra := [str(key) for key in given if key not in wanted]:
        faults.append(f"not expected {_some(extra)}")
    if odd := [key for key in wanted if key in given and not isinstance(given[key], Tensor)]:
        faults.append(f"no tensor {_some(odd)}")
    both = [key for key in wanted if key in given and key not in odd]
    if misshaped := [
        f"{key} with shape {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in both
        if given[key].shape != wanted[key].shape
    ]:
        faults.append(_some(misshaped))
    if mistyped := [
        f"{key} of {given[key].dtype} instead of {wanted[key].dtype}"
        for key in both
        if given[key].dtype != wanted[key].dtype
    ]:
        faults.append(_some(mistyped))
    if faults:
        raise WeightsError(f"the weights do not fit the configuration: {'; '.join(faults)}")


def _some(keys: Sequence[str]) -> str:
    more = len(keys) - SHOWN_KEYS
    return ", ".join(keys[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")


def _prefixes_of(key: str) -> list[str]:
    """Return the paths above a name, the longest first."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
