"""What the benchmarks share: tables, result files, and the part of a page that a benchmark writes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return made


def provenance() -> dict[str, Any]:
    """When, where, from which commit and by which command a result came."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    dirty = _output("git", "status", "--porcelain", "ditrelay")
    script = Path(sys.argv[0]).name
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores",
        "gpus": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "commit": commit + ("+" if dirty else ""),
        "command": " ".join(["python", f"benchmarks/{script}", *map(_shown, sys.argv[1:])]),
    }


def origin(source: Mapping[str, Any], *, where: str = "", packages: Sequence[str] = ()) -> str:
    """How a result came about, from its provenance; ``where`` in place of the machine's CPU."""
    versions = [f"{name} {source['packages'][name]}" for name in packages]
    place = [source["date"][:10], where or source["machine"], *versions, f"commit {source['commit']}"]
    return f"`{source['command']}`, {', '.join(place)}"


def _shown(argument: str) -> str:
    """An argument as others can use it: where a folder lies on this machine tells them nothing."""
    return f".../{Path(argument).name}" if argument.startswith("/") else shlex.quote(argument)


def _output(*command: str) -> str:
    """What the command prints; empty where it is not there or fails (a machine without git, GPUs, or a repository)."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"provenance": provenance(), **figures}, indent=1) + "\n")


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` in ``page``."""
    before, begin, rest = page.read_text().partition(f"<!-- {name}:begin -->")
    _, end, after = rest.partition(f"<!-- {name}:end -->")
    if not begin or not end:
        raise SystemExit(f"{page} has no section {name}")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
