"""Trains the built-in text-to-image model within a wall-clock budget, over one or several commands.

    python -m tools.train_emoji.train_image --data emoji.npz --work WORK --command-seconds 570 --seconds 900
    python -m tools.train_emoji.train_image --data emoji.npz --work WORK --command-seconds 570 --seed 1 --finish

WORK keeps the tokenizer, the autoencoder, the training's state and the log; a second command with the same WORK goes
on. At the end of each command WORK/model is the best model so far and WORK/samples-*.png shows it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ZImagePipeline
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tools.train_emoji.dataset import EmojiSet, load_emoji
from tools.train_emoji.decoder import Finish, finish_decoder
from tools.train_emoji.drawing import Drawer
from tools.train_emoji.export import ImageModel, export_image_model, load_image_model, weights_megabytes
from tools.train_emoji.image_model import (
    BatchedModel,
    make_text_encoder,
    make_transformer,
    unused_parameters,
)
from tools.train_emoji.layouts import SceneTable, make_table
from tools.train_emoji.pool import DeviceTable, LatentPool, encode_table
from tools.train_emoji.sheets import SHOWN_PROMPTS, write_sheet
from tools.train_emoji.tokens import make_tokenizer, tokenize
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
from tools.train_emoji.vae import VaeSettings, autocast, latent_means, make_vae, train_vae

VALIDATION_SEED = 999_999
UNCAPTIONED_SHARE = 0.1
TOKENIZER_CAPTIONS = 200_000
PATCHES_PER_LATENT = 2
VAE_SHRINKS = 4


@dataclass(frozen=True)
class Workshop(Command):
    """What every stage needs: the command, the emoji, and the scenes of this command."""

    emoji: EmojiSet
    scenes: SceneTable
    checks: SceneTable


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; ``--help`` says what each setting does."""
    parser = training_arguments("Train the built-in text-to-image model.")
    add = parser.add_argument
    add("--command-seconds", type=float, default=570, help="this command ends after so long")
    add("--reserve-seconds", type=float, default=25, help="kept at the end for export and samples")
    add("--seconds", type=float, default=720, help="transformer training over all commands; the rate falls to its end")
    add("--vae-seconds", type=float, default=210, help="training of the autoencoder, in the first command")
    add("--decoder-seconds", type=float, default=0, help="finish the decoder on what the transformer makes, at the end")
    add("--start", type=Path, help="go on from an exported model folder with fresh moments (use a low --rate)")
    add("--pool", type=int, default=400_000, help="scenes drawn and encoded per command")
    add("--batch", type=int, default=512)
    add("--vae-batch", type=int, default=64)
    add("--vocabulary", type=int, default=3072)
    add("--text-layers", type=int, default=6)
    add("--shift", type=float, default=2.0, help="written to the scheduler")
    add("--size", type=int, default=128, help="pixels")
    add("--validation-scenes", type=int, default=2048)
    return parser.parse_args(arguments)


def open_workshop(args: argparse.Namespace) -> Workshop:
    """Reads the emoji, makes up this command's scenes, and looks for a device."""
    args.work.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.work)
    emoji = load_emoji(args.data).first(args.emoji)
    scenes = make_table(emoji.emoji, args.pool, args.seed)
    checks = make_table(emoji.emoji, args.validation_scenes, VALIDATION_SEED)
    device = open_device(args.seed)
    journal.write("scenes drawn up", emoji=len(emoji), scenes=len(scenes), device=str(device), torch=torch.__version__)
    return Workshop(args, device, journal, emoji, scenes, checks)


def prepare_tokenizer(shop: Workshop) -> PreTrainedTokenizerFast:
    """The tokenizer of an earlier command, or a new one of this command's captions."""
    folder = shop.work / "tokenizer"
    if folder.exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = make_tokenizer(shop.scenes.captions[:TOKENIZER_CAPTIONS], shop.args.vocabulary)
    tokenizer.save_pretrained(folder)
    return tokenizer


def prepare_vae(shop: Workshop, table: DeviceTable, drawer: Drawer) -> AutoencoderKL:
    """The autoencoder of an earlier command, or one trained now."""
    folder, args = shop.work / "vae", shop.args
    if folder.exists():
        return AutoencoderKL.from_pretrained(folder).to(shop.device)
    vae = make_vae(args.size)
    now = time.monotonic()
    budget = Budget(args.vae_seconds, now + args.vae_seconds, finish=True)
    settings = VaeSettings(args.vae_batch, args.vae_rate, shop.compiled)
    train_vae(vae, table, drawer, settings, budget, shop.work / "vae-training", shop.journal)
    vae.save_pretrained(folder)
    return vae


def fill_pool(
    shop: Workshop, scenes: SceneTable, vae: AutoencoderKL, tok: PreTrainedTokenizerFast, drawer: Drawer
) -> LatentPool:
    """Draws and encodes the scenes, and tokenizes their captions."""
    vae.to(memory_format=torch.channels_last).eval()
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor

    def encode(pictures: Tensor) -> Tensor:
        latents = latent_means(vae, pictures.contiguous(memory_format=torch.channels_last))
        return ((latents - shift) * scale).contiguous()

    run: Callable[[Tensor], Tensor] = torch.compile(encode, dynamic=False) if shop.compiled else encode
    latents = encode_table(DeviceTable.of(scenes, shop.device), drawer, run, 1024 if shop.compiled else 32)
    tokens, lengths = tokenize(tok, [*scenes.captions, ""])
    shop.journal.write("pool filled", scenes=len(latents), deviation=latents[:4096].float().std().item())
    return LatentPool(latents, tokens.to(shop.device), lengths.to(shop.device))


def velocity_loss(
    model: BatchedModel, clean: Tensor, noise: Tensor, share: Tensor, tokens: Tensor, lengths: Tensor
) -> Tensor:
    """Flow matching: at ``share`` of noise [b] (0..1) the model should point from the noise to the data."""
    part = share.view(-1, 1, 1, 1)
    with autocast(clean.device):
        velocity = model(clean + part * (noise - clean), 1 - share, tokens, lengths)
    return (velocity - (clean - noise)).square().mean()


def draw_shares(batch: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Shares of noise to train at: mostly in the middle, a tenth of them anywhere."""
    middle = torch.sigmoid(torch.randn(batch, device=device, generator=generator) * 1.1 + 0.3)
    anywhere = torch.rand(batch, device=device, generator=generator)
    pick = torch.rand(batch, device=device, generator=generator) < 0.1
    return torch.where(pick, anywhere, middle)


def make_step(model: BatchedModel, pool: LatentPool, batch: int, compiled: bool) -> Callable[[], Tensor]:
    """One training step's loss over a random batch of the pool."""
    device = pool.latents.device
    loss = torch.compile(velocity_loss, dynamic=False) if compiled else velocity_loss

    def step() -> Tensor:
        rows = torch.randint(len(pool), (batch,), device=device)
        clean = pool.latents[rows].float()
        captions = torch.where(torch.rand(batch, device=device) < UNCAPTIONED_SHARE, len(pool), rows)
        tokens, lengths = pool.tokens[captions].long(), pool.lengths[captions].long()
        value: Tensor = loss(model, clean, torch.randn_like(clean), draw_shares(batch, device), tokens, lengths)
        return value

    return step


def make_validation(model: BatchedModel, checks: LatentPool, batch: int) -> Callable[[], float]:
    """The loss over the same scenes, noise and shares every time."""
    device = checks.latents.device
    generator = torch.Generator(device).manual_seed(VALIDATION_SEED)
    clean = checks.latents.float()
    noise = torch.randn(clean.shape, device=device, generator=generator)
    shares = draw_shares(len(clean), device, generator)

    def validate() -> float:
        losses = []
        for rows in torch.arange(len(checks), device=device).split(batch):
            tokens, lengths = checks.tokens[rows].long(), checks.lengths[rows].long()
            losses.append(velocity_loss(model, clean[rows], noise[rows], shares[rows], tokens, lengths) * len(rows))
        return torch.stack(losses).sum().item() / len(checks)

    return validate


def train_transformer(
    shop: Workshop, model: ImageModel, pool: LatentPool, checks: LatentPool, deadline: float
) -> BatchedModel:
    """Trains text encoder and transformer to the deadline or the schedule's end; they end with their best weights."""
    args = shop.args
    grid = args.size // VAE_SHRINKS // PATCHES_PER_LATENT
    batched = BatchedModel(model.transformer, model.text_encoder, grid).to(shop.device).train()
    modules: dict[str, torch.nn.Module] = {"transformer": model.transformer, "text_encoder": model.text_encoder}
    options = Options(Schedule(args.rate))
    trainer = Trainer("transformer", modules, options, shop.work / "transformer-training", shop.journal)
    trainer.resume()
    step = make_step(batched, pool, args.batch, shop.compiled)
    trainer.run(step, make_validation(batched, checks, args.batch), Budget(args.seconds, deadline, args.finish))
    trainer.use_best()
    return batched


def write_samples(folder: Path, sheet: Path, steps: int, device: torch.device, size: int) -> None:
    """Draws the shown prompts with the stock pipeline, guidance 2, seeds 0, 1, 2, ..."""
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        list(SHOWN_PROMPTS),
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=[torch.Generator("cpu").manual_seed(k) for k in range(len(SHOWN_PROMPTS))],
    ).images
    write_sheet(pictures, SHOWN_PROMPTS, sheet)


def prepare_model(shop: Workshop, table: DeviceTable, drawer: Drawer) -> ImageModel:
    """The parts to train on: of ``--start``, of an earlier command (tokenizer and autoencoder), or new ones."""
    if shop.args.start:
        model = load_image_model(shop.args.start)
        for parameter in unused_parameters(model.text_encoder) + unused_parameters(model.transformer):
            parameter.requires_grad_(False)
        model.tokenizer.save_pretrained(shop.work / "tokenizer")
        model.vae.save_pretrained(shop.work / "vae")
        return model
    tokenizer = prepare_tokenizer(shop)
    vae = prepare_vae(shop, table, drawer)
    torch.manual_seed(shop.args.seed)
    text_encoder = make_text_encoder(len(tokenizer), layers=shop.args.text_layers)
    return ImageModel(vae, text_encoder, tokenizer, make_transformer(), shop.args.shift)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command of the training."""
    started = time.monotonic()
    args = parse_arguments(arguments)
    shop = open_workshop(args)
    drawer = Drawer(shop.emoji.pictures, shop.device, args.size)
    table = DeviceTable.of(shop.scenes, shop.device)
    model = prepare_model(shop, table, drawer)
    model.vae.to(shop.device)
    pool = fill_pool(shop, shop.scenes, model.vae, model.tokenizer, drawer)
    checks = fill_pool(shop, shop.checks, model.vae, model.tokenizer, drawer)
    deadline = started + args.command_seconds - args.reserve_seconds
    trained = train_transformer(shop, model, pool, checks, deadline - args.decoder_seconds)
    if args.decoder_seconds:
        finish = Finish(trained, pool, table, drawer, args.shift, compiled=shop.compiled)
        budget = Budget(args.decoder_seconds, deadline, finish=True)
        finish_decoder(model.vae, finish, budget, args.work / "decoder-training", shop.journal)
    folder = args.work / "model"
    export_image_model(model, folder)
    shop.journal.write("exported", megabytes=weights_megabytes(folder))
    for steps in () if args.no_samples else (8, 4):
        write_samples(folder, args.work / f"samples-{steps}.png", steps, shop.device, args.size)
    shop.journal.write("done")


if __name__ == "__main__":
    main()
