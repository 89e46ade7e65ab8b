"""A replica's inner channel: commands from the leader, and the broadcast of a payload over gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from ditrelay.errors import TransferError
from ditrelay.runtime.communication import replica
from ditrelay.runtime.communication.replica import Begin, ReplicaLeader, ReplicaPeer, Shutdown, Step, Stop, Stopped
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.pipelines_core.executors import replica as led
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


# ---------------------------------------------------------------- what fails on all ranks alike costs one request


class Channel:
    """Both ends of a replica's channel: what the leader sent and the peer answered."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def send(self, command: object) -> None:
        self.said.append(command)

    answer = send

    def all_stopped(self, request_id: str, seconds: float) -> bool:
        return True


class FailingAdapter:
    """Its begin, restore and step raise, once there is an error."""

    conditioning_names = latents_names = frozenset[str]()

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.abandoned = 0

    def begin(self, requests: object, state: object) -> object:
        return self._do()

    def step(self, session: object) -> bool:
        self._do()
        return True

    def restore(self, session: object, captured: object) -> None:
        self._do()

    def abandon(self, session: object) -> None:
        self.abandoned += 1

    def _do(self) -> object:
        if self.error is not None:
            raise self.error
        return object()


ANY_ERRORS = [AttributeError("no such part"), ImportError("no kernel"), MemoryError(), StopIteration(), Exception("?")]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is broadcast: each end has an empty payload."""
    payload = led.encode_state({}, batch_id="r", request_ids=["r"])
    monkeypatch.setattr(led, "broadcast_payload", lambda given, header, device: payload)


def begin(image: bytes | None = None) -> Request:
    return Request(request_id="r", params=SamplingParams(prompt="a cat", image=image))


@pytest.mark.parametrize("error", ANY_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", ["begin", "restore", "step"])
def test_a_peer_outlives_whatever_a_denoise_raises_and_takes_the_next_one(
    at: str, error: Exception, alone: None
) -> None:
    channel, adapter = Channel(), FailingAdapter()
    follower = led._Follower(channel, adapter, torch.device("cpu"))  # type: ignore[arg-type]
    header = PayloadHeader("r", ("r",), (), (), 0)
    if at == "begin":
        adapter.error = error
    follower.obey(Begin(begin(), header))
    adapter.error = error
    if at != "begin":
        follower.obey(Step("r") if at == "step" else replica.Restore("r", header))
    follower.obey(Stop("r", "failed"))
    assert channel.said == [Stopped("r")] and adapter.abandoned == (at != "begin")
    adapter.error = None
    follower.obey(Begin(begin(), header))
    follower.obey(Step("r"))


@pytest.mark.parametrize("error", ANY_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", ["begin", "restore", "step"])
def test_a_leader_tells_its_peers_of_whatever_a_denoise_raises(at: str, error: Exception, alone: None) -> None:
    channel, inner = Channel(), FailingAdapter()
    adapter = led.LedAdapter(inner, channel, torch.device("cpu"))  # type: ignore[arg-type]
    if at == "begin":
        inner.error = error
        with pytest.raises(type(error)):
            adapter.begin([begin()], {})
    else:
        session = adapter.begin([begin()], {})
        inner.error = error
        with pytest.raises(type(error)):
            adapter.step(session) if at == "step" else adapter.restore(session, {})
    assert channel.said[-1] == Stop("r", "failed")


def test_peers_do_not_get_the_bytes_of_a_picture_but_know_that_there_is_one(alone: None) -> None:
    channel = Channel()
    led.LedAdapter(FailingAdapter(), channel, torch.device("cpu")).begin([begin(b"x" * 1_000_000)], {})  # type: ignore[arg-type]
    (command,) = channel.said
    assert isinstance(command, Begin) and command.request.params.image == b""
    assert len(msgspec.msgpack.encode(command)) < 10_000
