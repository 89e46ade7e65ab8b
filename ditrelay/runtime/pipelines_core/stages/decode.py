"""Latents become pixels, pixels become files; only the file leaves the rank."""

from __future__ import annotations

from ditrelay.models.adapter import StageAdapter
from ditrelay.runtime.pipelines_core.media import encode_media
from ditrelay.runtime.pipelines_core.pipeline import Batch, StageControl
from ditrelay.runtime.topology import Role


class DecodeStage:
    """Takes the latents in ``batch.state`` and leaves files in ``batch.media``: clips of ``fps``, with 0 pictures."""

    role: Role = "decode"

    def __init__(self, adapter: StageAdapter, fps: int = 0) -> None:
        self._adapter = adapter
        self._fps = fps

    def run(self, batch: Batch, control: StageControl) -> None:
        batch.frames = self._adapter.decode(batch.requests, batch.state)
        batch.state = {}

    def finish(self, batch: Batch) -> None:
        batch.media = tuple(encode_media(frames, fps=self._fps) for frames in batch.frames)
        batch.frames = ()
