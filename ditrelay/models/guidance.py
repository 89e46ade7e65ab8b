"""Classifier-free guidance in every step, on one rank or with its two branches on two."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from diffusers import ClassifierFreeGuidance


class SteadyGuidance(ClassifierFreeGuidance):  # type: ignore[misc]
    """Guidance in every turn of the loop.

    diffusers' own ends after ``num_inference_steps`` turns. With a scheduler that asks the model twice a step (Heun)
    there are more, and the later ones would go without.
    """

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.LongTensor) -> None:
        super().set_state(step, None, timestep)


class SplitGuidance(SteadyGuidance):
    """Rank 0 of a group computes the prompt's branch, rank 1 the negative prompt's; one exchange a step joins them.

    Where guidance is off there is one branch, which both compute without an exchange. Source of the arithmetic:
    ``diffusers.ClassifierFreeGuidance``.
    """

    def __init__(self, group: dist.ProcessGroup, **options: Any) -> None:
        """``options`` as of ``ClassifierFreeGuidance``; ``group`` has two ranks."""
        super().__init__(**options)
        self._group = group
        self._branch = dist.get_rank(group)

    def prepare_inputs(self, data: Any) -> list[Any]:
        return self._mine(super().prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        return self._mine(super().prepare_inputs_from_block_state(data, input_fields))

    def __call__(self, data: list[Any]) -> Any:
        if self.num_conditions == 1:
            return super().__call__(data)
        mine = data[0].noise_pred.contiguous()
        both = [torch.empty_like(mine) for _ in self._input_predictions]
        dist.all_gather(both, mine, group=self._group)
        return self.forward(**dict(zip(self._input_predictions, both, strict=True)))

    def _mine(self, batches: list[Any]) -> list[Any]:
        return batches if len(batches) == 1 else [batches[self._branch]]
