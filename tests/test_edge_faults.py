"""A broken edge names the request that was on it only where neither end's process is at fault."""

from __future__ import annotations

from ditrelay.runtime.edge_faults import HOLD_SECONDS, EdgeFaults
from ditrelay.runtime.messages import EdgeFailed


def fault(src: int, dst: int) -> EdgeFailed:
    return EdgeFailed(src, src, dst, 1, "reset", request_id="r1", seq=4)


def test_a_fault_is_told_once_its_moment_is_over_and_in_order() -> None:
    faults = EdgeFaults(lambda rank: True)
    faults.hold(fault(0, 1), 10.0)
    faults.hold(fault(2, 1), 10.1)
    assert faults and not list(faults.due(10.0 + HOLD_SECONDS - 0.01))
    assert list(faults.due(10.0 + HOLD_SECONDS)) == [fault(0, 1)]
    assert list(faults.due(11.0)) == [fault(2, 1)]
    assert not faults


def test_a_request_is_not_named_where_an_end_is_dead_by_then() -> None:
    well = {0, 1, 2}
    faults = EdgeFaults(well.__contains__)
    for edge in ((0, 1), (1, 2), (0, 2)):
        faults.hold(fault(*edge), 10.0)
    well.remove(1)
    told = {(event.src, event.dst): event.request_id for event in faults.due(11.0)}
    assert told == {(0, 1): None, (1, 2): None, (0, 2): "r1"}
