from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stores.videos import decode_video
from student.blocks import shuffle_up
from student.config import TinyHDConfig, build_config
from student.tinyhd import TinyHD, normalise_frames

PARAMETERS = {1: 3_940_981, 2: 1_370_291, 4: 513_121, 8: 779_933}
"""Of TinyHD-S with three decoders, as published."""


def fill(model: TinyHD, published_keys: list[str]) -> None:
    """Give every tensor the values that follow from its published name."""
    state = {}
    for (key, tensor), name in zip(model.state_dict().items(), published_keys, strict=True):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        shape, last = tuple(tensor.shape), name.rsplit(".", 1)[-1]
        if last == "num_batches_tracked":
            values = np.zeros(shape)
        elif last == "running_var" or (last == "weight" and len(shape) == 1):
            values = rng.uniform(0.5, 1.5, shape)
        elif last == "weight":
            values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            values = rng.standard_normal(shape) * 0.1
        state[key] = torch.from_numpy(np.asarray(values)).to(tensor.dtype)
    model.load_state_dict(state)


def published_keys(shared: Path, reduction: int) -> list[str]:
    keys = json.loads((shared / "specs" / f"student_keys_s_rc{reduction}.json").read_text())["keys"]
    return [key for key, _, _ in keys]


def synthetic_clip() -> torch.Tensor:
    values = np.random.default_rng(0).standard_normal((1, 3, 16, 192, 256))
    return torch.from_numpy(values.astype(np.float32))


def assert_is_golden(model: TinyHD, clip: torch.Tensor, path: Path, *, atol: float) -> None:
    golden = np.load(path)
    with torch.inference_mode():
        output = model.eval()(clip)
    found = {"out": output.saliency, **{f"map_{k}": v for k, v in output.maps.items()}}
    for name, values in found.items():
        reference = golden[name]
        sampled = values[..., ::4, ::4].reshape(reference.shape).numpy()
        np.testing.assert_allclose(sampled, reference, atol=atol, rtol=0, err_msg=name)
        sums = values.double().sum((-2, -1)).reshape(golden[f"{name}_sum"].shape)
        np.testing.assert_allclose(sums.numpy(), golden[f"{name}_sum"], rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("reduction", PARAMETERS)
def test_networks_have_the_published_number_of_parameters(reduction: int) -> None:
    model = TinyHD(TinyHDConfig(channel_reduction=reduction))  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[reduction]
    assert len(model.state_dict()) == 980


@pytest.mark.shared
@pytest.mark.parametrize("clip", ["synth", "clip000", "clip100"])
def test_published_weights_give_the_published_maps(shared: Path, clip: str) -> None:
    file = shared / "weights" / "d123s_rc4_rc1T.pth"
    published = torch.load(file, map_location="cpu", weights_only=True)["student_model"]
    model = TinyHD(build_config("tinyhd-s-rc4"))
    # Layers are declared in the published order, so the tensors' order is enough to match them.
    ours = model.state_dict()
    assert [t.shape for t in ours.values()] == [t.shape for t in published.values()]
    model.load_state_dict(dict(zip(ours, published.values(), strict=True)))
    if clip == "synth":
        tensor = synthetic_clip()
    else:
        start = int(clip.removeprefix("clip"))
        decoded = enumerate(decode_video(shared / "video" / "0068.AVI"))
        frames = [frame for index, frame in decoded if start <= index < start + 16]
        pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
        resized = F.interpolate(pixels, (192, 256), mode="bilinear") / 255
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        tensor = ((resized - mean) / std).transpose(0, 1)[None]
    golden = shared / "goldens" / "student" / f"s_rc4_pub__{clip}.npz"
    assert_is_golden(model, tensor, golden, atol=1e-5)


@pytest.mark.shared
@pytest.mark.parametrize("reduction", [1, 2])
def test_filled_networks_give_the_published_maps(shared: Path, reduction: int) -> None:
    model = TinyHD(TinyHDConfig(channel_reduction=reduction))  # type: ignore[arg-type]
    fill(model, published_keys(shared, reduction))
    golden = shared / "goldens" / "student" / f"s_rc{reduction}_fill__synth.npz"
    assert_is_golden(model, synthetic_clip(), golden, atol=5e-4)


@pytest.mark.parametrize("reduction", PARAMETERS)
@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_maps_have_the_size_of_the_clip(reduction: int, size: tuple[int, int]) -> None:
    height, width = size
    config = TinyHDConfig(channel_reduction=reduction, height=height, width=width)  # type: ignore[arg-type]
    with torch.inference_mode():
        output = TinyHD(config).eval()(torch.randn(2, 3, 16, height, width))
    assert output.saliency.shape == (2, 1, height, width)
    shapes = {name: tuple(maps.shape) for name, maps in output.maps.items()}
    one = (2, 1, 1, height, width)
    assert shapes == {"d1": (2, 4, 1, height, width), "d2": one, "d3": one}
    assert output.saliency.min() > 0
    assert output.saliency.max() < 1


def test_shuffle_is_pytorchs_on_every_frame() -> None:
    features = torch.randn(2, 12, 3, 4, 5)
    frames = [F.pixel_shuffle(features[:, :, t], 2) for t in range(3)]
    torch.testing.assert_close(shuffle_up(features), torch.stack(frames, 2), rtol=0, atol=0)


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = TinyHD(build_config("tinyhd-s-rc4", height=64, width=64))
    output = model(torch.randn(2, 3, 16, 64, 64))
    (output.saliency_logits.sum() + sum(m.sum() for m in output.map_logits.values())).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(1, 3, 15, 64, 64), "16"),
        (torch.zeros(1, 3, 16, 60, 64), "multiples of 32"),
        (torch.zeros(3, 16, 64, 64), "a clip must be"),
        (torch.zeros(1, 3, 16, 64, 64, dtype=torch.uint8), "floating point"),
    ],
)
def test_other_clips_are_refused(clip: torch.Tensor, message: str) -> None:
    model = TinyHD(build_config("tinyhd-s-rc4", height=64, width=64))
    with pytest.raises(ValueError, match=message):
        model(clip)


def test_frames_are_normalised_as_imagenet_wants() -> None:
    frames = torch.randint(0, 256, (1, 2, 4, 5, 3), dtype=torch.uint8)
    clip = normalise_frames(frames)
    assert clip.shape == (1, 3, 2, 4, 5)
    expected = (frames[0, 1, 2, 3, 2].item() / 255 - 0.406) / 0.225
    assert clip[0, 2, 1, 2, 3].item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="uint8"):
        normalise_frames(frames.float())
