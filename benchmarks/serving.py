"""Serve one workload with every system, in one run: requests a second, latency under load, busy DiT ranks, memory.

Systems: (a) asynchronous disaggregation, (b) lock-step at the same sequence parallel degree, (c) replicas of the
stock diffusers pipeline behind one queue, (d) one stock pipeline over all ranks with diffusers' context parallelism,
(e) our engine with every rank colocated, (f) as one replica over all ranks. Each runs in a process group of its own,
which is ended when its time is over: one that fails or hangs is reported as failed, with the reason, and the others
still run.

    python benchmarks/serving.py --workload emoji --json benchmarks/results/serving-emoji.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import serving_report
from common import parser, provenance
from serving_models import last_line, model_path
from serving_plots import draw_plots
from serving_run import COMMON_SHARE, Order
from serving_workloads import WORKLOADS, Device, System, Workload, not_possible, select, systems_for

HERE = Path(__file__).resolve().parent
END_SECONDS = 5.0  # past its limit before a system's processes are killed
SHARE_SLACK = 1.1  # a system may take so much more than its share of what is left
PAIR_WEIGHT = 2.0  # of the pair's two systems, each beside the others' 1
LEAST_SECONDS = 45.0  # a system has: ranks with a large model take so long to start and to warm up


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run a workload. ``time_limit``: seconds a system at most; ``budget``: seconds for all of them."""

    ranks: int = 4
    systems: str = ""
    time_limit: float = 240.0
    budget: float = 540.0
    requests: int | None = None
    rates: tuple[float, ...] | None = None
    device: Device | None = None
    compiled: bool = False
    seed: int = 0
    commit: str | None = None


def run_workload(workload: Workload, options: Options, models: Path, json_file: Path | None) -> dict[str, Any]:
    """Every chosen system in turn. The result is written after each, so that an end from outside loses one at most."""
    began = time.monotonic()
    workload = replace(workload, device=options.device or workload.device)
    systems = select(systems_for(workload, options.ranks), options.systems or workload.systems)
    result: dict[str, Any] = {
        "provenance": provenance() | ({"commit": options.commit} if options.commit else {}),
        "workload": asdict(workload) | {"dtype": workload.dtype},
        "options": asdict(options),
        "systems": [],
    }
    model = model_path(workload, models)
    for number, system in enumerate(systems):
        left = options.budget - (time.monotonic() - began)
        record = skipped(workload, system, left)
        if not record:
            others = [other for other in systems[number + 1 :] if not not_possible(workload, other)]
            limit = min(options.time_limit, share_of_time(system, others, left))
            record = run_system(_order(workload, system, options, model, limit, result["systems"]))
        result["systems"].append(record)
        print(f"[{time.monotonic() - began:5.0f} s] {serving_report.one_line(record)}", flush=True)
        result["seconds"] = time.monotonic() - began
        if json_file:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(result, indent=1) + "\n")
    return result


def share_of_time(system: System, others: Sequence[System], left: float) -> float:
    """Seconds at most for ``system`` where ``others`` come after it. The pair has more to measure."""
    weight, *weights = (PAIR_WEIGHT if each.pair else 1.0 for each in (system, *others))
    return min(left, max(LEAST_SECONDS, SHARE_SLACK * left * weight / (weight + sum(weights))))


def skipped(workload: Workload, system: System, left: float) -> dict[str, Any] | None:
    """The record of a system that is not run, with the reason; None for one that is."""
    record: dict[str, Any] = {"name": system.name, **asdict(system), "open": []}
    if reason := not_possible(workload, system):
        return record | {"status": "not possible", "reason": reason}
    if left < LEAST_SECONDS:
        return record | {"status": "not run", "reason": f"{max(0.0, left):.0f} s of the budget were left"}
    return None


def _order(
    workload: Workload, system: System, options: Options, model: str, limit: float, done: Sequence[dict[str, Any]]
) -> Order:
    lock_step = [each["saturated"]["rate"] for each in done if each["kind"] == "lock-step" and "saturated" in each]
    return Order(
        workload=workload.name,
        system=system,
        model=model,
        device=workload.device,
        limit=limit,
        common_rate=COMMON_SHARE * lock_step[0] if lock_step else None,
        requests=options.requests,
        rates=options.rates,
        compiled=options.compiled,
        seed=options.seed,
    )


def run_system(order: Order) -> dict[str, Any]:
    """The record of one system, whatever happens to its processes."""
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        order_file, record_file, log_file = (Path(folder) / name for name in ("order.json", "record.json", "log.txt"))
        order.write(order_file)
        command = [sys.executable, str(HERE / "serving_run.py"), str(order_file), str(record_file)]
        began = time.monotonic()
        with log_file.open("w") as log, process_group(command, log) as process:
            try:
                process.wait(order.limit + END_SECONDS)
                over_time = False
            except subprocess.TimeoutExpired:
                over_time = True
        system = order.system
        record: dict[str, Any] = {"name": system.name, **asdict(system), "status": "running", "open": []}
        if record_file.exists():
            record = json.loads(record_file.read_text())
        record["wall_seconds"] = time.monotonic() - began
        if record["status"] == "running":
            said = last_line(log_file.read_text(errors="replace"))
            reason = f"not done after {order.limit:.0f} s" if over_time else f"exit code {process.returncode}"
            record |= {"status": "failed", "reason": f"{reason}; its last words: {said}"}
        return record


@contextlib.contextmanager
def process_group(command: list[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own; at the end nothing of the group is left."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(END_SECONDS)


def add_options(arguments: argparse.ArgumentParser) -> None:
    """What serving.py and gpu_session.py have in common."""
    default = Options()
    arguments.add_argument("--ranks", type=int, default=default.ranks, help="GPUs, or processes on a CPU (default 4)")
    arguments.add_argument("--systems", default="", help="letters or names, comma-separated (default: the workload's)")
    arguments.add_argument("--time-limit", type=float, default=default.time_limit, help="seconds a system (240)")
    arguments.add_argument("--requests", type=int, help="counted requests a phase (default: the workload's)")
    arguments.add_argument("--rates", type=_rates, help="open-loop rates as shares of capacity, such as 0.8,0.5")
    arguments.add_argument("--device", choices=("cpu", "cuda"), help="in place of the workload's")
    arguments.add_argument("--compile", action="store_true", help="compile the transformer's blocks, in every system")
    arguments.add_argument("--seed", type=int, default=default.seed, help="of the Poisson arrivals")
    arguments.add_argument("--commit", help="for the provenance, where there is no git repository")
    arguments.add_argument("--models", type=Path, metavar="DIR", help="where model folders are made and kept")


def options_of(given: argparse.Namespace, budget: float) -> Options:
    return Options(
        ranks=given.ranks,
        systems=given.systems,
        time_limit=given.time_limit,
        budget=budget,
        requests=given.requests,
        rates=given.rates,
        device=given.device,
        compiled=given.compile,
        seed=given.seed,
        commit=given.commit,
    )


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(part) for part in text.split(",") if part)
    if not all(0 < rate < 2 for rate in rates):
        raise argparse.ArgumentTypeError("shares of the capacity, each above 0 and below 2")
    return rates


@contextlib.contextmanager
def models_folder(given: Path | None) -> Iterator[Path]:
    """The folder asked for, or one that is gone afterwards."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="serving-models-") as folder:
        yield Path(folder)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--workload", choices=sorted(WORKLOADS), default="emoji")
    arguments.add_argument("--budget", type=float, default=540.0, help="seconds for all systems together (540)")
    arguments.add_argument("--plots", type=Path, metavar="DIR", help="draw the plots into this folder")
    add_options(arguments)
    given = arguments.parse_args()
    with models_folder(given.models) as models:
        options = options_of(given, given.budget)
        try:
            result = run_workload(WORKLOADS[given.workload], options, models, given.json)
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None
    print(serving_report.report(result))
    if given.plots:
        for file in draw_plots(result, given.plots):
            print(f"plot: {file}")
    return 0 if any(record["status"] == "done" for record in result["systems"]) else 1


if __name__ == "__main__":
    sys.exit(main())
