"""What a worker is started with: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

from ditrelay.models.card import ModelCard
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import Topology


@dataclass(frozen=True)
class WorkerSpec:
    """Attributes:
    rank: whose process this is.
    incarnation: how often the rank was started before; also the generation of its replica's group.
    device_type: ``cpu`` or ``cuda``; rank r of a host runs on ``cuda:r``.
    run_dir: the launch's folder: sockets, checkpoints.
    store_host, store_port: the head's TCPStore.
    head_pid: the worker ends when this process does.
    token: of this launch; messages and meeting points without it are a stranger's.
    head_seconds: the worker ends, too, when it has not heard of the head for so long: that is stopped, or hangs. Should
        it go on after all, it starts the rank anew.
    """

    rank: int
    incarnation: int
    args: ServerArgs
    card: ModelCard
    topology: Topology
    device_type: str
    run_dir: str
    store_host: str
    store_port: int
    head_pid: int
    token: str = field(repr=False)
    head_seconds: float = 120.0
