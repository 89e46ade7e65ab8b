"""Which backend an edge gets, and that a wrong one is refused before any process starts."""

from __future__ import annotations

import pytest
import torch

from ditrelay import ServerArgs
from ditrelay.errors import ConfigError
from ditrelay.runtime.communication.backends import choose_backend, may_send_early
from ditrelay.runtime.launcher import resolve_device
from ditrelay.runtime.topology import Edge


@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_edges_between_cpus_run_over_torch(wanted: str) -> None:
    assert choose_backend(wanted, Edge(1, 0), torch.device("cpu")) == "torch"


@pytest.mark.parametrize("reach", [True, False])
def test_auto_takes_cuda_ipc_where_the_receiver_reaches_the_senders_memory(
    reach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, peer: asked.append((own, peer)) or reach)
    for rank in (3, 0):
        assert choose_backend("auto", Edge(3, 0), torch.device("cuda", rank)) == ("cuda_ipc" if reach else "torch")
    assert asked == [(0, 3), (0, 3)], "both ends ask the same question"


@pytest.mark.parametrize(
    "wanted, reach, early",
    [("auto", {0, 1}, True), ("auto", {0}, False), ("torch", {0, 1}, False), ("cuda_ipc", set(), True)],
)
def test_a_rank_sends_early_only_where_all_who_receive_from_it_wait_for_free(
    wanted: str, reach: set[int], early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, peer: own in reach)
    assert may_send_early(wanted, [Edge(3, 0), Edge(3, 1)], torch.device("cuda", 3)) is early


def test_who_sends_nothing_or_runs_on_a_cpu_sends_nothing_early() -> None:
    assert not may_send_early("cuda_ipc", [], torch.device("cuda", 0))
    assert not may_send_early("auto", [Edge(1, 0)], torch.device("cpu"))


def test_cuda_ipc_on_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--transfer-backend: cuda_ipc .* allowed: auto, torch"):
        resolve_device(ServerArgs(device="cpu", transfer_backend="cuda_ipc"))
