"""An importer that answers for ``sglang.multimodal_gen`` and all below it with ditrelay's modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

GUIDE = "sglang.multimodal_gen"
OURS = "ditrelay"


def our_name(name: str) -> str | None:
    """``sglang.multimodal_gen.X`` -> ``ditrelay.X``; ``None`` for a name that is not the guide's."""
    if name == GUIDE or name.startswith(GUIDE + "."):
        return OURS + name[len(GUIDE) :]
    return None


class _SameModule(InspectLoader):
    """Loads one of ditrelay's modules under another name."""

    def __init__(self, spec: ModuleSpec) -> None:
        self._spec = spec

    def exec_module(self, module: ModuleType) -> None:
        """Puts ditrelay's module in the place of the empty one.

        Not in ``create_module``: what that returns is given this loader's spec; ditrelay's module must keep its own.
        """
        sys.modules[module.__name__] = importlib.import_module(self._spec.name)

    def is_package(self, fullname: str) -> bool:
        return self._spec.submodule_search_locations is not None

    def get_code(self, fullname: str) -> CodeType | None:
        """For ``python -m``, which runs a module's code afresh."""
        loader = self._spec.loader
        return loader.get_code(self._spec.name) if isinstance(loader, InspectLoader) else None

    def get_source(self, fullname: str) -> str | None:
        loader = self._spec.loader
        return loader.get_source(self._spec.name) if isinstance(loader, InspectLoader) else None


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = our_name(fullname)
        spec = importlib.util.find_spec(ours) if ours else None
        if spec is None:
            return None
        alias = ModuleSpec(fullname, _SameModule(spec), origin=spec.origin)
        alias.submodule_search_locations = spec.submodule_search_locations
        return alias


def share_modules() -> None:
    """From now on, the guide's names give ditrelay's modules.

    First in line: the usual finder would load ditrelay's files a second time under the guide's names.
    """
    sys.meta_path.insert(0, _Finder())
