"""The import order goes down only, and some things are allowed in some rooms only. Read from the source (ast)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ditrelay"

# Each module's layer, by the first pattern that matches. A module may import its own layer and those below.
LAYERS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (
        0,
        (
            "ditrelay._version",
            "ditrelay.errors",
            "ditrelay.runtime",
            "ditrelay.runtime.degrees",
            "ditrelay.runtime.flags",
            "ditrelay.runtime.http_args",
            "ditrelay.runtime.server_args",
            "ditrelay.runtime.request",
            "ditrelay.runtime.payloads",
            "ditrelay.runtime.topology",
            "ditrelay.runtime.messages",
            "ditrelay.runtime.preview_messages",
            "ditrelay.runtime.start_messages",
        ),
    ),
    (
        1,
        (
            "ditrelay.runtime.activity",
            "ditrelay.runtime.admission",
            "ditrelay.runtime.deadlines",
            "ditrelay.runtime.descriptors",
            "ditrelay.runtime.scheduler",
            "ditrelay.runtime.scheduler_settings",
            "ditrelay.runtime.scheduling",
            "ditrelay.runtime.scheduling.*",
            "ditrelay.runtime.meters",
            "ditrelay.runtime.metrics",
            "ditrelay.runtime.placement",
            "ditrelay.runtime.timeline",
            "ditrelay.runtime.trace",
            "ditrelay.runtime.trace_*",
            "ditrelay.runtime.logs",
            "ditrelay.runtime.spool",
            "ditrelay.runtime.status",
            "ditrelay.runtime.communication",
            "ditrelay.runtime.communication.*",
        ),
    ),
    (2, ("ditrelay.models", "ditrelay.models.*")),
    (
        3,
        (
            "ditrelay.runtime.pipelines_core",
            "ditrelay.runtime.pipelines_core.pipeline",
            "ditrelay.runtime.pipelines_core.clips",
            "ditrelay.runtime.pipelines_core.media",
            "ditrelay.runtime.pipelines_core.stages",
            "ditrelay.runtime.pipelines_core.stages.*",
            "ditrelay.runtime.pictures",
            "ditrelay.runtime.pictures.*",
        ),
    ),
    (4, ("ditrelay.runtime.pipelines_core.executors", "ditrelay.runtime.pipelines_core.executors.*")),
    (
        5,
        (
            "ditrelay.async_engine",
            "ditrelay.engine",
            "ditrelay.runtime.worker",
            "ditrelay.runtime.worker_*",
            "ditrelay.runtime.launcher",
            "ditrelay.runtime.controller",
            "ditrelay.runtime.control_plane",
            "ditrelay.runtime.crew",
            "ditrelay.runtime.processes",
            "ditrelay.runtime.starter",
            "ditrelay.runtime.watchdog",
            "ditrelay.runtime.edge_faults",
            "ditrelay.runtime.request_log",
            "ditrelay.runtime.run_dir",
            "ditrelay.runtime.code_caches",
            "ditrelay.runtime.telemetry",
            "ditrelay.runtime.event_relay",
            "ditrelay.runtime.tickets",
            "ditrelay.runtime.warm_up",
            "ditrelay.runtime.replica*",
        ),
    ),
    (
        6,
        (
            "ditrelay",
            "ditrelay.__main__",
            "ditrelay.launch_server",
            "ditrelay.cli",
            "ditrelay.cli_*",
            "ditrelay.doctor",
            "ditrelay.server",
            "ditrelay.server.*",
        ),
    ),
)

# What is imported or called only in some modules: name (with all below it) -> patterns of modules.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch.distributed": (
        "ditrelay.runtime.communication.*",
        "ditrelay.models.*",
        "ditrelay.runtime.worker",
        "ditrelay.runtime.replica*",
    ),
    "os.environ": ("ditrelay.runtime.server_args", "ditrelay.runtime.launcher", "ditrelay.runtime.code_caches"),
    "os.environb": (),
    "os.getenv": (),
    "os.putenv": (),
    "print": ("ditrelay.cli", "ditrelay.cli_*", "ditrelay.doctor", "ditrelay.runtime.communication.test_async_basic"),
    "eval": (),
    "exec": (),
    "hasattr": (),
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
    "marshal": (),
    "shelve": (),
    "joblib": (),
    "torch.load": (),
    "torch.save": (),
    "torch.distributed.broadcast_object_list": (),
    "torch.distributed.send_object_list": (),
    "torch.distributed.recv_object_list": (),
    "torch.distributed.all_gather_object": (),
    "torch.distributed.gather_object": (),
    "torch.distributed.scatter_object_list": (),
}

# Rooms that never import another, whatever its layer.
NEVER: tuple[tuple[str, str], ...] = (
    ("ditrelay.runtime.pipelines_core.stages*", "ditrelay.runtime.communication*"),
    ("ditrelay.runtime.pipelines_core.pipeline", "ditrelay.runtime.communication*"),
)

# Values are light: not imported there when the program runs (for type checkers they may be).
NOT_IN_LAYER_0 = ("torch", "diffusers", "transformers")


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path, PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer_of(module: str) -> int | None:
    for layer, patterns in LAYERS:
        if any(fnmatch(module, pattern) for pattern in patterns):
            return layer
    return None


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of everything imported: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name is from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str:
    """The module that an imported name is or comes from."""
    return name if name in MODULES else name.rpartition(".")[0]


def without_type_checking(tree: ast.Module) -> ast.Module:
    """``tree`` without what only type checkers run."""

    class Remover(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            return node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else node

    return Remover().visit(tree)


def uses(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported or looked up through an import: ``import torch; torch.load`` gives both."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            # "import a.b" binds a; only "import a.b as c" binds all of it.
            bound = [(alias.asname, alias.name, alias.name.partition(".")[0]) for alias in node.names]
            aliases |= {asname or first: full if asname else first for asname, full, first in bound}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    yield from imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            yield aliases.get(first, first) + ("." + rest if rest else "")


def faults(module: str, source: str) -> list[str]:
    """Everything in ``source`` that the tables above forbid ``module``."""
    tree = ast.parse(source)
    return [*_upward(module, tree), *_misplaced(module, tree), *_heavy(module, tree)]


def _upward(module: str, tree: ast.Module) -> Iterator[str]:
    layer = layer_of(module)
    assert layer is not None, f"{module} has no layer: give it one in LAYERS"
    for name in imports(tree):
        if name.split(".")[0] != "ditrelay":
            continue
        target = module_of(name)
        below = layer_of(target)
        if below is None or below > layer:
            yield f"{module} (layer {layer}) imports {target} (layer {below}), which is above it"
        for room, other in NEVER:
            if fnmatch(module, room) and fnmatch(target, other):
                yield f"{module} imports {target}: {room} never imports {other}"


def _misplaced(module: str, tree: ast.Module) -> Iterator[str]:
    used = set(uses(tree))
    for name, allowed in ONLY_IN.items():
        found = any(each == name or each.startswith(name + ".") for each in used)
        if found and not any(fnmatch(module, pattern) for pattern in allowed):
            yield f"{module} uses {name}; allowed in: {', '.join(allowed) or 'no module'}"


def _heavy(module: str, tree: ast.Module) -> Iterator[str]:
    if layer_of(module) == 0:
        for name in imports(without_type_checking(tree)):
            if name.split(".")[0] in NOT_IN_LAYER_0:
                yield f"{module} is a value (layer 0) and imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_module_keeps_to_its_layer_and_its_room(module: str) -> None:
    assert faults(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_every_pattern_of_one_module_names_a_module_that_exists() -> None:
    exact = {pattern for _, patterns in LAYERS for pattern in patterns if "*" not in pattern}
    assert exact <= set(MODULES)


# ---------------------------------------------------------------- the test itself is tested


@pytest.mark.parametrize(
    "module, source",
    [
        ("ditrelay.errors", "from ditrelay.runtime.request import Request"),  # same layer: allowed
        ("ditrelay.engine", "import ditrelay.runtime.scheduler"),
        ("ditrelay.runtime.worker", "import os\nimport torch.distributed as dist\ndist.init_process_group()"),
        ("ditrelay.runtime.launcher", "import os\nos.environ.copy()"),
        ("ditrelay.runtime.payloads", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("ditrelay.models.loading", "model.eval()\nconsole.print(1)\nself.pickle = 1"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert faults(module, source) == []


@pytest.mark.parametrize(
    "module, source, word",
    [
        ("ditrelay.runtime.topology", "from ditrelay.runtime.scheduler import Scheduler", "above"),
        ("ditrelay.runtime.topology", "from ditrelay import engine", "above"),
        ("ditrelay.runtime.scheduler", "def f():\n    import ditrelay.engine", "above"),
        ("ditrelay.models.card", "from ditrelay.runtime.pipelines_core.stages import encode", "above"),
        ("ditrelay.engine", "from ditrelay import ServerArgs", "above"),
        ("ditrelay.errors", "from ditrelay.nowhere import x", "above"),
        ("ditrelay.runtime.pipelines_core.stages.encode", "import ditrelay.runtime.communication.codec", "never"),
        ("ditrelay.engine", "import torch.distributed", "torch.distributed"),
        ("ditrelay.engine", "from torch import distributed as d", "torch.distributed"),
        ("ditrelay.engine", "import torch\nx = torch.distributed.is_initialized()", "torch.distributed"),
        ("ditrelay.runtime.worker", "import os\nx = os.environ['A']", "os.environ"),
        ("ditrelay.runtime.worker", "from os import environ as e", "os.environ"),
        ("ditrelay.runtime.worker", "import os as o\nx = o.getenv('A')", "os.getenv"),
        ("ditrelay.engine", "print(1)", "print"),
        ("ditrelay.engine", "import pickle", "pickle"),
        ("ditrelay.engine", "from torch import load", "torch.load"),
        ("ditrelay.engine", "hasattr(x, 'y')", "hasattr"),
        ("ditrelay.runtime.payloads", "import torch", "layer 0"),
    ],
)
def test_planted_fault_is_caught(module: str, source: str, word: str) -> None:
    (fault,) = faults(module, source)
    assert module in fault and word in fault


def test_module_without_a_layer_is_caught() -> None:
    with pytest.raises(AssertionError, match="has no layer"):
        faults("ditrelay.runtime.newcomer", "")
