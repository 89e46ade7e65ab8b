"""3-D convolutions on a CPU, always by oneDNN.

torch (2.13) takes its own slow kernel where a batch of one has few numbers, whatever the width of its frames: the
built-in video model's decode then takes 2.7 times as long on one thread (1.05 s, against 0.39 s).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ConvForward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def use_onednn(module: nn.Module) -> None:
    """Let every float32 3-D convolution of ``module`` go to oneDNN; results differ in the last bits."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d) and layer.weight.dtype == torch.float32 and _pads_with_zeros(layer):
            layer._conv_forward = _by_onednn(layer)  # type: ignore[assignment, method-assign]


def _pads_with_zeros(layer: nn.Conv3d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _by_onednn(layer: nn.Conv3d) -> ConvForward:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding, stride, dilation = layer.padding, layer.stride, layer.dilation
        made: Tensor = torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, layer.groups)
        return made

    return convolve
