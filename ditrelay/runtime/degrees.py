"""The degrees of a replica: how many ranks share its work, and in which way."""

from __future__ import annotations

import math

from ditrelay.errors import ConfigError


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
