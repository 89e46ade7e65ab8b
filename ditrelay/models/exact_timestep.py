"""The scheduler's timestep for the transformer, where modular blocks round it."""

from __future__ import annotations

from typing import Any

import torch

from ditrelay.models.quirks import TimestepArgument

_TRAINED_STEPS = 1000


class ExactTimestep:
    """Forward pre-hook that gives the transformer the scheduler's timestep as it is.

    The modular blocks of some families round it to the dtype of the weights (in bfloat16 999 becomes 1000); the stock
    pipelines do not. One step runs at a time, so one value is enough: ``value``, while it is set.
    """

    def __init__(self, argument: TimestepArgument) -> None:
        self._argument = argument
        self.value: torch.Tensor | None = None

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.value is None:
            return args, kwargs
        name = self._argument.name
        time = (_TRAINED_STEPS - self.value) / _TRAINED_STEPS if self._argument.counts_up else self.value
        return args, kwargs | {name: time.expand(kwargs[name].shape)}
