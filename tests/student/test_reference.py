from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from student.checkpoints import save_checkpoint
from student.config import TinyHDConfig, build_config
from student.recipe import Optimisation
from student.reference import (
    WeightsError,
    export_weights,
    import_weights,
    inflate_encoder,
    published_names,
    read_weights,
)
from student.tinyhd import TinyHD
from student.trainer import build_optimizer
from tests.student.networks import CONFIGS, PUBLISHED, fill_value, fill_weights


@pytest.mark.parametrize("name", ["s_rc4", "m_rc4_d2d1d3", "m_d2only", "m_rc4_d1d2_ft"])
def test_exported_weights_are_those_that_were_imported(name: str) -> None:
    weights = fill_weights(CONFIGS[name])
    exported = export_weights(import_weights(weights, **CONFIGS[name]))
    assert list(exported) == list(weights)
    for key, tensor in exported.items():
        assert tensor.dtype == weights[key].dtype
        assert torch.equal(tensor, weights[key]), key


@pytest.mark.shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(shared: Path, name: str) -> None:
    listed = json.loads((shared / "specs" / f"student_keys_{name}.json").read_text())["keys"]
    exported = export_weights(import_weights(fill_weights(CONFIGS[name]), **CONFIGS[name]))
    found = [[key, list(t.shape), str(t.dtype)] for key, t in exported.items()]
    wanted = [[key, shape, f"torch.{dtype.removeprefix('torch.')}"] for key, shape, dtype in listed]
    assert found == wanted


def test_blocks_are_numbered_in_the_order_of_the_decoders() -> None:
    names = published_names(TinyHD(TinyHDConfig(decoders=("d2", "d1"), single=(True, True))))
    prefix = "aggregator.aggregate_adapter"
    assert names["decoders.d2.head.project.0.weight"] == f"{prefix}.7.conv.2.weight"
    assert names["decoders.d1.branches.0.blocks.0.expand.1.bias"] == f"{prefix}.8.conv.0.1.bias"
    assert names["encoder.blocks.0.project.0.weight"] == "encoder.encoder.1.conv.1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.decoder.0.bias": None}, r"missing decoder\.decoder\.0\.bias"),
        ({"encoder.head.weight": torch.zeros(1)}, r"not expected encoder\.head\.weight"),
        (
            {"encoder.encoder.0.0.weight": torch.zeros(8, 3, 3, 3)},
            r"encoder\.0\.0\.weight with shape \(8, 3, 3, 3\) instead of \(8, 3, 3, 3, 3\)",
        ),
        (
            {"encoder.encoder.0.1.bias": torch.zeros(8, dtype=torch.float64)},
            r"encoder\.encoder\.0\.1\.bias of torch\.float64 instead of torch\.float32",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, Tensor | None], message: str) -> None:
    weights = fill_weights(CONFIGS["s_rc4"])
    for key, value in change.items():
        if value is None:
            del weights[key]
        else:
            weights[key] = value
    with pytest.raises(WeightsError, match=message):
        import_weights(weights, **CONFIGS["s_rc4"])


def test_weights_of_another_variant_are_refused() -> None:
    with pytest.raises(WeightsError, match="instead of"):
        import_weights(fill_weights(CONFIGS["m_rc4"]), **CONFIGS["s_rc4"])


class Forbidden:
    """Runs when it is unpickled, if anything does."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("was-run"),))  # type: ignore[return-value]


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    model = TinyHD(build_config("tinyhd-s-rc4", height=32, width=32))
    save_checkpoint(tmp_path / "ours.pt", model)
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"student_model": {"a": 1}}, tmp_path / "numbers.pth")
    torch.save({"student_model": Forbidden()}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name, message in {
        "ours.pt": "already",
        "list.pth": "holds no weights",
        "numbers.pth": "'a' is not a tensor",
        "code.pth": "is refused: reading it would run code",
        "text.pth": "is not a file of PyTorch weights",
        "none.pth": "does not exist",
    }.items():
        with pytest.raises(WeightsError, match=message):
            read_weights(tmp_path / name)
    assert not Path("was-run").exists()


def picture_weights() -> dict[str, Tensor]:
    """Make a MobileNetV2's weights, as torchvision names and shapes them."""
    wide = TinyHD(TinyHDConfig())
    names = published_names(wide)
    weights = {}
    for key, value in wide.encoder.state_dict().items():
        name = names[f"encoder.{key}"].replace("encoder.encoder", "features")
        shape = tuple(value.shape)
        weights[name] = fill_value(name, shape[:2] + shape[3:] if len(shape) == 5 else shape)
    return weights


@pytest.mark.shared
@pytest.mark.parametrize("name", ["m_rc1", "s_rc1", "m_rc2", "m_rc4", "m_rc8"])
def test_reference_inflation_is_the_published_one(shared: Path, name: str) -> None:
    golden = np.load(shared / "goldens" / "student" / f"inflate_{name}.npz")
    model = TinyHD(TinyHDConfig.from_dict({**CONFIGS[name], "decoders": ["d1", "d2", "d3"]}))
    inflate_encoder(model, picture_weights(), rule="reference")
    weights = export_weights(model)
    kept = [key for key in weights if key.startswith("encoder.") and "num_" not in key]
    assert kept == list(golden["keys"])
    for index, key in enumerate(kept):
        flat = weights[key].double().flatten().numpy()
        assert flat.sum() == pytest.approx(golden["sum"][index], abs=1e-4), key
        assert np.abs(flat).sum() == pytest.approx(golden["abssum"][index], rel=1e-5), key
        positions = np.arange(16) * (len(flat) - 1) // 15
        np.testing.assert_allclose(flat[positions], golden["samples"][index], rtol=1e-5, atol=1e-7)
    for full in (key for key in golden.files if key.startswith("full:")):
        found = weights[full.removeprefix("full:")].numpy()
        np.testing.assert_allclose(found, golden[full], rtol=1e-5, atol=1e-7)


def test_aligned_inflation_sees_a_still_clip_as_the_picture() -> None:
    """In the middle of the clip, where no kernel looks beyond its ends."""
    model = TinyHD(TinyHDConfig()).eval()
    weights = picture_weights()
    inflate_encoder(model, weights)
    picture = torch.randn(1, 3, 64, 64)
    stem = torch.nn.functional.conv2d(picture, weights["features.0.0.weight"], None, 2, 1)
    with torch.inference_mode():
        clip = model.encoder.stem[0](picture[:, :, None].expand(-1, -1, 16, -1, -1))
    torch.testing.assert_close(clip[:, :, 4], stem)


@pytest.mark.parametrize("reduction", [2, 4])
def test_aligned_inflation_of_equal_channels_changes_nothing(reduction: int) -> None:
    """Where the channels of a group are equal, a narrow layer does what the wide one does."""
    narrow, rows = TinyHD(TinyHDConfig(channel_reduction=reduction)), 32 * reduction  # type: ignore[arg-type]
    weights = picture_weights()
    name = "features.2.conv.0.0.weight"  # 16 to 96 channels
    outputs, inputs = 96 // reduction, 16 // reduction
    weights[name] = torch.randn(outputs, 16, 1, 1).repeat(reduction, 1, 1, 1)
    inflate_encoder(narrow, weights)
    features = torch.randn(rows, inputs)
    wide = features.repeat(1, reduction) @ weights[name][:, :, 0, 0].T
    ours = features @ narrow.get_parameter("encoder.blocks.1.expand.0.weight")[:, :, 0, 0, 0].T
    torch.testing.assert_close(ours, wide[:, :outputs])


def test_inflation_says_what_does_not_fit() -> None:
    model, weights = TinyHD(build_config("tinyhd-s-rc4")), picture_weights()
    with pytest.raises(ValueError, match="rule"):
        inflate_encoder(model, weights, rule="other")  # type: ignore[arg-type]
    weights["features.18.0.weight"] = torch.zeros(640, 320, 1, 1)
    with pytest.raises(WeightsError, match=r"features\.18\.0\.weight has shape \(640"):
        inflate_encoder(model, weights)
    del weights["features.0.0.weight"]
    with pytest.raises(WeightsError, match=r"no features\.0\.0\.weight"):
        inflate_encoder(model, weights)


@pytest.mark.shared
def test_optimiser_treats_every_tensor_as_published(shared: Path) -> None:
    golden = json.loads((shared / "goldens" / "student" / "optim_groups_m_rc4.json").read_text())
    model = TinyHD(build_config("tinyhd-m-rc4"))
    names, config = published_names(model), Optimisation()
    name_of = {id(parameter): names[name] for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config)
    found = {
        name_of[id(parameter)]: (group["lr_scale"] * config.learning_rate, group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {key: pytest.approx((rate, decay)) for key, rate, decay in golden["groups"]}
    assert optimizer.defaults["momentum"] == golden["momentum"]
    assert not optimizer.defaults["nesterov"]
