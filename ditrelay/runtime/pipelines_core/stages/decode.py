"""Latents become pixels, pixels become files; only the file leaves the rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditrelay.models.adapter import StageAdapter
from ditrelay.runtime.pipelines_core.media import Media, encode_media
from ditrelay.runtime.pipelines_core.pipeline import Batch, StageControl
from ditrelay.runtime.request import SamplingParams
from ditrelay.runtime.topology import Role

if TYPE_CHECKING:
    from ditrelay.models.adapter import Frames


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
        batch.media = tuple(
            self._file(request.params, frames) for request, frames in zip(batch.requests, batch.frames, strict=True)
        )
        batch.frames = ()

    def _file(self, params: SamplingParams, frames: Frames) -> Media:
        quality = 100 if params.output_compression is None else params.output_compression
        return encode_media(frames, fps=self._fps, kind=params.output_format or "png", quality=quality)
