"""Text and image conditioning."""

from __future__ import annotations

from ditrelay.models.adapter import StageAdapter
from ditrelay.runtime.pipelines_core.pipeline import Batch, StageControl
from ditrelay.runtime.topology import Role


class EncodeStage:
    """Leaves the conditioning in ``batch.state``."""

    role: Role = "encode"

    def __init__(self, adapter: StageAdapter) -> None:
        self._adapter = adapter

    def run(self, batch: Batch, control: StageControl) -> None:
        batch.state = self._adapter.encode(batch.requests)

    def finish(self, batch: Batch) -> None:
        """Nothing is left to do."""
