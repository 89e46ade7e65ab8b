"""Measure one system: start, warm up, low load, saturation, Poisson arrivals. One process, so that it can be ended.

``python benchmarks/serving_run.py ORDER.json RECORD.json``. The record is written anew after every phase: what was
measured before a crash or the time limit is kept.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import serving_figures as figures
from serving_load import Client, LoadFailed, Phase, Sample, Target, lead_of, poisson_arrivals
from serving_workloads import ENGINE_KINDS, WORKLOADS, Device, System, Workload

from ditrelay.errors import DitrelayError

COMMON_SHARE = 0.9  # of lock-step's capacity: the arrival rate at which it is compared with async
CLOSE_SECONDS = 8.0  # kept back from the limit for ending the system
WARM_UP_STEPS = 2
DRAIN_SECONDS = 60.0  # for what a phase leaves behind
LEAST_COUNTED = 3  # requests, without which a saturated phase that was cut short shows nothing
LEAST_ARRIVALS = 10  # in an open-loop phase, without which it shows nothing
SATURATED_SHARE = 0.4  # of a pair's time, at most, so that its open-loop phase has the rest


@dataclass(frozen=True, kw_only=True)
class Order:
    """One measurement, as it is handed to the process.

    Attributes:
        model: the model path (see serving_models.model_path).
        device: in place of the workload's.
        limit: seconds for everything, start and end included.
        common_rate: arrivals a second at which a pair is compared; None: 90% of this system's own capacity.
        requests, rates: in place of the workload's.
    """

    workload: str
    system: System
    model: str
    device: Device
    limit: float
    common_rate: float | None = None
    requests: int | None = None
    rates: tuple[float, ...] | None = None
    compiled: bool = False
    seed: int = 0

    @classmethod
    def read(cls, path: Path) -> Order:
        given = json.loads(path.read_text())
        given["system"] = System(**given["system"])
        given["rates"] = None if given["rates"] is None else tuple(given["rates"])
        return cls(**given)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


class MeasuredTarget(Target, Protocol):
    """A load target that can be started and looked into."""

    def start(self) -> None: ...

    def close(self) -> None: ...

    def warm_up_requests(self) -> int: ...

    def submit(self, seq: int, steps: int | None = None) -> None: ...

    def denoise_intervals(self) -> list[tuple[float, float]]: ...

    def receive_intervals(self) -> list[tuple[float, float]]: ...

    def memory(self) -> list[dict[str, Any]]: ...


class WarmUp:
    """The target with few steps a request: every rank computes at full size once, at little cost."""

    def __init__(self, target: MeasuredTarget, steps: int) -> None:
        self._target, self._steps = target, steps
        self.completions = target.completions

    def submit(self, seq: int) -> None:
        self._target.submit(seq, self._steps)

    def cancel_waiting(self) -> None:
        self._target.cancel_waiting()


class Measurement:
    """The phases of one system. ``record`` is what is known so far."""

    def __init__(self, order: Order, workload: Workload, target: MeasuredTarget, save: Callable[[Any], None]) -> None:
        self._order, self._workload, self._target, self._save = order, workload, target, save
        self._deadline = time.monotonic() + order.limit - CLOSE_SECONDS
        self._client = Client(target)
        self._requests = order.requests or workload.requests
        self._rates = workload.rates if order.rates is None else order.rates
        system = order.system
        self.record: dict[str, Any] = {"name": system.name, **asdict(system), "status": "running", "open": []}

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    def run(self) -> None:
        self._timed("start", self._target.start)
        self._timed("warm_up", self._warm_up)
        self._low()
        self._saturated()
        self._arrivals()
        self.record["status"] = "done"
        self._keep()

    def _timed(self, name: str, phase: Callable[[], None]) -> None:
        began = time.monotonic()
        phase()
        self.record.setdefault("seconds", {})[name] = time.monotonic() - began
        self._keep()

    def _keep(self) -> None:
        self.record["memory"] = self._target.memory()
        self._save(self.record)

    def _warm_up(self) -> None:
        count = self._target.warm_up_requests()
        client = Client(WarmUp(self._target, min(WARM_UP_STEPS, self._workload.steps)))
        phase = client.open([0.0] * count, self._deadline)
        if phase.unfinished:
            raise LoadFailed(phase.cut_short("in the warm-up"))

    def _low(self) -> None:
        """One request at a time: latency with nobody in the way, and the stage times that the bounds are made of."""
        phase = self._client.closed(1, self._workload.low, self._deadline)
        if phase.unfinished:
            raise LoadFailed(phase.cut_short("at low load"))
        latencies = [sample.latency for sample in phase.samples]
        self.record["low"] = {
            "latency": figures.latency_figures(latencies),
            "stages": figures.stage_medians(phase.samples),
        }
        self._keep()

    def _saturated(self) -> None:
        system = self._order.system
        concurrency = self._workload.concurrency * system.ranks
        # after two bursts and one request every rank has work of its own
        wanted = system.units if self._workload.short_lead else min(concurrency, 2 * system.units + 1)
        lead, count = figures.lead_and_count(system.units, self._requests, wanted)
        share = SATURATED_SHARE if system.pair and self._workload.common_rate else 1.0
        phase = self._client.closed(concurrency, lead + count, time.monotonic() + share * self.left)
        if phase.unfinished:
            ended = len(phase.samples)
            self.record["reason"] = f"{ended} of {lead + count} requests ended at saturation before the time limit"
            count = (ended - lead) // system.units * system.units
            if count < max(LEAST_COUNTED, system.units):
                raise LoadFailed(self.record["reason"])
        window = figures.steady_window(phase.samples, lead, count)
        whole = self._client.finish(lambda: self._running_at(window.ended) >= system.units, self._deadline)
        busy = figures.busy_share(self._target.denoise_intervals(), window, system.units)
        counted = sorted(phase.samples, key=lambda sample: sample.done.ended)[lead : lead + count]
        self.record["saturated"] = {
            "concurrency": concurrency,
            "lead": lead,
            "counted": count,
            "window_seconds": window.seconds,
            "rate": window.rate,
            "latency": figures.latency_figures([sample.latency for sample in counted]),
            "stages": figures.stage_medians(counted),
            "transfers": self._transfers(window, counted),
            "dit_busy": busy,
            "dit_busy_complete": whole,
        }
        self._keep()

    def _running_at(self, moment: float) -> int:
        """Denoises known to have run then: each is known only when it has ended."""
        return sum(began < moment <= ended for began, ended in self._target.denoise_intervals())

    def _transfers(self, window: figures.Window, counted: list[Sample]) -> dict[str, float]:
        """Mean seconds a request; empty for systems without transfers.

        ``exposed``: an idle replica waited. ``hidden``: the rest of what receivers spent on it. ``handoff``: from the
        end of the producing stage until the tensors are usable, both ways, waiting for a free place included.
        """
        receives = self._target.receive_intervals()
        if not receives:
            return {}
        means = {
            name: statistics.fmean(sample.done.stages[name] for sample in counted) for name in ("exposed", "handoff")
        }
        moving = figures.seconds_inside(receives, window) / window.counted
        return means | {"hidden": max(0.0, moving - means["exposed"])}

    def _arrivals(self) -> None:
        capacity = self.record["saturated"]["rate"]
        if self._order.system.pair and self._workload.common_rate:
            common = self._order.common_rate or COMMON_SHARE * capacity
            self._poisson(common, f"{COMMON_SHARE:.0%} of lock-step", common=True)
        for share in self._rates:
            self._poisson(share * capacity, f"{share:.0%} of its own", common=False)

    def _poisson(self, rate: float, label: str, *, common: bool) -> None:
        point: dict[str, Any] = {"label": label, "common": common, "rate": rate}
        self.record["open"].append(point)
        if not self._client.drain(max(0.0, min(DRAIN_SECONDS, self.left))):
            point["skipped"] = "the requests of the phase before had not ended in time"
            return
        lead, arrivals = self._fitting(rate)
        point["counted"] = len(arrivals) - lead
        if len(arrivals) < min(LEAST_ARRIVALS, self._requests):
            point["skipped"] = f"{max(0.0, self.left):.0f} s were left, enough for {len(arrivals)} arrivals"
            return
        needed = arrivals[-1] + self._tail
        began = time.monotonic()
        # a system that can't keep up would pile up requests without end
        phase = self._client.open(arrivals, min(self._deadline, began + 1.5 * needed + 5))
        point |= open_figures(phase, began + arrivals[lead])
        self._keep()

    @property
    def _tail(self) -> float:
        """Seconds for what an open-loop phase leaves to be done after its last arrival."""
        return 4.0 * float(self.record["low"]["latency"]["p50"])

    def _fitting(self, rate: float) -> tuple[int, list[float]]:
        """The lead, and the arrivals: as many of the wanted ones as there is time for."""
        arrivals = poisson_arrivals(rate, lead_of(self._requests) + self._requests, self._order.seed)
        arrivals = [each for each in arrivals if each <= self.left - self._tail]
        return lead_of(len(arrivals)), arrivals


def open_figures(phase: Phase, first: float) -> dict[str, Any]:
    """Latencies of the requests due from ``first`` on. With any unfinished, none: the slow ones would be missing."""
    if phase.unfinished:
        return {"unfinished": phase.unfinished}
    latencies = [sample.latency for sample in phase.samples if sample.arrived >= first - 1e-6]
    return {"unfinished": 0, "latency": figures.latency_figures(latencies)}


def make_target(order: Order, workload: Workload) -> MeasuredTarget:
    limit = max(1.0, order.limit - 2 * CLOSE_SECONDS)
    if order.system.kind in ENGINE_KINDS:
        from serving_engine import EngineTarget

        return EngineTarget(order.system, workload, order.model, compiled=order.compiled, start_limit=limit)
    from serving_stock import StockTarget

    return StockTarget(order.system, workload, order.model, compiled=order.compiled, start_limit=limit)


def main() -> int:
    order, path = Order.read(Path(sys.argv[1])), Path(sys.argv[2])

    def save(record: dict[str, Any]) -> None:
        fresh = path.with_suffix(".part")
        fresh.write_text(json.dumps(record))
        fresh.replace(path)

    record: dict[str, Any] = {"name": order.system.name, **asdict(order.system), "status": "running", "open": []}
    workload = replace(WORKLOADS[order.workload], device=order.device)
    try:
        target = make_target(order, workload)
    except (DitrelayError, ImportError) as error:
        save(record | {"status": "failed", "reason": f"{type(error).__name__}: {error}"})
        return 1
    measurement = Measurement(order, workload, target, save)
    try:
        measurement.run()
    except (LoadFailed, DitrelayError, OSError, ValueError, TimeoutError) as error:
        save(measurement.record | {"status": "failed", "reason": f"{type(error).__name__}: {error}"})
        return 1
    finally:
        target.close()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the record is written; threads of a system that did not end must not hold the process
