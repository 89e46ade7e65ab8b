"""The model folder of a workload: built in, config-only at real size, or tiny with random weights.

``python benchmarks/serving_models.py WORKLOAD DIR`` makes it; serving.py calls that as a process of its own, so that
the process which measures imports neither torch nor diffusers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT
from serving_workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    import torch

BUILD_SECONDS = 180.0


def model_path(workload: Workload, root: Path) -> str:
    """What ``ServerArgs.model_path`` is to be; made under ``root`` on the first call.

    Raises:
        RuntimeError: the folder could not be made; says why.
    """
    kind, _, name = workload.model.partition(":")
    if kind == "builtin":
        return workload.model
    folder = root / workload.model.replace(":", "-")
    if not (folder / "model_index.json").exists():
        script = [str(ROOT / "benchmarks" / "model_configs.py"), name, str(folder)]
        if kind == "tiny":
            script = [__file__, workload.name, str(folder)]
        try:
            made = subprocess.run([sys.executable, *script], capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{workload.model} was not made within {BUILD_SECONDS:.0f} s") from None
        if made.returncode:
            raise RuntimeError(f"{workload.model} could not be made: {last_line(made.stderr)}")
    return str(folder)


def last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "no reason given")


def make_tiny(workload: Workload, folder: Path) -> None:
    """The test suite's tiny model, its transformer with the workload's number of heads; the weights are left out."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_models

    made = tiny_models.build(workload.model.partition(":")[2], folder.parent)
    config = made / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": workload.heads}))
    for weights in made.glob("*/*.safetensors"):
        weights.unlink()
    made.rename(folder)


def build_stock_pipeline(
    folder: str, *, device: str, dtype: str, load_format: str, given: Mapping[str, Any] | None = None
) -> Any:
    """The stock diffusers pipeline, whole, on one device; with ``dummy`` the random weights that ditrelay makes.

    Args:
        given: components that are there already.
    """
    import diffusers
    import torch
    from diffusers.utils import logging

    logging.set_verbosity_error()
    path = resolved(folder)
    torch_dtype = getattr(torch, dtype)
    if load_format != "dummy":
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(path), dtype=torch_dtype, **given or {}).to(device)
    else:
        pipeline = _with_random_weights(path, torch.device(device), torch_dtype, given or {})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def resolved(folder: str) -> Path:
    """The folder of a ``builtin:`` model, or the path itself."""
    from ditrelay.models.folder import find_folder

    return find_folder(folder, weights=False)


def _with_random_weights(path: Path, device: torch.device, dtype: torch.dtype, given: Mapping[str, Any]) -> Any:
    import diffusers
    from torch.nn import Module

    from ditrelay.models.dummy import build_dummy
    from ditrelay.models.folder import ModelFolder

    folder = ModelFolder(path)
    parts: dict[str, Any] = dict(given)
    for name, (library, class_name) in folder.components.items():
        if name in parts:
            continue
        cls = getattr(importlib.import_module(library), class_name)
        if issubclass(cls, Module):
            parts[name] = build_dummy(cls, path / name, dtype=dtype, device=device)
        else:
            parts[name] = cls.from_pretrained(str(path / name), local_files_only=True)
    # what is no component (switches such as is_distilled) and components that the model leaves empty
    rest = {name: value for name, value in folder.index.items() if not name.startswith("_") and name not in parts}
    empty = {name: None if isinstance(value, list) else value for name, value in rest.items()}
    return getattr(diffusers, folder.index["_class_name"])(**parts, **empty)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("workload", choices=[name for name, each in WORKLOADS.items() if each.heads])
    arguments.add_argument("folder", type=Path)
    options = arguments.parse_args()
    make_tiny(WORKLOADS[options.workload], options.folder)
