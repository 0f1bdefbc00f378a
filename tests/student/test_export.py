from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from student.checkpoints import CheckpointError, save_checkpoint
from student.config import TinyHDConfig
from student.export import ExportError, export_onnx, read_onnx_config
from student.reference import import_weights, read_weights
from student.runtimes import RuntimeName, load_runtime
from student.tinyhd import TinyHD
from tests.student.networks import CONFIGS, fill_weights

RUNTIMES: tuple[RuntimeName, ...] = ("torch", "onnxruntime", "openvino")


def clips(number: int, *, seed: int = 0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((number, 3, 16, 32, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TinyHD, Path, Path]]:
    """Networks with their checkpoint and their exported file, which takes two clips."""
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for name in ("s_rc4", "m_rc8_d2d3_tf", "m_rc4"):
        model = import_weights(fill_weights(CONFIGS[name]), **CONFIGS[name], height=32, width=64)
        save_checkpoint(folder / f"{name}.pt", model)
        difference = export_onnx(model, folder / f"{name}.onnx", batch=2)
        assert difference < 1e-4
        made[name] = (model, folder / f"{name}.pt", folder / f"{name}.onnx")
    return made


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["s_rc4", "m_rc8_d2d3_tf", "m_rc4"])
def test_runtimes_say_what_the_network_says(
    files: dict[str, tuple[TinyHD, Path, Path]], name: str, runtime: RuntimeName
) -> None:
    """Also of fewer clips than an exported file takes."""
    model, checkpoint, exported = files[name]
    file = checkpoint if runtime == "torch" else exported
    student = load_runtime(file, runtime=runtime, batch=2, threads=1)
    assert student.config == model.config
    assert student.batch == 2
    for number in (2, 1):
        given = clips(number, seed=number)
        with torch.inference_mode():
            expected = model(torch.from_numpy(given)).saliency.numpy()
        found = student.predict(given)
        assert found.shape == (number, model.config.output_frames, 32, 64)
        np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-4)


def test_results_of_a_runtime_outlive_its_next_clip(
    files: dict[str, tuple[TinyHD, Path, Path]],
) -> None:
    student = load_runtime(files["s_rc4"][2], runtime="openvino", threads=1)
    first = student.predict(clips(2))
    kept = first.copy()
    student.predict(clips(2, seed=5))
    np.testing.assert_array_equal(first, kept)


def test_exported_file_knows_its_configuration_and_no_path(
    files: dict[str, tuple[TinyHD, Path, Path]],
) -> None:
    model, _, exported = files["m_rc4"]
    assert read_onnx_config(exported) == model.config
    proto = onnx.load(str(exported))
    onnx.checker.check_model(proto)
    assert [
        (i.name, [d.dim_value for d in i.type.tensor_type.shape.dim]) for i in proto.graph.input
    ] == [("clip", [2, 3, 16, 32, 64])]
    assert [o.name for o in proto.graph.output] == ["saliency"]
    assert b".py" not in exported.read_bytes()
    assert [file.name for file in exported.parent.glob("*.partial")] == []


def test_a_checkpoint_is_exported_for_other_runtimes_on_the_way(
    files: dict[str, tuple[TinyHD, Path, Path]],
) -> None:
    model, checkpoint, _ = files["s_rc4"]
    student = load_runtime(checkpoint, runtime="onnxruntime")
    with torch.inference_mode():
        expected = model(torch.from_numpy(clips(1))).saliency.numpy()
    np.testing.assert_allclose(student.predict(clips(1)), expected, atol=1e-4)


def test_files_that_do_not_go_together_are_refused(
    files: dict[str, tuple[TinyHD, Path, Path]], tmp_path: Path
) -> None:
    _, checkpoint, exported = files["s_rc4"]
    with pytest.raises(ValueError, match="give the checkpoint"):
        load_runtime(exported, runtime="torch")
    with pytest.raises(ValueError, match="computes on the CPU"):
        load_runtime(checkpoint, runtime="openvino", device="cuda")
    (tmp_path / "text.onnx").write_text("not a network")
    (tmp_path / "text.pt").write_text("not a network")
    (tmp_path / "cut.onnx").write_bytes(exported.read_bytes()[:-5000])
    foreign = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    for name in ("text.onnx", "cut.onnx", "foreign.onnx"):
        with pytest.raises(ExportError, match="is not an ONNX file of tinyhd export"):
            load_runtime(tmp_path / name, runtime="onnxruntime")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_runtime(tmp_path / "text.pt")


def test_graphs_that_are_not_their_configurations_are_refused(
    files: dict[str, tuple[TinyHD, Path, Path]], tmp_path: Path
) -> None:
    def changed(name: str, change: Callable[[Any], None]) -> Path:
        proto = onnx.load(str(files["m_rc4"][2]))
        change(proto)
        (tmp_path / name).write_bytes(proto.SerializeToString())
        return tmp_path / name

    def other_frames(proto: Any) -> None:  # noqa: ANN401
        for entry in proto.metadata_props:
            entry.value = entry.value.replace('"output_frames": 16', '"output_frames": 8')

    def other_file(proto: Any) -> None:  # noqa: ANN401
        proto.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        entry = proto.graph.initializer[0].external_data.add()
        entry.key, entry.value = "location", "../weights"

    def unknown_operator(proto: Any) -> None:  # noqa: ANN401
        proto.graph.node[5].op_type = "Unheard"

    for runtime in RUNTIMES[1:]:
        with pytest.raises(ExportError, match="not its configuration's"):
            load_runtime(changed("frames.onnx", other_frames), runtime=runtime)
        with pytest.raises(ExportError, match="weights in other files"):
            load_runtime(changed("files.onnx", other_file), runtime=runtime)
        with pytest.raises(ExportError, match="cannot read"):
            load_runtime(changed("operator.onnx", unknown_operator), runtime=runtime)


def test_devices_and_batches_that_are_not_there_are_refused(
    files: dict[str, tuple[TinyHD, Path, Path]],
) -> None:
    _, checkpoint, exported = files["s_rc4"]
    for device in ("foo", "meta", "cuda:77"):
        with pytest.raises(ValueError, match=f"cannot compute on '{device}'"):
            load_runtime(checkpoint, device=device)
    with pytest.raises(ValueError, match="takes 2 clips at once, not 4"):
        load_runtime(exported, runtime="onnxruntime", batch=4)


def test_maps_that_differ_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import student.export

    model = TinyHD(
        TinyHDConfig(channel_reduction=8, decoders=("d3",), single=(True,), height=32, width=32)
    )
    model.fusion.get_parameter("bias").data.fill_(-9)  # maps of very small values
    constant = np.full((1, 1, 32, 32), torch.tensor(-9.1).sigmoid().item(), np.float32)
    monkeypatch.setattr(student.export, "_run", lambda *_: constant)
    with pytest.raises(ExportError, match="differ"):
        export_onnx(model, tmp_path / "wrong.onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"onnxscript.*tinyhd\[onnx\]"):
        export_onnx(TinyHD(TinyHDConfig(channel_reduction=4)), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("kind", ["s", "m"])
def test_exported_published_networks_give_the_published_maps(
    shared: Path, tmp_path: Path, kind: str
) -> None:
    weights = read_weights(shared / "weights" / f"d123{kind}_rc4_rc1T.pth")
    export_onnx(import_weights(weights, **CONFIGS[f"{kind}_rc4"]), tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    clip = rng.standard_normal((1, 3, 16, 192, 256)).astype(np.float32)
    golden = np.load(shared / "goldens" / "student" / f"{kind}_rc4_pub__synth.npz")
    for runtime in RUNTIMES[1:]:
        found = load_runtime(tmp_path / "model.onnx", runtime=runtime).predict(clip)[..., ::4, ::4]
        np.testing.assert_allclose(found.reshape(golden["out"].shape), golden["out"], atol=1e-5)
