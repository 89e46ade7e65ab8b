"""``/metrics``: every metric with the value that the engine has for it, in Prometheus' format; and the dashboard."""

from __future__ import annotations

import asyncio
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from scheduler_desk import Desk
from server_fakes import FakeEngine, running

from ditrelay._version import __version__
from ditrelay.engine import Engine
from ditrelay.runtime.messages import Decoded, Denoised, Encode, Encoded, Heartbeat, StageFailed, Started, StepDone
from ditrelay.runtime.meters import BOUNDS, Meters
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.payloads import PayloadHeader
from ditrelay.runtime.request import Request, RequestState, SamplingParams
from ditrelay.runtime.request_log import RequestLog
from ditrelay.runtime.scheduler import UnitSnapshot
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.status import EngineStatus
from ditrelay.runtime.tickets import Ticket
from ditrelay.runtime.topology import Topology
from ditrelay.server.exposition import CONTENT_TYPE, Family, render
from ditrelay.server.metrics import families

DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana-dashboard.json"
NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})(?:{{({LABEL}(?:,{LABEL})*)}})? (\S+)")
HEADER = PayloadHeader(batch_id="r", request_ids=("r",), fields=(), tensors=(), nbytes=0)


def filled() -> Meters:
    """What one request left behind that was tried twice."""
    meters = Meters()
    meters.observe(Encoded(2, "r", HEADER, 10.0, 10.5))
    meters.moved(RequestState.ENCODING, RequestState.ENCODED)
    meters.moved(RequestState.TO_DIT, RequestState.ENCODED)
    meters.observe(Started(0, "r", "denoise", 11.0))
    meters.observe(StepDone(0, "r", 1, 2, 12.0))
    meters.observe(Denoised(0, "r", HEADER, 11.0, 13.5))
    meters.observe(Decoded(2, "r", b"", "image/png", 8, 8, 1, 14.0, 14.25))
    meters.finished(Timings(queued=0.1, encode=0.5, to_dit=0.002, denoise=2.5, total=4.0, exposed_transfer=0.002))
    return meters


def unit_snapshots() -> tuple[UnitSnapshot, ...]:
    units = Topology.build(ServerArgs(enable_disagg=True, num_gpus=3)).units
    idle = [UnitSnapshot(unit, "up", None, 0, 0, 0, 0, 0, 0, 0) for unit in units]
    return (*idle[:2], replace(idle[2], held=3, stalled=("encode",)))


@dataclass
class MeteredEngine(FakeEngine):
    """One with something in every meter."""

    def status(self) -> EngineStatus:
        status = super().status()
        first = replace(
            status.workers[0],
            restarts=2,
            memory=Heartbeat(0, 0.0, 100, 900, 200, 300, pending_sends=1, pending_recvs=4, kept=70),
        )
        return replace(
            status,
            workers=(first, *status.workers[1:]),
            queued=5,
            running=6,
            done=7,
            failed=8,
            cancelled=9,
            units=unit_snapshots(),
            readings=filled().read(),
        )


def scraped(engine: FakeEngine, path: str = "/metrics") -> httpx.Response:
    async def main() -> httpx.Response:
        async with running(engine) as client:
            return await client.get(path)

    return asyncio.run(main())


@pytest.fixture(scope="module")
def page() -> httpx.Response:
    return scraped(MeteredEngine())


class Samples(dict[str, float]):
    """By name and labels; these may be asked for in any order."""

    def __missing__(self, sample: str) -> float:
        name, _, labels = sample.partition("{")
        ordered = f"{name}{{{','.join(sorted(labels.removesuffix('}').split(',')))}}}"
        if ordered == sample:
            raise KeyError(sample)
        return self[ordered]


def read(text: str) -> Samples:
    """Every sample by its name and labels as written; fails on a line that is not the format's."""
    samples = Samples()
    known = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            known = line.split(" ", 3)[2]
            assert re.fullmatch(NAME, known)
        elif line.startswith("# TYPE "):
            assert line.split(" ")[2:] in ([known, kind] for kind in ("counter", "gauge", "histogram"))
        else:
            match = SAMPLE.fullmatch(line)
            assert match and re.fullmatch(rf"{known}(_bucket|_sum|_count)?", match[1]), line
            name = line.rpartition(" ")[0]
            assert name not in samples, f"twice: {name}"
            samples[name] = float(match[3])
    assert text.endswith("\n")
    return samples


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        (f'ditrelay_info{{version="{__version__}",model="tiny"}}', 1),
        ("ditrelay_ready", 1),
        ("ditrelay_requests_queued", 5),
        ("ditrelay_requests_running", 6),
        ('ditrelay_requests_total{outcome="done"}', 7),
        ('ditrelay_requests_total{outcome="failed"}', 8),
        ('ditrelay_requests_total{outcome="cancelled"}', 9),
        ('ditrelay_retries_total{state="to_dit"}', 1),
        ('ditrelay_stage_seconds_bucket{stage="denoise",le="1"}', 0),
        ('ditrelay_stage_seconds_bucket{stage="denoise",le="2.5"}', 1),  # a bound belongs to its bucket
        ('ditrelay_stage_seconds_bucket{stage="denoise",le="+Inf"}', 1),
        ('ditrelay_stage_seconds_sum{stage="encode"}', 0.5),
        ('ditrelay_stage_seconds_count{stage="to_decoder"}', 1),
        ('ditrelay_request_seconds_bucket{le="5"}', 1),
        ("ditrelay_request_seconds_sum", 4.0),
        ("ditrelay_exposed_transfer_seconds_sum", 0.002),
        ('ditrelay_busy_seconds_total{rank="0",stage="denoise"}', 2.5),
        ('ditrelay_busy_seconds_total{rank="2",stage="encode"}', 0.5),
        ('ditrelay_busy_seconds_total{rank="2",stage="decode"}', 0.25),
        ('ditrelay_credits_stalled{rank="2",stage="encode"}', 1),
        ('ditrelay_credits_stalled{rank="0",stage="denoise"}', 0),
        ('ditrelay_held_payloads{rank="2"}', 3),
        ('ditrelay_edge_up{source="2",target="0"}', 1),
        ('ditrelay_edge_transfers{source="2",target="0"}', 1),
        ('ditrelay_edge_bytes{source="2",target="0"}', 500),
        ('ditrelay_edge_window{source="2",target="0"}', 2),
        ('ditrelay_rank_up{rank="0",role="dit"}', 1),
        ('ditrelay_rank_restarts_total{rank="0"}', 2),
        ('ditrelay_rank_pending_sends{rank="0"}', 1),
        ('ditrelay_rank_pending_receives{rank="0"}', 4),
        ('ditrelay_rank_memory_bytes{rank="0",kind="resident"}', 100),
        ('ditrelay_rank_memory_bytes{rank="0",kind="device"}', 200),
        ('ditrelay_rank_memory_bytes{rank="0",kind="device_peak"}', 300),
        ('ditrelay_rank_memory_bytes{rank="0",kind="device_total"}', 900),
        ('ditrelay_rank_memory_bytes{rank="0",kind="kept"}', 70),
    ],
)
def test_the_metric_has_the_value_that_the_engine_has(page: httpx.Response, sample: str, value: float):
    assert read(page.text)[sample] == pytest.approx(value)


def test_the_page_is_of_the_type_that_prometheus_asks_for(page: httpx.Response):
    assert (page.status_code, page.headers["content-type"]) == (200, CONTENT_TYPE)


def test_every_metric_is_named_before_anything_has_happened_and_while_the_engine_starts():
    status = EngineStatus(ready=False, workers=())
    assert {family.name for family in families(status, model="m")} == {
        family.name for family in families(MeteredEngine().status(), model="m")
    }
    samples = read(render(families(status, model="m")))
    assert samples["ditrelay_ready"] == samples["ditrelay_request_seconds_count"] == 0


def test_names_follow_prometheus_rules():
    for family in families(MeteredEngine().status(), model="m"):
        metric = family.metric
        assert family.name.startswith("ditrelay_") and metric.documentation.endswith(".")
        assert family.name.endswith("_total") == (metric.type == "counter")
        assert metric.type != "histogram" or family.name.endswith("_seconds")


def test_a_model_name_with_quotes_and_newlines_stays_one_label():
    family = Family("a", "gauge", "b").add(1, model='a"b\\c\nd')
    assert render([family]) == '# HELP a b\n# TYPE a gauge\na{model="a\\"b\\\\c\\nd"} 1.0\n'
    assert list(read(render([family])).values()) == [1]


def test_where_there_is_a_key_the_page_asks_for_it():
    engine = FakeEngine(args=ServerArgs(served_model_name="tiny", api_key="secret"))
    assert scraped(engine).status_code == 401


# ---------------------------------------------------------------- the meters


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.3, 600.0, 601.0, 1e9])
def test_a_duration_is_in_one_bucket_whose_bound_it_does_not_exceed(seconds: float):
    meters = Meters()
    meters.finished(Timings(total=seconds))
    reading = meters.read().seconds["total"]
    (number,) = [index for index, count in enumerate(reading.counts) if count]
    bounds = (-math.inf, *BOUNDS, math.inf)
    assert bounds[number] < seconds <= bounds[number + 1]
    assert reading.total == seconds


def test_a_denoise_counts_up_to_its_newest_step_while_it_runs():
    meters = Meters()
    meters.observe(Started(0, "r", "denoise", 100.0))
    meters.observe(StepDone(0, "r", 1, 4, 101.0))
    assert meters.read().busy == {(0, "denoise"): 1.0}
    meters.observe(StageFailed(0, "r", "denoise", "raised", 101.5))
    meters.observe(Started(0, "s", "denoise", 200.0))  # in between the rank was idle
    meters.observe(StepDone(0, "s", 1, 1, 203.0))
    meters.observe(Denoised(0, "s", HEADER, 200.0, 203.0))
    assert meters.read().busy == {(0, "denoise"): 4.5}


def test_only_a_step_back_is_a_retry():
    meters = Meters()
    way = [RequestState.QUEUED, RequestState.ENCODING, RequestState.ENCODED, RequestState.TO_DIT, RequestState.AT_DIT]
    for old, new in zip(way, way[1:], strict=False):
        meters.moved(old, new)
    assert meters.read().retries == {}
    meters.moved(RequestState.DENOISING, RequestState.QUEUED)
    assert meters.read().retries == {RequestState.DENOISING: 1}


def test_the_record_of_requests_counts_one_that_is_set_back():
    log = RequestLog(Topology.build(ServerArgs()))
    request = Request(request_id="r", params=SamplingParams(prompt="a cat", seed=1))
    log.open(request, Ticket(request, lambda request_id: None), limit=1)
    for state in (RequestState.ENCODING, RequestState.QUEUED, RequestState.ENCODING):
        log.state_changed("r", state)
    assert log.readings().retries == {RequestState.ENCODING: 1}


def stalled(desk: Desk) -> dict[int, tuple[str, ...]]:
    return {unit.unit.leader: unit.stalled for unit in desk.snapshot().units}


def test_an_encoder_with_work_and_no_credit_is_stalled_until_a_denoise_starts():
    desk = Desk(("n", 1), ("ed", 1), max_pending_transfers=1)
    assert stalled(desk) == {0: (), 1: ()}
    desk.submit("a")
    assert stalled(desk) == {0: (), 1: ()}  # nothing waits
    desk.submit("b")
    assert stalled(desk) == {0: (), 1: ("encode",)}
    desk.encoded("a")
    desk.received("a")
    assert stalled(desk) == {0: (), 1: ("encode",)}
    desk.started("a", "denoise")
    assert stalled(desk) == {0: (), 1: ()}
    assert [encode.request.request_id for encode in desk.of(Encode)] == ["b"]


def test_a_unit_that_is_down_is_not_stalled():
    desk = Desk(("n", 1), ("ed", 1), max_pending_transfers=1)
    desk.submit("a", "b")
    desk.down(1)
    assert stalled(desk) == {0: (), 1: ()}


def test_a_reading_does_not_change_with_what_comes_after_it():
    meters = filled()
    before = meters.read()
    kept = (dict(before.seconds), dict(before.busy), dict(before.retries))
    meters.finished(Timings(total=1.0))
    meters.moved(RequestState.DECODING, RequestState.DENOISED)
    meters.observe(Encoded(2, "s", HEADER, 0.0, 9.0))
    assert kept == (before.seconds, before.busy, before.retries)


def test_a_real_engine_counts_its_requests_its_stages_and_the_memory_of_its_ranks():
    model = "builtin:timed?encode=0.01&denoise=0.2&decode=0.01"
    args = ServerArgs(model_path=model, enable_disagg=True, num_gpus=2, device="cpu", warmup=False, log_level="warning")
    with Engine(args) as engine:
        engine.generate("a cat", num_images=3)
        samples = read(render(families(engine.status(), model="timed")))
    assert samples['ditrelay_requests_total{outcome="done"}'] >= 2  # the status is a tick old at most
    assert samples['ditrelay_stage_seconds_sum{stage="denoise"}'] >= 0.4
    assert samples['ditrelay_busy_seconds_total{rank="0",stage="denoise"}'] >= 0.4
    assert samples['ditrelay_stage_seconds_count{stage="to_dit"}'] >= 2
    assert samples['ditrelay_edge_up{source="1",target="0"}'] == 1
    assert samples['ditrelay_rank_memory_bytes{rank="1",kind="resident"}'] > 1 << 20
    assert "ditrelay_held_payloads" in {name.partition("{")[0] for name in samples}


# ---------------------------------------------------------------- the dashboard


def queries() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    variables = [each["definition"] for each in board["templating"]["list"] if "definition" in each]
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]] + variables


def asked_for(query: str) -> set[str]:
    return set(re.findall(r"ditrelay_\w+", query))


def test_every_query_of_the_dashboard_asks_for_samples_that_there_are(page: httpx.Response):
    there = {name.partition("{")[0] for name in read(page.text)}
    assert len(queries()) > 20
    assert {query: asked_for(query) - there for query in queries() if asked_for(query) - there} == {}
    assert all(asked_for(query) for query in queries())


def test_every_metric_is_on_the_dashboard():
    drawn = {re.sub("_(bucket|sum|count)$", "", name) for query in queries() for name in asked_for(query)}
    assert {family.name for family in families(MeteredEngine().status(), model="m")} == drawn


def test_the_labels_that_queries_select_by_have_the_values_that_they_select(page: httpx.Response):
    there = set(re.findall(r'(\w+="[^"]*")', page.text))
    for query in queries():
        assert set(re.findall(r'[{,](\w+="[^"]*")', query)) <= there, query


def test_every_metric_is_in_the_users_guide():
    guide = (DASHBOARD.parents[1] / "docs" / "usage.md").read_text()
    assert [each.name for each in families(MeteredEngine().status(), model="m") if f"`{each.name}`" not in guide] == []


def test_panels_have_numbers_of_their_own_and_do_not_overlap():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
