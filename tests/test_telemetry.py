"""Traces: one of every request, in its caller's trace, as an OpenTelemetry collector receives it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SentSpan

from ditrelay.async_engine import AsyncEngine
from ditrelay.engine import Engine
from ditrelay.errors import ConfigError, RequestCancelled
from ditrelay.runtime.metrics import RequestClock, Span
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.telemetry import EndedRequest, Telemetry, called_by
from ditrelay.server.app import create_app

MODEL = "builtin:timed?encode=0.01&denoise=0.06&steps=6&decode=0.01"
RANKS = {"device": "cpu", "enable_disagg": True, "num_gpus": 2}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class Collector(ThreadingHTTPServer):
    """Takes what is posted to ``/v1/traces``.

    Attributes:
        spans: all of them, as they were sent.
        names: the services that sent them.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[SentSpan] = []
        self.names: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def take(self, body: bytes) -> None:
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.names |= {one.value.string_value for one in each.resource.attributes if one.key == "service.name"}
            self.spans += [span for scope in each.scope_spans for span in scope.spans]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":
            self.server.take(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *values: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def attributes(span: SentSpan) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_request_is_one_trace_with_its_stages_their_ranks_and_every_step(collector: Collector) -> None:
    before = time.time_ns()
    with Engine(ServerArgs(model_path=MODEL, otlp_endpoint=f"{collector.url}/", **RANKS)) as engine:
        result = engine.generate("a secret cat", seed=1, width=64, height=32)
    [whole] = [span for span in collector.spans if not span.parent_span_id]  # the warm-up is not traced
    assert (whole.name, collector.names) == ("request", {"ditrelay"})
    assert attributes(whole) == {
        "ditrelay.request_id": result.request_id,
        "ditrelay.model": MODEL,
        "ditrelay.size": "64x32",
        "ditrelay.frames": 1,
        "ditrelay.steps": 6,
        "ditrelay.outcome": "done",
    }
    parts = sorted(
        (span for span in collector.spans if span.parent_span_id), key=lambda span: span.start_time_unix_nano
    )
    assert {span.trace_id for span in parts} == {whole.trace_id}
    assert {span.parent_span_id for span in parts} == {whole.span_id}
    names = [span.name for span in parts]
    assert names == ["queued", "encode", "to_dit", "wait_dit", "denoise", "to_decoder", "wait_decoder", "decode"]
    ranks = {span.name: attributes(span).get("ditrelay.rank") for span in parts}
    assert (ranks["encode"], ranks["denoise"], ranks["decode"], ranks["queued"]) == (1, 0, 1, None)
    denoise = parts[names.index("denoise")]
    assert [event.name for event in denoise.events] == ["step"] * 6
    moments = [event.time_unix_nano for event in denoise.events]
    assert denoise.start_time_unix_nano < moments[0] and moments == sorted(moments)
    assert moments[-1] <= denoise.end_time_unix_nano
    assert before < whole.start_time_unix_nano <= parts[0].start_time_unix_nano
    assert parts[-1].end_time_unix_nano <= whole.end_time_unix_nano < time.time_ns()
    assert whole.end_time_unix_nano - whole.start_time_unix_nano == pytest.approx(result.timings.total * 1e9, rel=0.05)
    assert not any(b"secret" in span.SerializeToString() for span in collector.spans)


def test_over_http_a_request_belongs_to_the_trace_of_its_caller(collector: Collector) -> None:
    async def main() -> None:
        app = create_app(AsyncEngine(ServerArgs(model_path=MODEL, otlp_endpoint=collector.url, **RANKS)))
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as to:
            async with asyncio.timeout(100):
                while (await to.get("/ready")).status_code != 200 or not app.state.context.started:
                    await asyncio.sleep(0.02)
            for headers, stream in ((CALLER, False), (CALLER, True), ({"traceparent": "nonsense"}, False), ({}, False)):
                body = {"prompt": "a cat", "stream": stream}
                assert (await to.post("/v1/images/generations", json=body, headers=headers)).status_code == 200

    asyncio.run(main())
    roots = sorted(
        (each for each in collector.spans if each.name == "request"), key=lambda each: each.start_time_unix_nano
    )
    assert [(each.trace_id.hex() == TRACE, each.parent_span_id.hex()) for each in roots] == [
        (True, PARENT),
        (True, PARENT),
        (False, ""),
        (False, ""),
    ]
    assert roots[2].trace_id != roots[3].trace_id


def test_a_failed_request_is_marked_with_the_reason_and_its_attempts_are_all_there(collector: Collector) -> None:
    telemetry = Telemetry(f"{collector.url}/v1/traces", "m").start()
    request = Request(request_id="r", params=SamplingParams(prompt="a cat", seed=1))
    spans = tuple(Span("r", 0, "denoise", began, began + 1) for began in (2.0, 4.0))
    clock = RequestClock(1.0)
    telemetry.record(EndedRequest(request, "failed", "out of memory", clock, 6.0, spans, None))
    telemetry.record(EndedRequest(request, "cancelled", None, clock, 6.0, (), None))
    telemetry.close()
    failed, cancelled = [span for span in collector.spans if span.name == "request"]
    assert (failed.status.code, failed.status.message) == (failed.status.STATUS_CODE_ERROR, "out of memory")
    assert cancelled.status.code == cancelled.status.STATUS_CODE_UNSET
    assert attributes(cancelled)["ditrelay.outcome"] == "cancelled"
    assert [span.name for span in collector.spans].count("denoise") == 2


def test_cancelled_requests_are_traced_and_a_collector_that_is_not_there_holds_nothing_up() -> None:
    args = ServerArgs(model_path=MODEL, otlp_endpoint="http://127.0.0.1:9", warmup=False, **RANKS)
    with Engine(args) as engine, called_by(CALLER):
        began = time.monotonic()
        ticket = engine.submit(SamplingParams(prompt="a cat", num_inference_steps=500))
        ticket.cancel()
        with pytest.raises(RequestCancelled):
            ticket.result(30)
        engine.generate("a dog")
        assert time.monotonic() - began < 20


def test_a_full_queue_loses_traces_and_never_waits() -> None:
    telemetry = Telemetry("http://127.0.0.1:9/v1/traces", "m")  # not started: nothing is taken from it
    request = Request(request_id="r", params=SamplingParams(prompt="a cat", seed=1))
    for _ in range(3000):
        telemetry.record(EndedRequest(request, "done", None, RequestClock(1.0), 2.0, (), None))
    telemetry.close()


def test_an_address_without_the_packages_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"otlp_endpoint: .*pip install 'ditrelay\[otel\]'"):
        Engine(ServerArgs(model_path=MODEL, otlp_endpoint="http://localhost:4318"))
    Engine(ServerArgs(model_path=MODEL))  # without an address nothing of them is needed


@pytest.mark.parametrize(
    ("flag", "variables", "url"),
    [
        (None, {}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}, "http://a:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b/x"}, "http://b/x"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b/x"}, "http://b/x"),
        ("https://c/", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b/x"}, "https://c/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
    ],
)  # fmt: skip
def test_the_address_is_the_flags_else_that_of_opentelemetrys_variables(
    flag: str | None, variables: dict[str, str], url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ServerArgs(otlp_endpoint=flag).traces_url() == url


def test_what_is_no_address_is_refused_by_the_name_under_which_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--otlp-endpoint: 'localhost:4318' is no address; allowed: http://"):
        ServerArgs(otlp_endpoint="localhost:4318").traces_url()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4318")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_ENDPOINT: 'localhost:4318' is no address"):
        ServerArgs().traces_url()
