"""The executors' contract, and the guide's own examples over the in-memory transport."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from ditrelay.errors import TransferError
from ditrelay.models.card import load_card
from ditrelay.models.timed import TimedAdapter
from ditrelay.models.timed_options import TimedOptions
from ditrelay.runtime.communication.communicator import DisaggCommunicator
from ditrelay.runtime.communication.local_transport import FaultPlan, LocalNetwork
from ditrelay.runtime.communication.pending import PendingTransfer
from ditrelay.runtime.communication.transport import Work
from ditrelay.runtime.payloads import StateValue
from ditrelay.runtime.pipelines_core.executors import disaggregated_executor
from ditrelay.runtime.pipelines_core.executors.disaggregated_executor import DisaggregatedExecutor
from ditrelay.runtime.pipelines_core.executors.pipeline_executor import ExecutorOutput, describe
from ditrelay.runtime.pipelines_core.executors.sync_executor import SyncExecutor
from ditrelay.runtime.pipelines_core.pipeline import Batch, Stage
from ditrelay.runtime.pipelines_core.stages import build_pipeline
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.topology import COLOCATED, Edge, Topology

MODEL = "builtin:timed?encode=0&denoise=0.01&decode=0&steps=2&conditioning_mb=0.1&latents_mb=0.02"
DIT, NON_DIT = 0, 1


class Pair:
    """The executors of a DiT rank and a non-DiT rank of one process."""

    def __init__(self, faults: FaultPlan | None = None, **changes: object) -> None:
        self.args = ServerArgs(
            **{"model_path": MODEL, "enable_disagg": True, "num_gpus": 2, "dist_timeout": 5.0, **changes}
        )
        topology = Topology.build(self.args)
        network = LocalNetwork(faults or FaultPlan())
        self.executors = {rank: self._executor(rank, topology, network) for rank in (DIT, NON_DIT)}
        self.stages = {rank: stages(topology.roles_of(rank)) for rank in (DIT, NON_DIT)}

    def _executor(self, rank: int, topology: Topology, network: LocalNetwork) -> DisaggregatedExecutor:
        def connect(edge: Edge, generation: int) -> object:
            return network.connect(edge, generation, rank, timeout=self.args.dist_timeout)

        comm = DisaggCommunicator(rank, topology.roles_of, connect, self.args.dist_timeout)
        for edge in topology.edges:
            comm.open_edge(edge, 0)
        return DisaggregatedExecutor(self.args, rank=rank, roles=topology.roles_of(rank), communicator=comm)

    def execute(self, prompt: str) -> dict[int, ExecutorOutput]:
        outputs: dict[int, ExecutorOutput] = {}

        def run(rank: int) -> None:
            outputs[rank] = self.executors[rank].execute(self.stages[rank], batch(prompt), self.args)

        together(lambda: run(DIT), lambda: run(NON_DIT))
        return outputs


def stages(roles: frozenset[str]) -> list[Stage]:
    return build_pipeline(TimedAdapter(TimedOptions.parse(MODEL)), roles).stages


def batch(prompt: str) -> Batch:
    params = load_card(MODEL).resolve(SamplingParams(prompt=prompt, seed=3))
    return Batch((Request(request_id=prompt.replace(" ", "-"), params=params),))


def together(*calls: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "an executor hangs"


def oracle(prompt: str) -> bytes:
    output = SyncExecutor().execute(stages(COLOCATED), batch(prompt), ServerArgs(model_path=MODEL)).output
    assert output is not None
    return output[0].data


def test_single_request() -> None:
    outputs = Pair().execute("a cat")
    assert outputs[NON_DIT].error is None and outputs[NON_DIT].output is not None
    assert outputs[DIT] == ExecutorOutput()
    assert outputs[NON_DIT].output[0].data == oracle("a cat")


def test_multiple_requests_leave_nothing_pending() -> None:
    pair = Pair()
    for i in range(10):
        outputs = pair.execute(f"batch {i}")
        assert outputs[NON_DIT].output is not None and outputs[NON_DIT].output[0].data == oracle(f"batch {i}")
    for executor in pair.executors.values():
        executor.drain()
        assert len(executor.pending_sends) == len(executor.pending_recvs) == 0


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_failing_stage_is_an_error_in_the_output(stage: str) -> None:
    output = SyncExecutor().execute(stages(COLOCATED), batch(f"[fail {stage}]"), ServerArgs(model_path=MODEL))
    assert output.output is None and output.error is not None and f"{stage} fails" in output.error


def test_an_error_without_a_message_tells_where_it_was_raised_and_no_path() -> None:
    def check(order: int) -> None:
        assert order > 0

    with pytest.raises(AssertionError) as caught:
        check(0)
    caught.value.args = ()  # pytest gives the asserts of tests a message, which those of libraries lack
    text = describe(caught.value)
    assert text.startswith(f"AssertionError without a message, raised in {__name__}.check, line ")
    assert "/" not in text and "\n" not in text
    assert describe(ValueError()) == "ValueError without a message; the server's log has more"


def test_an_error_with_a_message_tells_it() -> None:
    assert describe(ValueError("too many steps")) == "ValueError: too many steps"
    assert describe(TransferError("1->0", "lost")) == "transfer 1->0: lost"


def test_a_bare_assertion_of_a_library_is_an_error_in_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedAdapter, "step", mock.Mock(side_effect=AssertionError))
    pair = Pair()
    output = SyncExecutor().execute(stages(COLOCATED), batch("a cat"), pair.args)
    assert output.error is not None and output.error.startswith("AssertionError without a message, raised in ")


def test_a_transfer_that_never_arrives_is_an_error_on_the_waiting_rank() -> None:
    faults = FaultPlan()
    faults.add(Edge(DIT, NON_DIT), 2, "drop")  # after the two transfers of the header
    outputs = Pair(faults, dist_timeout=0.5).execute("a cat")
    assert outputs[NON_DIT].error is not None and "0->1" in outputs[NON_DIT].error


def test_a_corrupted_transfer_is_found_by_its_checksum() -> None:
    faults = FaultPlan()
    faults.add(Edge(NON_DIT, DIT), 2, "corrupt")
    outputs = Pair(faults, verify_transfers=True, dist_timeout=0.5).execute("a cat")
    assert outputs[DIT].error is not None and "checksum" in outputs[DIT].error


def test_the_guides_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="ditrelay.runtime"):
        Pair().execute("a cat")
    lines = [record.getMessage() for record in caplog.records if ".executors" in record.name]
    assert "DisaggregatedExecutor initialized on rank 0 with role dit, max_pending=2" in lines
    assert "DisaggregatedExecutor initialized on rank 1 with role non_dit, max_pending=2" in lines
    assert "[Async Send to DiT] Initiated 3 async sends (1 single tensors, 1 tensor lists)" in lines
    assert "[Async Recv from Non-DiT] Initiated 3 async recvs (1 single tensors, 1 tensor lists)" in lines
    assert "[Async Send to Non-DiT] Initiated 1 async sends (1 single tensors, 0 tensor lists)" in lines
    assert "[Async Recv from DiT] Initiated 1 async recvs (1 single tensors, 0 tensor lists)" in lines


def state_batch() -> Batch:
    made = batch("x")
    made.state = {"latents": StateValue(torch.arange(10))}
    return made


def test_sends_overlap_with_other_work_and_blocking_twins_wait(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair()
    sent, received = state_batch(), batch("x")
    received.header = pair.executors[NON_DIT].pack(sent)
    works = pair.executors[NON_DIT]._async_send_batch_to_dit(sent)
    assert not works[0].done()  # nobody receives yet, and the sender did not wait
    assert len(pair.executors[NON_DIT].pending_sends) == 1
    pair.executors[DIT]._recv_batch_from_non_dit(received)
    pair.executors[NON_DIT].comm.wait_all_works(works)
    assert torch.equal(received.state["latents"].value, torch.arange(10))


def test_a_full_window_waits_for_the_oldest_send(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(max_pending_transfers=1)
    sender, receiver = pair.executors[NON_DIT], pair.executors[DIT]
    batches = [state_batch() for _ in range(3)]
    headers = [sender.pack(each) for each in batches]

    def receive() -> None:
        for header in headers:
            time.sleep(0.1)  # the sender comes to the next one meanwhile
            incoming = batch("x")
            incoming.header = header
            receiver._recv_batch_from_non_dit(incoming)

    def send() -> None:
        for each in batches:
            sender._async_send_batch_to_dit(each)
            assert len(sender.pending_sends) == 1

    with caplog.at_level(logging.DEBUG, logger="ditrelay.runtime.pipelines_core.executors"):
        together(send, receive)
    waited = [record for record in caplog.records if record.getMessage() == "Waited for send completion: batch_x"]
    assert len(waited) >= 1


def test_a_failed_send_is_raised_and_not_kept_forever() -> None:
    pair = Pair(dist_timeout=0.3)
    sender = pair.executors[NON_DIT]
    outgoing = state_batch()
    sender.pack(outgoing)
    with pytest.raises(TransferError, match="1->0"):
        sender._send_batch_to_dit(outgoing)
    assert len(sender.pending_sends.drain(5)) == 1  # the edge's own deadline may pass a moment later
    assert len(sender.pending_sends) == 0


def test_a_send_that_the_head_asks_for_neither_waits_for_another_edge_nor_takes_its_error() -> None:
    """Its thread sends the heartbeats."""
    sender = Pair(max_pending_transfers=1).executors[NON_DIT]
    another = TransferError("1->7", "the other edge is broken")
    with mock.patch.object(PendingTransfer, "wait", side_effect=another) as wait:
        works = [sender._async_send_batch_to_dit(state_batch(), DIT, seq)[-1] for seq in range(3)]
        assert not wait.called and not any(work.done() for work in works)
        with pytest.raises(TransferError, match="other edge"):  # without a head, nobody else would hear of it
            sender._async_send_batch_to_dit(state_batch())


def test_a_rank_in_lock_step_does_something_else_while_it_waits_and_gives_up_in_time() -> None:
    meanwhile, work = mock.Mock(), Work(Edge(NON_DIT, DIT), 0)
    for asynchronous in (True, False):
        args = ServerArgs(model_path=MODEL, dist_timeout=0.1, use_async_comm=asynchronous)
        executor = DisaggregatedExecutor(args, rank=0, roles=COLOCATED, communicator=mock.Mock(), meanwhile=meanwhile)
        with mock.patch.object(disaggregated_executor, "MEANWHILE_SECONDS", 0.01):
            executor.keep_step(work)
        assert meanwhile.called is not asynchronous
