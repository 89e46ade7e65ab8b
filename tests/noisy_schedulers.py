"""Schedulers of diffusers that draw noise at every step, for a model of ``tiny_models``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers

# Those that the loops of every family with modular blocks can use, and those of families whose schedule does not depend
# on the size of the picture.
EVERYWHERE = ("FlowMatchLCM", "FlowMatchEuler")
NO_SHIFT = (*EVERYWHERE, "LTXEulerAncestralRF", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver")


def drawing(name: str, model: Path) -> Any:
    """``name`` (without "Scheduler", and of FlowMatchEuler without "Discrete"), as the model's own is set up."""
    config: dict[str, Any] = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    if name == "FlowMatchEuler":
        name, config = "FlowMatchEulerDiscrete", config | {"stochastic_sampling": True}
    if name.startswith(("DPMSolver", "SASolver")) and "prediction_type" not in config:
        config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if name.startswith("DPMSolver"):
        config |= {"algorithm_type": "sde-dpmsolver++"}
    return getattr(diffusers, f"{name}Scheduler").from_config(config)
