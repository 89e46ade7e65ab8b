"""Compiled code is kept, and loaded, only where no other user of the host can put any."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ditrelay.errors import StartupError
from ditrelay.runtime import code_caches
from ditrelay.runtime.code_caches import check_code_caches, trouble_of

ASK = """
import sys, tempfile
from pathlib import Path
tempfile.gettempdir()  # as a forkserver may have done
from ditrelay.runtime.code_caches import use_private_caches
use_private_caches(sys.argv[1])
from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir
print(cache_dir(), triton_cache_dir(0), tempfile.gettempdir(), sep="\\n")
"""


def asked(run_dir: Path, **variables: str) -> list[Path]:
    """Where torch keeps its code, Triton's, and temporary files, in a worker of the launch."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHINDUCTOR", "TRITON"))} | variables
    made = subprocess.run(
        [sys.executable, "-c", ASK, run_dir], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return [Path(line) for line in made.stdout.split()]


def test_a_worker_loads_compiled_code_only_from_its_launch_s_folder(tmp_path: Path) -> None:
    run_dir, shared, kept = tmp_path / "run", tmp_path / "shared", tmp_path / "kept"
    for folder in (run_dir, shared):
        folder.mkdir(mode=0o700)
    shared.chmod(0o1777)
    assert all(path.is_relative_to(run_dir) for path in asked(run_dir, TMPDIR=str(shared), HOME=str(shared)))
    assert list(shared.iterdir()) == []
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in run_dir.iterdir())
    compiled, of_triton, _ = asked(run_dir, TMPDIR=str(shared), TORCHINDUCTOR_CACHE_DIR=str(kept))
    assert compiled == kept and of_triton.is_relative_to(kept)


def test_folders_that_others_can_change_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    assert trouble_of(mine) == "" and stat.S_IMODE(mine.stat().st_mode) == 0o700  # it was made
    for mode in (0o770, 0o777, 0o1777):
        mine.chmod(mode)
        assert trouble_of(mine) == f"other users can write to {mine}"
    assert trouble_of(mine / "below") == ""  # in a sticky folder nobody else can replace it
    mine.chmod(0o777)
    assert trouble_of(mine / "below") == f"other users can write to {mine}"
    mine.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(mine)
    assert trouble_of(link) == ""
    assert "can't be looked at" in trouble_of(Path("/proc/no-such-folder"))
    monkeypatch.setattr(code_caches.os, "getuid", lambda: os.geteuid() + 1)
    assert trouble_of(mine) == f"{mine} belongs to another user"


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HF_MODULES_CACHE"])
def test_a_start_names_the_variable_whose_folder_others_can_write_to(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "mine"))
    check_code_caches()
    (tmp_path / "mine").chmod(0o777)
    with pytest.raises(StartupError, match=f"^{name}: .*other users can write to"):
        check_code_caches()
