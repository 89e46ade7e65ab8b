"""The contract of every executor: stages in, files or an error out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


# What a stage may raise because of its input, its model or its device; a programming error passes through.
STAGE_ERRORS = (DitrelayError, RuntimeError, ValueError, TypeError, OSError, ArithmeticError, LookupError)


def describe(error: BaseException) -> str:
    """One line for a client: ditrelay's own messages as they are, others with their class."""
    text = str(error).strip() or "no message"
    return text if isinstance(error, DitrelayError) else f"{type(error).__name__}: {text}"
