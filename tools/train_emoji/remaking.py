"""The last touch of both models: the decoder learns to draw what the transformer makes, not only the encoder.

Scenes or clips are encoded, noised part of the way and brought back by the transformer as the pipeline would. The
result shows the same with the transformer's own faults, so what was drawn is what the decoder should make of it. The
encoder and the meaning of latents stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tools.train_emoji.training import Budget, Journal, Options, Schedule, Trainer

LATENT_NOISE = 0.05
"""On latents as encoded, of which half of training is made."""
FINISHED_SHARE = 0.5
"""Of a decoder's finished weights, the rest those it had: the finished ones alone draw small parts too softly."""


def draw_sigmas(shift: float, steps: int, start: tuple[float, float]) -> list[float]:
    """The noise levels of sampling in so many steps, from a random one in the range ``start`` to none."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas: list[float] = scheduler.sigmas.tolist()
    starts = [k for k, sigma in enumerate(sigmas) if start[0] <= sigma <= start[1]]
    return sigmas[starts[int(torch.randint(len(starts), (1,)))] :]


def bring_back(clean: Tensor, sigmas: list[float], velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
    """``clean`` latents noised to the first level and brought back; ``velocity`` points from the data to the noise."""
    latents = torch.lerp(clean, torch.randn_like(clean), sigmas[0])
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        latents = latents + (then - now) * velocity(latents, now)
    return latents


@dataclass(frozen=True)
class DecoderTraining:
    """How a decoder is finished; ``validate_every`` in seconds."""

    rate: float
    budget: Budget
    folder: Path
    journal: Journal
    ema_decay: float = 0.999
    validate_every: float = 10.0

    def run(self, decoder: nn.Module, step_loss: Callable[[], Tensor], validate: Callable[[], float]) -> None:
        """Trains the decoder; its best EMA weights, blended with those it had, are left in it."""
        before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
        schedule = Schedule(self.rate, warmup=0.05, flat_until=0.2)
        options = Options(schedule, ema_decay=self.ema_decay, validate_every=self.validate_every)
        trainer = Trainer("decoder", {"decoder": decoder}, options, self.folder, self.journal)
        trainer.run(step_loss, validate, self.budget)
        trainer.use_best()
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                parameter.lerp_(before[name], 1 - FINISHED_SHARE)
            self.journal.write("decoder: blended", loss=validate())
