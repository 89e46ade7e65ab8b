"""Systems c and d: the stock diffusers pipeline, as replicas behind one queue or spread over all ranks, as a target."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from serving_engine import prompt_of
from serving_load import Done, LoadFailed
from serving_stock_worker import StockSpec, Task, run_stock
from serving_workloads import System, Workload

POLL_SECONDS = 0.5
END_SECONDS = 5.0


@dataclass
class _Rank:
    process: Any
    tasks: Any


class StockTarget:
    """Worker processes that take requests from one queue (replicas), or each the same requests from its own (cp)."""

    def __init__(self, system: System, workload: Workload, model: str, *, compiled: bool, start_limit: float) -> None:
        self.completions: queue.SimpleQueue[Done] = queue.SimpleQueue()
        self._system, self._workload = system, workload
        self._start_limit = start_limit
        self._context = multiprocessing.get_context("spawn")
        self._results = self._context.Queue()
        self._folder = tempfile.TemporaryDirectory(prefix="serving-stock-")
        self._spec = stock_spec(system, workload, model, compiled=compiled, meeting=f"{self._folder.name}/meeting")
        self._ranks: list[_Rank] = []
        self._peaks: dict[int, dict[str, Any]] = {}
        self._intervals: list[tuple[float, float]] = []
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, name="stock-results", daemon=True)

    def start(self) -> None:
        """Raises ``LoadFailed`` where a worker can't start, or not within the limit."""
        if self._workload.device == "cpu":
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # as ditrelay's own workers have it
        shared = self._context.Queue() if self._system.kind == "stock-replicas" else None
        for rank in range(self._system.ranks):
            tasks = shared or self._context.Queue()
            spec = replace(self._spec, rank=rank)
            process = self._context.Process(target=run_stock, args=(spec, tasks, self._results), daemon=True)
            process.start()
            self._ranks.append(_Rank(process, tasks))
        self._await_ready(time.monotonic() + self._start_limit)
        self._reader.start()

    def _await_ready(self, deadline: float) -> None:
        ready: set[int] = set()
        while len(ready) < len(self._ranks):
            if time.monotonic() > deadline:
                missing = sorted(set(range(len(self._ranks))) - ready)
                raise LoadFailed(f"stock ranks {missing} were not ready within {self._start_limit:.0f} s")
            message = self._next_result()
            if isinstance(message, str):
                raise LoadFailed(message)
            if message is not None:
                self._remember(message)
                ready.add(message["rank"])

    def warm_up_requests(self) -> int:
        """Each worker has done a request of its own before it said that it is ready; two more warm the queue."""
        return 2 * self._system.units

    def submit(self, seq: int, steps: int | None = None) -> None:
        task = Task(seq, prompt_of(seq), steps or self._workload.steps)
        queues = [self._ranks[0].tasks] if self._system.kind == "stock-replicas" else [r.tasks for r in self._ranks]
        for tasks in queues:
            tasks.put(task)

    def cancel_waiting(self) -> None:
        """Only with one shared queue: ranks of one pipeline must all see the same requests."""
        if self._system.kind != "stock-replicas":
            return
        while True:
            try:
                task = self._ranks[0].tasks.get_nowait()
            except queue.Empty:
                return
            self.completions.put(Done(task.seq, time.monotonic(), "cancelled"))

    def denoise_intervals(self) -> list[tuple[float, float]]:
        return list(self._intervals)

    def receive_intervals(self) -> list[tuple[float, float]]:
        return []

    def memory(self) -> list[dict[str, Any]]:
        return [self._peaks[rank] for rank in sorted(self._peaks)]

    def close(self) -> None:
        self._closing.set()
        for rank in self._ranks:
            rank.process.terminate()
        for rank in self._ranks:
            rank.process.join(END_SECONDS)
            if rank.process.is_alive():
                rank.process.kill()
        self._folder.cleanup()

    # ------------------------------------------------------------ what workers say

    def _next_result(self) -> dict[str, Any] | str | None:
        """A worker's message, why the system has failed, or None where nothing came."""
        try:
            message: dict[str, Any] = self._results.get(timeout=POLL_SECONDS)
        except queue.Empty:
            dead = [(number, rank.process.exitcode) for number, rank in enumerate(self._ranks)]
            ended = [f"stock rank {number} ended with exit code {code}" for number, code in dead if code is not None]
            return ended[0] if ended else None
        return f"stock rank {message['rank']}: {message['failed']}" if "failed" in message else message

    def _read(self) -> None:
        while not self._closing.is_set():
            message = self._next_result()
            if isinstance(message, str):
                self.completions.put(Done(-1, time.monotonic(), message))
                return
            if message is not None:
                self._remember(message)
                if "seq" in message:
                    self._intervals.append(message["denoise"])
                    self.completions.put(Done(message["seq"], time.monotonic(), stages=message["stages"]))

    def _remember(self, message: dict[str, Any]) -> None:
        rank, before = message["rank"], self._peaks.get(message["rank"], {"peak": 0})
        self._peaks[rank] = {
            "rank": rank,
            "role": "whole pipeline",
            "peak": max(message["peak"], before["peak"]),
            "allocated": message["allocated"],
        }


def stock_spec(system: System, workload: Workload, model: str, *, compiled: bool, meeting: str) -> StockSpec:
    spread = system.kind == "stock-cp"
    return StockSpec(
        rank=0,
        world=system.ranks if spread else 1,
        meeting=meeting,
        model=model,
        load_format=workload.load_format,
        device=workload.device,
        dtype=workload.dtype,
        call=tuple(sorted(call_of(workload).items())),
        is_video=workload.is_video,
        any_length=any(length % system.ranks for length in workload.cp_sequences),
        compiled=compiled,
        warm_up_steps=min(2, workload.steps),
    )


def call_of(workload: Workload) -> dict[str, Any]:
    """The arguments of a stock pipeline's call that are the same for every request."""
    call: dict[str, Any] = {"height": workload.height, "width": workload.width}
    if workload.num_frames is not None:
        call["num_frames"] = workload.num_frames
    if workload.guidance is not None:
        call["guidance_scale"] = workload.guidance
    return call
