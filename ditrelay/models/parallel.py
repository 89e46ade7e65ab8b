"""Spread a transformer over the ranks of the default process group with diffusers' own plans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import context_parallel, tensor_parallel
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import TensorParallelConfig
from diffusers.models._modeling_parallel import gather_size_by_comm as _ask_all_ranks
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.distributed.device_mesh import init_device_mesh

from ditrelay.errors import ConfigError, InvalidRequest
from ditrelay.models.lengths import SequenceLengths
from ditrelay.models.ulysses import UlyssesAttention

if TYPE_CHECKING:
    from ditrelay.models.load_spec import LoadSpec

_attention_without_lse = attention_dispatch._native_attention_forward_op
_ulysses_of_any_length = attention_dispatch.TemplatedUlyssesAnythingAttention
_context_parallel_attention = attention_dispatch._templated_context_parallel_attention


class ReplicaMesh:
    """The ranks of one replica in four dimensions: guidance branches, tensor, ring and Ulysses parallel.

    Every rank of the default process group makes one at the same time. Ulysses ranks, which exchange most, are
    neighbours.
    """

    def __init__(self, spec: LoadSpec, device: torch.device) -> None:
        """Raises ``ConfigError`` for ring attention in a dtype that its kernels don't take."""
        if spec.ring > 1 and device.type != "cpu" and spec.dtype == "float32":
            raise ConfigError(
                "--ring-degree", "its kernels take no float32 on a GPU; allowed: --dtype bfloat16, float16"
            )
        self._spec = spec
        self._device = device
        shape = (spec.cfg, spec.tp, spec.ring, spec.sp // spec.ring)
        self._mesh = init_device_mesh(device.type, shape, mesh_dim_names=("cfg", "tp", "ring", "ulysses"))
        share_timeout(self._device)

    @property
    def branches(self) -> dist.ProcessGroup | None:
        """The two ranks that share this rank's part and compute one branch of guidance each; None without such."""
        return self._mesh.get_group("cfg") if self._spec.cfg > 1 else None

    def split(self, transformer: Any) -> None:
        """Sequence and tensor parallelism, once per transformer. ``card.check_parallel`` refused what has no plan.

        Raises:
            ConfigError: it has too few attention heads for the Ulysses degree.
        """
        spec = self._spec
        if spec.sp > spec.ring:
            heads = transformer.config.num_attention_heads // spec.tp
            check_heads(heads, ulysses=spec.sp // spec.ring, ring=spec.ring)
        if self._device.type == "cpu":
            context_parallel._all_gather_anything = _gather_by_padding
            if spec.ring > 1:
                attention_dispatch._native_attention_forward_op = _attention_with_lse
        if spec.torch_compile and spec.sp > 1:
            # torch (2.13) fails to trace its exchanges. What is around the attention is compiled.
            eager = torch.compiler.disable(_context_parallel_attention)  # type: ignore[no-untyped-call]
            attention_dispatch._templated_context_parallel_attention = eager
        with _cpu_allowed(self._device), _sequences_watched(transformer):
            for config in self._configs():
                # diffusers refuses a second kind. But one splits the weights, the other what they are applied to.
                transformer._parallel_config = None
                transformer.enable_parallelism(config=config)
        share_timeout(self._device)  # diffusers makes a group of its own

    def _configs(self) -> Iterator[ContextParallelConfig | TensorParallelConfig]:
        ring, ulysses = self._spec.ring, self._spec.sp // self._spec.ring
        if self._spec.tp > 1:
            yield TensorParallelConfig(tp_degree=self._spec.tp, mesh=self._mesh["tp"])
        if self._spec.sp > 1:
            # "anything": the plain kinds assert that every sequence divides by the degree (512 text tokens by 3: not).
            # diffusers has no such mode for both at once.
            yield ContextParallelConfig(
                ring_degree=ring,
                ulysses_degree=ulysses,
                ring_anything=ulysses == 1,
                ulysses_anything=ring == 1,
                mesh=self._mesh,
            )


def _watching_split(lengths: SequenceLengths) -> type:
    """diffusers' hook that gives each rank its part of a sequence; it asserts where ours says what is allowed."""
    note = torch.compiler.disable(lengths.note)  # type: ignore[no-untyped-call]

    class WatchingSplit(context_parallel.ContextParallelSplitHook):  # type: ignore[misc]
        def _prepare_cp_input(self, x: torch.Tensor, cp_input: Any) -> torch.Tensor:
            config = self.parallel_config
            if cp_input.expected_dims in (None, x.dim()):
                tokens = x.shape[cp_input.split_dim]
                check_tokens(tokens, ulysses=config.ulysses_degree, ring=config.ring_degree)
                note(tokens)
            part: torch.Tensor = super()._prepare_cp_input(x, cp_input)
            return part

    return WatchingSplit


def check_tokens(tokens: int, *, ulysses: int, ring: int) -> None:
    """Refuse a sequence that diffusers can't share out. How long one is follows from a request's size.

    Raises:
        InvalidRequest: names the flags, and what fits.
    """
    ranks = ulysses * ring
    if tokens < ranks:
        reason, fits = f"is too short for {ranks} ranks", f"a size of at least {ranks} tokens"
    elif ulysses > 1 and ring > 1 and tokens % ranks:
        reason = f"does not divide by {ranks} ranks"
        fits = f"a size that makes a multiple of {ranks} tokens; any size where the server has only one of these flags"
    else:
        return
    flags = f"--ulysses-degree {ulysses} x --ring-degree {ring}"
    raise InvalidRequest("height", f"a sequence of {tokens} tokens {reason} ({flags}); allowed: {fits}")


def share_timeout(device: torch.device) -> None:
    """Give every process group the time-out of the default one; torch makes further ones with 10 or 30 minutes."""
    timeout = group_timeout(dist.group.WORLD, device)
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def group_timeout(group: Any, device: torch.device) -> timedelta:
    """How long a collective of ``group`` may take on ``device``."""
    timeout: timedelta = group._get_backend(device).options._timeout
    return timeout


def check_heads(heads: int, *, ulysses: int, ring: int) -> None:
    """Refuse an Ulysses degree that diffusers can't share ``heads`` out to (its heads are padded, except with a ring).

    Raises:
        ConfigError: names the degrees that fit.
    """

    def fits(degree: int) -> bool:
        padding = -heads % degree
        return padding == 0 if ring > 1 else padding < (heads + padding) // degree

    if not fits(ulysses):
        allowed = ", ".join(str(degree) for degree in range(1, heads + 1) if fits(degree))
        raise ConfigError(
            "--ulysses-degree", f"{ulysses} ranks can't share {heads} attention heads; allowed: {allowed}"
        )


def supports_context_parallel(backend: str) -> bool:
    """Whether diffusers can run these attention kernels with the sequence spread over ranks."""
    registry = attention_dispatch._AttentionBackendRegistry
    return bool(registry._is_context_parallel_available(AttentionBackendName(backend)))


@contextmanager
def _sequences_watched(transformer: Any) -> Iterator[None]:
    """What is made parallel inside splits sequences with our hook, from which all know the parts of the other ranks."""
    lengths = SequenceLengths()
    transformer.register_forward_pre_hook(lambda *_: lengths.begin())
    parts_of = lengths.gather(_ask_all_ranks)
    for module in (attention_dispatch, context_parallel):
        module.gather_size_by_comm = parts_of
    attention_dispatch.TemplatedUlyssesAnythingAttention = UlyssesAttention(parts_of, _ulysses_of_any_length)
    theirs = context_parallel.ContextParallelSplitHook
    context_parallel.ContextParallelSplitHook = _watching_split(lengths)
    try:
        yield
    finally:
        context_parallel.ContextParallelSplitHook = theirs


@contextmanager
def _cpu_allowed(device: torch.device) -> Iterator[None]:
    """diffusers divides by the number of accelerators, which is 0 without one, and refuses tensor parallelism there."""
    if device.type != "cpu":
        yield
        return
    count_devices, tp_devices = torch.accelerator.device_count, tensor_parallel._SUPPORTED_TP_DEVICES
    torch.accelerator.device_count = lambda: 1
    tensor_parallel._SUPPORTED_TP_DEVICES = ("cpu",)
    try:
        yield
    finally:
        torch.accelerator.device_count = count_devices
        tensor_parallel._SUPPORTED_TP_DEVICES = tp_devices


def _gather_by_padding(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate along ``dim`` the parts that all ranks hold, whatever their sizes.

    Takes the place of diffusers' own gather on the CPU: gloo gathers parts of one size only.
    """
    sizes = context_parallel.gather_size_by_comm(tensor.shape[dim], group)
    shape = list(tensor.shape)
    shape[dim] = max(sizes)
    padded = tensor.new_zeros(shape)
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=dim)


def _attention_with_lse(
    ctx: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    **saving: Any,
) -> Any:
    """Attention of [batch, tokens, heads, channels], where asked with its log-sum-exp, [batch, tokens, heads].

    Takes the place of diffusers' "native" kernels on the CPU, which give none, so that ring attention runs there too.
    """
    if not return_lse:
        options = (attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse)
        return _attention_without_lse(ctx, query, key, value, *options, **saving)
    assert attn_mask is None and not enable_gqa, "ring attention has neither"
    heads_first = (part.transpose(1, 2) for part in (query, key, value))
    result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *heads_first, dropout_p, is_causal, scale=scale
    )
    return result.transpose(1, 2), lse.transpose(1, 2)
