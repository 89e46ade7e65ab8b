"""Every rank works out the same parts of a sequence, or none does."""

from __future__ import annotations

from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from ditrelay.models.lengths import parts_by_own, split


@given(st.integers(1, 5000), st.integers(1, 8))
def test_parts_are_those_of_tensor_split(tokens: int, ranks: int) -> None:
    parts = torch.empty(tokens).tensor_split(ranks)
    assert split(tokens, ranks) == tuple(len(part) for part in parts)


def test_flux_on_three_ranks_knows_its_picture_its_text_and_both_together() -> None:
    sequences = frozenset({4096, 512})
    for rank, (picture, text) in enumerate(zip((1366, 1365, 1365), (171, 171, 170), strict=True)):
        known = parts_by_own(sequences, 3, rank)
        assert known[picture] == (1366, 1365, 1365) and known[text] == (171, 171, 170)
        assert known[picture + text] == (1537, 1536, 1535)


def test_nothing_is_known_anywhere_where_one_rank_could_not_tell() -> None:
    for rank in range(3):
        assert parts_by_own(frozenset({4096, 4097}), 3, rank) == {}  # rank 0 has 1366 of either
        assert parts_by_own(frozenset({1, 2, 4, 8, 16}), 3, rank) == {}


@given(st.frozensets(st.integers(2, 300), min_size=1, max_size=3), st.integers(2, 5))
def test_all_ranks_find_the_parts_of_what_was_joined_or_none_does(sequences: frozenset[int], ranks: int) -> None:
    for counts in product(range(3), repeat=len(sequences)):
        whole = [split(tokens, ranks) for tokens in sorted(sequences)]
        joined = tuple(sum(n * parts[r] for n, parts in zip(counts, whole, strict=True)) for r in range(ranks))
        if any(counts):
            found = {parts_by_own(sequences, ranks, rank).get(joined[rank]) for rank in range(ranks)}
            assert found in ({joined}, {None})
