"""Where libraries keep compiled code between runs: only in folders that nobody else can write to.

torch keeps it in ``/tmp/torchinductor_USER`` by default and loads what it finds there. Another user of the host who
makes that folder first runs code in our processes.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from ditrelay.errors import StartupError

# Variables that name such a folder, and where it is in the launch's own folder.
_COMPILED = {"TORCHINDUCTOR_CACHE_DIR": "inductor"}  # it is in the shared temporary folder where nobody names it
_IN_HOME = {  # these are in the home folder, which can be shared as well (HOME=/tmp in a container)
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "MPLCONFIGDIR": "matplotlib",
}
_OTHERS = ("HF_MODULES_CACHE",)  # nothing is loaded from it, but it is in the import path
_SHARED_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check_code_caches() -> None:
    """Raises ``StartupError`` for a variable that names a folder where others can put code."""
    for name in (*_COMPILED, *_IN_HOME, *_OTHERS):
        folder = os.environ.get(name)
        trouble = trouble_of(Path(folder)) if folder else ""
        if trouble:
            raise StartupError(
                f"{name}: compiled code is loaded from {folder}, and {trouble}; name a folder that only you can write "
                "to, or leave it unset"
            )


def use_private_caches(run_dir: str) -> None:
    """Let the libraries of this process keep code, and all temporary files, in a launch's own folder.

    What a variable names already stays: the head has checked it.
    """
    own = dict(_COMPILED)
    if not _is_home_safe():
        own |= _IN_HOME
    for name, folder in own.items():
        os.environ[name] = os.environ.get(name) or _made(run_dir, folder)
    # For what else uses fixed names in the temporary folder. The forkserver may have asked where that is before.
    os.environ["TMPDIR"] = tempfile.tempdir = _made(run_dir, "tmp")


def _is_home_safe() -> bool:
    try:
        home = Path.home()
    except RuntimeError:  # this user has none
        return False
    return home.is_dir() and not trouble_of(home)


def _made(run_dir: str, name: str) -> str:
    path = os.path.join(run_dir, name)
    os.makedirs(path, mode=0o700, exist_ok=True)
    return path


def trouble_of(folder: Path) -> str:
    """Who else can change what is in ``folder``, as half a sentence; nothing where nobody can.

    A folder that is still missing is made. Every folder on the way to it counts, as does every link.
    """
    path = Path(os.path.abspath(folder))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        real = path.resolve(strict=True)
        links = [each for each in (path, *path.parents) if each.is_symlink()]
        return _trouble_at(real, is_parent=False) or next(
            filter(None, (_trouble_at(each, is_parent=True) for each in (*links, *real.parents))), ""
        )
    except (OSError, RuntimeError) as error:
        return f"it can't be looked at ({error})"


def _trouble_at(path: Path, *, is_parent: bool) -> str:
    """Of a folder in which anybody may make things, but change only their own (sticky), others are safe parents."""
    found = path.lstat()
    if found.st_uid != os.getuid() and not (is_parent and found.st_uid == 0):
        return f"{path} belongs to another user"
    if stat.S_ISLNK(found.st_mode) or not found.st_mode & _SHARED_WRITE:
        return ""
    return "" if is_parent and found.st_mode & stat.S_ISVTX else f"other users can write to {path}"
