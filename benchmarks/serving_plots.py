"""Two pictures of a result, drawn with Pillow: latency against load, and where a request's time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1200, 675
SCALE = 2  # drawn larger and made smaller: smooth edges
LEFT, RIGHT, TOP, BOTTOM = 90, 250, 100, 80
INK, FAINT, GRID = "#1f2933", "#6b7785", "#e4e8ec"
COLOURS = ("#2f6fdb", "#d9542b", "#17936f", "#8a4fc7", "#c99700", "#5a6672", "#c73f7f")
STAGES = (
    ("encode", "#8fb8f0"),
    ("exposed", "#d9542b"),
    ("denoise", "#2f6fdb"),
    ("decode", "#17936f"),
    ("other", "#c7cdd4"),
)

Record = Mapping[str, Any]
Point = tuple[float, float]


def draw_plots(result: Record, folder: Path) -> list[Path]:
    """Writes ``NAME-latency.png`` and ``NAME-stages.png``; a picture that would be empty is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    name, files = result["workload"]["name"], []
    for suffix, draw in (("latency", latency_plot), ("stages", stage_plot)):
        picture = draw(result)
        if picture is not None:
            files.append(folder / f"serving-{name}-{suffix}.png")
            picture.save(files[-1], optimize=True)
    return files


class Canvas:
    """A white picture with a title; coordinates in pixels of the finished picture."""

    def __init__(self, title: str, subtitle: str) -> None:
        self._image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self._draw = ImageDraw.Draw(self._image)
        self.text((LEFT, 22), title, size=22)
        self.text((LEFT, 50), subtitle, size=14, fill=FAINT)

    def text(self, at: Point, text: str, *, size: int = 14, fill: str = INK, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * SCALE)
        self._draw.text((at[0] * SCALE, at[1] * SCALE), text, fill, font, anchor=anchor)

    def line(self, points: Sequence[Point], fill: str, width: float = 1.0) -> None:
        self._draw.line([(x * SCALE, y * SCALE) for x, y in points], fill, round(width * SCALE), joint="curve")

    def dot(self, at: Point, fill: str, radius: float = 4.0) -> None:
        box = [(at[0] - radius) * SCALE, (at[1] - radius) * SCALE, (at[0] + radius) * SCALE, (at[1] + radius) * SCALE]
        self._draw.ellipse(box, fill)

    def box(self, began: Point, ended: Point, fill: str) -> None:
        self._draw.rectangle([began[0] * SCALE, began[1] * SCALE, ended[0] * SCALE, ended[1] * SCALE], fill)

    def finish(self) -> Image.Image:
        return self._image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def ticks(highest: float, wanted: int = 6) -> list[float]:
    """0 and round steps up to the first one at or above ``highest``."""
    raw = highest / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def latency_points(record: Record) -> list[Point]:
    """(arrivals a second, mean latency): low load at 0, then the open-loop points in the order of their rates."""
    points = [(0.0, record["low"]["latency"]["mean"])] if "low" in record else []
    points += [(point["rate"], point["latency"]["mean"]) for point in record["open"] if "latency" in point]
    return sorted(points)


def latency_plot(result: Record) -> Image.Image | None:
    """Mean latency over the arrival rate; a tick on the axis below marks each system's measured capacity."""
    curves = [(record, points) for record in result["systems"] if len(points := latency_points(record)) > 1]
    if not curves:
        return None
    rates = [record["saturated"]["rate"] for record, _ in curves]
    across, up = ticks(max(rates)), ticks(max(latency for _, points in curves for _, latency in points))
    subtitle = (
        "mean latency in seconds; dots: Poisson arrivals, and low load at 0; marks on the axis: measured capacity"
    )
    canvas = Canvas(f"{result['workload']['name']}: latency against load", subtitle)

    def place(point: Point) -> Point:
        x = LEFT + point[0] / across[-1] * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - point[1] / up[-1] * (HEIGHT - TOP - BOTTOM)

    for value in up:
        canvas.line([place((0, value)), place((across[-1], value))], GRID)
        canvas.text((LEFT - 10, place((0, value))[1]), f"{value:g}", fill=FAINT, anchor="rm")
    for value in across:
        canvas.text((place((value, 0))[0], HEIGHT - BOTTOM + 22), f"{value:g}", fill=FAINT, anchor="ma")
    canvas.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 24), "arrivals, requests/s", fill=FAINT, anchor="mm")
    for number, (record, points) in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        canvas.line([place(point) for point in points], colour, 2.5)
        for point in points:
            canvas.dot(place(point), colour)
        x, y = place((record["saturated"]["rate"], 0))
        canvas.line([(x, y + 2), (x, y + 16)], colour, 4)
        legend = TOP + 26 * number
        canvas.dot((WIDTH - RIGHT + 30, legend), colour, 6)
        canvas.text((WIDTH - RIGHT + 44, legend), record["name"], anchor="lm")
    return canvas.finish()


def stage_parts(record: Record) -> dict[str, float]:
    """Median seconds of one request alone; ``other`` is its latency less its stages (queues, hand-offs, the file)."""
    stages = record["low"]["stages"]
    parts = {name: stages.get(name, 0.0) for name, _ in STAGES if name != "other"}
    return parts | {"other": max(0.0, record["low"]["latency"]["p50"] - sum(parts.values()))}


def stage_plot(result: Record) -> Image.Image | None:
    """One bar a system: encode, exposed transfer, denoise, decode and the rest, one above the other."""
    bars = [(record["name"], stage_parts(record)) for record in result["systems"] if "low" in record]
    if not bars:
        return None
    up = ticks(max(sum(parts.values()) for _, parts in bars))
    canvas = Canvas(f"{result['workload']['name']}: where one request's time goes", "seconds, at low load (medians)")
    height, slot = HEIGHT - TOP - BOTTOM, (WIDTH - LEFT - RIGHT) / len(bars)
    for value in up:
        y = HEIGHT - BOTTOM - value / up[-1] * height
        canvas.line([(LEFT, y), (WIDTH - RIGHT, y)], GRID)
        canvas.text((LEFT - 10, y), f"{value:g}", fill=FAINT, anchor="rm")
    for number, (name, parts) in enumerate(bars):
        x, y = LEFT + slot * (number + 0.5), float(HEIGHT - BOTTOM)
        for stage, colour in STAGES:
            top = y - parts[stage] / up[-1] * height
            canvas.box((x - slot * 0.3, top), (x + slot * 0.3, y), colour)
            y = top
        canvas.text((x, y - 6), f"{sum(parts.values()):.3g}", anchor="md")
        for row, words in enumerate(_two_lines(name)):
            canvas.text((x, HEIGHT - BOTTOM + 10 + 18 * row), words, size=13, anchor="ma")
    for number, (stage, colour) in enumerate(reversed(STAGES)):
        y = TOP + 26 * number
        canvas.box((WIDTH - RIGHT + 24, y - 6), (WIDTH - RIGHT + 36, y + 6), colour)
        canvas.text((WIDTH - RIGHT + 44, y), "exposed transfer" if stage == "exposed" else stage, anchor="lm")
    return canvas.finish()


def _two_lines(name: str) -> tuple[str, str]:
    first, _, rest = name.partition(" ")
    return first, rest
