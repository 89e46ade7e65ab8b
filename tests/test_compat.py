"""``compat/``: scripts written for the usage guide run unchanged on ditrelay's own modules. Each in a fresh process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from self_check import NAMES, passed, torchrun

from ditrelay._version import __version__

COMPAT = Path(__file__).parents[1] / "compat"
NAMED = COMPAT / "python"


def environment(*more: Path | str) -> dict[str, str]:
    folders = os.pathsep.join(str(folder) for folder in (NAMED, *more))
    return {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*words: str, path: tuple[Path, ...] = (), cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    return subprocess.run(
        command, env=environment(*path), cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def said(script: str) -> list[str]:
    """The lines that ``script`` prints."""
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


# ---------------------------------------------------------------- the guide's snippets

SERVER_ARGUMENTS = """
from sglang.multimodal_gen.runtime.server_args import ServerArgs

server_args = ServerArgs(
    model_path="/path/to/model",

    # Disaggregation settings
    enable_disagg=True,           # Enable disaggregated execution
    num_gpus=4,                   # Total number of GPUs
    num_non_dit_ranks=1,          # Number of Non-DiT ranks (Encoder/VAE)

    # Parallelism (applied to DiT ranks only in disagg mode)
    sp_degree=2,                  # Sequence parallelism degree
    tp_size=1,                    # Tensor parallelism size

    # Other settings
    attention_backend="fa",       # Flash attention
    enable_torch_compile=False,   # Torch compile (may cause issues with async)
)
"""

DETAILED_LOGGING = """
import logging

# Enable debug logging for communication
logging.getLogger("sglang.multimodal_gen.runtime.communication").setLevel(logging.DEBUG)

# Enable debug logging for executor
logging.getLogger("sglang.multimodal_gen.runtime.pipelines_core.executors").setLevel(logging.DEBUG)
"""


def test_the_guides_server_arguments_are_those_of_ditrelay():
    shown = """
import sys
print("torch" in sys.modules)
import ditrelay
print(type(server_args) is ditrelay.ServerArgs, server_args.num_gpus, server_args.sp_degree)
"""
    assert said(SERVER_ARGUMENTS + shown) == ["False", "True 4 2"]


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_guides_debug_logging_shows_ditrelays_lines_whether_set_before_or_after_the_import(order: str):
    imported = "import sglang.multimodal_gen\n"
    parts = [DETAILED_LOGGING, imported] if order == "before" else [imported, DETAILED_LOGGING]
    shown = """
logging.basicConfig(format="[%(levelname)s] %(name)s: %(message)s")
logging.getLogger("ditrelay.runtime.communication.communicator").debug("initiated")
logging.getLogger("ditrelay.runtime.scheduler").debug("not asked for")
logging.getLogger("ditrelay.runtime.pipelines_core.executors.overlap").debug("waited")
"""
    result = run("-c", "".join(parts) + shown)
    assert result.stderr.splitlines() == [
        "[DEBUG] ditrelay.runtime.communication.communicator: initiated",
        "[DEBUG] ditrelay.runtime.pipelines_core.executors.overlap: waited",
    ]


def test_a_logger_that_a_script_holds_since_before_the_import_is_ditrelays_after_it():
    script = """
import io, logging
held = logging.getLogger("sglang.multimodal_gen.engine")
text = io.StringIO()
held.addHandler(logging.StreamHandler(text))
import sglang
held.setLevel(logging.INFO)
logging.getLogger("ditrelay.engine").info("seen")
print(text.getvalue().strip())
print(logging.getLogger("sglang.multimodal_gen.engine") is logging.getLogger("ditrelay.engine"))
"""
    assert said(script) == ["seen", "True"]


@contextmanager
def guides_server(tmp_path: Path) -> Iterator[tuple[str, Callable[[str], str]]]:
    """The address of a server started by the guide's command, and a function that waits for a line of its log."""
    command = "-m sglang.multimodal_gen.launch_server --enable-disagg --num-gpus 4 --num-non-dit-ranks 1"
    ours = "--model-path builtin:timed --device cpu --port 0"  # a model that is there, and a port that is free
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        words = [sys.executable, *command.split(), *ours.split()]
        process = subprocess.Popen(words, env=environment(), stdout=file, stderr=file)
    try:
        wait = partial(wait_for, process, log)
        yield wait("Listening on ").partition("Listening on ")[2], wait
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()


def wait_for(process: subprocess.Popen[bytes], log: Path, text: str) -> str:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if text in line:
                return line
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} within 90 s in:\n{log.read_text()}")


def test_the_guides_launch_command_serves_and_logs_what_the_guide_says(tmp_path: Path):
    with guides_server(tmp_path) as (address, wait):
        for rank, role in enumerate(["dit", "dit", "dit", "non_dit"]):
            start = "[INFO] DisaggregatedExecutor initialized on"
            wait(f"{start} rank {rank} with role {role}, max_pending=2")
        ranks = httpx.get(f"{address}/v1/topology", timeout=30).json()["ranks"]
        assert [rank["role"] for rank in ranks] == ["dit", "dit", "dit", "non_dit"]


def test_the_guides_torchrun_command_runs_ditrelays_self_check():
    file = "python/sglang/multimodal_gen/runtime/communication/test_async_basic.py"
    assert (COMPAT / file).is_file()
    result = torchrun(2, str(COMPAT / file))
    assert result.returncode == 0, result.stderr
    assert tuple(passed(result)) == NAMES


# ---------------------------------------------------------------- one module under two names


def test_every_name_gives_the_same_module_object_and_leaves_it_as_it_was():
    script = """
import importlib, sys
names = ["", ".engine", ".cli", ".models.card", ".runtime", ".runtime.topology", ".runtime.communication.pending",
         ".runtime.communication.communicator", ".runtime.pipelines_core.executors.disaggregated_executor"]
for first, second in (("ditrelay", "sglang.multimodal_gen"), ("sglang.multimodal_gen", "ditrelay")):
    for name in names:
        one, two = importlib.import_module(first + name), importlib.import_module(second + name)
        assert one is two, name
        assert one.__name__ == one.__spec__.name == "ditrelay" + name, one.__spec__
from sglang.multimodal_gen.runtime import server_args
import ditrelay.runtime.server_args
assert server_args is ditrelay.runtime.server_args
files = [module.__file__ for module in {id(module): module for module in sys.modules.values()}.values()
         if getattr(module, "__name__", "").startswith("ditrelay")]
print(len(files) == len(set(files)), len(files) > 20)
"""
    assert said(script) == ["True True"]


def test_a_module_that_ditrelay_does_not_have_is_not_found_under_the_name_that_was_asked_for():
    result = run("-c", "import sglang.multimodal_gen.runtime.nowhere")
    assert result.returncode == 1
    assert "ModuleNotFoundError: No module named 'sglang.multimodal_gen.runtime.nowhere'" in result.stderr


# ---------------------------------------------------------------- only where it is asked for, and alone


def test_ditrelay_alone_does_not_bring_the_name():
    assert importlib.util.find_spec("sglang") is None


def test_it_stops_where_the_real_one_is_installed(tmp_path: Path):
    metadata = tmp_path / "sglang-0.5.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.9\n")
    result = run("-c", "import sglang.multimodal_gen", path=(tmp_path,))
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: the real sglang is here, too (version 0.5.9)")
    assert "pip uninstall ditrelay-sglang-names" in last


def test_it_stops_where_a_checkout_of_the_real_one_can_be_imported(tmp_path: Path):
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    result = run("-m", "sglang.multimodal_gen.launch_server", "--help", path=(tmp_path,))
    assert result.returncode == 1
    assert f"the real sglang is here, too ({tmp_path / 'sglang' / '__init__.py'})" in result.stderr


def test_its_version_is_that_of_ditrelay():
    project = tomllib.loads((COMPAT / "pyproject.toml").read_text())["project"]
    assert (project["version"], project["dependencies"]) == (__version__, [f"ditrelay=={__version__}"])
