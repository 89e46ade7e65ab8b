"""The last touch of the video model: its decoder learns to draw what the transformer makes.

    python -m tools.train_emoji.finish_video --data emoji.npz --model WORK/model --work WORK/finish --seconds 120

WORK/finish/model is the result; on a CPU it takes most of an hour. What it does: remaking.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor

from tools.train_emoji.dataset import load_emoji
from tools.train_emoji.drawing import Drawer
from tools.train_emoji.export import weights_megabytes
from tools.train_emoji.frames import decode_latents, denormalise
from tools.train_emoji.motions import ClipDrawer, make_clip_table
from tools.train_emoji.remaking import LATENT_NOISE, DecoderTraining, bring_back, draw_sigmas
from tools.train_emoji.training import Budget, Command, Journal, open_device, shared_arguments
from tools.train_emoji.vae import autocast, picture_loss
from tools.train_emoji.video_export import FLOW_SHIFT, GUIDANCE, STEPS, export_video_model, load_pipeline, write_samples
from tools.train_emoji.video_model import FRAMES, SIZE, ClipDenoiser, tokenize
from tools.train_emoji.video_vae import CHANGE_WEIGHT, ClipSource, encode_pool

START_SIGMAS = (0.4, 0.9)
"""Clips are noised to a sampling step in this range: enough for the faults to show, too little to move things."""
REMADE_AT_ONCE = 32


@dataclass(frozen=True)
class Workshop(Command):
    """The command, the model that is finished, its clips as they were made up, encoded and said (last: nothing)."""

    pipeline: WanPipeline
    source: ClipSource
    latents: Tensor
    tokens: Tensor
    lengths: Tensor


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``--help`` says what each setting does."""
    parser = shared_arguments("Finish the decoder of the built-in text-to-video model.")
    parser.set_defaults(rate=4e-4, seed=77)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="what train_video.py exported")
    add("--seconds", type=float, default=120, help="of training the decoder")
    add("--clips", type=int, default=6000, help="clips that are remade; a CPU core takes a second for each")
    add("--batch", type=int, default=32, help="windows of three frames a step")
    add("--validate-every", type=float, default=10, help="seconds")
    add("--size", type=int, default=SIZE, help="pixels, as trained")
    return parser.parse_args(arguments)


def open_workshop(args: argparse.Namespace) -> Workshop:
    """Loads the model, and makes up and encodes the clips."""
    args.work.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.work)
    device = open_device(args.seed)
    emoji = load_emoji(args.data).first(args.emoji)
    table = make_clip_table(emoji.emoji, args.clips, args.seed)
    pipeline = load_pipeline(args.model, device)
    source = ClipSource.of(table, ClipDrawer(Drawer(emoji.pictures, device, args.size), FRAMES))
    latents = encode_pool(pipeline.vae, source, float("inf"), False, journal)
    tokens, lengths = tokenize(pipeline.tokenizer, [*table.captions, ""])
    return Workshop(args, device, journal, pipeline, source, latents, tokens.to(device), lengths.to(device))


@torch.no_grad()
def remake(shop: Workshop, denoiser: ClipDenoiser, rows: Tensor) -> Tensor:
    """The latents [b, 8, f, h, w] of these clips as the transformer remakes them from half way, normalised."""
    captions = torch.cat([rows, torch.full_like(rows, len(shop.latents))])
    tokens, lengths = shop.tokens[captions].long(), shop.lengths[captions].long()

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(captions),), sigma, device=latents.device)
        with autocast(latents.device):
            told, untold = denoiser(latents.repeat(2, 1, 1, 1, 1), level, tokens, lengths).chunk(2)
        return untold + GUIDANCE * (told - untold)

    return bring_back(shop.latents[rows].float(), draw_sigmas(FLOW_SHIFT, STEPS, START_SIGMAS), velocity)


def remake_all(shop: Workshop) -> Tensor:
    """Every clip, bfloat16 [n, 8, f, h, w]."""
    denoiser = ClipDenoiser(shop.pipeline.transformer, shop.pipeline.text_encoder)
    began = time.monotonic()
    rows = torch.arange(len(shop.latents), device=shop.device)
    remade = torch.cat([remake(shop, denoiser, part).to(torch.bfloat16) for part in rows.split(REMADE_AT_ONCE)])
    shop.journal.write("clips remade", clips=len(remade), took=time.monotonic() - began)
    return remade


class Windows:
    """The first frame and a later pair of clips: their latents [b, 8, 2, h, w], and the frames [b, 3, 3, size, size].

    Half of the latents are remade, half as encoded with a little noise. The first ``kept`` clips are for validation.
    """

    def __init__(self, shop: Workshop, remade: Tensor) -> None:
        self._shop, self._remade = shop, remade
        self.kept = min(96, len(remade) // 4)

    def draw(self, rows: Tensor, pair: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
        """Of clips ``rows`` [b] the latent frame ``pair`` [b] (from 1); remade where ``exact`` [b] is false."""
        shop, device = self._shop, self._shop.device
        frames = torch.stack([torch.zeros_like(pair), 2 * pair - 1, 2 * pair], 1)
        places = torch.arange(len(rows), device=device)
        two = torch.stack([torch.zeros_like(pair), pair], 1)
        encoded, remade = (
            latents[rows].float().transpose(1, 2)[places[:, None], two].transpose(1, 2)
            for latents in (shop.latents, self._remade)
        )
        encoded = encoded + LATENT_NOISE * torch.randn_like(encoded)
        return torch.where(exact.view(-1, 1, 1, 1, 1), encoded, remade), shop.source.draw(rows, frames)

    def batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random windows of clips that are not kept, without end."""
        device, pairs = self._shop.device, self._remade.shape[2] - 1
        while True:
            rows = torch.randint(self.kept, len(self._remade), (batch,), device=device)
            pair = torch.randint(1, pairs + 1, (batch,), device=device)
            yield self.draw(rows, pair, torch.arange(batch, device=device) % 2 == 1)

    def fixed(self) -> tuple[Tensor, Tensor]:
        """A window of every kept clip, remade."""
        rows = torch.arange(self.kept, device=self._shop.device)
        pair = 1 + rows % (self._remade.shape[2] - 1)
        return self.draw(rows, pair, torch.zeros_like(rows, dtype=torch.bool))


def finish_decoder(shop: Workshop, remade: Tensor) -> None:
    """Trains the decoder and leaves its best EMA weights in the pipeline, blended with those it had."""
    args, vae = shop.args, shop.pipeline.vae

    def loss(latents: Tensor, clips: Tensor) -> Tensor:
        with autocast(shop.device):
            made = decode_latents(vae, denormalise(vae, latents)).float()
        change = (made - clips).diff(dim=2).abs().mean()
        frames = (clip.transpose(1, 2).flatten(0, 1) for clip in (made, clips))
        return picture_loss(*frames) + CHANGE_WEIGHT * change

    windows = Windows(shop, remade)
    kept = list(zip(*(part.split(args.batch) for part in windows.fixed()), strict=True))

    def validate() -> float:
        return sum(float(loss(*part)) for part in kept) / len(kept)

    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True).train()
    batches = windows.batches(args.batch)
    run = torch.compile(loss, dynamic=False) if shop.compiled else loss
    budget = Budget(args.seconds, time.monotonic() + 2 * args.seconds)
    training = DecoderTraining(
        args.rate, budget, args.work / "decoder-training", shop.journal, 0.998, args.validate_every
    )
    training.run(vae.decoder, lambda: run(*next(batches)), validate)
    vae.requires_grad_(False).eval()


def main(arguments: list[str] | None = None) -> None:
    """Finishes a model."""
    args = parse_arguments(arguments)
    shop = open_workshop(args)
    finish_decoder(shop, remake_all(shop))
    parts, folder = shop.pipeline, args.work / "model"
    export_video_model(folder, parts.vae, parts.text_encoder, parts.tokenizer, parts.transformer)
    shop.journal.write("exported", megabytes=weights_megabytes(folder))
    if not args.no_samples:
        write_samples(folder, args.work / "samples.png", shop.device, args.size, FRAMES)
    shop.journal.write("done")


if __name__ == "__main__":
    main()
