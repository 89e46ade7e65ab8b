"""Ctrl-C in a terminal, at every moment of the program's life."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def interrupted_after(
    moment: float, cwd: Path, *words: str, ignores: bool = False, once: str = "", python: tuple[str, ...] = ()
) -> tuple[int, str, str, float]:
    """Ctrl-C in a terminal, ``moment`` seconds after the start, or after a line on stderr that holds ``once``: exit
    code, stdout, stderr from then on, seconds to the end."""
    disposition = signal.SIG_IGN if ignores else signal.SIG_DFL  # not what the shell of this test run has left
    started = subprocess.Popen(
        [sys.executable, *python, "-m", "ditrelay", *words],
        cwd=cwd,
        env=ENVIRONMENT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, disposition),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert started.stderr is not None
        while once and once not in started.stderr.readline():
            assert started.poll() is None
        time.sleep(moment)
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to all of them
        began = time.monotonic()
        out, err = started.communicate(timeout=60)
        return started.returncode, out, err, time.monotonic() - began
    finally:
        started.kill()


@pytest.mark.parametrize("moment", [0.0, 1.5])
def test_ctrl_c_while_it_starts_ends_it_at_once_with_one_line_and_no_folder(tmp_path: Path, moment: float) -> None:
    words = ("generate", "a cat", "--num-images=2", "--output=made/here", "--num-gpus=3", "--enable-disagg")
    more = ("--num-non-dit-ranks=1", "--device=cpu")
    code, out, err, _ = interrupted_after(moment, tmp_path, *words, *more, once="starting 3 workers")
    assert (code, out, err) == (130, "", "interrupted\n")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_it_imports_is_one_line(tmp_path: Path) -> None:
    python = ("-X", "importtime")  # tells when a module is there
    code, out, err, _ = interrupted_after(0, tmp_path, "generate", "a cat", once="rich.text", python=python)
    assert (code, out) == (130, "")
    assert [line for line in err.splitlines() if not line.startswith("import time:")] == ["interrupted"]


def test_ctrl_c_while_a_server_loads_its_model_does_not_wait_for_it(tmp_path: Path) -> None:
    words = ("serve", "--device=cpu", "--port=0", "--num-gpus=4")
    code, _, err, seconds = interrupted_after(0.5, tmp_path, *words, once="Listening on")
    assert code in (0, 130) and "Traceback" not in err
    assert seconds < 15  # four workers that all load take longer than this on a loaded machine


def test_a_background_job_whose_shell_ignores_ctrl_c_goes_on(tmp_path: Path) -> None:
    words = ("generate", "a cat", "--model-path=builtin:timed", "--device=cpu")
    code, out, err, _ = interrupted_after(1, tmp_path, *words, ignores=True)
    assert code == 0, err
    assert "wrote a-cat.png" in out
