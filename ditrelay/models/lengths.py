"""How long every rank's part of a sequence is, known without asking the other ranks.

Where a sequence need not divide by the number of ranks, diffusers asks all of them before each exchange, four times an
attention layer, and waits for the device each time: three ranks took longer for a step of FLUX than one. But every rank
sees each sequence whole before it is split, so the parts of all ranks follow by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import product
from typing import Any

import torch.distributed as dist

Gather = Callable[[int, Any], list[int]]

_MOST_SEQUENCES = 4  # of different lengths in one forward
_MOST_TOGETHER = 2  # sequences of one length that are joined for one attention


class SequenceLengths:
    """The sequences that one forward of a transformer has split so far."""

    def __init__(self) -> None:
        self._tokens: frozenset[int] = frozenset()

    def begin(self) -> None:
        """A forward begins."""
        self._tokens = frozenset()

    def note(self, tokens: int) -> None:
        """A sequence of ``tokens`` is split over the ranks."""
        self._tokens |= {tokens}

    def gather(self, ask: Gather) -> Gather:
        """``ask`` (the ranks, for the length of their parts), asked only where the answer is not known.

        All ranks have noted the same, so that either all of them ask or none.
        """

        def parts(own: int, group: Any) -> list[int]:
            known = parts_by_own(self._tokens, dist.get_world_size(group), dist.get_rank(group))
            return list(known[own]) if own in known else ask(own, group)

        return parts


@lru_cache(maxsize=256)
def parts_by_own(sequences: frozenset[int], ranks: int, rank: int) -> Mapping[int, tuple[int, ...]]:
    """From the length of ``rank``'s part to those of all ranks', for one sequence or several that were joined.

    Empty where one rank's part could belong to two different sets of parts: then the answer, and whether there is one,
    would not be the same everywhere.
    """
    if len(sequences) > _MOST_SEQUENCES:
        return {}
    splits = [split(tokens, ranks) for tokens in sorted(sequences)]
    counts = product(range(_MOST_TOGETHER + 1), repeat=len(splits))
    joined = {_joined(zip(splits, count, strict=True), ranks) for count in counts if any(count)}
    if any(len({parts[each] for parts in joined}) < len(joined) for each in range(ranks)):
        return {}
    return {parts[rank]: parts for parts in joined}


def split(tokens: int, ranks: int) -> tuple[int, ...]:
    """The parts that ``torch.tensor_split`` makes: the first ones have one token more where it doesn't divide."""
    each, more = divmod(tokens, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def _joined(parts: Iterable[tuple[tuple[int, ...], int]], ranks: int) -> tuple[int, ...]:
    counted = list(parts)
    return tuple(sum(count * lengths[rank] for lengths, count in counted) for rank in range(ranks))
