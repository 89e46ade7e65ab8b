"""The playground: a page at ``/`` for browsers, and the files that it consists of."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from ditrelay.server.proxies import route_of

PREFIX = "/playground"

# The page runs its own scripts and styles only, talks to its own server only, and cannot be framed. Pictures and clips
# that a key is needed for are fetched and shown from the memory of the page (blob:).
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, so that the page fits the server after an update
    "Vary": "Accept",
}
_KINDS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


class _Assets(StaticFiles):
    """The files of the page."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        if status_code == 200:
            _finish(response, full_path)
        return response


def install(app: FastAPI) -> None:
    """Serve the files of the page under ``/playground``."""
    app.mount(PREFIX, _Assets(directory=_folder()), name="playground")


def page() -> FileResponse:
    """The page itself."""
    response = FileResponse(_folder() / "index.html")
    _finish(response, "index.html")
    return response


def is_browser(headers: Headers) -> bool:
    """Whether whoever asks wants a page: programs get JSON at the same address."""
    return "text/html" in headers.get("accept", "")


def is_open(scope: Scope) -> bool:
    """Whether this may be had without a key: the page asks for the key, and holds nothing that needs one."""
    path = route_of(scope)
    return path.startswith(f"{PREFIX}/") or (path == "/" and is_browser(Headers(scope=scope)))


def _finish(response: Response, name: str | os.PathLike[str]) -> None:
    response.headers.update(_HEADERS)
    # By its own table: what the machine's tables say of .js differs, and browsers run no script of another type.
    if kind := _KINDS.get(os.path.splitext(name)[1]):
        response.headers["Content-Type"] = f"{kind}; charset=utf-8"


def _folder() -> Path:
    return Path(str(files("ditrelay"))) / "assets" / "playground"
