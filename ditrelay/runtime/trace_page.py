"""A timeline as one HTML file to zoom and move in; it needs nothing from the network."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import msgspec

from ditrelay.runtime.timeline import PALETTE, Bar, Group, Timeline

_PLACE = "{{timeline}}"
_MICROSECOND = 6  # digits kept of a second


def timeline_page(timeline: Timeline) -> str:
    """The page of ``assets/timeline.html`` with the timeline in it."""
    page = files("ditrelay").joinpath("assets", "timeline.html").read_text(encoding="utf-8")
    # "<" is escaped, so that no name can end the script element that the data is in.
    return page.replace(_PLACE, msgspec.json.encode(_data(timeline)).decode().replace("<", "\\u003c"))


def _data(timeline: Timeline) -> dict[str, Any]:
    return {
        "title": timeline.title,
        "summary": timeline.summary,
        "began": _short(timeline.began),
        "ended": _short(timeline.ended),
        "palette": PALETTE,
        "ids": {str(bar.request): bar.request_id for bar in timeline.bars},
        "groups": [_group(group) for group in timeline.groups],
    }


def _group(group: Group) -> dict[str, Any]:
    lanes = [
        {
            "kind": lane.kind,
            "busy": None if lane.is_transfer else lane.busy(),
            "tracks": [[_bar(bar) for bar in track] for track in lane.tracks],
        }
        for lane in group.lanes
    ]
    return {"title": group.title, "role": group.role, "lanes": lanes}


def _bar(bar: Bar) -> tuple[int, float, float, list[float]]:
    return bar.request, _short(bar.began), _short(bar.ended), [_short(at) for at in bar.steps]


def _short(seconds: float) -> float:
    return round(seconds, _MICROSECOND)
