"""The image autoencoder: AutoencoderKL, 4x down to 4 channels, and its training on drawn scenes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from tools.train_emoji.drawing import Drawer
from tools.train_emoji.pool import DeviceTable, random_pictures
from tools.train_emoji.training import Budget, Journal, Options, Schedule, Trainer

CHANNELS = (32, 64, 96)
LATENT_CHANNELS = 4
KL_WEIGHT = 5e-4
LATENT_NOISE = 0.1
"""Up to this much noise is put on latents in training: what the transformer makes is never exact either."""


@dataclass(frozen=True)
class VaeSettings:
    """How the autoencoder is trained; ``compiled`` needs a GPU to pay."""

    batch: int = 64
    rate: float = 1.2e-3
    compiled: bool = False
    validation_scenes: int = 1024


def make_vae(size: int, channels: tuple[int, ...] = CHANNELS) -> AutoencoderKL:
    """An untrained autoencoder for pictures of ``size`` pixels; half the sides per level after the first."""
    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=size,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute and squared error, and the error of edges at full and at half size."""
    error = made - wanted
    loss = error.abs().mean() + error.square().mean() + 0.5 * _edge_error(error)
    return loss + 0.25 * _edge_error(F.avg_pool2d(error, 2))


def _edge_error(error: Tensor) -> Tensor:
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    return across + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic on a GPU, none of it on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def make_loss(vae: AutoencoderKL) -> Callable[[Tensor], Tensor]:
    """The training loss of a batch of pictures, as a function that compiles in one piece."""

    def loss(pictures: Tensor) -> Tensor:
        with autocast(pictures.device):
            mean, logvar = vae.encoder(pictures).float().chunk(2, 1)
            logvar = logvar.clamp(-30, 20)
            spread = torch.exp(0.5 * logvar) * torch.randn_like(mean)
            amount = LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, device=mean.device)
            made = vae.decoder(mean + spread + amount * torch.randn_like(mean)).float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return picture_loss(made, pictures) + KL_WEIGHT * divergence

    return loss


def latent_means(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The most likely latents of pictures, float32 [b, 4, size/4, size/4], not yet normalised."""
    with autocast(pictures.device):
        moments: Tensor = vae.encoder(pictures).float()
    return moments.chunk(2, 1)[0]


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pictures [b, 3, size, size] of latents that are not normalised."""
    with autocast(latents.device):
        pictures: Tensor = vae.decoder(latents)
    return pictures.float()


def train_vae(
    vae: AutoencoderKL,
    table: DeviceTable,
    drawer: Drawer,
    settings: VaeSettings,
    budget: Budget,
    folder: Path,
    journal: Journal,
) -> None:
    """Trains ``vae`` within the budget, leaves its best EMA weights in it and normalises its latents."""
    vae.to(drawer.device, memory_format=torch.channels_last).train()
    options = Options(Schedule(settings.rate, flat_until=0.35), ema_decay=0.998)
    trainer = Trainer("vae", {"vae": vae}, options, folder, journal)
    trainer.resume()
    pictures = random_pictures(table, drawer, settings.batch)
    loss = make_loss(vae)
    step_loss = torch.compile(loss, dynamic=False) if settings.compiled else loss
    fixed = table.draw(drawer, slice(0, settings.validation_scenes))

    def validate() -> float:
        errors = [picture_loss(decode(vae, latent_means(vae, part)), part).item() for part in torch.split(fixed, 64)]
        return sum(errors) / len(errors)

    trainer.run(lambda: step_loss(_channels_last(next(pictures))), validate, budget)
    trainer.use_best()
    vae.eval()
    normalise_latents(vae, fixed)
    journal.write("vae: done", steps=trainer.steps, psnr_db=signal_to_noise(vae, fixed))


def _channels_last(pictures: Tensor) -> Tensor:
    return pictures.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def signal_to_noise(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio of encoding and decoding, in dB."""
    errors = [(decode(vae, latent_means(vae, part)) - part).square().mean() for part in torch.split(pictures, 64)]
    return 10 * math.log10(4 / torch.stack(errors).mean().item())


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Gives all latent channels one scale inside the weights, then writes what is left into the config.

    Afterwards ``(latents - shift_factor) * scaling_factor`` has mean 0 and deviation 1 over ``pictures``.
    """
    means = torch.cat([latent_means(vae, part) for part in torch.split(pictures, 64)])
    scales = (means - means.mean()).square().mean((0, 2, 3)).sqrt()
    scales = scales.clamp(min=0.3 * scales.max().item())
    count = len(scales)
    encoder, decoder = vae.encoder.conv_out, vae.decoder.conv_in
    encoder.weight[:count] /= scales.view(-1, 1, 1, 1)
    encoder.bias[:count] /= scales
    encoder.bias[count:] -= 2 * scales.log()
    decoder.weight *= scales.view(1, -1, 1, 1)
    means = means / scales.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1 / means.std().item(), shift_factor=means.mean().item())
