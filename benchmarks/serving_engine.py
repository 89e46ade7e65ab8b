"""Systems a, b and e: ditrelay's own engine as a load target."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from serving_load import Done
from serving_workloads import System, Workload

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.runtime.tickets import Result, Ticket

MAX_QUEUE = 100_000  # load is limited by the phases, not by the queue


class EngineTarget:
    """One engine. ``start`` brings its ranks up; the first requests are the caller's."""

    def __init__(self, system: System, workload: Workload, model: str, *, compiled: bool, start_limit: float) -> None:
        self.completions: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._workload = workload
        self._tickets: dict[int, Ticket] = {}
        self._peaks: dict[int, dict[str, Any]] = {}
        self._engine = Engine(server_args(system, workload, model, compiled=compiled, start_limit=start_limit))

    def start(self) -> None:
        self._engine.start()

    def warm_up_requests(self) -> int:
        topology = self._engine.topology
        return 2 * max(len(topology.encoders), len(topology.replicas), len(topology.decoders))

    def submit(self, seq: int, steps: int | None = None) -> None:
        ticket = self._engine.submit(sampling_params(self._workload, seq, steps))
        self._tickets[seq] = ticket
        ticket.future.add_done_callback(lambda future: self._ended(seq, future))

    def cancel_waiting(self) -> None:
        for ticket in list(self._tickets.values()):
            ticket.cancel()

    def _ended(self, seq: int, future: Future[Result]) -> None:
        now = time.monotonic()
        self._tickets.pop(seq, None)
        error = future.exception()
        if error is not None:
            self.completions.put(Done(seq, now, f"{type(error).__name__}: {error}"))
            return
        t = future.result().timings
        stages = {"encode": t.encode, "denoise": t.denoise, "decode": t.decode}
        transfers = {"exposed": t.exposed_transfer, "handoff": t.to_dit + t.to_decoder}
        self.completions.put(Done(seq, now, stages=stages | transfers))

    def denoise_intervals(self) -> list[tuple[float, float]]:
        """Of all replicas; those of one replica do not overlap."""
        return [(span.began, span.ended) for span in self._engine.spans if span.kind == "denoise"]

    def receive_intervals(self) -> list[tuple[float, float]]:
        """Of all receiving ranks, from the posting of each receive until its tensors are usable."""
        return [(span.began, span.ended) for span in self._engine.spans if span.kind == "receive"]

    def memory(self) -> list[dict[str, Any]]:
        """Most bytes seen at each rank so far: on a GPU torch's peak since the start, on a CPU resident memory."""
        for worker in self._engine.status().workers:
            if worker.memory is not None:
                seen = worker.memory.device_peak or worker.memory.rss
                before: Mapping[str, Any] = self._peaks.get(worker.rank, {"peak": 0})
                self._peaks[worker.rank] = {
                    "rank": worker.rank,
                    "role": worker.role,
                    "peak": max(seen, before["peak"]),
                    "allocated": worker.memory.device_allocated or worker.memory.rss,
                }
        return [self._peaks[rank] for rank in sorted(self._peaks)]

    def close(self) -> None:
        self._engine.close()


def server_args(system: System, workload: Workload, model: str, *, compiled: bool, start_limit: float) -> ServerArgs:
    apart = system.kind != "colocated"
    return ServerArgs(
        model_path=model,
        load_format=workload.load_format,
        device=workload.device,
        dtype=workload.dtype,
        num_gpus=system.ranks,
        enable_disagg=apart,
        num_non_dit_ranks=system.non_dit if apart else 1,
        sp_degree=system.sp,
        use_async_comm=system.kind != "lock-step",
        enable_torch_compile=compiled,
        warmup=False,  # warmed up at the workload's own size instead
        max_queue=MAX_QUEUE,
        startup_timeout=start_limit,
        log_level="warning",
    )


def sampling_params(workload: Workload, seq: int, steps: int | None) -> SamplingParams:
    return SamplingParams(
        prompt=prompt_of(seq),
        height=workload.height,
        width=workload.width,
        num_frames=workload.num_frames,
        num_inference_steps=steps or workload.steps,
        guidance_scale=workload.guidance,
        seed=seq,
    )


def prompt_of(seq: int) -> str:
    """Every request has a prompt of its own, so that nothing can be cached."""
    return f"a red apple and {seq} bananas on a blue table"
