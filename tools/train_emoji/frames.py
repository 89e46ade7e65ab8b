"""The video autoencoder on whole clips, frame by frame: what diffusers computes, in a form that trains fast.

diffusers runs Wan's autoencoder one chunk of frames after the other, with convolutions in three dimensions. Those of
this model see one frame at a time (``build_vae``), so here they run in two dimensions over all frames at once, several
times faster. Only ``time_conv``, between two frames and their one latent frame, sees more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from torch import Tensor, nn


def encode_clips(vae: AutoencoderKLWan, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance [b, 8, 1 + (f - 1) / 2, h / 4, w / 4] of clips [b, 3, f, h, w], f odd."""
    encoder, batch = vae.encoder, len(clips)
    x = _convolve(encoder.conv_in, _to_frames(clips))
    for layer in encoder.down_blocks:
        x = _shrink(layer, x, batch) if isinstance(layer, WanResample) else _run_resnet(layer, x)
    x = _run_middle(encoder.mid_block, x)
    x = _convolve(encoder.conv_out, F.silu(_norm(encoder.norm_out, x)))
    mean, log_variance = _to_clips(_convolve(vae.quant_conv, x), batch).chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode_latents(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips [b, 3, f, h, w] of latents, not clamped to -1..1."""
    decoder, batch = vae.decoder, len(latents)
    x = _convolve(vae.post_quant_conv, _to_frames(latents))
    x = _run_middle(decoder.mid_block, _convolve(decoder.conv_in, x))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _run_resnet(resnet, x)
        for upsampler in block.upsamplers or ():
            x = upsampler.resample(_double(upsampler, x, batch))
    x = _convolve(decoder.conv_out, F.silu(_norm(decoder.norm_out, x)))
    return _to_clips(x, batch)


def normalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The latents as the transformer sees them: each channel about 0 with a deviation of 1."""
    mean, deviation = _statistics(vae, latents.device)
    return (latents - mean) / deviation


def denormalise(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The way back."""
    mean, deviation = _statistics(vae, latents.device)
    return latents * deviation + mean


def _statistics(vae: AutoencoderKLWan, device: torch.device) -> list[Tensor]:
    figures = (vae.config.latents_mean, vae.config.latents_std)
    return [torch.tensor(values, device=device).view(-1, 1, 1, 1) for values in figures]


def _to_frames(clips: Tensor) -> Tensor:
    """[b, c, f, h, w] to [b * f, c, h, w], channels last in memory."""
    return clips.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _to_clips(frames: Tensor, batch: int) -> Tensor:
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def _convolve(layer: nn.Conv3d, x: Tensor) -> Tensor:
    """What a causal convolution makes of a frame that has none before it."""
    return F.conv2d(x, layer.weight[:, :, -1], layer.bias, padding=layer.kernel_size[-1] // 2)


def _norm(layer: Any, x: Tensor) -> Tensor:
    scaled = F.normalize(x.float(), dim=1) * (layer.scale * layer.gamma.view(-1, 1, 1))
    return scaled.to(x.dtype)


def _run_resnet(resnet: Any, x: Tensor) -> Tensor:
    h = _convolve(resnet.conv1, F.silu(_norm(resnet.norm1, x)))
    h = _convolve(resnet.conv2, F.silu(_norm(resnet.norm2, h)))
    return h + (_convolve(resnet.conv_shortcut, x) if isinstance(resnet.conv_shortcut, nn.Conv3d) else x)


def _run_middle(block: Any, x: Tensor) -> Tensor:
    x = _run_resnet(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _run_resnet(resnet, attention(x.unsqueeze(2)).squeeze(2))
    return x


def _shrink(layer: WanResample, x: Tensor, batch: int) -> Tensor:
    """Half the height and width; where the layer says so, two frames become one, and the first stays as it is."""
    x = layer.resample(x)
    if layer.mode != "downsample3d":
        return x
    clips = _to_clips(x, batch)
    if clips.shape[2] == 1:
        return x
    return _to_frames(torch.cat([clips[:, :, :1], layer.time_conv(clips)], 2))


def _double(layer: WanResample, x: Tensor, batch: int) -> Tensor:
    """Every frame but the first becomes two, where the upsampler is one in time."""
    clips = _to_clips(x, batch)
    if layer.mode != "upsample3d" or clips.shape[2] == 1:
        return x
    _, channels, frames, height, width = clips.shape
    pairs = layer.time_conv(clips[:, :, 1:]).view(batch, 2, channels, frames - 1, height, width)
    rest = pairs.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels, 2 * (frames - 1), height, width)
    return _to_frames(torch.cat([clips[:, :, :1], rest], 2))
