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
    from ditrelay.cli_run import Outcome, Run
    from ditrelay.engine import Result

# A pipe has no width of its own; what reads it may be wide.
_PIPE_COLUMNS = 120
_LEAST_PROMPT = 6

# heading -> fields of Timings, added up
_TIMES = {
    "waiting": ("queued", "wait_dit", "wait_decoder"),
    "encode": ("encode",),
    "to DiT": ("to_dit",),
    "denoise": ("denoise",),
    "to dec.": ("to_decoder",),
    "decode": ("decode",),
    "exposed": ("exposed_transfer",),
    "total": ("total",),
}
_COLUMNS = ("seed", *_TIMES)
# What a narrow terminal goes without, first to last.
_LEFT_OUT = ("exposed", "to dec.", "to DiT", "seed", "waiting", "encode", "decode")


def print_report(run: Run, console: Console | None = None) -> None:
    """The table, the overlap, the files and what failed, on stdout."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_PIPE_COLUMNS)
    if any(outcome.result for outcome in run.outcomes):
        console.print(report_table(run, console.width))
        console.print(Text(summary(run)))
        if run.advice:
            console.print(Text(run.advice, style="dim"))
    for outcome in run.outcomes:
        if outcome.error is not None:
            what = f"{outcome.job.index + 1}: {_title(outcome)}: {printable(outcome.error)}"
            console.print(Text.assemble(("failed ", "bold red"), what), soft_wrap=True)
    files = [outcome.job.path for outcome in run.outcomes if outcome.result]
    if files:
        console.print(Text(f"wrote {_files(files)}"), soft_wrap=True)
    if run.trace is not None:
        console.print(Text(f"timeline: {run.trace}"), soft_wrap=True)


def report_table(run: Run, width: int) -> Table:
    """One row per request that was done; times in seconds. The prompts take what ``width`` columns leave them.

    ``waiting``: in the queue, for a replica, for a decoder. ``to DiT``, ``to dec.``: the transfers. ``exposed``: the
    part of the transfer to the DiT that a free replica waited for. Columns that do not fit are left out and named.
    """
    done = [outcome for outcome in run.outcomes if outcome.result]
    rows = [dict(zip(_COLUMNS, _cells(outcome.result), strict=True)) for outcome in done if outcome.result]
    widths = {heading: max(len(heading), *(len(row[heading]) for row in rows)) for heading in _COLUMNS}
    number_width = len(str(len(run.outcomes)))
    left_out: list[str] = []
    while (room := width - number_width - sum(widths.values()) - len(widths) - 1) < _LEAST_PROMPT:
        if len(left_out) == len(_LEFT_OUT):
            break
        left_out.append(_LEFT_OUT[len(left_out)])
        del widths[left_out[-1]]
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, title="seconds per request", title_justify="left")
    if left_out:
        table.caption, table.caption_justify = f"no room for: {', '.join(left_out)}", "left"
    table.add_column("#", justify="right", style="dim", width=number_width)
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=max(_LEAST_PROMPT, room))
    for heading, column_width in widths.items():
        style = "bold" if heading == "total" else None
        table.add_column(heading, justify="right", no_wrap=True, style=style, width=column_width)
    for outcome, row in zip(done, rows, strict=True):
        table.add_row(str(outcome.job.index + 1), Text(_title(outcome)), *(row[heading] for heading in widths))
    return table


def _cells(result: Result) -> tuple[str, ...]:
    timings = result.timings.as_dict()
    times = (sum(timings[name] for name in names) for names in _TIMES.values())
    return str(result.seed), *(f"{seconds:.3f}" for seconds in times)


def summary(run: Run) -> str:
    """One line: how many, how fast, and how much of the time stages overlapped."""
    done = sum(outcome.result is not None for outcome in run.outcomes)
    return (
        f"{done} of {run.asked} done in {run.seconds:.2f} s, {done / max(run.seconds, 1e-9):.2f} requests/s; "
        f"stages overlapped for {run.overlap:.0%} of the working time"
    )


def _title(outcome: Outcome) -> str:
    return printable(outcome.job.params.prompt)


def _files(files: list[Path]) -> str:
    if len(files) == 1:
        return str(files[0])
    return f"{len(files)} files to {files[0].parent}/"
