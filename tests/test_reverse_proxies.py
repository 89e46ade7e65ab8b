"""The configurations of docs/reverse-proxies.md, with the programs that they are for, where those are installed."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from server_fakes import FakeEngine

from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server.app import EngineServer
from ditrelay.server.sockets import listen, listening

PAGE = Path(__file__).parents[1] / "docs" / "reverse-proxies.md"
SECONDS = 30.0
ADDRESS = "v1/images/generations"


def config_of(name: str, replaced: dict[str, str]) -> str:
    [text] = re.findall(rf"```{name}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for old, new in replaced.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def nginx(folder: Path, port: int, path: str) -> list[str]:
    replaced = {"127.0.0.1:30000": f"unix:{path}", "listen 80;": f"listen 127.0.0.1:{port};"}
    server = config_of("nginx", replaced)
    folders = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = f"user root; worker_processes 1; daemon off; pid {folder}/pid; error_log stderr; events {{}}\n"
    (folder / "nginx.conf").write_text(f"{text}http {{ access_log off; {folders}\n{server}\n}}\n")
    return ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy(folder: Path, port: int, path: str) -> list[str]:
    server = config_of("caddy", {"127.0.0.1:30000": f"unix/{path}", "draw.example {": f"http://127.0.0.1:{port} {{"})
    (folder / "Caddyfile").write_text("{\n\tadmin off\n\tgrace_period 1s\n}\n" + server)
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


@asynccontextmanager
async def running(command: list[str], port: int, home: Path) -> AsyncIterator[httpx.AsyncClient]:
    own = {name: str(home) for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=dict(os.environ) | own)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/draw/", timeout=SECONDS) as http:
            await asyncio.wait_for(until_answered(http, process), SECONDS)
            yield http
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.communicate(), SECONDS)


async def until_answered(http: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
    while True:
        assert process.returncode is None, (await process.communicate())[1].decode()
        try:
            if (await http.get("ready")).status_code == 200:
                return
        except httpx.ConnectError:
            pass
        await asyncio.sleep(0.05)


@asynccontextmanager
async def serving(path: str) -> AsyncIterator[FakeEngine]:
    args = ServerArgs(served_model_name="tiny", uds=path)
    engine = FakeEngine(args=args)
    engine.loaded.set()
    server = EngineServer(engine)  # type: ignore[arg-type]
    with listening(args) as sockets:
        task = asyncio.create_task(server.serve(sockets=sockets))
        try:
            yield engine
        finally:
            server.stop()
            await asyncio.wait_for(task, SECONDS)


@pytest.mark.parametrize("program", [nginx, caddy], ids=lambda each: each.__name__)
def test_the_documented_configuration_does_what_the_page_says(program, tmp_path):
    if shutil.which(program.__name__) is None:
        pytest.skip(f"{program.__name__} is not installed")
    path = str(tmp_path / "http.sock")
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]

    async def main() -> None:
        async with serving(path) as engine, running(program(tmp_path, port, path), port, tmp_path) as http:
            await check(http, f"http://127.0.0.1:{port}", engine)

    asyncio.run(asyncio.wait_for(main(), 4 * SECONDS))


async def check(http: httpx.AsyncClient, origin: str, engine: FakeEngine) -> None:
    pages = {"Accept": "text/html"}
    assert "<html" in (await http.get("", headers=pages)).text
    for path in ("playground/main.js", "docs", "docs/swagger-ui.css"):
        assert (await http.get(path)).status_code == 200, path
    without_slash = await http.get(f"{origin}/draw", headers=pages)
    assert without_slash.headers["location"] in ("/draw/", f"{origin}/draw/")

    picture = {"prompt": "a", "response_format": "url"}
    made = await http.post(ADDRESS, json=picture, headers={"Origin": origin})
    address = made.json()["data"][0]["url"]
    assert address.startswith(f"{origin}/draw/v1/images/")
    assert (await http.get(address)).content.startswith(b"PNG of a")
    refused = await http.post(ADDRESS, json=picture, headers={"Origin": "http://evil.example"})
    assert refused.status_code == 403

    # Events come as they happen: this stream has no end, and its first event is smaller than any buffer.
    async with http.stream("GET", "v1/activity") as events:
        assert (await anext(events.aiter_lines())).startswith("event: topology")
    # A client that leaves cancels its request.
    with pytest.raises(httpx.ReadTimeout):
        await http.post(ADDRESS, json={"prompt": "[wait]"}, timeout=1)
    async with asyncio.timeout(SECONDS):
        while not engine.tickets[-1].cancelled:
            await asyncio.sleep(0.05)
    # 16 MiB reach the server, which finds that they are no picture.
    large = await http.post("v1/images/edits", data={"prompt": "a"}, files={"image": ("a.png", b"x" * (16 << 20))})
    assert (large.status_code, large.json()["error"]["param"]) == (400, "image")
