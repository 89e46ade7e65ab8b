"""Load single components of a diffusers folder, and stand in for those that a role does not hold."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from ditrelay.errors import UnsupportedModel
from ditrelay.models.folder import LIBRARIES, ModelFolder, check_component
from ditrelay.models.parallel import enable_parallel
from ditrelay.models.quirks import ATTENTION_BACKENDS

if TYPE_CHECKING:
    from ditrelay.models.loading import LoadSpec

logger = logging.getLogger(__name__)

_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)


class ComponentStore:
    """The components of one rank, each loaded at most once, so that roles on one rank share them."""

    def __init__(self, folder: ModelFolder, spec: LoadSpec) -> None:
        quiet_libraries()
        self._folder = folder
        self._spec = spec
        self._device = torch.device(spec.device)
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._loaded: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """The component, on the device and in the dtype of the spec.

        Raises:
            UnsupportedModel: it is not in the folder, or its files don't fit together; names it.
        """
        if name not in self._loaded:
            component = self._load(name)
            if name == "transformer":
                self._prepare(component)
            self._loaded[name] = component
        return self._loaded[name]

    def needed_by(self, specs: Iterable[Any]) -> list[str]:
        """Of diffusers' component specs, those to be loaded from the folder; the others are made from a config."""
        names = self._folder.components
        return [spec.name for spec in specs if spec.name in names or spec.default_creation_method == "from_pretrained"]

    def stand_in(self, name: str) -> Any:
        """The component's class and config without its weights (they are on the meta device).

        diffusers reads sizes and scale factors off components; without one it falls back to defaults that may be wrong.
        """
        cls = self._class(name)
        with torch.device("meta"):
            return cls.from_config(dict(self._folder.config(name)))

    def _class(self, name: str) -> Any:
        if name not in self._folder.components:
            raise UnsupportedModel(f"{self._folder.path / 'model_index.json'} names no {name}, which this model needs")
        library, class_name = self._folder.components[name]
        cls = getattr(importlib.import_module(library), class_name, None) if library in LIBRARIES else None
        if cls is None:
            raise UnsupportedModel(f"{name} is a {library}.{class_name}, which the installed {library} does not have")
        return cls

    def _load(self, name: str) -> Any:
        cls = self._class(name)
        path = self._folder.path / name
        check_component(path)
        try:
            if not issubclass(cls, torch.nn.Module):
                return cls.from_pretrained(str(path), local_files_only=True)
            model, info = cls.from_pretrained(
                str(path), dtype=self._dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        except _LOAD_ERRORS as error:
            raise UnsupportedModel(f"{path} can't be loaded as {cls.__name__}: {_first_line(error)}") from error
        if missing := sorted(info["missing_keys"]):
            raise UnsupportedModel(f"the weights in {path} lack {len(missing)} tensors, for instance {missing[0]}")
        return model.requires_grad_(False).to(self._device)

    def _prepare(self, transformer: Any) -> None:
        """Attention kernels first (parallelism checks them), compilation last (it sees the hooks of the others)."""
        set_attention(transformer, self._spec.attention_backend, self._device)
        enable_parallel(transformer, sp=self._spec.sp, tp=self._spec.tp, device=self._device)
        if self._spec.torch_compile:
            compile_blocks(transformer)


def set_attention(transformer: Any, backend: str, device: torch.device) -> None:
    """Choose the attention kernels: the first of the backend's candidates that works here; a later one with a warning.

    Args:
        backend: a key of ``quirks.ATTENTION_BACKENDS``.
    """
    candidates = ATTENTION_BACKENDS[backend]
    for name in candidates:
        if device.type == "cpu" and name != "native":
            continue
        try:
            transformer.set_attention_backend(name)
        except (RuntimeError, ImportError) as error:
            logger.debug("attention backend %s is not usable: %s", name, error)
            continue
        if name == "native" and name != candidates[0]:
            logger.warning("--attention-backend %s is not available here; using torch's own attention", backend)
        return


def compile_blocks(transformer: Any) -> None:
    """Compile one block for all its likes; the whole module where diffusers names no such blocks (SD3, CogVideoX)."""
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks()
    else:
        transformer.compile()


def quiet_libraries() -> None:
    """Switch off the libraries' own progress bars and log lines; what goes wrong reaches us as an exception."""
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"a config is not JSON ({error.msg})"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
