"""Latents become pixels, pixels become files; only the file leaves the rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditrelay.models.adapter import Decoder
from ditrelay.runtime.pipelines_core.clips import ClipEncoders, ClipFile
from ditrelay.runtime.pipelines_core.media import Media, encode_media
from ditrelay.runtime.pipelines_core.pipeline import Batch, StageControl
from ditrelay.runtime.request import SamplingParams
from ditrelay.runtime.topology import Role

if TYPE_CHECKING:
    from ditrelay.models.adapter import Frames, LazyFrames

CLIP_SECONDS = 600.0


class DecodeStage:
    """Takes the latents in ``batch.state`` and leaves files in ``batch.media``: clips of ``fps``, with 0 pictures.

    A clip is encoded while its frames are made, within ``timeout`` seconds. It can be cancelled between two parts.
    """

    role: Role = "decode"

    def __init__(self, adapter: Decoder, fps: int = 0, timeout: float = CLIP_SECONDS) -> None:
        self._adapter = adapter
        self._encoders = ClipEncoders(fps, timeout) if fps else None

    def run(self, batch: Batch, control: StageControl) -> None:
        if self._encoders is None:
            batch.frames = self._adapter.decode(batch.requests, batch.state)
        else:
            batch.clip = self._decode_clip(batch, control, self._encoders.open())
        batch.state = {}

    def _decode_clip(self, batch: Batch, control: StageControl, clip: ClipFile) -> ClipFile:
        def give(part: LazyFrames) -> None:
            control.before_step()
            clip.add(part)

        try:
            for frames in self._adapter.decode(batch.requests, batch.state, give):
                clip.add(lambda frames=frames: frames)  # type: ignore[misc]
        except BaseException:
            clip.abandon()
            raise
        return clip

    def finish(self, batch: Batch) -> None:
        clip, batch.clip = batch.clip, None
        if clip is not None:
            batch.media = (clip.finish(),)
            return
        batch.media = tuple(
            _picture(request.params, frames) for request, frames in zip(batch.requests, batch.frames, strict=True)
        )
        batch.frames = ()


def _picture(params: SamplingParams, frames: Frames) -> Media:
    quality = 100 if params.output_compression is None else params.output_compression
    return encode_media(frames, kind=params.output_format or "png", quality=quality)
