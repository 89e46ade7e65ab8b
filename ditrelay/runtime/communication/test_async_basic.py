"""Self-check of the transfer layer, to run under torchrun with any number of ranks from two on:

    torchrun --nproc_per_node=4 ditrelay/runtime/communication/test_async_basic.py

The last rank is non-DiT, all others are DiT. NCCL where every rank has a GPU of its own, gloo otherwise. Rank 0 prints;
every rank exits with 0 only if all checks passed on all ranks. ``--corrupt-on RANK`` flips a byte of what that rank
receives, to see the check fail.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch._C._distributed_c10d import Store
from torch.distributed import DistStoreError
from torch.distributed.rendezvous import rendezvous

if not __package__:  # run as a file: the package need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from ditrelay.errors import DitrelayError
from ditrelay.runtime.communication.codec import allocate, decode_payload, encode_state, verify, wire_view
from ditrelay.runtime.communication.communicator import DisaggCommunicator
from ditrelay.runtime.communication.pending import PendingTransfer, TransferWindow
from ditrelay.runtime.communication.torch_transport import TorchTransport
from ditrelay.runtime.communication.transport import Work
from ditrelay.runtime.payloads import Payload, State, StateValue
from ditrelay.runtime.topology import DIT, NON_DIT, Edge, Roles

TIMEOUT = 30.0
IN_FLIGHT = 3
RULE = "=" * 60


@dataclass(frozen=True)
class Ranks:
    """One rank's view of the world. ``corrupt``: spoil what this rank receives."""

    rank: int
    world_size: int
    store: Store
    device: torch.device
    corrupt: bool

    @classmethod
    def from_torchrun(cls, corrupt_on: int | None) -> Self:
        store, rank, world_size = next(rendezvous("env://"))
        if world_size < 2:
            raise SystemExit("this check needs at least two ranks: torchrun --nproc_per_node=2 ...")
        device = torch.device("cpu")
        if torch.cuda.device_count() >= world_size:
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        return cls(rank, world_size, store, device, corrupt_on == rank)

    @property
    def non_dit(self) -> int:
        return self.world_size - 1

    @property
    def dits(self) -> range:
        return range(self.non_dit)

    @property
    def own_edges(self) -> list[Edge]:
        """In one order on all ranks, so that no two ranks wait for each other's other edge."""
        edges = [edge for dit in self.dits for edge in (Edge(self.non_dit, dit), Edge(dit, self.non_dit))]
        return [edge for edge in edges if self.rank in edge]

    def roles_of(self, rank: int) -> Roles:
        return NON_DIT if rank == self.non_dit else DIT

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


class CheckFailed(DitrelayError):
    """A transfer ended well but brought the wrong tensors."""


def check(condition: bool, what: str) -> None:
    if not condition:
        raise CheckFailed(what)


def noise(seed: int, device: torch.device) -> torch.Tensor:
    """512 x 512 floats that every rank can make for itself."""
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(seed)).to(device)


# ---------------------------------------------------------------- the three checks


def basic_async(ranks: Ranks, comm: DisaggCommunicator) -> None:
    """Every DiT rank sends one tensor and computes meanwhile."""
    ranks.say("[Rank 0] Starting basic async test")
    if ranks.rank == ranks.non_dit:
        received = {dit: torch.empty(512, 512, device=ranks.device) for dit in ranks.dits}
        comm.wait_all_works([comm.irecv_from_dit(tensor, src=dit) for dit, tensor in received.items()])
        for dit, tensor in received.items():
            check(torch.equal(tensor, noise(dit, ranks.device)), f"rank {dit}'s tensor arrived changed")
        return
    tensor = noise(ranks.rank, ranks.device)
    ranks.say(f"[Rank 0] Sending tensor with sum={tensor.sum().item():.4f}")
    work = comm.isend_to_non_dit(tensor)
    ranks.say("[Rank 0] Async send initiated")
    ranks.say(f"[Rank 0] Did some computation: {(tensor @ tensor).abs().mean().item():.4f}")
    comm.wait_work(work)
    ranks.say("[Rank 0] Send completed")


def disagg_topology(ranks: Ranks, comm: DisaggCommunicator) -> None:
    """Every edge, both directions: conditioning out, doubled latents back."""
    edges = ", ".join(map(str, ranks.own_edges))
    ranks.say(f"[Rank 0] {len(ranks.dits)} DiT ranks, non-DiT rank {ranks.non_dit}; rank 0 has the edges {edges}")
    if ranks.rank != ranks.non_dit:
        conditioning = torch.empty(512, 512, device=ranks.device)
        comm.recv_from_non_dit(conditioning)
        check(torch.equal(conditioning, noise(ranks.rank, ranks.device)), "this is another rank's conditioning")
        comm.send_to_non_dit(conditioning * 2)
        ranks.say("[Rank 0] Received conditioning from the non-DiT rank, sent latents back")
        return
    latents = {dit: torch.empty(512, 512, device=ranks.device) for dit in ranks.dits}
    sends = [comm.isend_to_dit(noise(dit, ranks.device), dst=dit) for dit in ranks.dits]
    receives = [comm.irecv_from_dit(tensor, src=dit) for dit, tensor in latents.items()]
    comm.wait_all_works([*sends, *receives])
    for dit, tensor in latents.items():
        check(torch.equal(tensor, noise(dit, ranks.device) * 2), f"wrong latents came from rank {dit}")


def async_batch(ranks: Ranks, comm: DisaggCommunicator) -> None:
    """Several payloads of mixed dtypes in flight per edge and direction, checksums compared."""
    window = TransferWindow(max_transfers=2 * IN_FLIGHT * ranks.world_size, max_bytes=1 << 30)
    if ranks.rank == ranks.non_dit:
        for dit in ranks.dits:
            send_batches(ranks, comm, window, partial(comm.isend_to_dit, dst=dit), dst=dit, seed=dit)
        for dit in ranks.dits:
            receive_batches(ranks, comm, partial(comm.irecv_from_dit, src=dit), src=dit, seed=dit)
    else:
        receive_batches(ranks, comm, comm.irecv_from_non_dit, src=ranks.non_dit, seed=ranks.rank)
        ranks.say(f"[Rank 0] Received {IN_FLIGHT} payloads in flight at once, checksums match")
        send_batches(ranks, comm, window, comm.isend_to_non_dit, dst=ranks.non_dit, seed=ranks.rank)
    for pending in window.drain(TIMEOUT):
        pending.wait()
    ranks.say(f"[Rank 0] Sent {IN_FLIGHT} payloads back")


def send_batches(
    ranks: Ranks,
    comm: DisaggCommunicator,
    window: TransferWindow,
    isend: Callable[[Sequence[torch.Tensor]], Work],
    *,
    dst: int,
    seed: int,
) -> None:
    """Announce all payloads, then start to send all; they end in ``window``."""
    payloads = [make_payload(seed, number, ranks.device) for number in range(IN_FLIGHT)]
    for payload in payloads:
        comm.wait_all_works(comm.isend_header(payload.header, dst=dst))
    for payload in payloads:
        kept: dict[str, torch.Tensor | list[torch.Tensor]] = {"payload": list(payload.tensors)}
        work = isend(payload.tensors)
        window.add(PendingTransfer(payload.header.batch_id, [work], kept, payload.header.nbytes))


def receive_batches(
    ranks: Ranks,
    comm: DisaggCommunicator,
    irecv: Callable[[Sequence[torch.Tensor]], Work],
    *,
    src: int,
    seed: int,
) -> None:
    """Receive all payloads at once and compare each with what this rank makes itself."""
    headers = [comm.recv_header(src=src) for _ in range(IN_FLIGHT)]
    payloads = [Payload(header, allocate(header, ranks.device)) for header in headers]
    comm.wait_all_works([irecv(payload.tensors) for payload in payloads])
    for number, payload in enumerate(payloads):
        if ranks.corrupt:
            wire_view(payload.tensors[0])[0] ^= 0xFF
        verify(payload, edge=str(Edge(src, ranks.rank)), seq=number)
        expected = make_payload(seed, number, ranks.device)
        check(payload.header == expected.header, f"payload {number} from rank {src} has another header")
        same = [torch.equal(wire_view(a), wire_view(b)) for a, b in zip(payload.tensors, expected.tensors, strict=True)]
        check(all(same), f"payload {number} from rank {src} arrived changed")
        check(list(decode_payload(payload)) == list(make_state(seed, number, ranks.device)), "a field was lost")


def make_payload(seed: int, number: int, device: torch.device) -> Payload:
    name = f"batch_{number}"
    return encode_state(make_state(seed, number, device), batch_id=name, request_ids=[name], checksum=True)


def make_state(seed: int, number: int, device: torch.device) -> State:
    """About 4 MB of what a request's state may hold: dtypes, lists, empty and scalar tensors, plain values."""
    base = noise(1000 * seed + number, device)
    return {
        "prompt_embeds": StateValue(base.to(torch.bfloat16).repeat(4, 1), "denoiser_input_fields"),
        "prompt_embeds_mask": StateValue(base > 0, "denoiser_input_fields"),
        "image_embeds": StateValue([base, base.T, base.to(torch.float8_e4m3fn)]),
        "text_ids": StateValue((base * 1000).to(torch.int64)),
        "nothing": StateValue(torch.empty(0, 64, device=device)),
        "scale": StateValue(torch.tensor(0.5 + number, dtype=torch.float64, device=device)),
        "size": StateValue({"height": 512, "width": 512}),
        "negative_prompt": StateValue(None),
    }


# ---------------------------------------------------------------- running them

CHECKS: tuple[tuple[str, Callable[[Ranks, DisaggCommunicator], None]], ...] = (
    ("Basic Async Send/Recv", basic_async),
    ("Disagg Topology", disagg_topology),
    ("Async Batch Transfer", async_batch),
)


@contextmanager
def all_edges(ranks: Ranks, generation: int) -> Iterator[DisaggCommunicator]:
    """Fresh edges for each check, so that what one of them breaks does not break the next."""

    def connect(edge: Edge, generation: int) -> TorchTransport:
        return TorchTransport.connect(ranks.store, edge, generation, ranks.rank, device=ranks.device, timeout=TIMEOUT)

    comm = DisaggCommunicator(ranks.rank, ranks.roles_of, connect, TIMEOUT, device=ranks.device)
    try:
        for edge in ranks.own_edges:
            comm.open_edge(edge, generation)
        yield comm
    finally:
        comm.close("the check is over")


def run_check(ranks: Ranks, number: int, run: Callable[[Ranks, DisaggCommunicator], None]) -> str:
    """What went wrong on this rank; empty if nothing did."""
    try:
        with all_edges(ranks, number) as comm:
            run(ranks, comm)
            exchange(ranks, f"finished/{number}", "")  # nobody closes an edge that another rank still uses
    except (DitrelayError, RuntimeError, AssertionError) as error:
        ranks.store.set(f"finished/{number}/{ranks.rank}", "")
        return f"{type(error).__name__}: {error}"
    return ""


def exchange(ranks: Ranks, key: str, word: str) -> dict[int, str]:
    """Every rank's word, by rank. All ranks call this; one that does not answer is reported as such."""
    ranks.store.set(f"{key}/{ranks.rank}", word)
    words = {}
    for rank in range(ranks.world_size):
        try:
            ranks.store.wait([f"{key}/{rank}"], timedelta(seconds=2 * TIMEOUT))
            words[rank] = ranks.store.get(f"{key}/{rank}").decode()
        except DistStoreError:
            words[rank] = f"no answer within {2 * TIMEOUT:g} s"
    return words


def main() -> int:
    ranks = Ranks.from_torchrun(corrupt_on=int(sys.argv[2]) if sys.argv[1:2] == ["--corrupt-on"] else None)
    ranks.say(f"{RULE}\nRunning Async Communication Tests\nRank: 0/{ranks.world_size}\n{RULE}")
    passed: dict[str, bool] = {}
    for number, (name, run) in enumerate(CHECKS):
        ranks.say(f"\n--- Test: {name} ---")
        faults = exchange(ranks, f"result/{number}", run_check(ranks, number, run))
        passed[name] = not any(faults.values())
        for rank, fault in faults.items():
            if fault:
                ranks.say(f"[Rank {rank}] {fault}")
        if passed[name]:
            ranks.say(f"[Rank 0] {name} passed!")
    lines = [f"  {'✓ PASSED' if good else '✗ FAILED'}: {name}" for name, good in passed.items()]
    ranks.say("\n".join(["", RULE, "Test Summary:", *lines, RULE, ""]))
    ranks.say("All tests passed! ✓" if all(passed.values()) else "Some tests FAILED")
    exchange(ranks, "printed", "")  # torchrun ends all ranks as soon as one fails
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
