"""One process, no transfers: the oracle whose pictures every other mode must equal bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ditrelay.runtime.pipelines_core.executors.pipeline_executor import STAGE_ERRORS, ExecutorOutput, describe
from ditrelay.runtime.pipelines_core.pipeline import Batch, Stage, StageControl, Uncontrolled
from ditrelay.runtime.server_args import ServerArgs


class SyncExecutor:
    """Runs the stages one after the other in the caller's thread."""

    def __init__(self, control: StageControl | None = None) -> None:
        self._control = control or Uncontrolled()

    def execute(self, stages: Sequence[Stage], batch: Batch, server_args: ServerArgs) -> ExecutorOutput:
        try:
            with torch.no_grad():
                for stage in stages:
                    stage.run(batch, self._control)
                    stage.finish(batch)
        except STAGE_ERRORS as error:
            return ExecutorOutput(error=describe(error))
        return ExecutorOutput(output=batch.media)
