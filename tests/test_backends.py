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


def test_only_who_sends_from_a_gpu_sends_early() -> None:
    assert may_send_early([Edge(3, 0), Edge(3, 1)], torch.device("cuda", 3))
    assert not may_send_early([], torch.device("cuda", 0))
    assert not may_send_early([Edge(1, 0)], torch.device("cpu"))


def test_cuda_ipc_on_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--transfer-backend: cuda_ipc .* allowed: auto, torch"):
        resolve_device(ServerArgs(device="cpu", transfer_backend="cuda_ipc"))
