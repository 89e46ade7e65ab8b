"""The hand-off: seconds from "encode done" to "conditioning usable on the DiT rank", beside bare gloo.

An idle receiver, 8 MB, one request at a time. The baseline, in the same run, is a bare gloo send/receive of the same
bytes between two processes that do nothing else, from the moment before the send to the end of the receive.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

from common import parser, show, write_json

from ditrelay import Engine, SamplingParams, ServerArgs

BYTES = 8 * 1000 * 1000
REPEATS = 60
IDLE_SECONDS = 0.02


@dataclass(frozen=True)
class Handoff:
    """Medians in milliseconds for ``nbytes`` bytes."""

    nbytes: int
    repeats: int
    handoff_ms: float
    handoff_p90_ms: float
    bare_ms: float
    bare_p90_ms: float

    def show(self) -> None:
        rows = [
            ["ditrelay: encode done -> usable", f"{self.handoff_ms:.2f}", f"{self.handoff_p90_ms:.2f}"],
            ["bare gloo send/recv", f"{self.bare_ms:.2f}", f"{self.bare_p90_ms:.2f}"],
            ["difference of medians", f"{self.handoff_ms - self.bare_ms:.2f}", ""],
        ]
        show(f"Hand-off of {self.nbytes / 1e6:g} MB, {self.repeats} times", ["", "median ms", "P90 ms"], rows)

    def sentence(self) -> str:
        return (
            f"Hand-off of {self.nbytes / 1e6:g} MB with an idle receiver (median of {self.repeats}): "
            f"{self.handoff_ms:.2f} ms from encode done to conditioning usable; a bare gloo send/receive of the same "
            f"bytes in the same run: {self.bare_ms:.2f} ms."
        )


def measure_handoff() -> Handoff:
    ours = handoff_times()
    bare = bare_times()
    return Handoff(
        nbytes=BYTES,
        repeats=REPEATS,
        handoff_ms=statistics.median(ours) * 1000,
        handoff_p90_ms=p90(ours) * 1000,
        bare_ms=statistics.median(bare) * 1000,
        bare_p90_ms=p90(bare) * 1000,
    )


def p90(values: list[float]) -> float:
    return statistics.quantiles(values, n=10)[-1]


def handoff_times() -> list[float]:
    model = f"builtin:timed?encode=0.02&denoise=0.02&decode=0.02&steps=1&conditioning_mb={BYTES / 1e6:g}&latents_mb=1"
    args = ServerArgs(model_path=model, device="cpu", enable_disagg=True, num_gpus=2, log_level="warning")
    times = []
    with Engine(args) as engine:
        for seed in range(REPEATS):
            times.append(engine.submit(SamplingParams(prompt="x", seed=seed)).result(timeout=60).timings.to_dit)
            time.sleep(IDLE_SECONDS)
    return times


def bare_times() -> list[float]:
    """The receiver reads the sender's clock: on one host the monotonic clock is the same for all processes."""
    from ditrelay.runtime.communication.store import StoreServer

    server = StoreServer()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    processes = [context.Process(target=_bare_end, args=(rank, server.port, theirs)) for rank in (0, 1)]
    for process in processes:
        process.start()
    times: list[float] = ours.recv() if ours.poll(120) else []
    for process in processes:
        process.join(10)
    return times


def _bare_end(rank: int, port: int, results: object) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    group = dist.ProcessGroupGloo(dist.PrefixStore("bare", store), rank, 2, timedelta(seconds=60))
    stamp = torch.zeros(1, dtype=torch.float64)
    times = []
    for _ in range(REPEATS):
        time.sleep(IDLE_SECONDS)
        payload = torch.ones(BYTES, dtype=torch.uint8) if rank == 0 else torch.empty(BYTES, dtype=torch.uint8)
        group.barrier().wait()
        if rank == 0:
            stamp[0] = time.monotonic()
            group.send([payload], 1, 0).wait()
            group.send([stamp], 1, 1).wait()
        else:
            group.recv([payload], 0, 0).wait()
            now = time.monotonic()
            group.recv([stamp], 0, 1).wait()
            times.append(now - float(stamp))
    if rank == 1:
        results.send(times)  # type: ignore[attr-defined]
    group.barrier().wait()


def main() -> None:
    options = parser(__doc__).parse_args()
    measured = measure_handoff()
    measured.show()
    write_json(options.json, asdict(measured))


if __name__ == "__main__":
    main()
