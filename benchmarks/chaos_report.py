"""The figures of a chaos run: as one dictionary, on the terminal, and as the section of docs/reliability.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from chaos_load import Account
from chaos_watch import Recovery
from common import markdown, origin, show

Result = Mapping[str, Any]
MIB = 1 << 20


def account_figures(account: Account) -> dict[str, Any]:
    return {
        "sent": account.sent,
        "accepted": account.accepted,
        "completed": account.completed,
        "failed": dict(account.failed),
        "refused": dict(account.refused),
        "left": account.left,
        "lost": account.lost,
        "hung": account.hung,
        "wrong": account.wrong,
        "answered_badly": account.answered_badly,
        "seconds": spread(account.latencies),
    }


def recovery_figures(recoveries: Sequence[Recovery]) -> dict[str, Any]:
    """Per kind of fault: how many, and the seconds until noticed, serving and full. And those of the faults alone."""
    figures = {}
    for kind in sorted({recovery.kind for recovery in recoveries}):
        own = [each for each in recoveries if each.kind == kind]
        figures[kind] = _kind_figures(own)
        figures[f"{kind}{ALONE}"] = _kind_figures([each for each in own if _is_alone(each, recoveries)])
    return figures


def _is_alone(recovery: Recovery, recoveries: Sequence[Recovery]) -> bool:
    """Whether no other rank was away at any time while this one was."""
    others = [other for other in recoveries if other is not recovery]
    return all(_end(other) < recovery.began or _end(recovery) < other.began for other in others)


def _end(recovery: Recovery) -> float:
    return math.inf if recovery.full is None else recovery.began + recovery.full


def _kind_figures(recoveries: Sequence[Recovery]) -> dict[str, Any]:
    parts = {name: [getattr(each, name) for each in recoveries] for name in ("noticed", "serving", "full")}
    known = {name: [value for value in values if value is not None] for name, values in parts.items()}
    return {
        "count": len(recoveries),
        "not_healed": sum(value is None for value in parts["full"]),
        **{name: spread(values) for name, values in known.items()},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and largest; empty where there is nothing."""
    return {"median": statistics.median(values), "max": max(values)} if values else {}


def verdict(result: Result) -> list[str]:
    """What must not have happened; empty where all is well."""
    load = result["load"]
    wrong = [f"{load[name]} {name}" for name in ("lost", "hung") if load[name]]
    wrong += [f"wrong picture: {what}" for what in load["wrong"]]
    wrong += [f"answered badly: {what}" for what in load["answered_badly"]]
    wrong += [f"left behind when idle: {count} {what}" for what, count in result["held"].items() if count]
    wrong += [f"at its end: {what}" for what in result["end"]]
    if not result["whole"]:
        wrong.append("not back at full strength")
    return wrong


# ---------------------------------------------------------------- tables

Rows = list[list[str]]

ALONE = ", no other rank away"


def load_rows(result: Result) -> Rows:
    load = result["load"]
    rows = [
        ["accepted", str(load["accepted"])],
        ["completed, byte for byte the oracle's picture", str(load["completed"] - len(load["wrong"]))],
        ["**wrong pictures**", str(len(load["wrong"]))],
        ["**lost** (no answer)", str(load["lost"])],
        [f"**hung** (no answer within {result['hang_seconds']:g} s)", str(load["hung"])],
        *([f"failed: {reason}", str(count)] for reason, count in sorted(load["failed"].items())),
        ["clients that left on purpose", str(load["left"])],
        *([f"turned away: {code}", str(count)] for code, count in sorted(load["refused"].items())),
        ["rubbish not answered by its 4xx", str(len(load["answered_badly"]))],
        ["stopped for a moment and yet replaced", str(result["replaced_needlessly"])],
    ]
    return rows


def fault_rows(result: Result) -> Rows:
    rows = []
    for kind, count in sorted(result["faults"].items()):
        healed = result["recovery"].get(kind, {})
        cells = [_seconds(healed.get(name, {})) for name in ("noticed", "serving", "full")]
        rows.append([kind, str(count), *cells])
        alone = result["recovery"].get(f"{kind}{ALONE}")
        if alone and 0 < alone["count"] < count:
            cells = [_seconds(alone[name]) for name in ("noticed", "serving", "full")]
            rows.append([f"{kind}{ALONE}", str(alone["count"]), *cells])
    return rows


def memory_rows(result: Result) -> Rows:
    first, last = result["memory"]["start"], result["memory"]["end"]
    rows = []
    for name in sorted(first.keys() | last.keys()):
        early, late = first.get(name), last.get(name)
        growth = f"{late / early - 1:+.1%}" if early and late else "-"
        rows.append([name, *(f"{value / MIB:.0f}" if value else "-" for value in (early, late)), growth])
    return rows


def _seconds(figures: Mapping[str, float]) -> str:
    return f"{figures['median']:.2f} / {figures['max']:.2f}" if figures else "-"


LOAD_HEADER = ("requests", "count")
FAULT_HEADER = ("fault", "times", "noticed s", "serving s", "full strength s")
MEMORY_HEADER = ("process", "start MiB", "end MiB", "growth")


def show_result(result: Result) -> None:
    show("Requests", LOAD_HEADER, [[cell.replace("*", "") for cell in row] for row in load_rows(result)])
    show("Faults (median / largest)", FAULT_HEADER, fault_rows(result))
    show("Resident memory", MEMORY_HEADER, memory_rows(result))


def section(result: Result, source: Mapping[str, Any]) -> str:
    """The part of docs/reliability.md that a run writes."""
    total = sum(result["faults"].values())
    intro = (
        f"{origin(source, packages=('torch',))}: {result['seconds'] / 60:.1f} minutes, {total} faults, "
        f"{result['clients']} clients at a time, `{' '.join(result['flags'])}`. A picture took "
        f"{_seconds(result['load']['seconds'])} s (median / largest, with waiting)."
    )
    wrong = verdict(result)
    said = "Nothing that must not happen happened." if not wrong else "**Not passed:** " + "; ".join(wrong) + "."
    return "\n\n".join(
        [
            intro,
            said,
            markdown(LOAD_HEADER, load_rows(result)),
            "Times are median / largest. *Noticed*: the head says that the rank is not up. *Serving*: the first "
            "picture after that (none can come while the only non-DiT rank is away). *Full strength*: the rank and its "
            f"edges are up again. All processes share {source['machine'].rpartition(', ')[2]}.",
            markdown(FAULT_HEADER, fault_rows(result)),
            "Resident memory; ranks were replaced in between, so theirs is that of different processes.",
            markdown(MEMORY_HEADER, memory_rows(result)),
        ]
    )
