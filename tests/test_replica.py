"""A replica's inner channel: commands from the leader, and the broadcast of a payload over gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ditrelay.errors import TransferError
from ditrelay.runtime.communication import replica
from ditrelay.runtime.communication.replica import Begin, ReplicaLeader, ReplicaPeer, Shutdown, Step, Stop
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.request import Request, SamplingParams

COMMANDS = [
    Begin(Request(request_id="r", params=SamplingParams(prompt="a cat")), PayloadHeader("r", ("r",), (), (), 0)),
    Step("r"),
    Stop("r", "cancelled"),
    Shutdown(),
]

MEMBER = """
import sys, torch, torch.distributed as dist
from ditrelay.runtime.communication.codec import decode_payload, encode_state, verify
from ditrelay.runtime.communication.replica import Begin, ReplicaLeader, ReplicaPeer, Shutdown, broadcast_payload
from ditrelay.runtime.payloads import StateValue
from ditrelay.runtime.request import Request, SamplingParams
rank, folder, cpu = int(sys.argv[1]), sys.argv[2], torch.device("cpu")
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
state = {"a": StateValue(torch.arange(6.0).to(torch.bfloat16)), "b": StateValue([torch.ones(2) > 0, torch.empty(0)]),
         "c": StateValue(7)}
payload = encode_state(state, batch_id="r", request_ids=["r"], checksum=True)
if rank == 0:
    leader = ReplicaLeader([f"ipc://{folder}/peer"])
    leader.send(Begin(Request(request_id="r", params=SamplingParams(prompt="p")), payload.header))
    assert broadcast_payload(payload, payload.header, cpu) is payload
    leader.send(Shutdown())
    leader.close()
else:
    peer = ReplicaPeer(f"ipc://{folder}/peer")
    begin = peer.receive(60)
    assert isinstance(begin, Begin), begin
    received = broadcast_payload(None, begin.header, cpu)
    verify(received)
    back = decode_payload(received)
    assert torch.equal(back["a"].value, state["a"].value) and back["c"].value == 7 and len(back["b"].value) == 2
    assert isinstance(peer.receive(60), Shutdown)
    peer.close()
dist.destroy_process_group()
"""


def test_every_peer_gets_every_command_in_order(tmp_path: Path) -> None:
    addresses = [f"ipc://{tmp_path}/{peer}" for peer in range(2)]
    leader = ReplicaLeader(addresses)
    for command in COMMANDS[:2]:
        leader.send(command)  # the peers are not up yet
    peers = [ReplicaPeer(address) for address in addresses]
    for command in COMMANDS[2:]:
        leader.send(command)
    for peer in peers:
        assert [peer.receive(5.0) for _ in COMMANDS] == COMMANDS
        assert peer.receive(0.01) is None
    leader.close()
    for peer in peers:
        peer.close()


def test_closing_the_leader_still_delivers(tmp_path: Path) -> None:
    peer = ReplicaPeer(f"ipc://{tmp_path}/peer")
    leader = ReplicaLeader([f"ipc://{tmp_path}/peer"])
    leader.send(Shutdown())
    leader.close()
    assert peer.receive(5.0) == Shutdown()
    peer.close()


def test_a_peer_that_takes_nothing_any_more_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "_MAX_BEHIND", 3)
    monkeypatch.setattr(replica, "_LINGER_MS", 0)
    leader = ReplicaLeader([f"ipc://{tmp_path}/nobody"])
    with pytest.raises(TransferError, match="takes no commands"):
        for _ in range(5):
            leader.send(Step("r"))
    leader.close()


def test_a_payload_reaches_all_members_over_gloo(tmp_path: Path) -> None:
    members = [subprocess.Popen([sys.executable, "-c", MEMBER, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [member.wait(100) for member in members] == [0, 0]
    finally:
        for member in members:
            member.kill()
            member.wait()


def test_commands_of_another_shape_are_refused() -> None:
    decoder = msgspec.msgpack.Decoder(replica.ReplicaCommand)
    for wrong in ({"type": "Evil"}, {"type": "Stop", "request_id": "r", "reason": "why"}, ["Step", "r"]):
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(msgspec.msgpack.encode(wrong))
