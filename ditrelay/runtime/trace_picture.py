"""A timeline as a picture: lanes from top to bottom in the order in which a request meets them, time to the right."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ditrelay.runtime.timeline import Bar, Group, Lane, Timeline

WIDTH = 1600
MARGIN = 40
LANES_LEFT = 246
LANES_RIGHT = WIDTH - MARGIN - 88  # what is right of it is the share that a lane is busy
HEADER = 136
FOOTER = 100

TRACK_GAP = 2
LANE_GAP = 5
GROUP_GAP = 20
HEIGHTS = {"denoise": 50, "encode": 36, "decode": 36, "send": 16, "receive": 16}
RADIUS = 5
NUMBER_SIZES = (21, 17, 14)
LEAST_BAR = 3  # pixels: what is shorter is still seen
LEAST_STEP = 5  # pixels between the ticks of two steps

PAPER, INK, GREY, PALE, LANE, GRID = "#ffffff", "#1b2430", "#5c6773", "#929ba6", "#eef1f5", "#dce1e8"
ON_BAR = "#ffffff"
_SMOOTH = 4  # a rounded corner is drawn this much larger and scaled down
_TICKS = 12  # most marks on the time axis

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_timeline(timeline: Timeline) -> Image.Image:
    """RGB picture, 1600 pixels wide; as high as the lanes need."""
    return _Picture(timeline).draw()


@dataclass(frozen=True)
class _Place:
    """Where a lane is: ``top`` and ``height`` in pixels, one row of this height per track."""

    lane: Lane
    top: int

    @property
    def row(self) -> int:
        return HEIGHTS[self.lane.kind]

    @property
    def height(self) -> int:
        rows = max(1, len(self.lane.tracks))
        return rows * (self.row + TRACK_GAP) - TRACK_GAP


class _Picture:
    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._groups, bottom = _layout(timeline)
        self._bottom = bottom
        self._image = Image.new("RGB", (WIDTH, bottom + FOOTER), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        seconds = max(timeline.ended - timeline.began, 1e-6)
        self._scale = (LANES_RIGHT - LANES_LEFT) / seconds

    def draw(self) -> Image.Image:
        self._text((MARGIN, 28), _cut(self._timeline.title, 36, WIDTH - 2 * MARGIN), 36, INK)
        self._text((MARGIN, 80), self._timeline.summary, 23, GREY)
        self._text((WIDTH - MARGIN, HEADER - 10), "busy", 18, PALE, "rs")
        for group, places in self._groups:
            self._draw_heading(group, places)
            for place in places:
                self._draw_background(place)
        self._draw_axis()
        for _, places in self._groups:
            for place in places:
                self._draw_bars(place)
        return self._image

    # ------------------------------------------------------------ lanes

    def _draw_heading(self, group: Group, places: list[_Place]) -> None:
        top, bottom = places[0].top, places[-1].top + places[-1].height
        self._text((MARGIN, top - 1), group.title, 22, INK)
        if bottom - top > 48:
            self._text((MARGIN, top + 27), group.role, 18, PALE)

    def _draw_background(self, place: _Place) -> None:
        lane, middle = place.lane, place.top + place.height // 2
        self._rounded(LANES_LEFT, place.top, LANES_RIGHT - LANES_LEFT, place.height, LANE)
        self._text((LANES_LEFT - 14, middle), lane.kind, 16 if lane.is_transfer else 20, GREY, "rm")
        busy = None if lane.is_transfer else lane.busy()
        if busy is not None:
            self._text((WIDTH - MARGIN, middle), f"{math.floor(busy * 1000) / 10:.1f}%", 20, INK, "rm")

    def _draw_bars(self, place: _Place) -> None:
        for row, track in enumerate(place.lane.tracks):
            top = place.top + row * (place.row + TRACK_GAP)
            for bar in track:
                self._draw_bar(bar, top, place.row, labelled=not place.lane.is_transfer)

    def _draw_bar(self, bar: Bar, top: int, height: int, *, labelled: bool) -> None:
        left, right = self._x(bar.began), self._x(bar.ended)
        # A pixel of the lane shows between two bars that touch.
        width = max(LEAST_BAR, right - left - 1)
        self._rounded(left, top, width, height, bar.colour)
        self._draw_steps(bar, left + width, top, height)
        if labelled:
            self._draw_number(bar, left, width, top + height // 2)

    def _draw_number(self, bar: Bar, left: int, width: int, middle: int) -> None:
        """The request's number where it fits: beside the ticks of a wide bar, else in the middle."""
        label = str(bar.request)
        # By zeros: numbers of as many digits are of one size.
        size = next((size for size in NUMBER_SIZES if _font(size).getlength("0" * len(label)) + 4 <= width), None)
        if size is None:
            return
        x, anchor = (left + 12, "lm") if bar.steps and width > 64 else (left + width // 2, "mm")
        self._text((x, middle), label, size, ON_BAR, anchor)

    def _draw_steps(self, bar: Bar, right: int, top: int, height: int) -> None:
        """A tick at the end of every step but the last, which ends the bar."""
        ticks = [self._x(at) for at in bar.steps[:-1]]
        if any(later - earlier < LEAST_STEP for earlier, later in zip(ticks, ticks[1:], strict=False)):
            return
        tick = _blend(bar.colour, ON_BAR, 0.55)
        for x in ticks:
            if x < right - 2:
                self._draw.line([(x, top + height - 13), (x, top + height - 1)], tick)

    # ------------------------------------------------------------ time

    def _draw_axis(self) -> None:
        end = self._timeline.ended
        step = tick_step(end - self._timeline.began)
        unit, factor = ("ms", 1000) if step < 0.1 else ("s", 1)
        digits = max(0, -math.floor(math.log10(step * factor)))
        first = math.ceil(self._timeline.began / step - 1e-9)
        count = math.floor((end - first * step) / step + 1e-9) + 1
        for number in range(first, first + count):
            x = self._x(number * step)
            self._draw.line([(x, HEADER - 4), (x, self._bottom + 8)], GRID)
            self._text((x, self._bottom + 14), f"{number * step * factor:.{digits}f} {unit}", 18, GREY, "ma")
        note = "One colour and number per request. Ticks: denoising steps. Busy: from a lane's first bar to its last."
        self._text((LANES_LEFT, self._bottom + 54), note, 18, PALE)

    def _x(self, at: float) -> int:
        return LANES_LEFT + round((at - self._timeline.began) * self._scale)

    # ------------------------------------------------------------ shapes

    def _text(self, at: tuple[int, int], text: str, size: int, colour: str, anchor: str = "la") -> None:
        self._draw.text(at, text, colour, _font(size), anchor)

    def _rounded(self, left: int, top: int, width: int, height: int, colour: str) -> None:
        radius = min(RADIUS, width // 2, height // 2)
        mask = Image.new("L", (width * _SMOOTH, height * _SMOOTH))
        box = (0, 0, width * _SMOOTH - 1, height * _SMOOTH - 1)
        ImageDraw.Draw(mask).rounded_rectangle(box, radius * _SMOOTH, 255)
        self._image.paste(colour, (left, top), mask.reduce(_SMOOTH))


def _layout(timeline: Timeline) -> tuple[list[tuple[Group, list[_Place]]], int]:
    """Each group with the places of its lanes, and the bottom of the last."""
    top, groups = HEADER, []
    for group in timeline.groups:
        places = []
        for lane in group.lanes:
            places.append(_Place(lane, top))
            top += places[-1].height + LANE_GAP
        groups.append((group, places))
        top += GROUP_GAP - LANE_GAP
    return groups, top - GROUP_GAP


def tick_step(seconds: float, most: int = _TICKS) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (times a power of ten) that gives at most ``most`` ticks in ``seconds``."""
    least = max(seconds, 1e-6) / most
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def _cut(text: str, size: int, width: int) -> str:
    """``text``, its end left out where it is wider than ``width`` pixels."""
    if _font(size).getlength(text) <= width:
        return text
    fitting = next(n for n in range(len(text), -1, -1) if _font(size).getlength(text[:n] + "...") <= width)
    return text[:fitting] + "..."


def _font(size: int) -> _Font:
    return ImageFont.load_default(size)


def _blend(colour: str, other: str, share: float) -> tuple[int, int, int]:
    """``share`` of ``other`` in ``colour``, both ``#rrggbb``."""
    red, green, blue = (
        round(int(colour[i : i + 2], 16) * (1 - share) + int(other[i : i + 2], 16) * share) for i in (1, 3, 5)
    )
    return red, green, blue
