"""Clips on the device, the video autoencoder's training on them, and a pool of encoded clips."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from tools.train_emoji.frames import decode_latents, encode_clips, normalise
from tools.train_emoji.motions import ClipDrawer, ClipTable
from tools.train_emoji.training import Budget, Journal, Options, Schedule, Trainer
from tools.train_emoji.vae import KL_WEIGHT, LATENT_NOISE, autocast, picture_loss

WINDOW = 3
"""Frames of a clip that a training step sees: one that has its own latents and a pair; more would show fewer things."""
CHANGE_WEIGHT = 0.25
DRAWN_AT_ONCE = 64
WINDOWS_AT_ONCE = 256
MEASURED_CLIPS = 1024
VALIDATION_CLIPS = 64
LEAST_DEVIATION = 0.3
"""No latent channel is stretched to more than this part of the widest: an unused one would turn into noise."""


@dataclass(frozen=True)
class ClipSource:
    """A table of clips on the device, drawn when they are asked for."""

    drawer: ClipDrawer
    things: Tensor
    backgrounds: Tensor
    motions: Tensor

    @classmethod
    def of(cls, table: ClipTable, drawer: ClipDrawer) -> ClipSource:
        """Copies the arrays of ``table`` to the drawer's device."""
        arrays = (table.things, table.backgrounds, table.motions)
        return cls(drawer, *(torch.from_numpy(array).to(drawer.device) for array in arrays))

    def __len__(self) -> int:
        return len(self.motions)

    @property
    def device(self) -> torch.device:
        """Where the clips are drawn."""
        return self.drawer.device

    def draw(self, rows: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Clips [b, 3, frames, size, size] in -1..1; of each only the frames ``chosen`` [b, k], if given."""
        return self.drawer.draw(self.things[rows], self.backgrounds[rows], self.motions[rows], chosen)

    def windows(self, batch: int) -> Iterator[Tensor]:
        """Frames in a row of random clips without end, [b, 3, 3, size, size].

        Drawing many at once keeps the device from waiting for Python.
        """
        at_once = max(1, WINDOWS_AT_ONCE // batch) * batch
        while True:
            rows = torch.randint(len(self), (at_once,), device=self.device)
            start = torch.randint(self.drawer.frames - WINDOW + 1, (at_once, 1), device=self.device)
            yield from self.draw(rows, start + torch.arange(WINDOW, device=self.device)).split(batch)

    def first(self, count: int, batch: int) -> Iterator[Tensor]:
        """The first ``count`` clips in order."""
        for rows in torch.arange(min(count, len(self)), device=self.device).split(batch):
            yield self.draw(rows)


@dataclass(frozen=True)
class VaeSettings:
    """How the autoencoder is trained: windows of three frames a step, peak learning rate, seconds over all commands."""

    batch: int
    rate: float
    seconds: float
    compiled: bool = False


def train_vae(
    vae: AutoencoderKLWan, source: ClipSource, settings: VaeSettings, folder: Path, journal: Journal, deadline: float
) -> None:
    """Trains ``vae``, or goes on with it; leaves its best EMA weights in it and the latents' range in its config."""
    vae.to(source.device).train()
    options = Options(Schedule(settings.rate, flat_until=0.35), ema_decay=0.998)
    trainer = Trainer("vae", {"vae": vae}, options, folder, journal)
    trainer.resume()
    fixed = list(source.first(VALIDATION_CLIPS, settings.batch))
    windows = source.windows(settings.batch)
    loss = torch.compile(vae_loss, dynamic=False) if settings.compiled else vae_loss

    def validate() -> float:
        return sum(float((_rebuilt(vae, clips) - clips).abs().mean()) for clips in fixed) / len(fixed)

    if not trainer.done:
        trainer.run(lambda: loss(vae, next(windows)), validate, Budget(settings.seconds, deadline))
    trainer.use_best()
    vae.requires_grad_(False).eval()
    measure_latents(vae, source, settings.batch, folder / "latents.json")
    deviations = vae.config.latents_std
    psnr = signal_to_noise(vae, fixed)
    journal.write("vae: ready", psnr_db=psnr, narrowest=min(deviations), widest=max(deviations))


def vae_loss(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Errors of pixels, edges and changes between frames, and the latents' distance from a normal distribution."""
    with autocast(clips.device):
        mean, log_variance = encode_clips(vae, clips)
        mean, log_variance = mean.float(), log_variance.float()
        spread = torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        amount = LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, 1, device=mean.device)
        made = decode_latents(vae, mean + spread + amount * torch.randn_like(mean)).float()
    change = (made - clips).diff(dim=2).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    frames = (clip.transpose(1, 2).flatten(0, 1) for clip in (made, clips))
    return picture_loss(*frames) + CHANGE_WEIGHT * change + KL_WEIGHT * divergence


@torch.no_grad()
def _rebuilt(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    with autocast(clips.device):
        made = decode_latents(vae, encode_clips(vae, clips)[0])
    return made.float().clamp(-1, 1)


def signal_to_noise(vae: AutoencoderKLWan, batches: list[Tensor]) -> float:
    """Peak signal-to-noise ratio of encoding and decoding, in dB."""
    errors = [(_rebuilt(vae, clips) - clips).square().mean() for clips in batches]
    return float(10 * torch.log10(4 / torch.stack(errors).mean()))


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, source: ClipSource, batch: int, path: Path) -> None:
    """Puts each latent channel's mean and deviation into the config; later commands take the figures of the first."""
    if not path.exists():
        means = torch.cat([_means(vae, clips) for clips in source.first(MEASURED_CLIPS, batch)])
        deviation = means.std((0, 2, 3, 4))
        deviation = deviation.clamp(min=LEAST_DEVIATION * float(deviation.max()))
        figures = {"latents_mean": means.mean((0, 2, 3, 4)).tolist(), "latents_std": deviation.tolist()}
        path.write_text(json.dumps(figures))
    vae.register_to_config(**json.loads(path.read_text()))


def _means(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    with autocast(clips.device):
        return encode_clips(vae, clips)[0].float()


@torch.no_grad()
def encode_pool(vae: AutoencoderKLWan, source: ClipSource, seconds: float, compiled: bool, journal: Journal) -> Tensor:
    """As many clips as there is time for, in order, as normalised latents, bfloat16 [n, 8, f, h, w]."""
    encode = torch.compile(_means, dynamic=False) if compiled else _means
    started, parts = time.monotonic(), []
    for clips in source.first(len(source), DRAWN_AT_ONCE):
        parts.append(normalise(vae, encode(vae, clips)).to(torch.bfloat16).contiguous())
        if source.device.type == "cuda":
            torch.cuda.synchronize()
        if time.monotonic() - started > seconds:
            break
    pool = torch.cat(parts)
    deviation = pool[:MEASURED_CLIPS].float().std().item()
    journal.write("pool filled", clips=len(pool), took=time.monotonic() - started, deviation=deviation)
    return pool
