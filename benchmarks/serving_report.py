"""From the JSON of serving.py to Markdown: tables, checks, and a plain "when not to disaggregate".

    python benchmarks/serving_report.py FILE... [--plots DIR] [--docs]

``--docs`` writes the section "serving" of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, markdown, origin, write_section
from serving_figures import bound, low_stages, reference_stages
from serving_plots import draw_plots
from serving_verdict import checks, when_not
from serving_workloads import System

GIB = 1 << 30

Record = Mapping[str, Any]


def one_line(record: Record) -> str:
    """A system while the run goes on."""
    if record["status"] in ("done", "failed") and "saturated" in record:
        rate = f"{record['saturated']['rate']:.2f} req/s"
        return f"{record['name']}: {rate}" + (f"; {record['reason']}" if record.get("reason") else "")
    return f"{record['name']}: {record['status']}; {record.get('reason', '')}"


def report(result: Record) -> str:
    """The whole report of one workload, as Markdown."""
    records, workload = result["systems"], result["workload"]
    parts = [
        f"### {workload['name']}",
        _source(result),
        _caution(result),
        throughput_table(records),
        latency_table(records),
        stage_table(records),
        memory_table(records),
        _not_measured(records),
        *_verdicts(result),
    ]
    return "\n\n".join(part for part in parts if part)


def _source(result: Record) -> str:
    source, workload = result["provenance"], result["workload"]
    size = f"{workload['width']}x{workload['height']}" + (
        f", {workload['num_frames']} frames" if workload["num_frames"] else ""
    )
    cards = source.get("gpus") or []
    where = f"{len(cards)}x {cards[0]}" if cards and workload["device"] == "cuda" else source["machine"]
    weights = "random weights" if not workload["model"].startswith("builtin:") else "built in"
    return (
        f"{origin(source, where=where, packages=('torch', 'diffusers'))}. {workload['model'].partition('?')[0]} "
        f"({weights}), {workload['steps']} steps, {size}, {workload['dtype']}"
        + (", compiled blocks." if result["options"]["compiled"] else ".")
    )


def _verdicts(result: Record) -> Iterator[str]:
    """What the figures decide; nothing where the ranks took each other's cores."""
    if _shares_cores(result):
        return
    yield _bullets("Against what was aimed at:", checks(result["systems"]))
    yield _bullets("When not to disaggregate, by these figures:", when_not(result["systems"]))


def _caution(result: Record) -> str:
    if result["workload"]["device"] != "cpu":
        return ""
    machine = result["provenance"]["machine"]
    if _sleeps(result):
        return f"Stages that sleep, on a CPU ({machine}): the figures show scheduling and transfers, not compute."
    if not _shares_cores(result):
        return f"A run on a CPU ({machine})."
    return (
        f"A run on a CPU ({machine}), with fewer cores than ranks that compute: the ranks take each other's time, the "
        "bounds (which give each rank a device of its own) don't hold, and no figure here compares the systems. It "
        "shows that the harness works; conclusions are left out."
    )


def _sleeps(result: Record) -> bool:
    is_timed: bool = result["workload"]["model"].startswith("builtin:timed")
    return is_timed


def _shares_cores(result: Record) -> bool:
    """Ranks that compute on a CPU with fewer cores."""
    if result["workload"]["device"] != "cpu" or _sleeps(result):
        return False
    words = result["provenance"]["machine"].split(", ")[-1].split()
    cores = int(words[0]) if words and words[0].isdigit() else 1
    return cores < int(result["options"]["ranks"])


def _measured(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if "saturated" in record]


def throughput_table(records: Sequence[Record]) -> str:
    reference = reference_stages(records)
    header = ["system", "ranks", "req/s", "per rank", "bound", "of bound", "mean s", "P50", "P95", "P99"]
    header += ["DiT busy", "exposed ms", "hidden ms", "hand-off ms"]
    rows = []
    for record in _measured(records):
        saturated = record["saturated"]
        rate, latency, transfers = saturated["rate"], saturated["latency"], saturated["transfers"]
        own = low_stages(record).get("denoise")
        limit = bound(system_of(record), reference[1], own) if reference and own else None
        rows.append(
            [
                record["name"],
                str(record["ranks"]),
                f"{rate:.3g}",
                f"{rate / record['ranks']:.3g}",
                f"{limit:.3g}" if limit else "-",
                f"{rate / limit:.1%}" if limit else "-",
                *(f"{latency[name]:.3g}" for name in ("mean", "p50", "p95", "p99")),
                f"{saturated['dit_busy']:.1%}",
                *(f"{transfers[name] * 1000:.1f}" if transfers else "-" for name in ("exposed", "hidden", "handoff")),
            ]
        )
    if not rows:
        return "No system was measured."
    counted = sorted({record["saturated"]["counted"] for record in _measured(records)})
    text = (
        f"**Saturated** ({_range(counted)} requests counted a system, in the steady window, so P99 is close to the "
        "slowest). `per rank` is per GPU. A request's transfers, both ways: `exposed` while an idle replica waited, "
        "`hidden` behind computing, `hand-off` with the wait for a free place at the receiver."
    )
    if reference:
        e, d, v = (reference[1][stage] * 1000 for stage in ("encode", "denoise", "decode"))
        text += (
            f" Bounds from e = {e:.1f}, v = {v:.1f} ms ({reference[0]}, low load; d = {d:.1f} ms there) and each "
            "system's own denoise time at low load."
        )
    return f"{text}\n\n{markdown(header, rows)}"


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def latency_table(records: Sequence[Record]) -> str:
    header = ["system", "arrivals", "req/s", "mean s", "P50", "P95", "P99"]
    rows = []
    for record in records:
        if "low" in record:
            rows.append([record["name"], "one at a time", "-", *_latency(record["low"]["latency"])])
        for point in record["open"]:
            label, rate = point["label"], f"{point['rate']:.3g}"
            if "latency" in point:
                rows.append([record["name"], label, rate, *_latency(point["latency"])])
            elif "skipped" not in point and "unfinished" in point:
                rows.append([record["name"], label, rate, f"did not keep up ({point['unfinished']} left)", "", "", ""])
            else:
                rows.append([record["name"], label, rate, "not run", "", "", ""])
    if not rows:
        return ""
    return (
        f"**Latency** at low load and with Poisson arrivals (one seeded pattern for all).\n\n{markdown(header, rows)}"
    )


def _latency(latency: Mapping[str, float]) -> list[str]:
    return [f"{latency[name]:.3g}" for name in ("mean", "p50", "p95", "p99")]


def stage_table(records: Sequence[Record]) -> str:
    header = ["system", "encode ms", "denoise ms", "decode ms", "(e+v)/d", "start s", "warm-up s"]
    rows = []
    for record in records:
        stages = low_stages(record)
        if not stages:
            continue
        p = stages["encode"] + stages["decode"]
        seconds = record.get("seconds", {})
        rows.append(
            [
                record["name"],
                *(f"{stages[stage] * 1000:.1f}" for stage in ("encode", "denoise", "decode")),
                f"{p / stages['denoise']:.2f}",
                *(f"{seconds[name]:.1f}" if name in seconds else "-" for name in ("start", "warm_up")),
            ]
        )
    return f"**Stages** at low load (medians).\n\n{markdown(header, rows)}" if rows else ""


def memory_table(records: Sequence[Record]) -> str:
    header = ["system", "ranks", "role", "peak GiB", "at the end GiB"]
    rows = []
    for record in records:
        by_role: dict[str, list[Record]] = {}
        for rank in record.get("memory", []):
            by_role.setdefault(rank["role"], []).append(rank)
        for role, ranks in by_role.items():
            peak = max(rank["peak"] for rank in ranks) / GIB
            held = max(rank["allocated"] for rank in ranks) / GIB
            rows.append([record["name"], str(len(ranks)), role, f"{peak:.2f}", f"{held:.2f}"])
    if not rows:
        return ""
    text = (
        "**Memory** of the rank that needs most: torch's peak since its start (loading included); on a CPU, resident."
    )
    return f"{text}\n\n{markdown(header, rows)}"


def _not_measured(records: Sequence[Record]) -> str:
    lines = [f"{r['name']}: {r['status']}: {r['reason']}" for r in records if r.get("reason")]
    for record in records:
        lines += [f"{record['name']}, {p['label']}: not run: {p['skipped']}" for p in record["open"] if "skipped" in p]
    return _bullets("Not measured, or not to the end:", lines)


def _bullets(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"**{title}**", "", *(f"- {line}" for line in lines)]) if lines else ""


def system_of(record: Record) -> System:
    return System(**{name: record[name] for name in ("kind", "ranks", "non_dit", "sp", "pair")})


def docs_section(results: Sequence[Record], plots: Sequence[Sequence[Path]], page: Path) -> str:
    """The reports one after the other, each with its pictures, as they stand in ``page``."""
    parts = []
    for result, files in zip(results, plots, strict=True):
        pictures = [f"![{file.stem}]({os.path.relpath(file, page.parent)})" for file in files]
        parts.append("\n\n".join([report(result), *pictures]))
    return "\n\n".join(parts)


def _named(result: Record, file: Path) -> Record:
    """Named after its file: there may be several runs of one workload."""
    return {**result, "workload": {**result["workload"], "name": file.stem.removeprefix("serving-")}}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("files", type=Path, nargs="+", metavar="FILE")
    arguments.add_argument("--plots", type=Path, metavar="DIR", help="draw the plots into this folder")
    arguments.add_argument("--docs", action="store_true", help="write docs/performance.md's section")
    given = arguments.parse_args()
    results = [_named(json.loads(file.read_text()), file) for file in given.files]
    plots = [draw_plots(result, given.plots) if given.plots else [] for result in results]
    for result in results:
        print(report(result), end="\n\n")
    if given.docs:
        page = ROOT / "docs" / "performance.md"
        plots = [[file.resolve() for file in files] for files in plots]
        write_section(page, "serving", docs_section(results, plots, page))


if __name__ == "__main__":
    main()
