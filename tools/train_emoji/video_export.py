"""Writes the trained video model as a diffusers folder, and looks at it through the stock pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from tools.train_emoji.export import half, save_pipeline

STEPS = 8
GUIDANCE = 2.0
FLOW_SHIFT = 5.0
FRAMES_PER_SECOND = 6
SHOWN = (
    "a cat moving to the left",
    "a red car moving to the right on a yellow background",
    "a rocket flying up in space",
    "a soccer ball bouncing on the grass",
    "a pizza spinning on a blue background",
    "a ghost appearing at night",
    "a snowman disappearing in the snow",
    "a sunflower growing in a meadow",
    "a balloon getting smaller in the sky",
    "an alarm clock shaking",
    "a bell swinging on a pink background",
    "a blue fish moving in a circle under water",
    "a penguin falling down",
    "a frog and a duck bouncing",
    "a robot on a purple background",
    "a green dragon flying left at sunset",
)


def export_video_model(
    folder: Path,
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    transformer: WanTransformer3DModel,
) -> None:
    """Replaces ``folder`` with the model as WanPipeline saves and loads it, in float16."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=half(text_encoder),
        vae=half(vae),
        scheduler=scheduler,
        transformer=half(transformer),
    )
    save_pipeline(pipeline, folder)


@torch.no_grad()
def generate(
    pipeline: WanPipeline, prompts: list[str], size: int, frames: int, steps: int = STEPS, guidance: float = GUIDANCE
) -> Tensor:
    """Clips [n, 3, frames, size, size] in 0..1 from the stock pipeline; prompt k has seed k."""
    clips = []
    for first in range(0, len(prompts), 32):
        part = prompts[first : first + 32]
        seeds = [torch.Generator("cpu").manual_seed(first + k) for k in range(len(part))]
        made = pipeline(
            part,
            height=size,
            width=size,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=seeds,
            output_type="pt",
        )
        clips.append(made.frames.transpose(1, 2).float().cpu())
    return torch.cat(clips)


def load_pipeline(folder: Path, device: torch.device) -> WanPipeline:
    """The stock pipeline with 32-bit weights, without its progress bar."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_samples(folder: Path, path: Path, device: torch.device, size: int, frames: int) -> None:
    """A sheet of the shown prompts, a row of frames for each."""
    clips = generate(load_pipeline(folder, device), list(SHOWN), size, frames)
    write_clips(clips, SHOWN, path)


def to_pixels(clip: Tensor) -> npt.NDArray[np.uint8]:
    """uint8 [frames, height, width, 3] of a clip [3, frames, height, width] in 0..1."""
    pixels: npt.NDArray[np.uint8] = (clip.clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).numpy()
    return pixels


def write_clips(clips: Tensor, captions: Sequence[str], path: Path) -> None:
    """A row of frames for each clip [n, 3, frames, size, size] in 0..1, its caption above."""
    _, _, frames, height, width = clips.shape
    title = 14
    sheet = Image.new("RGB", (frames * (width + 2), len(clips) * (height + title + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        top = row * (height + title + 2)
        pen.text((2, top + 1), caption, fill="black")
        pixels = to_pixels(clip)
        for k in range(frames):
            sheet.paste(Image.fromarray(pixels[k]), (k * (width + 2), top + title))
    sheet.save(path)


def write_animation(clips: Tensor, path: Path, columns: int = 8) -> None:
    """All clips [n, 3, frames, size, size] in 0..1 beside each other as one animated WebP without end."""
    count, _, frames, height, width = clips.shape
    shown = []
    for frame in zip(*map(to_pixels, clips), strict=True):
        sheet = Image.new("RGB", (columns * (width + 2) - 2, -(-count // columns) * (height + 2) - 2), "white")
        for k, picture in enumerate(frame):
            sheet.paste(Image.fromarray(picture), (k % columns * (width + 2), k // columns * (height + 2)))
        shown.append(sheet)
    every, milliseconds = shown[1:], 1000 // FRAMES_PER_SECOND
    shown[0].save(path, quality=85, method=6, save_all=True, append_images=every, duration=milliseconds, loop=0)
