"""What the ranks of a replica listen on is seen from this host alone."""

from __future__ import annotations

import psutil

from ditrelay import Engine, ServerArgs


def test_the_ranks_of_a_replica_listen_on_the_loopback_interface_only(monkeypatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    args = ServerArgs(model_path="builtin:timed", device="cpu", enable_disagg=True, num_gpus=3, sp_degree=2)
    with Engine(args) as engine:
        engine.generate("a red apple", timeout=60)
        listening = [
            connection.laddr.ip
            for worker in engine.status().workers
            for connection in psutil.Process(worker.pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
    assert listening and set(listening) <= {"127.0.0.1", "::1"}
