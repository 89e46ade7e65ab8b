"""What the figures say: each aim, reached or not, and where disaggregation loses. Sentences from numbers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serving_figures import low_stages

Record = Mapping[str, Any]
SAME = 0.02  # differences below this are called none
TOO_GOOD = 1.1  # past this share of a bound, the stage times of the two runs were not the same
BOTTLENECK = 0.95  # the DiT is one where the other ranks have at most so much of its work
DISAGGREGATED = ("async", "lock-step")
WHOLE = ("colocated", "stock-replicas", "stock-cp")
GIB = 1 << 30


def checks(records: Sequence[Record]) -> list[str]:
    """The aims of the project that this run can decide, each with its figure."""
    found = (_pair_checks, _busy_checks, _exposed_checks, _stock_checks, _spread_checks)
    return [sentence for check in found for sentence in check(records)]


def _find(records: Sequence[Record], kind: str, *, pair: bool | None = None) -> Record | None:
    found = [r for r in records if r["kind"] == kind and "saturated" in r and (pair is None or r["pair"] == pair)]
    return found[0] if found else None


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**not reached**"


def _pair_checks(records: Sequence[Record]) -> Iterator[str]:
    ours, base = _find(records, "async", pair=True), _find(records, "lock-step", pair=True)
    if ours is None or base is None:
        return
    stages = low_stages(base)
    p, d = stages["encode"] + stages["decode"], stages["denoise"]
    rest = max(0.0, base["low"]["latency"]["p50"] - p - d)  # the file and the way to the client: lock-step waits for it
    promised, measured = (p + d) / max(p, d), ours["saturated"]["rate"] / base["saturated"]["rate"]
    share, whole = measured / promised, (p + d + rest) / max(p, d)
    decided = _verdict(share >= 0.95) if measured <= TOO_GOOD * whole else "not decided: more than the formula allows"
    yield (
        f"Async over lock-step at the same sequence parallel degree ({ours['name']} / {base['name']}, p/dM = "
        f"{p / d:.2f}): {measured:.2f}x, {share:.1%} of (p + dM)/max(p, dM) = {promised:.2f}; aim 95%: "
        f"{decided}. Lock-step also waits {rest:.2f} s a request for what is no stage (making the file, the way to the "
        f"client); with it the formula gives {whole:.2f}."
    )
    if 0.5 <= p / d <= 2:
        yield f"With p/dM between 0.5 and 2, aim 1.4x: {measured:.2f}x, {_verdict(measured >= 1.4)}."
    means = [_common_mean(record) for record in (ours, base)]
    if means[0] and means[1]:
        lower = 1 - means[0] / means[1]
        aim = f"; aim 30% lower: {_verdict(lower >= 0.3)}" if 0.5 <= p / d <= 2 else ""
        yield (
            f"Mean latency with Poisson arrivals at 90% of lock-step's capacity: {means[0]:.3g} s against "
            f"{means[1]:.3g} s, {abs(lower):.0%} {'lower' if lower >= 0 else 'higher'}{aim}."
        )


def _common_mean(record: Record) -> float | None:
    means = [point["latency"]["mean"] for point in record["open"] if point["common"] and "latency" in point]
    return means[0] if means else None


def _busy_checks(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record["kind"] != "async" or "saturated" not in record:
            continue
        stages = low_stages(record)
        units = (record["ranks"] - record["non_dit"]) // record["sp"]
        if (stages["encode"] + stages["decode"]) / record["non_dit"] > BOTTLENECK * stages["denoise"] / units:
            yield f"{record['name']}: the DiT is not clearly the bottleneck; its ranks are busy {_busy(record)}."
        else:
            reached = record["saturated"]["dit_busy"] >= 0.98
            decided = _verdict(reached) if reached or _is_complete(record) else "not decided"
            yield f"{record['name']}: DiT ranks busy {_busy(record)} under saturation; aim 98%: {decided}."


def _busy(record: Record) -> str:
    return f"{'' if _is_complete(record) else 'at least '}{record['saturated']['dit_busy']:.1%}"


def _is_complete(record: Record) -> bool:
    """Whether the denoises that ran at the window's end are counted, too."""
    return record["saturated"].get("dit_busy_complete", False) is True


def _exposed_checks(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        if record["kind"] == "async" and record.get("saturated", {}).get("transfers"):
            exposed = record["saturated"]["transfers"]["exposed"]
            share = exposed / record["saturated"]["stages"]["denoise"]
            yield (
                f"{record['name']}: exposed transfer {exposed * 1000:.2f} ms a request, {share:.2%} of its DiT time; "
                f"aim below 0.5%: {_verdict(share < 0.005)}."
            )


def _stock_checks(records: Sequence[Record]) -> Iterator[str]:
    stock = _find(records, "stock-replicas")
    one_rank = [record for record in records if record["sp"] == 1]
    ours = _find(one_rank, "colocated") or _find(one_rank, "async")
    if stock is None or ours is None:
        return
    ratio = low_stages(ours)["denoise"] / low_stages(stock)["denoise"]
    yield (
        f"Denoise time against stock diffusers at low load ({ours['name']} / {stock['name']}): {ratio:.3f}; aim at "
        f"most 1.02: {_verdict(ratio <= 1.02)}."
    )


def _spread_checks(records: Sequence[Record]) -> Iterator[str]:
    """One request at a time over all ranks: ditrelay's replica against diffusers' context parallelism."""
    ours = next((r for r in records if r["kind"] == "colocated" and r["sp"] > 1 and "low" in r), None)
    stock = next((r for r in records if r["kind"] == "stock-cp" and "low" in r), None)
    if ours is None or stock is None:
        return
    denoises = [low_stages(record)["denoise"] for record in (ours, stock)]
    whole = [record["low"]["latency"]["p50"] for record in (ours, stock)]
    yield (
        f"One request over all ranks ({ours['name']} / {stock['name']}): its denoise takes "
        f"{denoises[0] / denoises[1]:.2f} of stock diffusers' time, all of it {whole[0]:.3g} s, not {whole[1]:.3g} s."
    )


def when_not(records: Sequence[Record]) -> list[str]:
    """Disaggregated placements against whole pipelines on every rank: throughput, latency, memory."""
    ours, whole = _best(records, DISAGGREGATED), _best(records, WHOLE)
    if ours is None or whole is None:
        return []
    return [_by_throughput(ours, whole), *_by_low_load(records), *_by_memory(ours, whole)]


def _best(records: Sequence[Record], kinds: Sequence[str]) -> Record | None:
    found = [record for record in records if record["kind"] in kinds and "saturated" in record]
    return max(found, key=_rate_per_rank, default=None)


def _rate_per_rank(record: Record) -> float:
    rate: float = record["saturated"]["rate"] / record["ranks"]
    return rate


def _by_throughput(ours: Record, whole: Record) -> str:
    a, b = _rate_per_rank(ours), _rate_per_rank(whole)
    figures = f"{ours['name']} {a:.3g} requests/s per rank, {whole['name']} {b:.3g}"
    if abs(a / b - 1) < SAME:
        return f"Throughput: no difference worth the name ({figures}); disaggregate for other reasons or not at all."
    if a < b:
        return f"Throughput: don't disaggregate. Whole pipelines on every rank give {b / a - 1:.0%} more ({figures})."
    return f"Throughput: disaggregation gives {a / b - 1:.0%} more ({figures})."


def _by_low_load(records: Sequence[Record]) -> Iterator[str]:
    times = {record["name"]: record["low"]["latency"]["p50"] for record in records if "low" in record}
    kinds = {record["name"]: record["kind"] for record in records}
    ours = min((name for name in times if kinds[name] in DISAGGREGATED), key=times.__getitem__, default=None)
    whole = min((name for name in times if kinds[name] in WHOLE), key=times.__getitem__, default=None)
    if ours is None or whole is None:
        return
    change = times[ours] / times[whole] - 1
    what = "no difference" if abs(change) < SAME else f"{abs(change):.0%} {'slower' if change > 0 else 'faster'}"
    yield (
        f"Latency of a single request: the fastest disaggregated placement ({ours}, {times[ours]:.3g} s) against the "
        f"fastest whole pipeline ({whole}, {times[whole]:.3g} s): {what}."
    )


def _by_memory(ours: Record, whole: Record) -> Iterator[str]:
    dit = [rank["peak"] for rank in ours.get("memory", []) if rank["role"] == "dit"]
    full = [rank["peak"] for rank in whole.get("memory", [])]
    if dit and full:
        yield (
            f"Memory: a DiT rank of {ours['name']} peaked at {max(dit) / GIB:.2f} GiB, a rank of {whole['name']} at "
            f"{max(full) / GIB:.2f} GiB. Where a whole pipeline does not fit, the rates above are beside the point."
        )
