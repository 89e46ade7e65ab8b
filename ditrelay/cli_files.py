"""Where ``ditrelay generate`` puts what it makes."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ditrelay.cli_run import Job
from ditrelay.errors import ConfigError
from ditrelay.runtime.request import PictureFormat, SamplingParams
from ditrelay.runtime.tickets import PICTURE_SUFFIXES

if TYPE_CHECKING:
    from ditrelay.models.card import ModelCard

DEFAULT_DIRECTORY = Path("ditrelay-output")
_MEDIA_SUFFIX = {"image": ".png", "video": ".mp4"}
_MEDIA_SUFFIXES = frozenset({*PICTURE_SUFFIXES, ".gif", ".bmp", ".tiff", ".avif", ".mp4", ".webm", ".mov"})


class Folders:
    """Makes folders; those that hold nothing at the end go again."""

    def __init__(self) -> None:
        self._made: list[Path] = []

    def __enter__(self) -> Folders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                path.rmdir()

    def make(self, path: Path) -> Path:
        """``path``, a folder that can be written to.

        Raises:
            ConfigError: it cannot be made.
            OSError: it cannot be written to.
        """
        missing = [each for each in (*reversed(path.parents), path) if not each.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("--output", f"cannot make the directory {path}: {reason(error)}") from error
        self._made += missing
        with tempfile.TemporaryFile(dir=path):  # the only way to know, whatever file system it is
            return path


def format_of(path: Path | None) -> PictureFormat | None:
    """The format that the name of a picture's file asks for; ``None`` where it asks for none."""
    return None if path is None else PICTURE_SUFFIXES.get(path.suffix.lower())


def slug(prompt: str) -> str:
    """``"A red apple!"`` -> ``"a-red-apple"``: a short file name without suffix."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "output"


def reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"


def plan_files(card: ModelCard, given: Path | None, params: list[SamplingParams], folders: Folders) -> list[Job]:
    """A file for each request, in a directory that is there and can be written to: what is drawn must not be lost.

    Raises:
        ConfigError: ``--output`` cannot be what it is asked to be.
    """
    suffix = _MEDIA_SUFFIX[card.media]
    try:
        if given is not None and given.suffix.lower() in _MEDIA_SUFFIXES and not (len(params) > 1 and given.is_dir()):
            _check_file(given, card, len(params), folders)
            return [Job(0, params[0], given, overwrites=True)]
        if len(params) == 1:
            path = folders.make(given or Path()) / (slug(params[0].prompt) + suffix)
            return [Job(0, params[0], _unused(path))]
        directory, width = folders.make(given or DEFAULT_DIRECTORY), len(str(len(params)))
        names = [f"{i:0{width}}-{slug(each.prompt)}{suffix}" for i, each in enumerate(params, start=1)]
        return [Job(i, each, _unused(directory / names[i])) for i, each in enumerate(params)]
    except OSError as error:
        raise ConfigError("--output", f"cannot write to {given or 'this directory'}: {reason(error)}") from error


def _check_file(path: Path, card: ModelCard, count: int, folders: Folders) -> None:
    allowed = tuple(PICTURE_SUFFIXES) if card.media == "image" else (_MEDIA_SUFFIX[card.media],)
    if count > 1:
        raise ConfigError("--output", f"{path} is one file, and {count} are asked for; allowed: a directory")
    if path.suffix.lower() not in allowed:
        raise ConfigError("--output", f"{path}: the model makes no such files; allowed: {', '.join(allowed)}")
    if path.is_dir():
        raise ConfigError("--output", f"{path} is a directory; allowed: a file name")
    if not path.exists():
        folders.make(path.parent)
    elif not os.access(path, os.W_OK):
        raise ConfigError("--output", f"{path} is there and cannot be written to; choose another")


def _unused(path: Path) -> Path:
    """``path``, with a number where a file of that name exists: a name that nobody chose overwrites nothing."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def write(job: Job, media: bytes) -> Path:
    """The file of ``job``, whole or not there. Where another run has taken a name that nobody chose, it is another.

    Raises:
        OSError: it cannot be written.
    """
    path = job.path
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            file = path.open("wb" if job.overwrites else "xb")
        except FileExistsError:
            path = _unused(job.path)
            continue
        try:
            with file:
                file.write(media)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path
