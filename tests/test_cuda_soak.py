"""Long runs on GPUs: the window holds, no byte is wrong in thousands of transfers, and memory does not grow."""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections.abc import Iterator
from functools import partial

import torch
from rig import BACKENDS, DEVICE, ON_GPUS, Record, at_rest, draw, heartbeats, needs, settings, side_by_side
from self_check import FILE, NAMES, passed, torchrun

from ditrelay import Engine, SamplingParams
from ditrelay.models.card import ModelCard, load_card
from ditrelay.models.load_spec import LoadSpec
from ditrelay.models.loading import load_adapter
from ditrelay.runtime.metrics import Span
from ditrelay.runtime.pipelines_core.executors.sync_executor import SyncExecutor
from ditrelay.runtime.pipelines_core.pipeline import Batch
from ditrelay.runtime.pipelines_core.stages import build_pipeline
from ditrelay.runtime.request import Request
from ditrelay.runtime.topology import COLOCATED

MIB = 1 << 20
DIT, NON_DIT = 0, 1

# ---------------------------------------------------------------- self-check


@needs(4)
def test_the_self_check_passes_on_four_ranks_and_fails_when_a_byte_is_wrong() -> None:
    good, bad = side_by_side(
        partial(torchrun, 4, FILE, gpus=ON_GPUS, timeout=90.0),
        partial(torchrun, 4, FILE, "--corrupt-on", "2", gpus=ON_GPUS, timeout=90.0),
    )
    assert good.returncode == 0, good.stderr
    assert tuple(passed(good)) == NAMES and "All tests passed! ✓" in good.stdout
    assert bad.returncode != 0
    assert "Async Batch Transfer" not in passed(bad) and "[Rank 2] TransferCorrupt" in bad.stdout


# ---------------------------------------------------------------- window


def most_on_the_way(spans: list[Span], stage: str, source: int) -> int:
    """Payloads at a time that ``source`` had begun to send and whose ``stage`` had not begun to compute."""
    sent = {span.request_id: span.began for span in spans if (span.kind, span.rank) == ("send", source)}
    taken = {span.request_id: span.began for span in spans if span.kind == stage}
    moments = sorted([(at, 1) for at in sent.values()] + [(taken[request], -1) for request in sent])
    most = depth = 0
    for _, change in moments:
        depth += change
        most = max(most, depth)
    return most


def watched(window: int, budget: int) -> tuple[list[Span], int, int]:
    """A run with a slow DiT: its spans, and the most sends and receives in flight that any heartbeat told of."""
    model = "builtin:timed?encode=0.005&denoise=0.06&decode=0.005&steps=3&conditioning_mb=4&latents_mb=1"
    with Engine(settings(model_path=model, max_pending_transfers=window, max_pending_bytes=budget)) as engine:
        tickets = [engine.submit(SamplingParams(prompt=f"number {i}", seed=i)) for i in range(40)]
        beats = []
        while not all(ticket.done() for ticket in tickets):
            beats += heartbeats(engine, since=time.monotonic() - 1.1)
            time.sleep(0.1)
        at_rest(engine)
        assert all(ticket.result(0) for ticket in tickets)
        return engine.spans, max(b.pending_sends for b in beats), max(b.pending_recvs for b in beats)


@needs(2)
def test_the_window_is_reached_and_never_exceeded() -> None:
    limits = [(1, 1 << 30, 1), (3, 1 << 30, 3), (8, 9_000_000, 2)]  # at last the bytes of two payloads and a bit
    runs = side_by_side(*(partial(watched, window, budget) for window, budget, _ in limits))
    for (_, _, most), (spans, sends, receives) in zip(limits, runs, strict=True):
        assert most_on_the_way(spans, "denoise", NON_DIT) == most
        assert 1 <= most_on_the_way(spans, "decode", DIT) <= most
        assert max(sends, receives) <= most


# ---------------------------------------------------------------- corruption

TIMED = "builtin:timed?encode=0.001&denoise=0.004&decode=0.001&steps=2&conditioning_mb=0.5&latents_mb=0.1"
SWITCH = 1100 if ON_GPUS else 150  # requests of each backend, two transfers each


def oracle(card: ModelCard, requests: list[SamplingParams]) -> list[bytes]:
    """The files that one process makes without a transfer."""
    adapter = load_adapter(LoadSpec(card=card, roles=COLOCATED))
    pipeline, executor, args = build_pipeline(adapter, COLOCATED), SyncExecutor(), settings()
    files = []
    for number, params in enumerate(requests):
        batch = Batch((Request(request_id=str(number), params=card.resolve(params)),))
        output = executor.execute(pipeline.stages, batch, args).output
        assert output is not None
        files.append(output[0].data)
    return files


@contextlib.contextmanager
def busy_device(device: torch.device) -> Iterator[None]:
    """Small matmuls on the side, from a process other than the ranks'."""
    stop = threading.Event()

    def compute() -> None:
        matrix = torch.ones(1024, 1024, device=device)
        while not stop.wait(0.001):
            torch.mm(matrix, matrix).sum().item()

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10.0)


def checked(backend: str, requests: list[SamplingParams]) -> list[bytes]:
    args = settings(model_path=TIMED, transfer_backend=backend, verify_transfers=True, max_queue=len(requests))
    with Engine(args) as engine:
        files = [result.media for result in draw(engine, requests)]
        at_rest(engine)
        assert sum(worker.restarts for worker in engine.status().workers) == 0
        return files


@needs(2)
def test_no_byte_is_wrong_in_thousands_of_transfers_while_the_gpus_compute() -> None:
    requests = [SamplingParams(prompt=f"number {i}", seed=i, num_inference_steps=2) for i in range(SWITCH)]
    expected = oracle(load_card(TIMED), requests)
    assert len(set(expected)) == len(expected)
    with busy_device(torch.device(DEVICE, 0) if ON_GPUS else torch.device("cpu")):
        for files in side_by_side(*(partial(checked, backend, requests) for backend in BACKENDS)):
            assert files == expected


# ---------------------------------------------------------------- growth

WARM, LATER = (200, 800) if ON_GPUS else (40, 60)


def own_rss() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


@needs(4)
def test_a_thousand_requests_leave_the_memory_as_it_was(record_property: Record) -> None:
    """What is kept per request would show: 800 requests may add 24 MiB to a process and 1 MiB to a device."""
    prompts = ("a red apple", "two dogs", "a yellow car", "a tree")

    def requests(count: int) -> list[SamplingParams]:
        small = dict(height=64, width=64, num_inference_steps=2)
        return [SamplingParams(prompt=prompts[i % 4], seed=i % 8, **small) for i in range(count)]

    with Engine(settings(num_gpus=4, max_queue=LATER, verify_transfers=True)) as engine:
        files = [result.media for result in draw(engine, requests(WARM))]
        before, own_before = at_rest(engine), own_rss()
        assert [result.media for result in draw(engine, requests(LATER))] == [files[i % 8] for i in range(LATER)]
        after, own_after = at_rest(engine), own_rss()
        status = engine.status()
    assert (status.done, status.failed, status.queued, status.running) == (WARM + LATER, 0, 0, 0)
    for old, new in zip(before, after, strict=True):
        grown, device_grown = new.rss - old.rss, new.device_allocated - old.device_allocated
        record_property(f"rank {new.rank}", f"{grown / MIB:.1f} MiB, device {device_grown} B")
        assert grown < 24 * MIB and device_grown <= MIB, new
    record_property("head", f"{(own_after - own_before) / MIB:.1f} MiB")
    assert own_after - own_before < 32 * MIB
