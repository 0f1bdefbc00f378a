"""The example of docs/own-teacher.md, as it stands there; and weights that are looked at first."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from cli import cli
from distill import DistillSettings, label_videos
from stores.decode import decode_video
from stores.targets import TargetStore
from student import TinyHD, build_config, save_checkpoint
from student.reference import WeightsError
from teachers.base import TeacherSpec
from teachers.hd2s import Hd2sTeacher
from teachers.network import NetworkTeacher
from teachers.registry import build
from teachers.shared import Features, whole
from teachers.vinet_s import VinetSTeacher

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the example's teacher, in a module that Python finds."""
    page = (PROJECT / "docs" / "own-teacher.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 40
    (tmp_path / "my_teacher.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_teacher", raising=False)
    return "my_teacher:MyTeacher"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_example_labels_with_weights_of_its_own(
    example: str, tmp_path: Path, video_folder: Path
) -> None:
    weights = {"weight": torch.randn(1, 3, 8, 4, 4) / 10, "bias": torch.zeros(1)}
    torch.save({"state_dict": weights}, tmp_path / "my.pth")
    settings = DistillSettings(
        teacher=example, weights=tmp_path / "my.pth", executor="inline", shard_frames=16
    )
    store = tmp_path / "targets.zarr"
    label_videos([video_folder / "short.avi"], store, settings)
    labels = TargetStore.open(store).label_set("mine")
    teacher = build(example)
    frames = [teacher.resize(frame) for frame in decode_video(video_folder / "short.avi")]
    pixels = torch.from_numpy(np.stack([frames[0]] * 7 + frames)).permute(3, 0, 1, 2)[None] / 255
    expected = torch.nn.functional.conv3d(pixels, weights["weight"], stride=(1, 4, 4))[0, 0]
    stored = labels.read("short", 0, 24)["maps_16x24"][:, 0]
    assert np.abs(stored - expected.numpy()).max() <= 1 / 64 + 1e-4
    assert run("store", "verify", store, "--relabel", 2).exit_code == 1  # it needs its weights


def test_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("nowhere:Teacher", "json:Nothing", "json:dumps"):
        result = run("teachers", "check", name)
        assert result.exit_code == 1
        assert name.partition(":")[0] in result.output


def test_teachers_are_listed_with_their_licences() -> None:
    result = run("teachers")
    assert result.exit_code == 0
    assert "CC BY-NC" in result.output
    assert "sal2, sal3, sal4, sal5, out" in result.output


def test_good_weights_are_told_from_bad_ones(tmp_path: Path) -> None:
    weights = Hd2sTeacher(height=32, width=32).network.state_dict()
    check = ("teachers", "check", "hd2s", "--size", "32x32", "--weights", tmp_path / "hd2s.pth")
    torch.save(weights, tmp_path / "hd2s.pth")
    result = run(*check)
    assert result.exit_code == 0, result.output
    assert hashlib.sha256((tmp_path / "hd2s.pth").read_bytes()).hexdigest() in result.output
    for value, problem in ((float("nan"), "not finite"), (0.0, "constant")):
        torch.save({**weights, "last_conv.weight": torch.full((1, 4, 1, 1), value)},
                   tmp_path / "hd2s.pth")  # fmt: skip
        result = run(*check)
        assert result.exit_code == 1
        assert f": {problem}" in result.output.splitlines()[-1]


def test_weights_of_something_else_are_recognised(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "ours.pt", TinyHD(build_config("tinyhd-s-rc4")))
    torch.save(Hd2sTeacher().network.state_dict(), tmp_path / "hd2s.pth")
    size = ("--size", "32x32")
    result = run("teachers", "check", "hd2s", "--weights", tmp_path / "ours.pt", *size)
    assert "it is a checkpoint of TinyHD Toolkit: use --teacher assistant" in result.output
    assert (
        run("teachers", "check", "hd2s", "--weights", tmp_path / "hd2s.pth", *size).exit_code == 0
    )
    data = (tmp_path / "hd2s.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(data[: len(data) // 2])
    result = run("teachers", "check", "tased", "--weights", tmp_path / "hd2s.pth")
    assert "they fit the teacher 'hd2s'" in result.output
    result = run("teachers", "check", "hd2s", "--weights", tmp_path / "half.pth")
    assert "its end is missing" in result.output
    assert "needs its weights" in run("teachers", "check", "hd2s").output
    # The names of ViNet-S are those of ViNet.
    torch.save(VinetSTeacher().network.state_dict(), tmp_path / "vinet-s.pth")
    for name in ("vinet", "tased"):
        result = run("teachers", "check", name, "--weights", tmp_path / "vinet-s.pth")
        assert "they fit the teacher 'vinet-s'" in result.output


class Odd(NetworkTeacher):
    """A teacher with numbers that are not among its weights."""

    title = "Odd"

    def build_network(self) -> nn.Module:
        network = nn.Sequential(nn.Conv3d(3, 1, 1))
        network.register_buffer("scale", torch.tensor([2.0]), persistent=False)
        network.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]  # type: ignore[assignment]
        return network

    def make_spec(self) -> TeacherSpec:
        return Hd2sTeacher(height=32, width=32).spec

    def logits(self, windows: Features) -> dict[str, torch.Tensor]:
        return {"maps_16x16": self.network(whole(windows))[:, 0]}


def test_what_is_not_among_the_weights_outlives_an_import() -> None:
    teacher = Odd()
    teacher.import_weights(teacher.network.state_dict())
    assert teacher.network.get_buffer("scale").tolist() == [2.0]
    with pytest.raises(WeightsError, match="tensors by name, got a list"):
        teacher.import_weights([])  # type: ignore[arg-type]


def test_a_span_takes_its_frames_and_no_others() -> None:
    teacher = Hd2sTeacher(height=32, width=64)
    frames = torch.zeros(40, 3, 32, 64)
    with pytest.raises(ValueError, match="takes frames 5-21, got 10-40"):
        teacher.label(frames[10:], first=10, span=range(20, 21), num_frames=40)
    for span in (range(0), range(38, 41), range(-1, 3)):
        with pytest.raises(ValueError, match="cannot label"):
            teacher.label(frames, first=0, span=span, num_frames=40)
