"""3-D convolutions on a CPU go to oneDNN, and compute what torch's own do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ditrelay.models.cpu_convolutions import use_onednn

pytestmark = pytest.mark.usefixtures("one_thread")  # with more, torch itself takes oneDNN


def kernels(module: nn.Module, x: torch.Tensor) -> set[str]:
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(8, 6, 3),
        nn.Conv3d(8, 6, (3, 1, 1), stride=(2, 1, 1), bias=False),
        nn.Conv3d(8, 6, 3, padding=1, groups=2, dilation=2),
    ],
    ids=["plain", "strided, no bias", "padded, grouped, dilated"],
)
def test_a_small_convolution_gives_the_same_by_onednn(layer: nn.Conv3d) -> None:
    x = torch.randn(1, 8, 9, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = layer(x)
        use_onednn(layer)
        torch.testing.assert_close(layer(x), own, atol=1e-5, rtol=1e-5)
    assert "aten::mkldnn_convolution" in kernels(layer, x)


@pytest.mark.parametrize(
    "layer", [nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate"), nn.Conv3d(4, 4, 3, padding="same")]
)
def test_what_pads_in_other_ways_keeps_its_own_kernel(layer: nn.Conv3d) -> None:
    x = torch.randn(1, 4, 3, 6, 6)
    with torch.no_grad():
        own = layer(x)
        use_onednn(layer)
        assert torch.equal(layer(x), own)
