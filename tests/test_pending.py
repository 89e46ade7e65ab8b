"""What is pending keeps its tensors, and the window counts it by number and bytes."""

from __future__ import annotations

import pytest
import torch

from ditrelay.errors import TransferError, TransferTimeout
from ditrelay.runtime.communication.pending import PendingTransfer, TransferWindow
from ditrelay.runtime.communication.transport import Work
from ditrelay.runtime.topology import Edge


def pending(name: str = "b", nbytes: int = 10, works: int = 1) -> PendingTransfer:
    own = [Work(Edge(3, 0), number, name) for number in range(works)]
    return PendingTransfer(name, own, {"latents": torch.zeros(2)}, nbytes)


def fail(work: Work) -> TransferError:
    error = TransferError("3->0", "broken", seq=work.seq)
    work.finish(error)
    return error


def test_a_pending_transfer_is_done_when_its_last_work_is() -> None:
    transfer = pending(works=2)
    transfer.works[0].finish()
    assert not transfer.done()
    with pytest.raises(TransferTimeout, match="3->0 #1 of request b"):
        transfer.wait(0.01)
    transfer.works[1].finish()
    transfer.wait(0.0)
    assert transfer.done() and transfer.error is None


def test_a_failed_work_is_raised_only_after_the_others_ended() -> None:
    transfer = pending(works=2)
    error = fail(transfer.works[0])
    with pytest.raises(TransferTimeout):
        transfer.wait(0.01)
    transfer.works[1].finish()
    with pytest.raises(TransferError) as raised:
        transfer.wait(0.01)
    assert raised.value is error and transfer.error is error


def test_only_the_first_end_of_a_work_counts() -> None:
    work = pending().works[0]
    work.finish()
    fail(work)
    assert work.error is None


def test_the_window_is_bounded_by_number() -> None:
    window = TransferWindow(2, max_bytes=1000)
    for _ in range(2):
        assert window.has_room(10)
        window.add(pending())
    assert not window.has_room(0) and len(window) == 2


def test_the_window_is_bounded_by_bytes() -> None:
    window = TransferWindow(10, max_bytes=25)
    window.add(pending(nbytes=20))
    assert window.has_room(5) and not window.has_room(6) and window.nbytes == 20


def test_reaping_takes_out_what_is_done_and_gives_its_room_back() -> None:
    window = TransferWindow(3, max_bytes=30)
    transfers = [pending(str(i)) for i in range(3)]
    for transfer in transfers:
        window.add(transfer)
    transfers[2].works[0].finish()
    error = fail(transfers[0].works[0])
    assert [(done.batch_id, done.error) for done in window.reap()] == [("0", error), ("2", None)]
    assert window.oldest() is transfers[1] and window.nbytes == 10 and window.reap() == []


def test_draining_keeps_everything_until_all_is_done() -> None:
    window = TransferWindow(2, max_bytes=100)
    first, second = pending("first"), pending("second")
    for transfer in (first, second):
        window.add(transfer)
    first.works[0].finish()
    with pytest.raises(TransferTimeout, match="request second"):
        window.drain(0.01)
    assert len(window) == 2, "a timed-out drain lets go of nothing"
    second.works[0].finish()
    assert window.drain(0.01) == [first, second] and len(window) == 0


def test_resizing_changes_the_limit_and_drops_nothing() -> None:
    window = TransferWindow(3, max_bytes=100)
    for _ in range(2):
        window.add(pending())
    window.resize(1)
    assert len(window) == 2 and not window.has_room(0)
    window.resize(3)
    assert window.has_room(0)
    with pytest.raises(ValueError, match="at least one"):
        window.resize(0)
