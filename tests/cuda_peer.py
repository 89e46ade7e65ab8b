"""The other end of an edge between two GPUs, as a process of its own. Run by test_cuda_transport.py.

What it is to do comes as one line of stdin, so that it can be started, and import torch, before that is known:

    PORT BACKEND GENERATION RANK MODE [SIZE...]

Rank r has GPU r; the edge is 1->0. MODE ``move`` sends (or receives and checks) a payload of each size and says "moved"
if all is well; ``die`` sends the first and kills itself as soon as the receiver is told. Then it waits to be killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from ditrelay.runtime.communication.backends import connect_edge
from ditrelay.runtime.communication.edge_channel import Channel
from ditrelay.runtime.communication.endpoint import Endpoint
from ditrelay.runtime.communication.store import connect_store
from ditrelay.runtime.topology import Edge

EDGE = Edge(1, 0)
TIMEOUT = 60.0


def connect(port: int, backend: str, generation: int, rank: int) -> Endpoint:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = connect_store("127.0.0.1", port, TIMEOUT)
    return connect_edge(backend, store, EDGE, generation, rank, device=device, timeout=TIMEOUT)


def payload(size: int, rank: int) -> list[torch.Tensor]:
    """``size`` bytes in two tensors, the same on every rank: a pattern whose length fits no power of two."""
    pattern = torch.arange(251, dtype=torch.uint8, device=f"cuda:{rank}")
    whole = pattern.repeat(size // 251 + 1)[:size]
    return [whole[: size // 3].clone(), whole[size // 3 :].clone()]


def move(end: Endpoint, rank: int, seq: int, size: int) -> bool:
    """Send or receive a payload; False if it arrived changed."""
    wanted = payload(size, rank)
    if rank == EDGE.src:
        end.isend(wanted, seq=seq).wait(TIMEOUT)
        return True
    received = [torch.full_like(tensor, 255) for tensor in wanted]
    end.irecv(received, seq=seq).wait(TIMEOUT)
    return all(torch.equal(a, b) for a, b in zip(wanted, received, strict=True))


def main() -> None:
    port, backend, generation, rank, mode, *sizes = sys.stdin.readline().split()
    end = connect(int(port), backend, int(generation), int(rank))
    if mode == "die":
        Channel.receive = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
    moved = all(move(end, int(rank), seq, int(size)) for seq, size in enumerate(sizes))
    # Half a GiB of another rank's GPU. (What NCCL's own threads do there is not ours to say.)
    strayed = backend == "cuda_ipc" and int(rank) > 0 and torch._C._cuda_hasPrimaryContext(0)
    sys.stdout.write("strayed\n" if strayed else "moved\n" if moved else "changed\n")
    sys.stdout.flush()
    time.sleep(60)


if __name__ == "__main__":
    main()
