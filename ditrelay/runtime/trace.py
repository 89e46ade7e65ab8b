"""Writes a run as Chrome's trace format (for https://ui.perfetto.dev), as a picture and as a page.

The format: "Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import msgspec

from ditrelay.errors import ConfigError
from ditrelay.runtime.metrics import COMPUTE_KINDS, Span
from ditrelay.runtime.timeline import Bar, Lane, Timeline, build_timeline
from ditrelay.runtime.topology import Topology
from ditrelay.runtime.trace_page import timeline_page
from ditrelay.runtime.trace_picture import draw_timeline

NEWEST_IN_PICTURE = 64  # requests; past that a picture that cannot be zoomed shows nothing

Event = dict[str, Any]


@dataclass(frozen=True)
class TraceFiles:
    """The three files of one trace, beside each other."""

    perfetto: Path
    page: Path
    picture: Path

    @classmethod
    def at(cls, path: str | Path) -> TraceFiles:
        """Those of the trace ``path``.

        Raises:
            ConfigError: ``path`` does not end in ``.json``.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise ConfigError("--trace", f"{str(path)!r} is not allowed; allowed: a file name that ends in .json")
        return cls(path, path.with_suffix(".html"), path.with_suffix(".png"))

    def check(self) -> TraceFiles:
        """Make the folder, so that a run's trace is not lost for want of it. Returns itself.

        Raises:
            ConfigError: the folder cannot be made or written to.
        """
        folder = self.perfetto.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("--trace", f"cannot make the folder {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError("--trace", f"cannot write into the folder {folder}; choose another")
        return self

    def __str__(self) -> str:
        return f"{self.perfetto}, {self.page.name}, {self.picture.name}"


def write_trace(
    path: str | Path, spans: Iterable[Span], topology: Topology, *, model: str, since: float = 0.0
) -> TraceFiles:
    """Write the trace ``path`` (``.json``), and a page (``.html``) and a picture (``.png``) of the same name.

    Args:
        spans: what was done (``Engine.spans``). The picture shows the newest 64 requests, the others all.
        topology: the ranks.
        model: the model's name.
        since: leave out what began before this moment (monotonic seconds).

    Raises:
        ConfigError: ``path`` does not end in ``.json``, or its folder cannot be written to.
        OSError: a file cannot be written.
    """
    made = TraceFiles.at(path).check()
    spans = list(spans)
    timeline = build_timeline(spans, topology, model=model, since=since)
    made.perfetto.write_bytes(msgspec.json.encode(chrome_trace(timeline)))
    made.page.write_text(timeline_page(timeline), encoding="utf-8")
    newest = build_timeline(spans, topology, model=model, since=since, newest=NEWEST_IN_PICTURE)
    draw_timeline(newest).save(made.picture, optimize=True)
    return made


def display_name(model_path: str) -> str:
    """``org/FLUX.1-dev`` and ``/models/FLUX.1-dev`` -> ``FLUX.1-dev``; options of a built-in model are left out."""
    return PurePath(model_path.partition("?")[0]).name


# ---------------------------------------------------------------- Chrome's trace format


def chrome_trace(timeline: Timeline) -> Event:
    """The JSON object: a process per rank, a thread per lane, a slice per bar, arrows along each request."""
    facts = {"model": timeline.model, "ranks": timeline.ranks, "overlap": round(timeline.overlap, 4)}
    return {"displayTimeUnit": "ms", "otherData": facts, "traceEvents": list(_events(timeline))}


def _events(timeline: Timeline) -> Iterator[Event]:
    titles = {lane.rank: f"{group.title} ({group.role})" for group in timeline.groups for lane in group.lanes}
    yield from (_named("process", title, rank) for rank, title in titles.items())
    compute: dict[int, list[tuple[Bar, Event]]] = defaultdict(list)
    thread = 0
    for lane in timeline.lanes:
        for track in lane.tracks or [[]]:
            thread += 1
            where = {"pid": lane.rank, "tid": thread}
            yield from (_named("thread", lane.kind, **where), _sorted_by(thread, **where))
            for bar in track:
                yield from _slices(lane, bar, where)
                if lane.kind in COMPUTE_KINDS:
                    compute[bar.request].append((bar, where))
    for bars in compute.values():
        yield from _arrows(sorted(bars, key=lambda pair: pair[0].began))


def _named(what: str, name: str, pid: int, tid: int = 0) -> Event:
    return {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _sorted_by(index: int, pid: int, tid: int) -> Event:
    return {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": index}}


def _slices(lane: Lane, bar: Bar, where: Event) -> Iterator[Event]:
    """The bar, and inside it a slice per denoising step."""
    args = {"request": bar.request, "request_id": bar.request_id}
    yield _slice(f"{lane.kind} {bar.request}", lane.kind, bar.began, bar.ended, where) | {"args": args}
    for number, (began, ended) in enumerate(zip((bar.began, *bar.steps), bar.steps, strict=False), start=1):
        yield _slice(f"step {number} of {len(bar.steps)}", "step", began, ended, where)


def _slice(name: str, category: str, began: float, ended: float, where: Event) -> Event:
    start, end = _nano(began), _nano(ended)
    return {"ph": "X", "name": name, "cat": category, "ts": start / 1000, "dur": (end - start) / 1000, **where}


def _arrows(bars: list[tuple[Bar, Event]]) -> Iterator[Event]:
    """From the end of each stage of a request to the start of its next."""
    for number, ((bar, start), (later, end)) in enumerate(zip(bars, bars[1:], strict=False)):
        common = {"name": f"request {bar.request}", "cat": "request", "id": f"{bar.request}.{number}"}
        # An arrow belongs to the slice around its moment, which the end of a slice is no longer in.
        inside = max(bar.began, bar.ended - 1e-6)
        yield {"ph": "s", "ts": _nano(inside) / 1000, **common, **start}
        yield {"ph": "f", "bp": "e", "ts": _nano(later.began) / 1000, **common, **end}


def _nano(seconds: float) -> int:
    """Whole nanoseconds, so that slices that touch do not overlap by a rounding. The format's unit is microseconds."""
    return round(seconds * 1e9)
