"""Serve diffusion transformers with asynchronous disaggregated execution.

    with ditrelay.Engine(ditrelay.ServerArgs(enable_disagg=True, num_gpus=4)) as engine:
        engine.generate("a red apple").save("apple.png")

Importing this package is cheap: each name is imported on first use, and torch only in worker processes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ditrelay._version import __version__

if TYPE_CHECKING:
    from ditrelay import errors
    from ditrelay.async_engine import AsyncEngine
    from ditrelay.engine import Engine, Result
    from ditrelay.runtime.request import SamplingParams
    from ditrelay.runtime.server_args import ServerArgs

__all__ = ["AsyncEngine", "Engine", "Result", "SamplingParams", "ServerArgs", "__version__", "errors"]

_HOME = {
    "AsyncEngine": "ditrelay.async_engine",
    "Engine": "ditrelay.engine",
    "Result": "ditrelay.engine",
    "SamplingParams": "ditrelay.runtime.request",
    "ServerArgs": "ditrelay.runtime.server_args",
}


def __getattr__(name: str) -> object:
    if name == "errors":
        return importlib.import_module("ditrelay.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'ditrelay' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
