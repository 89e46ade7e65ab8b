"""The key-value store that ranks meet at, and the names of its keys."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from ditrelay.errors import TransferError
from ditrelay.runtime.topology import Edge

_STORE_TIMEOUT = timedelta(seconds=60)


class StoreServer:
    """Hosts the store in this process, on one interface only (the store has no authentication).

    Attributes:
        host: the interface that it listens on.
        port: chosen by the operating system.
        store: this process's own client.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        listener = socket.socket()
        listener.bind((host, 0))
        self.host = host
        self.port: int = listener.getsockname()[1]
        # Given only a port, TCPStore listens on all interfaces; given a bound socket, it takes that one over.
        self.store = TCPStore(
            host,
            self.port,
            is_master=True,
            timeout=_STORE_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def connect_store(host: str, port: int, timeout: float, token: str = "") -> Store:
    """A client of the store at ``host:port``; its own waits take at most ``timeout`` seconds too.

    All its keys begin with ``token``, so that only processes of one launch meet.

    A client waits for a key with its connection locked, so threads that may wait for each other need one each.

    Raises:
        TransferError: no store answered within (about) ``timeout`` seconds.
    """
    limit = timedelta(seconds=timeout)
    try:
        store = TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        raise TransferError(f"store {host}:{port}", f"it does not answer within {timeout:g} s") from error
    return PrefixStore(token, store) if token else store


def edge_prefix(edge: Edge, generation: int) -> str:
    """Where the two ends of one generation of an edge meet."""
    return f"edge/{edge}/{generation}"


def replica_prefix(leader: int, generation: int) -> str:
    """Where the members of one generation of a replica meet."""
    return f"replica/{leader}/{generation}"
