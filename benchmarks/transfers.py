"""The two transfer backends of an edge between two GPUs, side by side, and the engine's hand-off over each.

Needs two GPUs. Every figure is a median in one run of this script; the other backend is the baseline.

edge: from isend/irecv, asked for at the same moment, to the end of the receive.
matmul: an 8192^3 bf16 product on the receiving GPU alone, beside a receive whose send does not come, and beside
payloads that come one after the other.
hand-off: encode done -> conditioning usable, with an idle receiver, through real workers. The encode is device work of
20 ms that its thread has launched ahead, as a real one is; the other stages sleep.
host: what pinned memory and a pool of receive buffers are worth, and how late a thread wakes after its event.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import ROOT, markdown, origin, parser, show, write_json, write_section

from ditrelay import Engine, SamplingParams, ServerArgs
from ditrelay.models.pixels import to_frames
from ditrelay.runtime.communication.backends import connect_edge
from ditrelay.runtime.communication.endpoint import Endpoint
from ditrelay.runtime.communication.store import StoreServer, connect_store
from ditrelay.runtime.topology import Edge

BACKENDS = ("torch", "cuda_ipc")
EDGE = Edge(1, 0)
TIMEOUT = 60.0
SIZES_MIB = (0.0625, 1, 4, 8, 16, 64, 256)
REPEATS = 40
HANDOFF_MB = {"FLUX": 4.2, "Wan 480p": 8.4, "Wan 720p": 27.8}
BUSY_MIB = 64
AIM_MS = 1.0  # of a hand-off, beside the time that its bytes take


def connect(port: int, backend: str, rank: int) -> Endpoint:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = connect_store("127.0.0.1", port, TIMEOUT)
    return connect_edge(backend, store, EDGE, 0, rank, device=device, timeout=TIMEOUT)


def send_on_demand(port: int, backend: str, orders: Connection) -> None:
    """The sending process: for each (bytes, seq) it is told, send and say when that was asked for; 0 ends it."""
    end = connect(port, backend, EDGE.src)
    payloads: dict[int, torch.Tensor] = {}
    while (order := orders.recv())[0]:
        nbytes, seq = order
        if nbytes not in payloads:
            payloads[nbytes] = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda:1")
            torch.cuda.current_stream().synchronize()
        began = time.monotonic()
        end.isend([payloads[nbytes]], seq=seq).wait(TIMEOUT)
        orders.send(began)
    end.close("done")


class Sender:
    """The sending process, and this process's end of the edge to it."""

    def __init__(self, backend: str) -> None:
        self._server = StoreServer()
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        arguments = (self._server.port, backend, theirs)
        self._process = context.Process(target=send_on_demand, args=arguments, daemon=True)
        self._process.start()
        self.end = connect(self._server.port, backend, EDGE.dst)
        self._seq = 0

    def transfer(self, target: torch.Tensor) -> float:
        """Seconds of one transfer into ``target``."""
        self._orders.send((target.numel(), self._seq))
        work = self.end.irecv([target], seq=self._seq)
        self._seq += 1
        work.wait(TIMEOUT)
        assert self._orders.poll(TIMEOUT), "the sender does not answer"
        return work.ended - float(self._orders.recv())

    def post(self, target: torch.Tensor) -> Callable[[], None]:
        """A receive whose send comes only when the returned function is called."""
        work, seq = self.end.irecv([target], seq=self._seq), self._seq
        self._seq += 1

        def complete() -> None:
            self._orders.send((target.numel(), seq))
            work.wait(TIMEOUT)
            self._orders.recv()

        return complete

    def close(self) -> None:
        self._orders.send((0, 0))
        self._process.join(10.0)
        self._process.kill()
        self.end.close("done")


def edge_times(sender: Sender) -> dict[str, float]:
    """Microseconds by MiB."""
    times = {}
    for mib in SIZES_MIB:
        target = torch.empty(int(mib * 2**20), dtype=torch.uint8, device="cuda:0")
        measured = []
        for _ in range(REPEATS):
            measured.append(sender.transfer(target))
            time.sleep(0.002)
        times[f"{mib:g}"] = statistics.median(measured) * 1e6
    return times


def matmul_times(sender: Sender) -> dict[str, float]:
    """Milliseconds of one product."""
    a = torch.randn(8192, 8192, device="cuda:0", dtype=torch.bfloat16)
    target = torch.empty(BUSY_MIB << 20, dtype=torch.uint8, device="cuda:0")
    compute = torch.cuda.Stream()  # a receive waits for the stream it is asked for on, so not this one
    compute.wait_stream(torch.cuda.current_stream())
    product_ms(a, compute)
    figures = {"alone": product_ms(a, compute)}
    complete = sender.post(target)
    time.sleep(0.2)
    figures["receive posted, no send"] = product_ms(a, compute)
    complete()
    figures["alone again"] = product_ms(a, compute)
    products = Products(a, compute, 200)
    moved = 0
    while not products.done():
        sender.transfer(target)
        moved += 1
    figures[f"beside payloads of {BUSY_MIB} MiB"] = products.milliseconds()
    figures["payloads meanwhile"] = moved
    figures["alone at last"] = product_ms(a, compute)
    return figures


class Products:
    """``count`` matrix products on a stream."""

    def __init__(self, a: torch.Tensor, stream: torch.cuda.Stream, count: int) -> None:
        self._count = count
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            self._start.record()
            for _ in range(count):
                torch.mm(a, a)
            self._end.record()

    def done(self) -> bool:
        return self._end.query()

    def milliseconds(self) -> float:
        """Of one product."""
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / self._count


def product_ms(a: torch.Tensor, stream: torch.cuda.Stream) -> float:
    return Products(a, stream, 60).milliseconds()


def handoff_ms(backend: str, megabytes: float) -> dict[str, float]:
    model = f"builtin:timed?encode=0.02&denoise=0.02&decode=0.02&steps=1&conditioning_mb={megabytes}&latents_mb=1"
    args = ServerArgs(
        model_path=model,
        device="cuda",
        enable_disagg=True,
        num_gpus=2,
        log_level="warning",
        transfer_backend=backend,
    )
    times = []
    with Engine(args) as engine:
        for seed in range(REPEATS + 5):
            result = engine.submit(SamplingParams(prompt="x", seed=seed)).result(timeout=60)
            times.append(result.timings.to_dit * 1000)
            time.sleep(0.01)
        spans = {(span.request_id, span.kind, span.rank): span for span in engine.spans}
    times = times[5:]
    ready = {request_id: span.ended for (request_id, kind, _), span in spans.items() if kind == "encode"}
    told, moved = [], []
    for each, ended in ready.items():
        received = spans[each, "receive", EDGE.dst]
        both_told = max(spans[each, "send", EDGE.src].began, received.began)  # the encode's end where that came later
        told.append(both_told - ended)
        moved.append(received.ended - both_told)
    return {
        "median": statistics.median(times),
        "p90": statistics.quantiles(times, n=10)[-1],
        "least": min(times),
        "of it until both ranks are told": statistics.median(told) * 1000,
        "of it the transfer": statistics.median(moved) * 1000,
    }


def host_times() -> dict[str, float]:
    """Microseconds to make receive buffers and of a thread's wake-up, milliseconds of a clip's way to the host."""
    torch.cuda.set_device(0)
    clip = torch.rand(81, 3, 720, 1280, device="cuda:0")
    rounded = (clip * 255).round().to(torch.uint8)
    figures = {
        "buffer from the allocator us": timed(lambda: torch.empty(8 << 20, dtype=torch.uint8, device="cuda:0")) * 1e6,
        "clip 720p81f pageable ms": timed(lambda: rounded.permute(0, 2, 3, 1).contiguous().cpu(), 5) * 1e3,
        "clip 720p81f to_frames (pinned) ms": timed(lambda: to_frames(clip), 5) * 1e3,
        "event wake-up, blocking us": statistics.median(wake_up(blocking=True) for _ in range(20)) * 1e6,
        "event wake-up, spinning us": statistics.median(wake_up(blocking=False) for _ in range(20)) * 1e6,
    }
    return figures


def timed(call: Callable[[], object], repeats: int = 50) -> float:
    """Median seconds, after one call that does not count."""
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def wake_up(*, blocking: bool) -> float:
    """Seconds from the end of 10 ms of device work until a waiting thread runs."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True, blocking=blocking) for _ in range(2))
    start.record()
    start.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(18_000_000)
    end.record()
    end.synchronize()
    return time.perf_counter() - began - start.elapsed_time(end) / 1000


# ---------------------------------------------------------------- what is shown


def section(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    source = result["provenance"]
    where = f"two {result['card']}, torch {result['torch']}"
    caption = f"{origin(source, where=where)}. Medians of {REPEATS}."
    edges, matmuls, handoffs = (
        [result[f"{what}, {backend}"] for backend in BACKENDS]
        for what in ("edge us by MiB", "matmul ms", "hand-off ms")
    )
    rows = [
        [f"one edge alone, {' / '.join(edges[0])} MiB, us", *(_slashed(edge.values(), 0) for edge in edges)],
        ["8192^3 matmul alone / while a receive waits, ms", *(_matmul(each) for each in matmuls)],
        ["payloads of 64 MiB moved during 200 such matmuls", *(str(each["payloads meanwhile"]) for each in matmuls)],
    ]
    for name, megabytes in HANDOFF_MB.items():
        seen = [handoff[name] for handoff in handoffs]
        rows.append([f"hand-off of {megabytes} MB ({name}), median / 90th percentile, ms", *map(_handoff, seen)])
    rows.append(["of it, until both ranks are told, ms", *(_told(handoff) for handoff in handoffs)])
    return "\n\n".join([caption, markdown(["", *BACKENDS], rows), *_verdicts(edges, handoffs)])


def _slashed(values: Iterable[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def _matmul(times: Mapping[str, float]) -> str:
    return f"{times['alone']:.2f} / {times['receive posted, no send']:.2f}"


def _handoff(seen: Mapping[str, float]) -> str:
    return f"{seen['median']:.2f} / {seen['p90']:.2f}"


def _told(handoff: Mapping[str, Mapping[str, float]]) -> str:
    return _slashed((seen["of it until both ranks are told"] for seen in handoff.values()), 2)


def _verdicts(
    edges: Sequence[Mapping[str, float]], handoffs: Sequence[Mapping[str, Mapping[str, float]]]
) -> Iterator[str]:
    for backend, edge, handoff in zip(BACKENDS, edges, handoffs, strict=True):
        rate = bandwidth(edge)
        allowed = {name: AIM_MS + 1e3 * HANDOFF_MB[name] / rate for name in handoff}
        tightest = min(handoff, key=lambda name: allowed[name] - handoff[name]["median"])
        found, aim = handoff[tightest]["median"], allowed[tightest]
        yield (
            f"`{backend}`: {found:.2f} ms where it is tightest ({tightest}); aim 1 ms + bytes/bandwidth, {aim:.2f} ms "
            f"there at {rate / 1e3:.0f} GB/s: {'reached' if found <= aim else '**not reached**'}."
        )


def bandwidth(edge: Mapping[str, float]) -> float:
    """MB a second, from the two largest payloads of an edge's times (microseconds by MiB)."""
    (some, early), (more, late) = sorted((float(mib), us) for mib, us in edge.items())[-2:]
    return (more - some) * (1 << 20) / (late - early)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--report", type=Path, metavar="FILE", help="write docs/performance.md from this result")
    arguments.add_argument(
        "--only", choices=("edge", "handoff", "host"), nargs="+", default=["edge", "handoff", "host"]
    )
    options = arguments.parse_args()
    if options.report:
        write_section(ROOT / "docs" / "performance.md", "transfers", section(json.loads(options.report.read_text())))
        return
    figures: dict[str, object] = {"card": torch.cuda.get_device_name(0), "torch": torch.__version__}
    if "edge" in options.only:
        for backend in BACKENDS:
            sender = Sender(backend)
            figures[f"edge us by MiB, {backend}"] = edge_times(sender)
            figures[f"matmul ms, {backend}"] = matmul_times(sender)
            sender.close()
    if "handoff" in options.only:
        for backend in BACKENDS:
            figures[f"hand-off ms, {backend}"] = {n: handoff_ms(backend, mb) for n, mb in HANDOFF_MB.items()}
    if "host" in options.only:
        figures["host"] = host_times()
    show("Transfers between two GPUs", ("what", "figures"), [[name, str(value)] for name, value in figures.items()])
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
