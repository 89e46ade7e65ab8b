"""The contract of every executor: stages in, files or an error out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from traceback import walk_tb
from typing import Protocol

from ditrelay.errors import DitrelayError
from ditrelay.runtime.pipelines_core.media import Media
from ditrelay.runtime.pipelines_core.pipeline import Batch, Stage
from ditrelay.runtime.server_args import ServerArgs


@dataclass(frozen=True)
class ExecutorOutput:
    """``output``: one file per request, or ``None`` on a rank that makes none; ``error``: why there is none."""

    output: tuple[Media, ...] | None = None
    error: str | None = None


class PipelineExecutor(Protocol):
    """Runs a batch through stages. A failing stage is an ``error`` in the output, never an exception."""

    def execute(self, stages: Sequence[Stage], batch: Batch, server_args: ServerArgs) -> ExecutorOutput: ...


# What a stage may raise because of its input, its model (libraries assert, too) or its device. Without a head a
# programming error passes through; with one it fails its request, on a single rank and on a replica alike.
STAGE_ERRORS = (
    DitrelayError,
    RuntimeError,
    ValueError,
    TypeError,
    OSError,
    ArithmeticError,
    LookupError,
    AssertionError,
)


def describe(error: BaseException) -> str:
    """One line for a client: ditrelay's own messages as they are, others with their class, or where they come from."""
    text = str(error).strip()
    if text:
        return text if isinstance(error, DitrelayError) else f"{type(error).__name__}: {text}"
    return f"{type(error).__name__} without a message{_place(error)}; the server's log has more"


def _place(error: BaseException) -> str:
    """Where it was raised; a module's name, as a path would tell of the machine."""
    raised = [
        (frame.f_globals.get("__name__"), frame.f_code.co_name, line) for frame, line in walk_tb(error.__traceback__)
    ]
    if not raised:
        return ""
    module, function, line = raised[-1]
    return f", raised in {module}.{function}, line {line}"
