"""How a rank's process ends: what belongs to a thread is closed by that thread."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch

from ditrelay.models.card import load_card
from ditrelay.runtime import worker as module
from ditrelay.runtime.pipelines_core.executors.lane import Lane
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import Topology
from ditrelay.runtime.worker import Worker
from ditrelay.runtime.worker_spec import WorkerSpec


def leader(lane: Lane) -> tuple[Worker, list[str]]:
    """A worker that leads a replica, and the names of the threads that close its sockets."""
    args = ServerArgs(model_path="builtin:timed")
    spec = WorkerSpec(0, 0, args, load_card(args.model_path), Topology.build(args), "cpu", "", "", 0, 0, "")
    worker, closers = Worker(spec, mock.Mock()), []
    worker._lanes = {lane}
    worker._leader = mock.Mock()
    worker._leader.close.side_effect = lambda: closers.append(threading.current_thread().name)
    return worker, closers


def test_the_sockets_of_a_replicas_leader_are_closed_by_the_thread_that_sends_on_them() -> None:
    worker, closers = leader(Lane("compute", torch.device("cpu")))
    worker._shut_down()
    assert closers == ["lane-compute"]


def test_a_leader_that_still_computes_does_not_lose_its_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEADER_SECONDS", 0.05)
    lane, begun, computed = Lane("compute", torch.device("cpu")), threading.Event(), threading.Event()
    worker, closers = leader(lane)

    def compute() -> None:
        begun.set()
        computed.wait(30)

    lane.put(0, compute)
    assert begun.wait(30)
    worker._shut_down()
    assert closers == []
    computed.set()
