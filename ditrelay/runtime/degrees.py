"""The degrees of a replica: how many ranks share its work, and in which way."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ditrelay.errors import ConfigError

if TYPE_CHECKING:
    from ditrelay.runtime.server_args import ServerArgs


def split_sequence(sp_degree: int, ulysses: int | None, ring: int | None) -> tuple[int, int]:
    """(Ulysses degree, ring degree): by attention heads, by keys and values. Their product is the degree of both.

    What is not given follows from the rest: ``sp_degree`` alone is all Ulysses. A ``sp_degree`` of 1 beside one of the
    other two counts as not given.

    Raises:
        ConfigError: the degrees contradict each other.
    """
    if ulysses is None and ring is None:
        return sp_degree, 1
    given = [(flag, d) for flag, d in (("--ulysses-degree", ulysses), ("--ring-degree", ring)) if d is not None]
    product = math.prod(degree for _, degree in given)
    if sp_degree == 1:
        return ulysses or 1, ring or 1
    if len(given) == 2 and product != sp_degree:
        raise ConfigError(
            "--sp-degree",
            f"{sp_degree} is not --ulysses-degree {ulysses} x --ring-degree {ring}; allowed: {product}",
        )
    if sp_degree % product:
        flag, degree = given[0]
        divisors = ", ".join(str(d) for d in range(1, sp_degree + 1) if sp_degree % d == 0)
        raise ConfigError(flag, f"{degree} does not divide --sp-degree {sp_degree}; allowed: {divisors}")
    return ulysses or sp_degree // product, ring or sp_degree // product


def shrunk_ring(ring: int, sp: int) -> int:
    """The ring's part where only ``sp`` ranks, a divisor of the full degree, are left for a replica."""
    return math.gcd(ring, sp)


def check_group(*, sp: int, tp: int, cfg: int, ranks: int) -> None:
    """Raises ``ConfigError``, naming the flag of the largest degree, where ``ranks`` are too few for one replica."""
    group = sp * tp * cfg
    if group <= ranks:
        return
    _, flag = max((sp, "--sp-degree"), (tp, "--tp-size"), (cfg, "--cfg-parallel-degree"), key=lambda item: item[0])
    with_cfg = f" x cfg-parallel-degree {cfg}" if cfg > 1 else ""
    raise ConfigError(
        flag,
        f"sp-degree {sp} x tp-size {tp}{with_cfg} needs {group} DiT ranks and there are {ranks}; "
        f"allowed: a product of at most {ranks}, or a larger --num-gpus",
    )


def check_ranks(args: ServerArgs) -> tuple[int, int]:
    """(Ulysses degree, ring degree) of a replica. Raises ``ConfigError`` where the ranks can't be placed as asked."""
    if args.enable_disagg:
        _check_disagg(args)
    split = args.sequence_split
    check_group(sp=math.prod(split), tp=args.tp_size, cfg=args.cfg_parallel_degree, ranks=args.num_dit_ranks)
    if args.dit_cpu_offload and args.tp_size > 1:
        raise ConfigError("--dit-cpu-offload", f"can't be combined with --tp-size {args.tp_size}; allowed: --tp-size 1")
    return split


def _check_disagg(args: ServerArgs) -> None:
    if args.num_gpus < 2:
        raise ConfigError("--num-gpus", f"{args.num_gpus} is too few for --enable-disagg; allowed: 2 or more")
    if args.num_non_dit_ranks >= args.num_gpus:
        raise ConfigError(
            "--num-non-dit-ranks",
            f"{args.num_non_dit_ranks} leaves no DiT rank of {args.num_gpus}; allowed: 1 to {args.num_gpus - 1}",
        )
    _check_split(args)


def _check_split(args: ServerArgs) -> None:
    encoders, decoders, total = args.num_encoder_ranks, args.num_decoder_ranks, args.num_non_dit_ranks
    if encoders is not None and decoders is not None:
        if encoders + decoders != total:
            raise ConfigError(
                "--num-non-dit-ranks",
                f"{total} is not the sum of --num-encoder-ranks {encoders} and --num-decoder-ranks {decoders}; "
                f"allowed: {encoders + decoders}",
            )
        return
    for option, given, other in (
        ("--num-encoder-ranks", encoders, "decoder"),
        ("--num-decoder-ranks", decoders, "encoder"),
    ):
        if given is not None and given >= total:
            allowed = f"1 to {total - 1}" if total > 1 else "none here; raise --num-non-dit-ranks to 2 or more"
            raise ConfigError(option, f"{given} of {total} non-DiT ranks leaves no {other} rank; allowed: {allowed}")
