from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stores.decode import decode_video
from student.blocks import InvertedResidual
from student.checkpoints import save_checkpoint
from student.config import TinyHDConfig, build_config
from student.layers import double_frames, interpolate_up, shuffle_up
from student.reference import export_weights, import_weights, read_weights
from student.tinyhd import StudentOutput, TinyHD, normalise_frames
from tests.student.networks import (
    CONFIGS,
    GOLDENS,
    PUBLISHED,
    build_pair,
    describe,
    fill_weights,
    synthetic_clip,
)

PARAMETERS = {
    **{"m_rc1": 3_922_405, "m_rc2": 1_366_979, "m_rc4": 515_281, "m_rc8": 798_005},
    **{"s_rc1": 3_940_981, "s_rc2": 1_370_291, "s_rc4": 513_121, "s_rc8": 779_933},
    **{"s_d1only": 2_552_217, "s_d2only": 3_568_598, "s_d3only": 2_528_264},
    **{"m_d1only": 2_502_753, "m_d2only": 3_536_054, "m_d3only": 2_477_648},
    **{"m_rc1_d1last": 3_922_405, "m_rc1_fff": 3_922_405, "m_rc4_fff": 515_281},
    **{"m_rc1_n8": 3_922_405, "m_rc1_force": 3_922_405},
}
"""As published."""
PUBLISHED_FILES = {"s_rc4": "d123s_rc4_rc1T.pth", "m_rc4": "d123m_rc4_rc1T.pth"}


def real_clip(shared: Path, start: int) -> Tensor:
    """Return 16 frames of a real video the way the goldens were made, not the way ours are."""
    decoded = enumerate(decode_video(shared / "video" / "0068.AVI"))
    frames = [frame for index, frame in decoded if start <= index < start + 16]
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, (192, 256), mode="bilinear") / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return ((resized - mean) / std).transpose(0, 1)[None]


def assert_maps_are_golden(
    output: StudentOutput, golden: Mapping[str, np.ndarray], *, atol: float, map_atol: float
) -> None:
    found = {"out": output.saliency, **{f"map_{k}": v for k, v in output.maps.items()}}
    for name, values in found.items():
        full = values if values.ndim == 5 else values.unsqueeze(2)
        assert tuple(values.shape) == tuple(golden[f"{name}_shape"]) or name == "out"
        sampled = full[:, :, golden[f"{name}_frames"].tolist(), ::4, ::4].numpy()
        bound = atol if name == "out" else map_atol
        np.testing.assert_allclose(sampled, golden[name], atol=bound, rtol=0, err_msg=name)
        sums = full.double().sum((-2, -1)).numpy()
        np.testing.assert_allclose(sums, golden[f"{name}_sum"], rtol=1e-3, err_msg=name)
        peaks = full.flatten(-2).argmax(-1).numpy()
        rows, columns = np.divmod(peaks, 256)
        wanted_rows, wanted_columns = np.divmod(golden[f"{name}_argmax"], 256)
        assert np.abs(rows - wanted_rows).max() <= 1, name
        assert np.abs(columns - wanted_columns).max() <= 1, name


def assert_blocks_are_golden(
    blocks: Mapping[str, Tensor], golden: Mapping[str, np.ndarray]
) -> None:
    """Compare the blocks in order, so that the first that deviates is named."""
    for kind, number in (("enc", 19), ("agg", len(golden["agg_shape"])), ("lvl", 4)):
        for index in range(number):
            name, values = f"{kind} {index}", blocks[f"{kind}_{index}"]
            assert tuple(values.shape) == tuple(golden[f"{kind}_shape"][index]), name
            flat = values.contiguous().double().flatten()
            total, abs_total = golden[f"{kind}_sum"][index], golden[f"{kind}_abssum"][index]
            assert float(flat.sum()) == pytest.approx(total, abs=1e-3 * abs_total), name
            assert float(flat.abs().sum()) == pytest.approx(abs_total, rel=1e-3), name
            samples = golden[f"{kind}_samples"][index]
            positions = np.arange(len(samples)) * (len(flat) - 1) // (len(samples) - 1)
            scale = abs_total / len(flat)
            np.testing.assert_allclose(
                flat[positions.tolist()].numpy(),
                samples,
                atol=1e-3 * scale,
                rtol=1e-3,
                err_msg=name,
            )


@contextmanager
def kept_blocks(model: TinyHD) -> Iterator[dict[str, Tensor]]:
    """Keep what every block returns."""
    kept: dict[str, Tensor] = {}
    names: dict[torch.nn.Module, str] = {model.encoder.stem: "enc_0"}
    names |= {block: f"enc_{i}" for i, block in enumerate(model.encoder.blocks, 1)}
    decoder_blocks = [m for m in model.decoders.modules() if isinstance(m, InvertedResidual)]
    names |= {block: f"agg_{i}" for i, block in enumerate(decoder_blocks)}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: kept.update({name: out.clone()}))
        for module, name in names.items()
    ]
    hooks.append(
        model.encoder.register_forward_hook(
            lambda _, __, levels: kept.update({f"lvl_{i}": x for i, x in enumerate(levels)})
        )
    )
    yield kept
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_number_of_parameters(name: str) -> None:
    config = {**PUBLISHED[name], "decoders": list(PUBLISHED[name]["decoders"])}
    with torch.device("meta"):
        model = TinyHD(TinyHDConfig.from_dict(config))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_the_plain_network(name: str) -> None:
    """Also with another size and with several clips at once, folded for inference or not."""
    model, plain = build_pair(CONFIGS[name], fill_weights(CONFIGS[name]))
    goldens = json.loads(GOLDENS.read_text())[name]
    clips = torch.cat([synthetic_clip(32, 64), torch.randn(1, 3, 16, 32, 64)])
    with torch.inference_mode():
        saliency, maps = plain(clips)
        for form in (model, model.for_inference()):
            output = form(clips)
            torch.testing.assert_close(output.saliency, saliency, atol=5e-4, rtol=0)
            assert list(output.maps) == list(maps)
            for decoder in maps:
                torch.testing.assert_close(output.maps[decoder], maps[decoder], atol=2e-3, rtol=0)
            first = {decoder: values[:1] for decoder, values in output.maps.items()}
            found = describe(output.saliency[:1], first)
            assert found == {kind: pytest.approx(goldens[kind], abs=2e-3) for kind in goldens}
        alone = model(clips[1:])
    torch.testing.assert_close(alone.saliency, output.saliency[1:], atol=5e-4, rtol=0)


@pytest.mark.shared
@pytest.mark.parametrize("clip", ["synth", "clip000", "clip100"])
@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_published_weights_give_the_published_maps(shared: Path, name: str, clip: str) -> None:
    weights = read_weights(shared / "weights" / PUBLISHED_FILES[name])
    model = import_weights(weights, **CONFIGS[name])
    golden = np.load(shared / "goldens" / "student" / f"{name}_pub__{clip}.npz")
    start = clip.removeprefix("clip")
    tensor = synthetic_clip(192, 256) if clip == "synth" else real_clip(shared, int(start))
    with torch.inference_mode(), kept_blocks(model) as blocks:
        output = model(tensor)
    assert_blocks_are_golden(blocks, golden)
    assert_maps_are_golden(output, golden, atol=1e-5, map_atol=1e-5)
    with torch.inference_mode():
        output = model.for_inference()(tensor)
    assert_maps_are_golden(output, golden, atol=1e-5, map_atol=1e-5)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["m_rc1", "s_rc1", "s_rc2"])
def test_filled_networks_give_the_published_maps(shared: Path, name: str) -> None:
    model = import_weights(fill_weights(CONFIGS[name]), **CONFIGS[name])
    golden = np.load(shared / "goldens" / "student" / f"{name}_fill__synth.npz")
    with torch.inference_mode(), kept_blocks(model) as blocks:
        output = model(synthetic_clip(192, 256))
    assert_blocks_are_golden(blocks, golden)
    assert_maps_are_golden(output, golden, atol=5e-4, map_atol=2e-3)
    with torch.inference_mode():
        output = model.for_inference()(synthetic_clip(192, 256))
    assert_maps_are_golden(output, golden, atol=5e-4, map_atol=2e-3)


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
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


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_upsamplings_are_pytorchs(frames: int, batch: int) -> None:
    features = torch.randn(batch, 12, frames, 4, 5)
    shuffled = [F.pixel_shuffle(features[:, :, t], 2) for t in range(frames)]
    torch.testing.assert_close(shuffle_up(features), torch.stack(shuffled, 2), rtol=0, atol=0)
    for function, scale in ((interpolate_up, (1, 2, 2)), (double_frames, (2, 1, 1))):
        expected = F.interpolate(features, scale_factor=scale, mode="trilinear", align_corners=True)
        torch.testing.assert_close(function(features), expected)


@pytest.mark.parametrize("variant", ["tinyhd-s-rc4", "tinyhd-m-rc4"])
def test_every_parameter_learns(variant: str) -> None:
    torch.manual_seed(0)
    model = TinyHD(build_config(variant, height=64, width=64))
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
        (torch.zeros(1, 3, 16, 64, 64, dtype=torch.float64), "torch.float32 as the network"),
        (torch.full((1, 3, 16, 64, 64), 255.0), "must be normalised"),
        (torch.full((1, 3, 16, 64, 64), torch.nan), "must be normalised"),
        (torch.zeros(0, 3, 16, 64, 64), "a clip must be"),
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
    torch.testing.assert_close(normalise_frames(frames.float()), clip)
    with pytest.raises(ValueError, match="uint8"):
        normalise_frames(frames.double())


def test_form_for_inference_has_no_norms_and_is_not_kept(tmp_path: Path) -> None:
    model = TinyHD(build_config("tinyhd-s-rc4", height=64, width=64))
    form = model.for_inference()
    assert not [m for m in form.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert len([m for m in model.modules() if isinstance(m, torch.nn.BatchNorm3d)]) == 163
    with pytest.raises(ValueError, match="form for inference"):
        save_checkpoint(tmp_path / "form.pt", form)
    with pytest.raises(ValueError, match="form for inference"):
        export_weights(form)
    assert list(tmp_path.iterdir()) == []
