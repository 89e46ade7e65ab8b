"""The text-to-image networks: a small Qwen3 and a small Z-Image transformer, and one batched pass of both for training.

The stock modules take Python lists of captions and pictures of any size. In training all have one size, so the same
weights are computed with plain batches here; a test holds the two to the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from tools.train_emoji.tokens import CAPTION_TOKENS
from tools.train_emoji.vae import LATENT_CHANNELS

PATCH = "2-1"
"""The name under which the transformer keeps its embedder and final layer for patches of 2 x 2."""
TIME_FREQUENCIES = 128


def make_text_encoder(vocabulary: int, width: int = 256, layers: int = 6, hidden: int = 320) -> Qwen3Model:
    """A small Qwen3. ZImagePipeline reads the input of the last layer, so that layer does nothing: it is all zeros."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen3Model(config)
    for parameter in unused_parameters(model):
        parameter.requires_grad_(False).zero_()
    return model


def make_transformer(caption_width: int = 256, dim: int = 256, layers: int = 4) -> ZImageTransformer2DModel:
    """A small Z-Image transformer for latents of 4 channels, in patches of 2 x 2.

    Its blocks start as the identity and its output at zero.
    """
    model = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=LATENT_CHANNELS,
        dim=dim,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=caption_width,
        axes_dims=[dim // 16, dim * 3 // 32, dim * 3 // 32],
        axes_lens=[1024, 128, 128],
    )
    nn.init.normal_(model.cap_pad_token, std=0.02)
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name.startswith(f"all_final_layer.{PATCH}.linear"):
            nn.init.zeros_(parameter)
    for parameter in unused_parameters(model):
        parameter.requires_grad_(False).zero_()
    return model


def unused_parameters(model: Qwen3Model | ZImageTransformer2DModel) -> list[nn.Parameter]:
    """What the pipeline never computes with: the text encoder's end, and the padding of pictures (all of one size)."""
    if isinstance(model, Qwen3Model):
        return [*model.layers[-1].parameters(), *model.norm.parameters()]
    return [model.x_pad_token]


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


class BatchedModel(nn.Module):
    """What ZImagePipeline computes per step, for ``grid`` x ``grid`` patches and captions of 32 tokens."""

    picture_positions: Tensor
    caption_positions: Tensor
    text_rotation: Tensor

    def __init__(self, transformer: ZImageTransformer2DModel, text_encoder: Qwen3Model, grid: int) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.grid = transformer, text_encoder, grid
        caption_grid = transformer.create_coordinate_grid((CAPTION_TOKENS, 1, 1), (1, 0, 0)).flatten(0, 2)
        picture_grid = transformer.create_coordinate_grid((1, grid, grid), (CAPTION_TOKENS + 1, 0, 0)).flatten(0, 2)
        for name, positions in (("caption_positions", caption_grid), ("picture_positions", picture_grid)):
            turns = torch.view_as_real(transformer.rope_embedder(positions.cpu())).clone()
            self.register_buffer(name, turns, persistent=False)
        cos, sin = text_encoder.rotary_emb(torch.zeros(1, CAPTION_TOKENS, 1), torch.arange(CAPTION_TOKENS)[None])
        self.register_buffer("text_rotation", torch.stack([cos[0], sin[0]]).float(), persistent=False)

    def forward(self, latents: Tensor, time: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The velocity (data minus noise) [b, c, h, w] at ``time`` [b] (0: noise, 1: data) for token rows [b, 32]."""
        model, grid = self.transformer, self.grid
        batch, channels = latents.shape[:2]
        condition = self._time(time)
        patches = latents.view(batch, channels, grid, 2, grid, 2).permute(0, 2, 4, 3, 5, 1)
        picture = model.all_x_embedder[PATCH](patches.reshape(batch, grid * grid, 4 * channels))
        for block in model.noise_refiner:
            picture = self._block(block, picture, self.picture_positions, condition)
        both = torch.cat([picture, self._caption(tokens, lengths)], 1)
        positions = torch.cat([self.picture_positions, self.caption_positions])
        for block in model.layers:
            both = self._block(block, both, positions, condition)
        last = model.all_final_layer[PATCH]
        scale = 1 + last.adaLN_modulation(condition)[:, None]
        made = F.layer_norm(both[:, : grid * grid].float(), both.shape[-1:], eps=1e-6) * scale
        patches = last.linear(made).float().view(batch, grid, grid, 2, 2, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, 2 * grid, 2 * grid)

    def _time(self, time: Tensor) -> Tensor:
        steps = torch.arange(TIME_FREQUENCIES, device=time.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10000) * steps / TIME_FREQUENCIES)
        angles = (time * self.transformer.t_scale)[:, None].float() * frequencies[None]
        embedded: Tensor = self.transformer.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1))
        return embedded

    def _caption(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        model = self.transformer
        norm, project = model.cap_embedder
        caption = project(normed(self._text(tokens), norm.weight, norm.eps))
        padding = torch.arange(CAPTION_TOKENS, device=tokens.device)[None] >= lengths[:, None]
        caption = torch.where(padding[..., None], model.cap_pad_token[0].to(caption.dtype), caption)
        for block in model.context_refiner:
            caption = self._block(block, caption, self.caption_positions, None)
        return caption

    def _text(self, tokens: Tensor) -> Tensor:
        """The input of the text encoder's last layer, which is what the pipeline conditions on."""
        epsilon = self.text_encoder.config.rms_norm_eps
        x: Tensor = self.text_encoder.embed_tokens(tokens)
        for layer in self.text_encoder.layers[:-1]:
            x = x + self._text_attention(layer.self_attn, normed(x, layer.input_layernorm.weight, epsilon))
            h = normed(x, layer.post_attention_layernorm.weight, epsilon)
            x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
        return x

    def _text_attention(self, attention: Any, x: Tensor) -> Tensor:
        epsilon = self.text_encoder.config.rms_norm_eps
        heads = [f(x).unflatten(-1, (-1, attention.head_dim)) for f in _text_projections(attention)]
        value = heads[2].transpose(1, 2)
        query = self._rotate_halves(normed(heads[0], attention.q_norm.weight, epsilon).transpose(1, 2)).to(value.dtype)
        key = self._rotate_halves(normed(heads[1], attention.k_norm.weight, epsilon).transpose(1, 2)).to(value.dtype)
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attention.o_proj(mixed.transpose(1, 2).flatten(2))

    def _rotate_halves(self, x: Tensor) -> Tensor:
        cos, sin = self.text_rotation[0], self.text_rotation[1]
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def _block(self, block: Any, x: Tensor, positions: Tensor, condition: Tensor | None) -> Tensor:
        """One transformer block; without a condition it is the context refiner's, which has no modulation."""
        attention, feed = block.attention, block.feed_forward
        scales: list[Tensor | float] = [1.0] * 4
        if condition is not None:
            a, b, c, d = block.adaLN_modulation(condition)[:, None].chunk(4, -1)
            scales = [1 + a, b.tanh(), 1 + c, d.tanh()]
        epsilon = block.attention_norm1.eps
        h = normed(x, block.attention_norm1.weight, epsilon) * scales[0]
        query, key, value = (f(h).unflatten(-1, (attention.heads, -1)) for f in _projections(attention))
        query = _rotate_pairs(normed(query, attention.norm_q.weight, 1e-5), positions).to(value.dtype)
        key = _rotate_pairs(normed(key, attention.norm_k.weight, 1e-5), positions).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        mixed = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
        x = x + scales[1] * normed(mixed, block.attention_norm2.weight, epsilon)
        h = normed(x, block.ffn_norm1.weight, epsilon) * scales[2]
        h = feed.w2(F.silu(feed.w1(h)) * feed.w3(h))
        return x + scales[3] * normed(h, block.ffn_norm2.weight, epsilon)


def _projections(attention: Any) -> tuple[Any, Any, Any]:
    return attention.to_q, attention.to_k, attention.to_v


def _text_projections(attention: Any) -> tuple[Any, Any, Any]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _rotate_pairs(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs: x [b, n, heads, d], positions [n, d/2, 2] as cosine and sine."""
    cos, sin = positions[:, None, :, 0], positions[:, None, :, 1]
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
