from __future__ import annotations

import pytest
import torch

from student.cost import computed_macs
from student.reference import import_weights
from student.streaming import StreamingStudent
from student.tinyhd import TinyHD
from tests.student.networks import CONFIGS, fill_weights


def network(name: str) -> TinyHD:
    model = import_weights(fill_weights(CONFIGS[name]), **CONFIGS[name], height=64, width=64)
    return model.for_inference()


def clip_of(video: torch.Tensor, newest: int) -> torch.Tensor:
    return video[:, :, [max(0, index) for index in range(newest - 15, newest + 1)]]


@pytest.mark.parametrize("name", ["s_rc1", "s_rc4", "s_rc8"])
@pytest.mark.parametrize(
    "order", [list(range(12)), [0, 1, 2, 5, 6, 7, 8], [3, 2, 1, 4, 6, 8, 8], list(range(14, 22))]
)
def test_maps_are_those_of_whole_clips(name: str, order: list[int]) -> None:
    """In any order, and where the first frame is repeated before the video's beginning."""
    model = network(name)
    torch.manual_seed(0)
    video = torch.randn(1, 3, 22, 64, 64)
    student = StreamingStudent(model)
    for newest in order:
        clip = clip_of(video, newest)
        with torch.inference_mode():
            expected = model(clip)
        found = student.see(clip, newest)
        torch.testing.assert_close(found.saliency, expected.saliency, atol=5e-5, rtol=0)
        for decoder, maps in expected.maps.items():
            torch.testing.assert_close(found.maps[decoder], maps, atol=5e-4, rtol=0)


def test_nothing_is_taken_from_another_video() -> None:
    model = network("s_rc4")
    student = StreamingStudent(model)
    videos = torch.randn(2, 3, 20, 64, 64)
    for newest in range(15, 18):
        student.see(clip_of(videos[:1], newest), newest)
    student.forget()
    clip = clip_of(videos[1:], 18)
    with torch.inference_mode():
        expected = model(clip).saliency
    torch.testing.assert_close(student.see(clip, 18).saliency, expected, atol=5e-5, rtol=0)


def test_sharing_saves_what_it_says() -> None:
    """Six of eight positions of the stem, four of eight of block 1."""
    model = network("s_rc1")
    student = StreamingStudent(model)
    video = torch.randn(1, 3, 20, 64, 64)
    for newest in (15, 16):
        student.see(clip_of(video, newest), newest)
    whole = computed_macs(model, clip_of(video, 17))

    class Next(torch.nn.Module):
        def forward(self, clip: torch.Tensor) -> torch.Tensor:
            return student.see(clip, 17).saliency

    position = 32 * 32  # half the height and width
    stem, block1 = 32 * 3 * 27 * position, (32 * 27 + 16 * 32) * position
    assert whole - computed_macs(Next(), clip_of(video, 17)) == 6 * stem + 4 * block1


def test_networks_whose_clips_do_not_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="TinyHD-M"):
        StreamingStudent(network("m_rc4"))
    with pytest.raises(ValueError, match="training mode"):
        StreamingStudent(network("s_rc4").train())
