"""The three kinds of stage: encode, denoise, decode (layer 3)."""

from __future__ import annotations

from ditrelay.models.adapter import Decoder, StageAdapter
from ditrelay.runtime.pipelines_core.pipeline import Pipeline, Stage
from ditrelay.runtime.pipelines_core.stages.decode import CLIP_SECONDS, DecodeStage
from ditrelay.runtime.pipelines_core.stages.denoise import DenoiseStage
from ditrelay.runtime.pipelines_core.stages.encode import EncodeStage
from ditrelay.runtime.topology import Role


def build_pipeline(
    adapter: StageAdapter,
    roles: frozenset[Role],
    *,
    decoder: Decoder | None = None,
    fps: int = 0,
    timeout: float = CLIP_SECONDS,
) -> Pipeline:
    """The stages that a rank with these roles runs.

    Args:
        decoder: makes the pixels in the adapter's place.
        fps: frames a second of a clip; 0: pictures.
        timeout: seconds within which a clip is encoded.
    """
    stages: list[Stage] = [EncodeStage(adapter), DenoiseStage(adapter), DecodeStage(decoder or adapter, fps, timeout)]
    return Pipeline([stage for stage in stages if stage.role in roles])
