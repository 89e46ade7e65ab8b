"""The guide's logger names give ditrelay's loggers."""

from __future__ import annotations

import importlib.util
import logging
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from sglang._modules import GUIDE, OURS


def share_loggers() -> None:
    """Make every logger ``sglang.multimodal_gen.X`` the logger ``ditrelay.X``, those included that were made before."""
    spec = importlib.util.find_spec(OURS)
    assert spec is not None and spec.submodule_search_locations is not None, f"{OURS} is a package"
    known = logging.Logger.manager.loggerDict
    for suffix in ("", *_below("", spec.submodule_search_locations)):
        ours = logging.getLogger(OURS + suffix)
        before = known.get(GUIDE + suffix)
        known[GUIDE + suffix] = ours
        if isinstance(before, logging.Logger) and before is not ours:
            _become(before, ours)


def _below(prefix: str, folders: Sequence[str]) -> Iterator[str]:
    """``.runtime``, ``.runtime.scheduler``, ...: every module below, none of them imported."""
    for module in pkgutil.iter_modules(folders):
        name = f"{prefix}.{module.name}"
        yield name
        if module.ispkg:
            yield from _below(name, [str(Path(folder) / module.name) for folder in folders])


def _become(before: logging.Logger, ours: logging.Logger) -> None:
    """A script may still hold ``before``: what it was set to holds for ``ours``, and they are one from now on."""
    if before.level != logging.NOTSET:
        ours.setLevel(before.level)
    for handler in before.handlers:
        ours.addHandler(handler)
    before.__dict__ = ours.__dict__
