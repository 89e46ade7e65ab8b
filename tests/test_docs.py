"""The pages in docs/: what is written by a script is up to date, and links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return script("reference").pages()


@pytest.mark.parametrize("name", ["api.md", "flags.md"])
def test_a_reference_page_is_what_its_script_writes(name: str, pages: dict[str, str]) -> None:
    assert (ROOT / "docs" / name).read_text() == pages[name], "run: python scripts/reference.py"


def test_the_reference_has_every_address_and_every_flag(pages: dict[str, str]) -> None:
    from ditrelay.async_engine import AsyncEngine
    from ditrelay.runtime.server_args import ServerArgs, server_flags
    from ditrelay.server.app import create_app

    paths = create_app(AsyncEngine(ServerArgs(device="cpu"))).openapi()["paths"]
    for path, ways in paths.items():
        for method in ways:
            assert f"\n### {method.upper()} {path}\n" in pages["api.md"]
    for flag in server_flags():
        assert pages["flags.md"].count(f"| `{flag.option}` |") == 1


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings; one that comes again has a number."""
    found: set[str] = set()
    for heading in HEADING.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    broken = []
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_recorded_session_is_of_the_calls_that_its_script_makes() -> None:
    session, text = script("openai_session"), (ROOT / "docs" / "openai-session.md").read_text()
    cells = [session.block("python", cell) for cell in (*session.PICTURES, *session.VIDEOS)]
    found = [text.find(cell) for cell in cells]
    assert -1 not in found, "run: python scripts/openai_session.py"
