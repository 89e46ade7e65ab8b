"""The three kinds of stage: encode, denoise, decode (layer 3)."""

from __future__ import annotations

from ditrelay.models.adapter import StageAdapter
from ditrelay.runtime.pipelines_core.pipeline import Pipeline, Stage
from ditrelay.runtime.pipelines_core.stages.decode import DecodeStage
from ditrelay.runtime.pipelines_core.stages.denoise import DenoiseStage
from ditrelay.runtime.pipelines_core.stages.encode import EncodeStage
from ditrelay.runtime.topology import Role


def build_pipeline(adapter: StageAdapter, roles: frozenset[Role], *, video: bool) -> Pipeline:
    """The stages that a rank with these roles runs."""
    stages: list[Stage] = [EncodeStage(adapter), DenoiseStage(adapter), DecodeStage(adapter, video=video)]
    return Pipeline([stage for stage in stages if stage.role in roles])
