"""``/docs``: the API with forms to try. All that the page needs comes from this server."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fastapi import Response
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from ditrelay.server.router import Router

router = Router(include_in_schema=False)

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",  # Swagger UI sets styles of its elements
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

# Swagger UI, Apache-2.0, from the package fastapi-offline; the others are ours. The page names them without a slash
# before them: it may lie under a path of a reverse proxy.
_FILES = {
    "swagger-ui-bundle.js": ("fastapi_offline", "static", "text/javascript"),
    "swagger-ui.css": ("fastapi_offline", "static", "text/css"),
    "start.js": ("ditrelay", "assets/docs", "text/javascript"),
}


@router.get("/docs")
async def page() -> Response:
    return _file("index.html", "ditrelay", "assets/docs", "text/html")


@router.get("/docs/{name}")
async def part(name: str) -> Response:
    if name not in _FILES:
        raise HTTPException(404)
    return _file(name, *_FILES[name])


def _file(name: str, package: str, folder: str, kind: str) -> Response:
    path = Path(str(files(package))) / folder / name
    # With its stat: HEAD has the headers of GET.
    return FileResponse(path, headers=_HEADERS | {"Content-Type": f"{kind}; charset=utf-8"}, stat_result=path.stat())
