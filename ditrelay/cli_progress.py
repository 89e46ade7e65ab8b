"""What ``ditrelay generate`` shows while it runs: a live table on a terminal, short lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ditrelay.runtime.request import RequestState

if TYPE_CHECKING:
    from ditrelay.engine import Engine
    from ditrelay.runtime.tickets import Progress

LABELS = {
    RequestState.QUEUED: "queued",
    RequestState.ENCODING: "encoding",
    RequestState.ENCODED: "waiting for a replica",
    RequestState.TO_DIT: "sending conditioning",
    RequestState.AT_DIT: "waiting to denoise",
    RequestState.DENOISING: "denoising",
    RequestState.DENOISED: "waiting for a decoder",
    RequestState.TO_DECODER: "sending latents",
    RequestState.AT_DECODER: "waiting to decode",
    RequestState.DECODING: "decoding",
    RequestState.DONE: "done",
    RequestState.FAILED: "failed",
    RequestState.CANCELLED: "cancelled",
}
_STYLES = {
    RequestState.QUEUED: "dim",
    RequestState.DONE: "green",
    RequestState.FAILED: "bold red",
    RequestState.CANCELLED: "yellow",
}
_REFRESHES_PER_SECOND = 12
_LINE_SECONDS = 10.0


class Display(Protocol):
    """Shows one run; requests are known by their index."""

    def starting(self, engine: Engine, workers: int) -> AbstractContextManager[None]:
        """While the workers start."""
        ...

    def running(self, prompts: Sequence[str]) -> AbstractContextManager[None]:
        """While the requests run."""
        ...

    def update(self, index: int, progress: Progress) -> None: ...

    def ended(self, index: int, seconds: float, error: str | None) -> None: ...


def printable(text: str) -> str:
    """``text`` on one line, without characters that a terminal would obey."""
    return "".join(char if char.isprintable() else " " for char in text)


@dataclass
class _Row:
    title: str
    state: RequestState = RequestState.QUEUED
    step: int = 0
    total: int = 0
    note: str = ""


class LiveDisplay:
    """Redraws itself on a terminal; log lines go above it. Gone when the run ends: the report takes its place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[_Row] = []
        self._spinner = Spinner("dots")

    @contextlib.contextmanager
    def starting(self, engine: Engine, workers: int) -> Iterator[None]:
        began = time.monotonic()

        def render() -> RenderableType:
            up = sum(worker.state == "up" for worker in engine.status().workers)
            word = "warming up" if up == workers else f"{up} up"
            self._spinner.text = Text(f"starting {_count(workers, 'worker')}: {word}, {time.monotonic() - began:.0f} s")
            return self._spinner

        with self._live(render):
            yield

    @contextlib.contextmanager
    def running(self, prompts: Sequence[str]) -> Iterator[None]:
        self._rows = [_Row(printable(prompt)) for prompt in prompts]
        with self._live(self.render):
            yield

    def update(self, index: int, progress: Progress) -> None:
        row = self._rows[index]
        row.state, row.step, row.total = progress.state, progress.step, progress.total_steps

    def ended(self, index: int, seconds: float, error: str | None) -> None:
        row = self._rows[index]
        row.state = RequestState.FAILED if error else RequestState.DONE
        row.note = printable(error) if error else f"{seconds:.2f} s"

    def render(self) -> RenderableType:
        """One line per request, as many as fit, and a count of all."""
        number, state, gap = len(str(len(self._rows))), max(map(len, LABELS.values())), 2
        room = self._console.width - number - state - 3 * gap
        title = min(max(len(row.title) for row in self._rows), room * 3 // 5)
        table = Table.grid(padding=(0, gap, 0, 0))
        table.add_column(justify="right", style="dim", width=number)
        table.add_column(no_wrap=True, overflow="ellipsis", width=title)
        table.add_column(no_wrap=True, width=state)
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=room - title)
        for index in self._shown():
            row = self._rows[index]
            label = Text(LABELS[row.state], style=_STYLES.get(row.state, "cyan"))
            table.add_row(str(index + 1), Text(row.title), label, _detail(row))
        return Group(table, Text(self._summary(), style="dim")) if len(self._rows) > 1 else table

    def _shown(self) -> list[int]:
        """Which rows fit the terminal: those being worked on first, then what failed, waits, is done."""
        room = max(1, self._console.height - 3)
        return sorted(sorted(range(len(self._rows)), key=lambda i: (_rank(self._rows[i].state), i))[:room])

    def _summary(self) -> str:
        groups = Counter(_GROUPS[_rank(row.state)] for row in self._rows)
        return ", ".join(f"{groups[name]} {name}" for name in ("done", "failed", "running", "queued") if groups[name])

    def _live(self, render: Callable[[], RenderableType]) -> Live:
        return Live(
            get_renderable=render, console=self._console, refresh_per_second=_REFRESHES_PER_SECOND, transient=True
        )


_GROUPS = ("running", "failed", "queued", "done")


def _rank(state: RequestState) -> int:
    special = {
        RequestState.FAILED: "failed",
        RequestState.CANCELLED: "failed",
        RequestState.QUEUED: "queued",
        RequestState.DONE: "done",
    }
    return _GROUPS.index(special.get(state, "running"))


def _detail(row: _Row) -> RenderableType:
    if row.state is not RequestState.DENOISING or not row.total:
        return Text(row.note)
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(ProgressBar(total=row.total, completed=row.step, width=20), f"{row.step}/{row.total}")
    return grid


class PlainDisplay:
    """Short lines, no control characters: for pipes and log files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._prompts: list[str] = []
        self._ended = 0
        self._spoke: dict[int, float] = {}

    @contextlib.contextmanager
    def starting(self, engine: Engine, workers: int) -> Iterator[None]:
        began = time.monotonic()
        self._say(f"starting {_count(workers, 'worker')}")
        yield
        self._say(f"ready after {time.monotonic() - began:.1f} s")

    @contextlib.contextmanager
    def running(self, prompts: Sequence[str]) -> Iterator[None]:
        self._prompts = [printable(prompt) for prompt in prompts]
        self._spoke = dict.fromkeys(range(len(prompts)), time.monotonic())
        yield

    def update(self, index: int, progress: Progress) -> None:
        """A line only now and then: short runs stay short, long ones show that they go on."""
        if progress.state.ended or progress.at - self._spoke[index] < _LINE_SECONDS:
            return
        self._spoke[index] = progress.at
        steps = f" step {progress.step}/{progress.total_steps}" if progress.total_steps else ""
        self._say(f"{LABELS[progress.state]}{steps}: {self._prompts[index]}")

    def ended(self, index: int, seconds: float, error: str | None) -> None:
        self._ended += 1
        how = f"failed, {printable(error)}" if error else f"done in {seconds:.2f} s"
        self._say(f"[{self._ended}/{len(self._prompts)}] {how}: {self._prompts[index]}")

    def _say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
