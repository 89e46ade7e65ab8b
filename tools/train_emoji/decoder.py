"""The image model's decoder learns to draw what the transformer makes (remaking.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tools.train_emoji.drawing import Drawer
from tools.train_emoji.image_model import BatchedModel
from tools.train_emoji.pool import DRAWN_AT_ONCE, DeviceTable, LatentPool
from tools.train_emoji.remaking import LATENT_NOISE, DecoderTraining, bring_back, draw_sigmas
from tools.train_emoji.training import Budget, Journal
from tools.train_emoji.vae import autocast, picture_loss

GUIDANCE = 2.0
STEP_COUNTS = (8, 4)
START_SIGMAS = (0.3, 0.75)
"""Scenes are noised to a sampling step in this range: enough for the faults to show, too little to move things."""


@dataclass(frozen=True)
class Finish:
    """What finishing needs besides the autoencoder: the trained model, its scenes, and how to go about it."""

    model: BatchedModel
    pool: LatentPool
    table: DeviceTable
    drawer: Drawer
    shift: float
    scenes: int = 24_000
    batch: int = 64
    rate: float = 4e-4
    compiled: bool = False


@torch.no_grad()
def remake(finish: Finish, rows: Tensor) -> Tensor:
    """The latents of these scenes as the transformer remakes them from half way, normalised, float32."""
    steps = STEP_COUNTS[int(torch.randint(len(STEP_COUNTS), (1,)))]
    captions = torch.cat([rows, torch.full_like(rows, len(finish.pool))])
    tokens, lengths = finish.pool.tokens[captions].long(), finish.pool.lengths[captions].long()

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        time = torch.full((len(captions),), 1 - sigma, device=latents.device)
        with autocast(latents.device):
            told, untold = finish.model(latents.repeat(2, 1, 1, 1), time, tokens, lengths).chunk(2)
        return -(told + GUIDANCE * (told - untold))

    return bring_back(finish.pool.latents[rows].float(), draw_sigmas(finish.shift, steps, START_SIGMAS), velocity)


def finish_decoder(vae: AutoencoderKL, finish: Finish, budget: Budget, folder: Path, journal: Journal) -> None:
    """Trains the decoder within the budget and leaves its best EMA weights in it, blended with those it had."""
    finish.model.eval()
    rows = torch.randperm(len(finish.table), device=finish.drawer.device)[: finish.scenes]
    remade = torch.cat([remake(finish, part).to(torch.bfloat16) for part in _parts(rows, DRAWN_AT_ONCE)])
    held = min(512, len(rows) // 4)
    kept_rows, kept = rows[:held], remade[:held].float()
    wanted = finish.table.draw(finish.drawer, kept_rows)

    def loss(latents: Tensor, pictures: Tensor) -> Tensor:
        return picture_loss(decode_normalised(vae, latents), pictures)

    def validate() -> float:
        parts = zip(_parts(kept, 64), _parts(wanted, 64), strict=True)
        losses = [loss(latents, pictures).item() for latents, pictures in parts]
        return sum(losses) / len(losses)

    vae.decoder.to(memory_format=torch.channels_last).train()
    batches = _batches(finish, rows[held:], remade[held:])
    run: Callable[[Tensor, Tensor], Tensor] = torch.compile(loss, dynamic=False) if finish.compiled else loss
    training = DecoderTraining(finish.rate, budget, folder, journal)
    training.run(vae.decoder, lambda: run(*next(batches)), validate)
    vae.decoder.eval()


def decode_normalised(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures of normalised latents."""
    with autocast(latents.device):
        pictures: Tensor = vae.decoder(latents / vae.config.scaling_factor + vae.config.shift_factor)
    return pictures.float()


def _batches(finish: Finish, rows: Tensor, remade: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents and the pictures they should become: half remade, half as encoded with a little noise."""
    at_once = max(finish.batch, min(DRAWN_AT_ONCE, len(rows)) // finish.batch * finish.batch)
    while True:
        chosen = torch.randint(len(rows), (at_once,), device=rows.device)
        pictures = finish.table.draw(finish.drawer, rows[chosen])
        exact = finish.pool.latents[rows[chosen]].float()
        exact = exact + LATENT_NOISE * torch.randn_like(exact)
        latents = remade[chosen].float()
        latents[::2] = exact[::2]
        for made, wanted in zip(_parts(latents, finish.batch), _parts(pictures, finish.batch), strict=True):
            yield made, wanted.contiguous(memory_format=torch.channels_last)


def _parts(tensor: Tensor, size: int) -> tuple[Tensor, ...]:
    return torch.split(tensor, size)
