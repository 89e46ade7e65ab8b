"""AdamW with its moments by name, so that a training can be put down and taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
"""Of matrices; vectors have none."""
STATE = ("exp_avg", "exp_avg_sq", "step")


class Optimizer:
    """What a training steps with. One that takes the gradient's direction alone (Muon) ran away here on an H100."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = any(p.is_cuda for p in parameters.values())
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=fused)

    def step(self, rate: float) -> None:
        """One step at this learning rate, then no gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Every moment by name, to be saved."""
        state = self._adamw.state
        held = {name: p for name, p in self._parameters.items() if p in state}
        return {f"adamw.{kind}.{name}": state[p][kind] for name, p in held.items() for kind in STATE}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Goes on from moments that ``tensors`` gave; what is missing starts at nothing."""
        for name, parameter in self._parameters.items():
            found = {kind: saved.get(f"adamw.{kind}.{name}") for kind in STATE}
            state = {kind: tensor.to(parameter.device) for kind, tensor in found.items() if tensor is not None}
            if len(state) == len(STATE):
                self._adamw.state[parameter] = state

    def forget(self) -> None:
        """Drops every moment."""
        self._adamw.state.clear()
