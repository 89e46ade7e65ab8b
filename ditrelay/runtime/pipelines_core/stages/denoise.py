"""The denoising loop, step by step, under the caller's control."""

from __future__ import annotations

from functools import partial

from ditrelay.models.adapter import StageAdapter
from ditrelay.runtime.pipelines_core.pipeline import Batch, StageControl
from ditrelay.runtime.topology import Role


class DenoiseStage:
    """Takes the conditioning in ``batch.state`` and leaves the latents there."""

    role: Role = "denoise"

    def __init__(self, adapter: StageAdapter) -> None:
        self._adapter = adapter

    def run(self, batch: Batch, control: StageControl) -> None:
        adapter = self._adapter
        session = adapter.begin(batch.requests, batch.state)
        try:
            if (captured := control.checkpoint()) is not None:
                adapter.restore(session, captured)
            more = True
            while more:
                control.before_step()
                more = adapter.step(session)
                control.after_step(session.steps_done, session.total_steps)
                if more:
                    control.keep(session.steps_done, partial(adapter.capture, session))
                    control.show(session.steps_done, session.total_steps, lambda: adapter.preview(session))
            batch.state = adapter.finish(session)
        finally:
            adapter.abandon(session)

    def finish(self, batch: Batch) -> None:
        """Nothing is left to do."""
