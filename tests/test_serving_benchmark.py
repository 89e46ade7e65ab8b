"""benchmarks/serving*.py: what is run, figures, verdicts and reports, and one system measured for real."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_session  # noqa: E402
import serving  # noqa: E402
import serving_figures as figures  # noqa: E402
import serving_report  # noqa: E402
import serving_run  # noqa: E402
import serving_verdict  # noqa: E402
from serving_load import Done, Sample  # noqa: E402
from serving_plots import draw_plots, latency_points, stage_parts, ticks  # noqa: E402
from serving_workloads import WORKLOADS, System, not_possible, select, systems_for  # noqa: E402

# ---------------------------------------------------------------- figures


def test_percentiles_are_linear_between_the_nearest_values() -> None:
    values = [random.Random(0).random() for _ in range(101)]
    assert figures.percentile(values, 0.5) == statistics.median(values)
    assert figures.percentile(values, 0.95) == pytest.approx(statistics.quantiles(values, n=20, method="inclusive")[-1])
    assert figures.percentile([1.0], 0.99) == 1.0
    assert figures.percentile([1.0, 2.0], 0.25) == 1.25


def _sample(ended: float, arrived: float = 0.0) -> Sample:
    return Sample(arrived, Done(0, ended))


def test_the_steady_window_counts_from_the_end_of_the_lead() -> None:
    window = figures.steady_window([_sample(end) for end in (4.0, 1.0, 2.0, 3.0, 5.0)], lead=2, count=2)
    assert (window.began, window.ended, window.rate) == (2.0, 4.0, 1.0)
    with pytest.raises(ValueError, match="5 requests ended"):
        figures.steady_window([_sample(end) for end in range(5)], lead=2, count=4)


def test_a_window_over_bursts_shows_the_rate_of_the_bursts() -> None:
    ends = [burst + 0.001 * unit for burst in range(10) for unit in range(3)]
    lead, count = figures.lead_and_count(units=3, requests=10, lead=4)
    assert (lead, count) == (6, 12)
    assert figures.steady_window([_sample(end) for end in ends], lead, count).rate == pytest.approx(3.0)


def test_busy_share_counts_only_what_is_inside_the_window() -> None:
    window = figures.Window(10.0, 20.0, 5)
    assert figures.busy_share([(5, 12), (15, 16), (19, 30), (1, 2)], window, lanes=1) == pytest.approx(0.4)
    assert figures.busy_share([(0, 30), (10, 15)], window, lanes=2) == pytest.approx(0.75)


STAGES = {"encode": 0.1, "denoise": 1.0, "decode": 0.3}


@pytest.mark.parametrize(
    "system, own, expected",
    [
        (System(kind="async", ranks=4, non_dit=1), 1.0, 2.5),  # 1 / p
        (System(kind="async", ranks=4, non_dit=2), 1.0, 2.0),  # 2 / d
        (System(kind="async", ranks=4, non_dit=1, sp=3), 0.5, 2.0),  # 1 / dM
        (System(kind="lock-step", ranks=4, non_dit=1, sp=3), 0.5, 1 / 0.9),
        (System(kind="colocated", ranks=4), 1.0, 4 / 1.4),
        (System(kind="colocated", ranks=4, sp=4), 0.4, 1 / 0.8),
        (System(kind="stock-replicas", ranks=4), 1.0, 4 / 1.4),
        (System(kind="stock-cp", ranks=4), 0.4, 1 / 0.8),
    ],
)
def test_bounds_are_those_of_the_performance_page(system: System, own: float, expected: float) -> None:
    assert figures.bound(system, STAGES, own) == pytest.approx(expected)


# ---------------------------------------------------------------- what is run


def test_async_and_lock_step_are_compared_at_one_sequence_parallel_degree() -> None:
    for workload in WORKLOADS.values():
        pair = [system for system in systems_for(workload, 4) if system.pair]
        assert {system.kind for system in pair} == {"async", "lock-step"}
        assert {(system.ranks, system.non_dit, system.sp) for system in pair} == (
            {(4, 1, 3)} if workload.plan else {(2, 1, 1)}
        )
        assert all(system.units == 1 for system in pair)
        assert pair[0].kind == "lock-step"  # its capacity sets the pair's arrival rate


def test_systems_are_chosen_by_letter_or_name_and_have_names_of_their_own() -> None:
    systems = systems_for(WORKLOADS["flux-schnell"], 4)
    assert len({system.name for system in systems}) == len(systems) == 8
    assert [system.name for system in select(systems, "c,async 2+2")] == ["stock x4", "async 2+2"]
    assert {system.name for system in select(systems, "a")} == {"async 1+3 sp3", "async 1+3", "async 2+2"}
    assert [system.name for system in select(systems, "f,e")] == ["colocated x4", "colocated sp4"]
    with pytest.raises(ValueError, match="no system 'g'; there are"):
        select(systems, "a,g")


def test_every_workload_names_systems_that_it_has() -> None:
    for workload in WORKLOADS.values():
        assert select(systems_for(workload, 4), workload.systems)


def test_a_family_without_a_plan_is_reported_and_not_run() -> None:
    record = serving.skipped(WORKLOADS["emoji"], System(kind="stock-cp", ranks=4), left=100)
    assert record is not None and record["reason"].startswith("no plan")
    for system in (System(kind="stock-cp", ranks=4), System(kind="colocated", ranks=4, sp=4)):
        assert not_possible(WORKLOADS["emoji"], system).startswith("no plan")
        assert not_possible(WORKLOADS["flux-dev"], system) == ""


def test_a_system_for_which_no_time_is_left_is_reported_and_not_run() -> None:
    record = serving.skipped(WORKLOADS["emoji"], System(kind="colocated", ranks=4), left=3)
    assert record is not None and record["status"] == "not run" and "3 s of the budget" in record["reason"]


def test_the_pair_has_more_of_the_time_and_no_system_too_little_to_start() -> None:
    pair, other = System(kind="async", ranks=4, non_dit=1, sp=3, pair=True), System(kind="colocated", ranks=4)
    assert serving.share_of_time(pair, [other] * 2, 450.0) > 1.5 * serving.share_of_time(other, [pair, other], 450.0)
    assert serving.share_of_time(other, [], 450.0) == 450.0
    assert serving.share_of_time(other, [pair] * 6, 100.0) == serving.LEAST_SECONDS


def test_an_open_loop_phase_has_as_many_arrivals_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    order = serving_run.Order(workload="timed", system=COLOCATED, model="m", device="cpu", limit=48.0)
    measurement = serving_run.Measurement(order, WORKLOADS["timed"], SimpleNamespace(), lambda record: None)
    measurement.record["low"] = {"latency": {"p50": 0.5}}
    lead, arrivals = measurement._fitting(rate=1.0)
    assert 20 < len(arrivals) < 33 and arrivals[-1] < 38 and lead == 3
    lead, arrivals = measurement._fitting(rate=10.0)
    assert len(arrivals) == 33


def test_plain_ulysses_is_used_where_the_ranks_divide_every_sequence() -> None:
    from serving_stock import stock_spec

    for ranks, any_length in ((4, False), (3, True)):
        spec = stock_spec(
            System(kind="stock-cp", ranks=ranks), WORKLOADS["flux-schnell"], "m", compiled=False, meeting=""
        )
        assert (spec.world, spec.any_length) == (ranks, any_length)


def test_an_order_survives_its_file(tmp_path: Path) -> None:
    order = serving_run.Order(
        workload="emoji", system=System(kind="colocated", ranks=2), model="m", device="cpu", limit=3.0, rates=(0.5,)
    )
    order.write(tmp_path / "order.json")
    assert serving_run.Order.read(tmp_path / "order.json") == order


def test_the_budget_of_a_session_is_shared_and_what_is_left_over_goes_on() -> None:
    workloads = gpu_session.parse_workloads("emoji,timed:3")
    assert workloads == [("emoji", 1.0), ("timed", 3.0)]
    assert gpu_session.share_of(workloads, 0, 400) == 100
    assert gpu_session.share_of(workloads, 1, 390) == 390
    for wrong in ("nothing", "emoji:x", "emoji:0"):
        with pytest.raises(argparse.ArgumentTypeError):
            gpu_session.parse_workloads(wrong)


# ---------------------------------------------------------------- reports


def _record(system: System, rate: float, denoise: float = 1.0, **more: Any) -> dict[str, Any]:
    latency = {"count": 30, "mean": 1.6, "p50": 1.5, "p95": 2.0, "p99": 2.1}
    whole = system.kind.startswith("stock")
    return {
        "name": system.name,
        **asdict(system),
        "status": "done",
        "seconds": {"start": 10.0, "warm_up": 2.0},
        "low": {"latency": latency, "stages": STAGES | {"denoise": denoise}},
        "saturated": {
            "concurrency": 8,
            "counted": 30,
            "rate": rate,
            "window_seconds": 9.0,
            "latency": latency,
            "stages": STAGES,
            "transfers": {} if whole else {"exposed": 0.001, "hidden": 0.002, "handoff": 0.1},
            "dit_busy": 0.99,
            "dit_busy_complete": True,
        },
        "open": [{"label": "80% of its own", "common": False, "rate": 0.8 * rate, "latency": latency}],
        "memory": [
            {"rank": 0, "role": "dit" if system.non_dit else "colocated", "peak": 3 << 30, "allocated": 2 << 30}
        ],
        **more,
    }


def _result(*records: dict[str, Any]) -> dict[str, Any]:
    workload = WORKLOADS["flux-schnell"]
    return {
        "provenance": {
            "command": "python benchmarks/serving.py",
            "date": "2026-11-22T00:00:00",
            "machine": "a CPU, 64 cores",
            "gpus": ["NVIDIA H100 80GB HBM3, 580"] * 4,
            "packages": {"torch": "2.11", "diffusers": "0.42.1"},
            "commit": "abc1234",
        },
        "workload": asdict(workload) | {"dtype": "bfloat16"},
        "options": asdict(serving.Options()),
        "systems": list(records),
    }


LOCK_STEP = System(kind="lock-step", ranks=4, non_dit=1, sp=3, pair=True)
ASYNC_SP = replace(LOCK_STEP, kind="async")
ASYNC = System(kind="async", ranks=4, non_dit=1)
COLOCATED = System(kind="colocated", ranks=4)
STOCK = System(kind="stock-replicas", ranks=4)


def test_a_report_is_made_from_a_stored_file_alone(tmp_path: Path) -> None:
    records = [_record(LOCK_STEP, 1.0, 0.5), _record(ASYNC_SP, 1.7, 0.5), _record(ASYNC, 2.4), _record(COLOCATED, 2.8)]
    failed = {"name": "stock x4", **asdict(STOCK), "status": "failed", "reason": "no memory", "open": []}
    file = tmp_path / "result.json"
    file.write_text(json.dumps(_result(*records, failed)))
    result = json.loads(file.read_text())
    text = serving_report.report(result)
    assert "| async 1+3 | 4 | 2.4 | 0.6 | 2.5 | 96.0% |" in text
    assert "4x NVIDIA H100" in text and "random weights" in text and "abc1234" in text
    assert "stock x4: failed: no memory" in text
    plots = draw_plots(result, tmp_path)
    assert [plot.name for plot in plots] == ["serving-flux-schnell-latency.png", "serving-flux-schnell-stages.png"]
    section = serving_report.docs_section([result], [plots], tmp_path / "page.md")
    assert "![serving-flux-schnell-stages](serving-flux-schnell-stages.png)" in section
    for plot in plots:
        with Image.open(plot) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 5


def test_a_report_of_nothing_but_failures_says_so_and_has_no_pictures(tmp_path: Path) -> None:
    result = _result({"name": "stock x4", **asdict(STOCK), "status": "failed", "reason": "no GPU", "open": []})
    assert "No system was measured." in serving_report.report(result)
    assert draw_plots(result, tmp_path) == []


def test_a_busy_share_that_lacks_the_last_denoises_decides_nothing_against_a_system() -> None:
    record = _record(ASYNC_SP, 1.7, 0.5)
    record["saturated"] |= {"dit_busy": 0.96}
    assert "busy 96.0% under saturation; aim 98%: **not reached**" in "\n".join(serving_verdict.checks([record]))
    record["saturated"] |= {"dit_busy_complete": False}
    assert "busy at least 96.0% under saturation; aim 98%: not decided" in "\n".join(serving_verdict.checks([record]))


def test_a_request_over_all_ranks_is_compared_with_diffusers_own_way_to_spread_it() -> None:
    ours = _record(System(kind="colocated", ranks=2, sp=2), 1.4, 0.5)
    stock = _record(System(kind="stock-cp", ranks=2), 1.1, 0.9)
    found = "\n".join(serving_verdict.checks([stock, ours]))
    assert (
        "(colocated sp2 / stock cp2): its denoise takes 0.56 of stock diffusers' time, all of it 1.5 s, not 1.5 s"
        in found
    )
    assert "over all ranks" not in "\n".join(serving_verdict.checks([stock, _record(COLOCATED, 2.0)]))


def test_no_conclusion_is_drawn_where_ranks_share_cores() -> None:
    result = _result(_record(ASYNC, 2.0), _record(COLOCATED, 2.5))
    assert "When not to disaggregate" in serving_report.report(result)
    result["workload"]["device"] = "cpu"
    assert "When not to disaggregate" in serving_report.report(result)  # 64 cores, 4 ranks
    result["provenance"]["machine"] = "a CPU, 2 cores"
    text = serving_report.report(result)
    assert "When not to disaggregate" not in text and "conclusions are left out" in text


def test_a_share_of_the_lock_step_formula_is_judged() -> None:
    pair = [_record(LOCK_STEP, 1.0, 0.5), _record(ASYNC_SP, 1.75, 0.5)]
    reached = serving_verdict.checks(pair)[0]
    assert "1.75x, 97.2% of (p + dM)/max(p, dM) = 1.80; aim 95%: reached" in reached
    pair[1]["saturated"]["rate"] = 2.1  # lock-step waits for more than its stages, so that more can be won
    assert "2.10x, 116.7%" in serving_verdict.checks(pair)[0] and "gives 3.00" in serving_verdict.checks(pair)[0]
    pair[1]["saturated"]["rate"] = 3.4
    assert "not decided: more than the formula allows" in serving_verdict.checks(pair)[0]
    pair[1]["saturated"]["rate"] = 1.3
    checks = serving_verdict.checks(pair)
    assert "**not reached**" in checks[0] and "aim 1.4x: 1.30x, **not reached**" in checks[1]


def test_latency_at_the_common_rate_is_judged() -> None:
    point = {"label": "90% of lock-step", "common": True, "rate": 0.9}
    pair = [
        _record(LOCK_STEP, 1.0, 0.5, open=[point | {"latency": {"mean": 4.0}}]),
        _record(ASYNC_SP, 1.75, 0.5, open=[point | {"latency": {"mean": 2.0}}]),
    ]
    assert "2 s against 4 s, 50% lower; aim 30% lower: reached" in serving_verdict.checks(pair)[2]


def test_stock_diffusers_is_compared_by_its_denoise_time() -> None:
    checks = serving_verdict.checks([_record(COLOCATED, 2.0, 1.05), _record(STOCK, 2.0, 1.0)])
    assert "1.050; aim at most 1.02: **not reached**" in checks[-1]


def test_where_whole_pipelines_win_the_report_says_not_to_disaggregate() -> None:
    said = serving_verdict.when_not([_record(ASYNC, 2.0), _record(COLOCATED, 2.5)])
    assert said[0].startswith("Throughput: don't disaggregate") and "25% more" in said[0]
    said = serving_verdict.when_not([_record(ASYNC, 3.0), _record(COLOCATED, 2.5)])
    assert "disaggregation gives 20% more" in said[0]
    said = serving_verdict.when_not([_record(ASYNC, 2.51), _record(COLOCATED, 2.5)])
    assert "no difference" in said[0]


def test_placements_on_fewer_ranks_are_compared_per_rank() -> None:
    pair = System(kind="async", ranks=2, non_dit=1)
    assert "50% more" in serving_verdict.when_not([_record(pair, 1.0), _record(COLOCATED, 3.0)])[0]


def test_plots_show_the_phases_that_were_measured_and_a_request_in_parts() -> None:
    record = _record(ASYNC, 2.0, open=[{"label": "x", "common": False, "rate": 1.0, "skipped": "no time"}])
    assert latency_points(record) == [(0.0, 1.6)]
    parts = stage_parts(record)
    assert parts["other"] == pytest.approx(0.1) and sum(parts.values()) == pytest.approx(1.5)
    for highest in (0.013, 1.0, 7.3, 940):
        marks = ticks(highest)
        assert marks[0] == 0 and marks[-1] >= highest and 3 <= len(marks) <= 12


# ---------------------------------------------------------------- for real


def test_one_system_is_measured_for_real(tmp_path: Path) -> None:
    """The path of the GPU machine, with stages that sleep."""
    options = serving.Options(
        ranks=2, systems="colocated x2", requests=4, rates=(), time_limit=60.0, budget=120.0, commit="none"
    )
    file = tmp_path / "out.json"
    result = serving.run_workload(WORKLOADS["timed"], options, tmp_path, file)
    (record,) = json.loads(file.read_text())["systems"]
    assert record["status"] == "done", record
    assert 0.35 < record["low"]["stages"]["denoise"] < 0.7  # it sleeps 0.36 s; a busy machine is late
    assert 0.5 < record["saturated"]["dit_busy"] <= 1.0 and record["saturated"]["dit_busy_complete"]
    assert len(record["memory"]) == 2 and all(rank["peak"] > 1 << 20 for rank in record["memory"])
    assert "| colocated x2 |" in serving_report.report(result)


def test_a_system_that_outlasts_its_limit_is_killed_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = tmp_path / "serving_run.py"
    stuck.write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(serving, "HERE", tmp_path)
    monkeypatch.setattr(serving, "END_SECONDS", 0.5)
    order = serving_run.Order(workload="timed", system=COLOCATED, model="m", device="cpu", limit=0.5)
    record = serving.run_system(order)
    assert record["status"] == "failed" and "loading" in record["reason"] and "0 s" in record["reason"]
    assert record["wall_seconds"] < 30


def test_a_system_that_crashes_is_reported_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "serving_run.py").write_text("raise SystemExit('CUDA error: out of luck')\n")
    monkeypatch.setattr(serving, "HERE", tmp_path)
    order = serving_run.Order(workload="timed", system=COLOCATED, model="m", device="cpu", limit=20)
    record = serving.run_system(order)
    assert record["status"] == "failed" and "out of luck" in record["reason"]
