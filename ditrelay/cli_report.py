"""What ``ditrelay generate`` prints at its end: where each request's time went, and the files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ditrelay.cli_progress import printable

if TYPE_CHECKING:
    from ditrelay.cli_generate import Outcome, Run

# A pipe has no width of its own; what reads it may be wide.
_PIPE_COLUMNS = 120

# heading, field of Timings
_COLUMNS = (
    ("queued", "queued"),
    ("encode", "encode"),
    ("to DiT", "to_dit"),
    ("wait", "wait_dit"),
    ("denoise", "denoise"),
    ("to dec.", "to_decoder"),
    ("wait", "wait_decoder"),
    ("decode", "decode"),
    ("exposed", "exposed_transfer"),
    ("total", "total"),
)


def print_report(run: Run, console: Console | None = None) -> None:
    """The table, the overlap, the files and what failed, on stdout."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_PIPE_COLUMNS)
    if any(outcome.result for outcome in run.outcomes):
        console.print(report_table(run))
        console.print(Text(summary(run)))
    for outcome in run.outcomes:
        if outcome.error is not None:
            what = f"{outcome.job.index + 1}: {_title(outcome)}: {printable(outcome.error)}"
            console.print(Text.assemble(("failed ", "bold red"), what), soft_wrap=True)
    files = [outcome.job.path for outcome in run.outcomes if outcome.result]
    if files:
        console.print(Text(f"wrote {_files(files)}"), soft_wrap=True)


def report_table(run: Run) -> Table:
    """One row per request that was done; times in seconds.

    ``exposed`` is the part of a transfer to the DiT that a free replica waited for.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.title, table.title_justify = "seconds per request", "left"
    table.add_column("#", justify="right", style="dim", no_wrap=True)
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", min_width=8, ratio=1)
    table.add_column("seed", justify="right", no_wrap=True)
    for heading, _ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True, style="bold" if heading == "total" else None)
    for outcome in run.outcomes:
        if outcome.result is not None:
            times = (f"{getattr(outcome.result.timings, name):.3f}" for _, name in _COLUMNS)
            table.add_row(str(outcome.job.index + 1), Text(_title(outcome)), str(outcome.result.seed), *times)
    return table


def summary(run: Run) -> str:
    """One line: how many, how fast, and how much of the time stages overlapped."""
    done = sum(outcome.result is not None for outcome in run.outcomes)
    return (
        f"{done} of {len(run.outcomes)} done in {run.seconds:.2f} s, {done / run.seconds:.2f} requests/s; "
        f"stages overlapped for {run.overlap:.0%} of the working time"
    )


def _title(outcome: Outcome) -> str:
    return printable(outcome.job.params.prompt)


def _files(files: list[Path]) -> str:
    if len(files) == 1:
        return str(files[0])
    return f"{len(files)} files to {files[0].parent}/"
