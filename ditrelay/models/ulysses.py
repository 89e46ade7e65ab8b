"""Ulysses attention over parts of any length, with two exchanges a layer in place of diffusers' four.

Query, key and value travel together. A step of a model with many small layers waits for the thread that launches it,
so what counts is how little there is to launch. Source: DeepSpeed Ulysses (arXiv 2309.14509); takes the place of
``TemplatedUlyssesAnythingAttention`` of diffusers 0.42, which goes on with what is not plain self-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

PartsOf = Callable[[int, dist.ProcessGroup], Sequence[int]]


class UlyssesAttention:
    """What diffusers calls for each attention layer that is spread over ranks.

    Args:
        parts_of: from the length of this rank's part to those of all ranks of a group.
        theirs: diffusers' own, for masks, for attention that gives its log-sum-exp and for heads that must be padded.
    """

    def __init__(self, parts_of: PartsOf, theirs: Any) -> None:
        self._parts_of = parts_of
        self._theirs = theirs

    def apply(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        return_lse: bool,
        forward_op: Callable[..., torch.Tensor],
        backward_op: object,
        parallel: Any,
    ) -> Any:
        """Attention of [batch, own tokens, heads, channels] over the tokens of all ranks, in the shape of ``query``."""
        group = parallel.context_parallel_config._ulysses_mesh.get_group()
        options = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
        alike = query.shape == key.shape == value.shape
        if attn_mask is not None or return_lse or not alike or query.shape[2] % dist.get_world_size(group):
            return self._theirs.apply(query, key, value, *options, forward_op, backward_op, parallel)
        parts = list(self._parts_of(query.shape[1], group))
        query, key, value = to_heads((query, key, value), parts, group)
        made = forward_op(SimpleNamespace(), query, key, value, *options, _save_ctx=False, _parallel_config=parallel)
        return to_tokens(made, parts, group)


def to_heads(tensors: Sequence[torch.Tensor], parts: list[int], group: dist.ProcessGroup) -> Sequence[torch.Tensor]:
    """[batch, own tokens, heads, channels] each -> [batch, all tokens, own heads, channels] each."""
    batch, tokens, heads, channels = tensors[0].shape
    ranks, count = len(parts), len(tensors)
    own = heads // ranks
    sent = tensors[0].new_empty(ranks, tokens, count, batch, own, channels)
    for number, tensor in enumerate(tensors):
        sent[:, :, number] = tensor.reshape(batch, tokens, ranks, own, channels).permute(2, 1, 0, 3, 4)
    received = sent.new_empty(sum(parts), count, batch, own, channels)
    dist.all_to_all_single(received, sent.flatten(0, 1), parts, [tokens] * ranks, group)
    return [received[:, number].transpose(0, 1) for number in range(count)]


def to_tokens(tensor: torch.Tensor, parts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """[batch, all tokens, own heads, channels] -> [batch, own tokens, heads, channels]."""
    batch, _, own, channels = tensor.shape
    ranks, tokens = len(parts), parts[dist.get_rank(group)]
    received = tensor.new_empty(ranks * tokens, batch, own, channels)
    dist.all_to_all_single(received, tensor.transpose(0, 1).contiguous(), [tokens] * ranks, parts, group)
    return received.view(ranks, tokens, batch, own, channels).permute(2, 1, 0, 3, 4).flatten(2, 3)
