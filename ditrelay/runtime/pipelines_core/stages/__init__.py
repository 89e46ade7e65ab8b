"""The three kinds of stage: encode, denoise, decode (layer 3)."""

from __future__ import annotations

from ditrelay.models.adapter import StageAdapter
from ditrelay.runtime.pipelines_core.pipeline import Pipeline, Stage
from ditrelay.runtime.pipelines_core.stages.decode import DecodeStage
from ditrelay.runtime.pipelines_core.stages.denoise import DenoiseStage
from ditrelay.runtime.pipelines_core.stages.encode import EncodeStage
from ditrelay.runtime.topology import Role


def build_pipeline(adapter: StageAdapter, roles: frozenset[Role], *, fps: int = 0) -> Pipeline:
    """The stages that a rank with these roles runs. ``fps``: frames a second of a clip; 0: pictures."""
    stages: list[Stage] = [EncodeStage(adapter), DenoiseStage(adapter), DecodeStage(adapter, fps)]
    return Pipeline([stage for stage in stages if stage.role in roles])
