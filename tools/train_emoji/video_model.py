"""The video model's networks: Wan's classes at a tiny size, and a pass through the denoiser that suits training.

diffusers runs Wan's transformer on prompts padded to 512 tokens. The pass here computes the same values from the same
modules with prompts of 32 tokens. The autoencoder's pass is in frames.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from tools.train_emoji.tokens import byte_pairs

FRAMES = 9
SIZE = 96
CHANNELS = 8
SHRINKS = 4
PATCH = 3
"""A token is 3x3 latents of 4x4 pixels each, and two frames (the first frame has its own tokens)."""
PROMPT_TOKENS = 512
"""What the pipeline pads a prompt to; the transformer sees the padding as zeros."""
TEXT_TOKENS = 32
"""What training pads a caption to; the padding beyond is counted, not computed."""
PADDING_BIAS, QUERY_BIAS = 0.1, 2.0
END_TOKEN = "</s>"
PAD_TOKEN = "<pad>"


class Widths(NamedTuple):
    """How large the networks are; the defaults are the built-in model's, 24 MB in 16 bits."""

    vae: int = 24
    vae_levels: tuple[int, int, int] = (1, 2, 3)
    text: int = 192
    text_layers: int = 3
    dim: int = 256
    heads: int = 4
    layers: int = 8
    feed_forward: int = 640
    vocabulary: int = 2560


TRIAL_WIDTHS = Widths(
    vae=8, vae_levels=(1, 1, 2), text=64, text_layers=2, dim=64, heads=2, layers=2, feed_forward=128, vocabulary=400
)
"""Networks for tests and trials on a CPU."""


def build_vae(widths: Widths) -> AutoencoderKLWan:
    """4x smaller in height and width, 2x in time (the first frame stays alone), 8 channels.

    Its convolutions look at one frame at a time: what they would read of earlier frames starts at zero and stays there
    (frames.py never trains it). Only the step from two frames to one and back mixes frames.
    """
    vae = AutoencoderKLWan(
        base_dim=widths.vae,
        z_dim=CHANNELS,
        dim_mult=list(widths.vae_levels),
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=2,
        scale_factor_spatial=SHRINKS,
    )
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv3d) and not (name.startswith("encoder") and name.endswith("time_conv")):
            nn.init.zeros_(module.weight[:, :, :-1])
    return vae


def build_text_encoder(widths: Widths, vocabulary: int) -> UMT5EncoderModel:
    """A small encoder whose every layer has its own relative positions, as UMT5's have."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=widths.text,
        d_kv=32,
        num_heads=widths.text // 32,
        d_ff=widths.text * 7 // 3 // 64 * 64,
        num_layers=widths.text_layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_transformer(widths: Widths) -> WanTransformer3DModel:
    """Wan's transformer with tokens of 12x12 pixels and 2 frames; it starts deaf to padding, and its output at zero."""
    model = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=widths.heads,
        attention_head_dim=widths.dim // widths.heads,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=widths.text,
        freq_dim=256,
        ffn_dim=widths.feed_forward,
        num_layers=widths.layers,
        rope_max_seq_len=64,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.proj_out.weight)
    for block in model.blocks:
        _turn_from_padding(block.attn2)
    return model


@torch.no_grad()
def _turn_from_padding(attention: Any) -> None:
    """Lets cross-attention start with its eyes on the words.

    A prompt is 10 words and 500 tokens of padding, all alike, and Wan's transformer masks none. Left to chance, padding
    takes 98% of the attention, and after 12,000 steps still 96%: words are hardly heard, and things are not told apart.
    Padding reaches the keys as zeros, so its key is the bias alone; queries start opposed to that bias. The bias is
    small beside a word's own key, but the norm after it makes every key the same length.
    """
    signs = torch.randint(0, 2, attention.to_k.bias.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    attention.to_k.bias.copy_(-PADDING_BIAS * signs)
    attention.to_q.bias.copy_(QUERY_BIAS * signs)


def build_tokenizer(captions: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer that ends every prompt with an end token, as T5's do."""
    tokenizer = byte_pairs(captions, vocabulary, (PAD_TOKEN, END_TOKEN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END_TOKEN}", special_tokens=[(END_TOKEN, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        padding_side="right",
        model_max_length=PROMPT_TOKENS,
    )


def tokenize(tokenizer: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids int16 [n, 32], padded with 0, and the lengths int16 [n] with the end token; longer ones are cut."""
    rows = tokenizer(captions, truncation=True, max_length=TEXT_TOKENS)["input_ids"]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int16)
    ids = torch.zeros(len(rows), TEXT_TOKENS, dtype=torch.int16)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row, dtype=torch.int16)
    return ids, lengths


# ------------------------------------------------------------------ the transformer on short prompts


class ClipDenoiser(nn.Module):
    """Text encoder and transformer in one pass, for captions padded to 32 tokens."""

    def __init__(
        self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel, compiled: bool = False
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        # One compiled block serves all of them; the whole pass takes minutes to compile.
        self._train_block = torch.compile(_run_block, dynamic=False) if compiled else _run_block
        self._train_words = torch.compile(self.encode_text, dynamic=False) if compiled else self.encode_text

    def forward(self, latents: Tensor, sigma: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
        """The velocity (noise minus data) of latents [b, 8, f, h, w] at noise levels [b] in 0..1."""
        model = self.transformer
        training = torch.is_grad_enabled()
        encode = self._train_words if training else self.encode_text
        run_block: Callable[..., Tensor] = self._train_block if training else _run_block
        cos, sin = (part[:, :, :, ::2].float() for part in model.rope(latents))
        x = model.patch_embedding(latents).flatten(2).transpose(1, 2).float()  # sums up in 32 bits, as in the pipeline
        position = torch.arange(TEXT_TOKENS, device=ids.device)[None]
        words = encode(ids, lengths) * (position < lengths[:, None]).unsqueeze(-1)
        time, modulation, words, _ = model.condition_embedder(sigma * 1000, words)
        modulation = modulation.unflatten(1, (6, -1))
        padding = _padding_bias(position, lengths[:, None])
        for block in model.blocks:
            x = run_block(block, x, words, padding, modulation, cos, sin)
        shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, 1)
        x = model.proj_out(model.norm_out(x.float()) * (1 + scale) + shift)
        return _unpatch(x.float(), latents.shape)

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """What UMT5 makes of token ids [b, 32] of these lengths: [b, 32, width]; rows past the end mean nothing."""
        encoder = self.text_encoder.encoder
        position = torch.arange(TEXT_TOKENS, device=ids.device)[None]
        hidden = torch.zeros(position.shape, device=ids.device).where(position < lengths[:, None], float("-inf"))
        x = self.text_encoder.shared(ids)
        for block in encoder.block:
            outer = block.layer[0]
            attention = outer.SelfAttention
            h = outer.layer_norm(x)
            q, k, v = (_heads(project(h), attention.n_heads) for project in (attention.q, attention.k, attention.v))
            bias = attention.compute_bias(TEXT_TOKENS, TEXT_TOKENS, device=ids.device) + hidden[:, None, None]
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
            x = block.layer[1](x + attention.o(h.transpose(1, 2).flatten(2)))
        return encoder.final_layer_norm(x)


def _padding_bias(position: Tensor, lengths: Tensor) -> Tensor:
    """What to add to attention scores so that one padding token counts for all: [b, 1, 1, 32].

    The transformer attends to every one of the 512 tokens, padding included, and all padding is alike.
    """
    hidden = torch.full(position.shape, float("-inf"), device=position.device)
    many = torch.log((PROMPT_TOKENS - lengths).float())
    bias = torch.where(position < lengths, 0.0, torch.where(position == lengths, many, hidden))
    return bias[:, None, None]


def _run_block(
    block: Any, x: Tensor, words: Tensor, padding: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """One WanTransformerBlock; ``cos`` and ``sin`` are [1, tokens, 1, half a head]."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = (block.scale_shift_table + modulation.float()).chunk(6, 1)
    h = (block.norm1(x.float()) * (1 + scale) + shift).type_as(x)
    own = block.attn1
    v = _heads(own.to_v(h), own.heads)
    q, k = (_rotate(project.unflatten(2, (own.heads, -1)), cos, sin).to(v.dtype) for project in _query_key(own, h, h))
    h = F.scaled_dot_product_attention(q, k, v)
    x = (x.float() + own.to_out[0](h.transpose(1, 2).flatten(2)) * gate).type_as(x)
    cross = block.attn2
    q, k = (_heads(project, cross.heads) for project in _query_key(cross, block.norm2(x), words))
    v = _heads(cross.to_v(words), cross.heads)
    h = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=padding.to(v.dtype))
    x = x + cross.to_out[0](h.transpose(1, 2).flatten(2))
    h = (block.norm3(x.float()) * (1 + ff_scale) + ff_shift).type_as(x)
    return (x.float() + block.ffn(h).float() * ff_gate).type_as(x)


def _query_key(attention: Any, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    return attention.norm_q(attention.to_q(x)), attention.norm_k(attention.to_k(context))


def _heads(x: Tensor, heads: int) -> Tensor:
    """[b, tokens, width] to [b, heads, tokens, width / heads]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [b, tokens, heads, width], neighbours paired; to [b, heads, tokens, width]."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)
    return turned.transpose(1, 2)


def _unpatch(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Tokens [b, f * h / 3 * w / 3, 3 * 3 * 8] back to latents [b, 8, f, h, w]."""
    batch, channels, frames, height, width = shape
    grid = tokens.view(batch, frames, height // PATCH, width // PATCH, PATCH, PATCH, channels)
    return grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, channels, frames, height, width)
