"""Trains the built-in text-to-video model within a wall-clock budget, over one or several commands.

    python -m tools.train_emoji.train_video --data emoji.npz --work WORK --command-seconds 575
    python -m tools.train_emoji.train_video --data emoji.npz --work WORK --command-seconds 575 --seed 1 --finish

WORK keeps the tokenizer, the training's state and the log; a second command with the same WORK goes on. At the end of
each command WORK/model is the best model so far and WORK/samples.png shows it.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tools.train_emoji.dataset import load_emoji
from tools.train_emoji.drawing import Drawer
from tools.train_emoji.export import weights_megabytes
from tools.train_emoji.motions import ClipDrawer, ClipTable, make_clip_table
from tools.train_emoji.training import (
    Budget,
    Command,
    Journal,
    Options,
    Schedule,
    Trainer,
    open_device,
    training_arguments,
)
from tools.train_emoji.vae import autocast
from tools.train_emoji.video_export import export_video_model, write_samples
from tools.train_emoji.video_model import (
    FRAMES,
    SIZE,
    TRIAL_WIDTHS,
    ClipDenoiser,
    Widths,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    tokenize,
)
from tools.train_emoji.video_vae import ClipSource, VaeSettings, encode_pool, train_vae

UNCAPTIONED_SHARE = 0.1
"""How many clips train without their caption: what guidance is measured against."""
DETAIL_SHIFT, CONTENT_SHIFT = 2.0, 6.0
"""Half of training learns to finish (moderate noise), half to begin (much noise): only there the words are needed.

The more frames show a thing, the more noise hides it: content's shift grows with the root of their number.
"""
STILLS_SHARE, STILLS_LATER, STILLS_UNTIL = 0.85, 0.15, 0.3
"""Shares of steps on first frames only, before and after this progress: what things look like is learned cheaper so."""
VALIDATION_CLIPS = 512
VALIDATION_SEED = 999_999
VALIDATION_BATCH = 64
TOKENIZER_CAPTIONS = 200_000
DIVERGED_ABOVE = 6.0
"""Stills and clips have losses of their own, so the mean of the two moves more than one of them."""


@dataclass(frozen=True)
class Workshop(Command):
    """What every stage needs: the command, its clips, and their captions as tokens.

    The last row of ``tokens`` and ``lengths`` is the empty caption.
    """

    widths: Widths
    source: ClipSource
    tokenizer: PreTrainedTokenizerFast
    tokens: Tensor
    lengths: Tensor
    deadline: float


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``--help`` says what each setting does."""
    parser = training_arguments("Train the built-in text-to-video model.")
    add = parser.add_argument
    add("--command-seconds", type=float, default=580, help="this command ends after so long")
    add("--reserve-seconds", type=float, default=30, help="kept at the end for export and samples")
    add("--seconds", type=float, default=660, help="transformer training over all commands; the rate falls to its end")
    add("--vae-seconds", type=float, default=140, help="training of the autoencoder over all commands")
    add("--pool", type=int, default=200_000, help="clips made up per command")
    add("--pool-seconds", type=float, default=55, help="time to draw and encode them; what is left over is not used")
    add("--batch", type=int, default=256, help="clips a step")
    add("--stills-batch", type=int, default=1024, help="pictures a step, in the steps on first frames")
    add("--vae-batch", type=int, default=32, help="windows of three frames a step")
    add("--size", type=int, default=SIZE, help="pixels")
    add("--trial", action="store_true", help="networks that train on a CPU, for trials")
    return parser.parse_args(arguments)


def open_workshop(args: argparse.Namespace) -> Workshop:
    """Reads the emoji, makes up this command's clips, and looks for a device."""
    args.work.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.work)
    emoji = load_emoji(args.data).first(args.emoji)
    table = make_clip_table(emoji.emoji, args.pool, args.seed)
    widths = TRIAL_WIDTHS if args.trial else Widths()
    tokenizer = prepare_tokenizer(args.work / "tokenizer", table, widths)
    tokens, lengths = tokenize(tokenizer, [*table.captions, ""])
    device = open_device(args.seed)
    random.seed(args.seed)
    source = ClipSource.of(table, ClipDrawer(Drawer(emoji.pictures, device, args.size), FRAMES))
    journal.write("clips made up", emoji=len(emoji), clips=len(table), longest=int(lengths.max()), device=str(device))
    deadline = journal.started + args.command_seconds - args.reserve_seconds
    return Workshop(args, device, journal, widths, source, tokenizer, tokens.to(device), lengths.to(device), deadline)


def prepare_tokenizer(folder: Path, table: ClipTable, widths: Widths) -> PreTrainedTokenizerFast:
    """The tokenizer of an earlier command, or a new one of this command's captions."""
    if not folder.exists():
        build_tokenizer(table.captions[:TOKENIZER_CAPTIONS], widths.vocabulary).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


class FlowLosses:
    """Flow matching on a pool of latents; its first ``kept`` clips are for validation only."""

    def __init__(self, shop: Workshop, denoiser: ClipDenoiser, latents: Tensor, kept: int) -> None:
        self.shop, self.denoiser, self.latents, self.kept = shop, denoiser, latents, kept
        self._taken = 0
        fixed = torch.Generator().manual_seed(VALIDATION_SEED)
        self._noise = torch.randn(latents[:kept].shape, generator=fixed).to(shop.device)
        self._sigma = torch.linspace(0.02, 0.98, kept)[torch.randperm(kept, generator=fixed)].to(shop.device)

    def velocity_loss(self, clean: Tensor, noise: Tensor, sigma: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """At ``sigma`` of noise [b] (0..1) the model should point from the data to the noise."""
        mixed = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        with autocast(clean.device):
            velocity = self.denoiser(mixed, sigma, tokens, lengths)
        return F.mse_loss(velocity, noise - clean)

    def step(self, progress: float) -> Tensor:
        """The loss of a random batch of clips, or of as many stills as cost about the same."""
        shop = self.shop
        self._taken += 1
        stills = random.random() < (STILLS_SHARE if progress < STILLS_UNTIL else STILLS_LATER)
        if self._taken <= 2:  # both kinds compile before the clock starts
            stills = self._taken == 2
        count = shop.args.stills_batch if stills else shop.args.batch
        rows = torch.randint(self.kept, len(self.latents), (count,), device=shop.device)
        clean = (self.latents[rows, :, :1] if stills else self.latents[rows]).float()
        untold = torch.rand(count, device=shop.device) < UNCAPTIONED_SHARE
        rows = torch.where(untold, len(shop.tokens) - 1, rows)
        tokens, lengths = shop.tokens[rows].long(), shop.lengths[rows].long()
        sigma = draw_levels(count, clean.shape[2], shop.device)
        return self.velocity_loss(clean, torch.randn_like(clean), sigma, tokens, lengths)

    def validate(self) -> float:
        """The loss on the clips kept aside, always with the same noise."""
        losses = []
        for rows in torch.arange(self.kept, device=self.shop.device).split(VALIDATION_BATCH):
            tokens, lengths = self.shop.tokens[rows].long(), self.shop.lengths[rows].long()
            clean = self.latents[rows].float()
            losses.append(self.velocity_loss(clean, self._noise[rows], self._sigma[rows], tokens, lengths))
        return float(torch.stack(losses).mean())


def draw_levels(count: int, frames: int, device: torch.device) -> Tensor:
    """Shares of noise to train at for latents of so many frames; a tenth of them anywhere."""
    shift = torch.full((count,), DETAIL_SHIFT, device=device)
    shift[::2] = CONTENT_SHIFT * frames**0.5
    level = torch.randn(count, device=device).sigmoid()
    level = shift * level / (1 + (shift - 1) * level)
    return torch.where(torch.rand(count, device=device) < 0.1, torch.rand(count, device=device), level)


def prepare_vae(shop: Workshop) -> AutoencoderKLWan:
    """The autoencoder, trained now or by earlier commands."""
    vae = build_vae(shop.widths)
    args = shop.args
    settings = VaeSettings(args.vae_batch, args.vae_rate, args.vae_seconds, shop.compiled)
    train_vae(vae, shop.source, settings, shop.work / "vae-training", shop.journal, shop.deadline)
    return vae


def train_denoiser(shop: Workshop, vae: AutoencoderKLWan) -> ClipDenoiser:
    """Trains text encoder and transformer to the deadline or the schedule's end; returns them at their best."""
    args = shop.args
    text_encoder = build_text_encoder(shop.widths, len(shop.tokenizer))
    denoiser = ClipDenoiser(build_transformer(shop.widths), text_encoder, shop.compiled)
    denoiser.to(shop.device).train()
    trainer = Trainer(
        "denoiser",
        {"transformer": denoiser.transformer, "text_encoder": denoiser.text_encoder},
        Options(Schedule(args.rate), ema_decay=0.9993, diverged_above=DIVERGED_ABOVE),
        shop.work / "denoiser-training",
        shop.journal,
    )
    trainer.resume()
    if not trainer.done:
        latents = encode_pool(vae, shop.source, args.pool_seconds, shop.compiled, shop.journal)
        losses = FlowLosses(shop, denoiser, latents, min(VALIDATION_CLIPS, len(latents) // 4))
        trainer.run(
            lambda: losses.step(trainer.progress), losses.validate, Budget(args.seconds, shop.deadline, args.finish)
        )
    trainer.use_best()
    denoiser.requires_grad_(False).eval()
    return denoiser


def main(arguments: list[str] | None = None) -> None:
    """Runs one command of the training."""
    args = parse_arguments(arguments)
    shop = open_workshop(args)
    vae = prepare_vae(shop)
    denoiser = train_denoiser(shop, vae)
    folder = args.work / "model"
    export_video_model(folder, vae, denoiser.text_encoder, shop.tokenizer, denoiser.transformer)
    shop.journal.write("exported", megabytes=weights_megabytes(folder))
    if not args.no_samples:
        began = time.monotonic()
        write_samples(folder, args.work / "samples.png", shop.device, args.size, FRAMES)
        shop.journal.write("samples drawn", took=time.monotonic() - began)
    shop.journal.write("done")


if __name__ == "__main__":
    main()
