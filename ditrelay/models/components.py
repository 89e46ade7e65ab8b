"""Load single components of a diffusers folder, and stand in for those that a role does not hold."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from ditrelay.errors import ConfigError, UnsupportedModel
from ditrelay.models.cpu_convolutions import use_onednn
from ditrelay.models.dummy import build_dummy
from ditrelay.models.folder import LIBRARIES, ModelFolder, check_component
from ditrelay.models.offload import Parked, offload_blocks, offload_name
from ditrelay.models.parallel import ReplicaMesh, supports_context_parallel
from ditrelay.models.quirks import ATTENTION_BACKENDS, CHANNELS_LAST_VAES, RING_BACKENDS
from ditrelay.models.weights import check_all_used

if TYPE_CHECKING:
    from ditrelay.models.load_spec import LoadSpec

logger = logging.getLogger(__name__)

_LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    AssertionError,
    SafetensorError,
)


class ComponentStore:
    """The components of one rank, each loaded at most once, so that roles on one rank share them.

    Attributes:
        mesh: the ranks of the replica, from when the transformer is loaded; None for one rank.
    """

    def __init__(self, folder: ModelFolder, spec: LoadSpec) -> None:
        quiet_libraries()
        self._folder = folder
        self._spec = spec
        self._device = torch.device(spec.device)
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._loaded: dict[str, Any] = {}
        self._parked: dict[str, Parked] = {}
        self.mesh: ReplicaMesh | None = None

    def get(self, name: str) -> Any:
        """The component, on the device and in the dtype of the spec.

        Raises:
            UnsupportedModel: it is not in the folder, or its files don't fit together; names it.
        """
        if name not in self._loaded:
            component = self._load(name)
            if name == "transformer":
                self._prepare(component)
            elif isinstance(component, torch.nn.Module):
                self._settle(name, component)
            self._loaded[name] = component
        return self._loaded[name]

    @contextmanager
    def on_device(self, names: Iterable[str]) -> Iterator[None]:
        """Those of the named components that are parked in host memory are on the device inside the block."""
        with ExitStack() as stack:
            for name in sorted(self._parked.keys() & set(names)):  # sorted: two threads never wait for each other
                stack.enter_context(self._parked[name])
            yield

    def needed_by(self, specs: Iterable[Any]) -> list[str]:
        """Of diffusers' component specs, those to be loaded from the folder; the others are made from a config."""
        names = self._folder.components
        return [spec.name for spec in specs if spec.name in names or spec.default_creation_method == "from_pretrained"]

    def stand_in(self, name: str) -> Any:
        """The component's class and config without its weights (they are on the meta device).

        diffusers reads sizes and scale factors off components; without one it falls back to defaults that may be wrong.
        """
        cls = self._class(name)
        config = dict(self._folder.config(name))
        try:
            with torch.device("meta"):
                return cls.from_config(config)
        except _LOAD_ERRORS as error:
            raise self._unloadable(name, error) from error

    def _class(self, name: str) -> Any:
        if name not in self._folder.components:
            raise UnsupportedModel(f"{self._folder.path / 'model_index.json'} names no {name}, which this model needs")
        library, class_name = self._folder.components[name]
        cls = getattr(importlib.import_module(library), str(class_name), None) if library in LIBRARIES else None
        if not isinstance(cls, type):
            raise UnsupportedModel(f"{name} is a {library}.{class_name}, which the installed {library} does not have")
        return cls

    def _load(self, name: str) -> Any:
        cls = self._class(name)
        path = self._folder.path / name
        is_dummy = self._spec.load_format == "dummy"
        check_component(path, weights=not is_dummy)
        try:
            if not issubclass(cls, torch.nn.Module):
                return cls.from_pretrained(str(path), local_files_only=True)
            if is_dummy:
                return build_dummy(cls, path, dtype=self._dtype, device=self._device, home=self._home(name))
            model, info = cls.from_pretrained(
                str(path), dtype=self._dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        except _LOAD_ERRORS as error:
            raise self._unloadable(name, error) from error
        if missing := sorted(info["missing_keys"]):
            raise UnsupportedModel(f"the weights in {path} lack {len(missing)} tensors, for instance {missing[0]}")
        check_all_used(model, path, info["unexpected_keys"], whole=self._folder.components[name][0] == "diffusers")
        return model.requires_grad_(False).to(self._home(name))

    def _unloadable(self, name: str, error: Exception) -> UnsupportedModel:
        class_name = self._folder.components[name][1]
        return UnsupportedModel(f"{self._folder.path / name} can't be loaded as {class_name}: {_first_line(error)}")

    def _home(self, name: str) -> torch.device:
        """Where the component's weights are while nothing runs."""
        return torch.device("cpu") if self._is_offloaded(name) else self._device

    def _is_offloaded(self, name: str) -> bool:
        return offload_name(name) in self._spec.offload

    def _settle(self, name: str, component: torch.nn.Module) -> None:
        if self._device.type == "cuda" and type(component).__name__ in CHANNELS_LAST_VAES:
            put_channels_last(component)
        if self._device.type == "cpu":
            use_onednn(component)
        if self._is_offloaded(name):
            self._parked[name] = Parked(component, self._device)

    def _prepare(self, transformer: Any) -> None:
        """Attention kernels first (parallelism checks them), compilation last (it sees the hooks of the others)."""
        spec = self._spec
        set_attention(transformer, spec.attention_backend, self._device, sp=spec.sp, ring=spec.ring)
        if spec.ranks > 1:
            self.mesh = ReplicaMesh(spec, self._device)
            self.mesh.split(transformer)
        if self._is_offloaded("transformer"):
            offload_blocks(transformer, self._device)
        if spec.torch_compile:
            compile_blocks(transformer)


def set_attention(transformer: Any, backend: str, device: torch.device, *, sp: int = 1, ring: int = 1) -> None:
    """Choose the attention kernels: the first of the backend's candidates that works here; a later one with a warning.

    Args:
        backend: a key of ``quirks.ATTENTION_BACKENDS``.
        sp: above 1 only kernels that diffusers can run sequence parallel are tried.
        ring: above 1 only kernels that ring attention can use are tried.

    Raises:
        ConfigError: none of the candidates works with ring attention.
    """
    candidates = ATTENTION_BACKENDS[backend]
    if ring > 1 and device.type != "cpu":
        candidates = RING_BACKENDS.get(backend, ())
    for name in candidates:
        if device.type == "cpu" and name != "native":
            continue
        if sp > 1 and not supports_context_parallel(name):
            continue
        try:
            transformer.set_attention_backend(name)
        except (RuntimeError, ImportError) as error:
            logger.debug("attention backend %s is not usable: %s", name, error)
            continue
        if name == "native" and name != candidates[0]:
            logger.warning("--attention-backend %s is not available here; using torch's own attention", backend)
        return
    if ring > 1 and device.type != "cpu":
        raise ConfigError(
            "--ring-degree",
            f"ring attention needs the log-sum-exp of its kernels; none of --attention-backend {backend} gives it; "
            f"allowed: --attention-backend {', '.join(RING_BACKENDS)}, or --ulysses-degree",
        )


def compile_blocks(transformer: Any) -> None:
    """Compile one block for all its likes; the whole module where diffusers names no such blocks (SD3, CogVideoX)."""
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks()
    else:
        transformer.compile()


def put_channels_last(module: torch.nn.Module) -> None:
    """The weights of 2-D and 3-D convolutions with their channels last in memory; values and shapes stay."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])


def quiet_libraries() -> None:
    """Switch off the libraries' own progress bars and log lines; what goes wrong reaches us as an exception."""
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()


def _first_line(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"a config is not JSON ({error.msg})"
    if isinstance(error, AssertionError) and not str(error):
        return "values of its config.json don't go together"
    if "ignore_mismatched_sizes" in str(error) and "expected shape" not in str(error):
        return "its weights have other shapes than its config.json says"  # transformers points to a report in the log
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
