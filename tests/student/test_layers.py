from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from student.layers import Conv


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "stride", "padding"),
    [
        (6, 6, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
        (6, 6, (3, 3, 3), (2, 1, 1), (1, 1, 1)),
        (6, 6, (3, 3, 3), (2, 2, 2), (1, 1, 1)),
        (6, 6, (3, 3, 3), (1, 2, 2), (1, 1, 1)),
        (6, 6, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
        (6, 6, (2, 3, 3), (1, 2, 2), (0, 1, 1)),
        (6, 4, (1, 1, 1), (1, 1, 1), (0, 0, 0)),
        (3, 4, (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ],
)
def test_convolution_and_its_gradients_are_pytorchs(
    channels: int,
    outputs: int,
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    batch: int,
    frames: int,
) -> None:
    frames = max(frames, kernel[0] - 2 * padding[0])  # a kernel is not longer than the clip
    torch.manual_seed(0)
    groups = channels if kernel != (1, 1, 1) and channels == outputs else 1
    conv = Conv(channels, outputs, kernel, stride, padding, groups=groups, bias=False)
    conv = conv.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    features = torch.randn(batch, channels, frames, 8, 10, requires_grad=True)
    given = features.contiguous(memory_format=torch.channels_last_3d)
    weight = conv.weight.detach().double().requires_grad_()
    exact = features.detach().double().requires_grad_()
    expected = F.conv3d(exact, weight, None, stride, padding, 1, groups)
    found = conv(given)
    torch.testing.assert_close(found, expected.float())
    gradient = torch.randn_like(found)
    torch.autograd.backward(found, gradient)
    torch.autograd.backward(expected, gradient.double())
    for ours, exacts in ((features.grad, exact.grad), (conv.weight.grad, weight.grad)):
        assert ours is not None
        assert exacts is not None
        torch.testing.assert_close(ours, exacts.float(), atol=1e-4, rtol=1e-4)
