"""A diffusers model folder: found or fetched, then checked file by file before anything is loaded. No torch import."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from ditrelay.errors import UnsupportedModel
from ditrelay.models.quirks import BUILTINS

BUILTIN_PREFIX = "builtin:"

LIBRARIES = ("diffusers", "transformers")  # a class from anywhere else is code that came with the model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NO_WEIGHTS = ("scheduler", "processor", "feature_extractor", "image_processor", "video_processor")
_CONFIG_NAMES = ("config.json", "scheduler_config.json", "preprocessor_config.json")
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself


@dataclass(frozen=True)
class ModelFolder:
    """A folder with ``model_index.json`` and one sub-folder per component."""

    path: Path

    @cached_property
    def index(self) -> Mapping[str, Any]:
        """``model_index.json``. Raises ``UnsupportedModel`` where it is missing or no JSON object."""
        return read_json(self.path / "model_index.json")

    @property
    def components(self) -> dict[str, tuple[str, str]]:
        """Component name -> (library, class name), those left empty by the model left out."""
        pairs = {name: value for name, value in self.index.items() if isinstance(value, list) and len(value) == 2}
        return {name: (library, cls) for name, (library, cls) in pairs.items() if library is not None}

    def config(self, component: str) -> Mapping[str, Any]:
        """The component's ``config.json``."""
        return read_json(self.path / component / "config.json")

    @property
    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's ``scheduler_config.json``."""
        return read_json(self.path / "scheduler" / "scheduler_config.json")

    def check(self, *, weights: bool = True) -> None:
        """Raise ``UnsupportedModel``, naming the file, for the first thing missing or damaged in any component."""
        for name, (library, class_name) in self.components.items():
            if library not in LIBRARIES:
                raise UnsupportedModel(f"{name} is a {library}.{class_name}; code that comes with a model is not run")
            check_component(self.path / name, weights=weights)


def find_folder(model_path: str, *, weights: bool = True) -> Path:
    """The folder of ``builtin:NAME``, of a path, or of a hub id (``owner/name``, downloaded when it is not cached).

    Without ``weights``, a download leaves them out.

    Raises:
        UnsupportedModel: nothing is there.
    """
    if model_path.startswith(BUILTIN_PREFIX):
        return _builtin(model_path.removeprefix(BUILTIN_PREFIX))
    try:
        path = Path(model_path).expanduser()
        if path.is_dir():
            return path.resolve()
    except (OSError, RuntimeError) as error:  # it may not be looked at, its name is too long; there is no such user
        raise UnsupportedModel(f"the folder {model_path!r} can't be read: {error}") from error
    if _HUB_ID.fullmatch(model_path):
        return _download(model_path, weights)
    builtins = " or ".join(BUILTIN_PREFIX + name for name in BUILTINS)
    raise UnsupportedModel(f"there is no folder {model_path!r}; give a diffusers folder, a hub id, {builtins}")


def _builtin(name: str) -> Path:
    if name not in BUILTINS:
        raise UnsupportedModel(f"there is no model {BUILTIN_PREFIX}{name}; built in: {', '.join(BUILTINS)}, timed")
    return Path(str(resources.files("ditrelay"))) / "assets" / name


def _download(repo_id: str, weights: bool) -> Path:
    import httpx  # both only here: seconds to import, and needed for hub ids alone
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    endings = [".json", ".txt", ".model", ".jinja"] + [".safetensors"] * weights
    patterns = ["model_index.json"] + [f"*/*{ending}" for ending in endings]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedModel(
            f"{repo_id!r} is no folder here, and the hub did not give it: {reason[0] if reason else type(error)}"
        ) from error


def read_json(path: Path) -> Mapping[str, Any]:
    """Raises ``UnsupportedModel``, naming the file, where there is no JSON object in it."""
    content = _parse_json(path)
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} is not a JSON object")
    return content


def _parse_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnsupportedModel(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} is damaged: {error}") from error


def check_component(folder: Path, *, weights: bool = True) -> None:
    """Look for the component's config, and for each weight file that it should have. Reads headers only.

    Raises:
        UnsupportedModel: naming the folder or the file that is missing or damaged.
    """
    if not folder.is_dir():
        raise UnsupportedModel(f"the component folder {folder} is missing")
    for path in sorted(folder.glob("*.json")):
        _parse_json(path)
    if folder.name.startswith("tokenizer"):
        _check_tokenizer(folder)
        return
    if folder.name.startswith(_NO_WEIGHTS):
        if not any((folder / name).is_file() for name in _CONFIG_NAMES):
            raise UnsupportedModel(f"{folder} has no config; one of {', '.join(_CONFIG_NAMES)} is needed")
        return
    read_json(folder / "config.json")
    if weights:
        for file in _weight_files(folder):
            _check_safetensors(file)


def _check_tokenizer(folder: Path) -> None:
    """Where its files are missing, transformers makes a tokenizer that knows no word: all prompts would be the same."""
    read_json(folder / "tokenizer_config.json")
    vocabulary = [name for name in ("tokenizer.json", "vocab.txt", "vocab.json") if (folder / name).is_file()]
    if not vocabulary and not any(folder.glob("*.model")):
        raise UnsupportedModel(
            f"{folder} has no vocabulary; tokenizer.json, a .model file, or vocab.json and merges.txt are needed"
        )


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files of a component's weights: those of its index, else the single file."""
    for index in folder.glob("*.safetensors.index.json"):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UnsupportedModel(f"{index} is damaged: it names no weight files")
        yield from (folder / name for name in sorted({str(name) for name in weight_map.values()}))
        return
    single = [folder / name for name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    found = [path for path in single if path.exists()]
    if not found:
        raise UnsupportedModel(f"{folder} has no weights; {single[0].name} or {single[1].name} is needed")
    yield found[0]


def tensor_names(folder: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Each weight file of a component with the names of its tensors. Raises ``UnsupportedModel`` as its check does."""
    for path in _weight_files(folder):
        yield path, _check_safetensors(path)


def _check_safetensors(path: Path) -> tuple[str, ...]:
    """The header is JSON and the file has exactly the bytes that the header promises. Returns the tensors' names."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _MAX_SAFETENSORS_HEADER):
                raise ValueError("it is no safetensors file")
            header = json.loads(file.read(length))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except FileNotFoundError as error:
        raise UnsupportedModel(f"the weight file {path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UnsupportedModel(f"the weight file {path} is damaged: {error}") from error
    if size != 8 + length + max(ends, default=0):
        raise UnsupportedModel(f"the weight file {path} is damaged: {size} bytes do not match its header")
    return tuple(name for name in header if name != "__metadata__")
