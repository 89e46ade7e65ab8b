"""Every error that a client can see, in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from ditrelay.errors import DitrelayError, EngineClosed, InvalidRequest, QueueFull, RequestCancelled, RequestFailed
from ditrelay.runtime.descriptors import EXHAUSTED
from ditrelay.server.proxies import route_of
from ditrelay.server.schemas import Error, ErrorResponse

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"

# For the OpenAPI page; naming 4XX also keeps FastAPI from documenting its own 422, which is never sent.
RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "The request is refused; the message names the field."},
    "5XX": {"model": ErrorResponse, "description": "The server failed, is busy, or is not ready."},
}


class ApiError(DitrelayError):
    """An answer other than success.

    Args:
        status: HTTP status.
        message: what is wrong and what is allowed instead.
        type: OpenAI's class of error.
        param: the request field at fault.
        code: the reason, for programs.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = Error(message=message, type=type, param=param, code=code)
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        body = ErrorResponse(error=self.error).model_dump()
        return JSONResponse(body, status_code=self.status, headers=self.headers)


class Refused(HTTPException):
    """Turns a request away whose body may still be on its way, so its connection is closed.

    An ``HTTPException`` is what FastAPI lets through while it reads a body.

    Args:
        code: the reason, for programs.
    """

    def __init__(self, status: int, detail: str, *, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail, headers={"Connection": "close", **(headers or {})})
        self.code = code

    def described(self) -> ApiError:
        kind = "rate_limit_error" if self.status_code == 429 else INVALID
        return ApiError(self.status_code, self.detail, type=kind, code=self.code, headers=self.headers)


def not_ready(message: str) -> ApiError:
    """503: the engine takes no requests now; try again soon."""
    return ApiError(503, message, type=SERVER, code="not_ready", headers={"Retry-After": "5"})


def shutting_down(failure: str = "") -> ApiError:
    """503: this server ends; another may be up soon. ``failure``: why, where nobody has asked for it."""
    return not_ready(failure or "the server is shutting down")


def role_lost(role: str, reason: str) -> ApiError:
    """503: no rank is left for ``role``; what was given up is tried again after minutes."""
    message = (
        f"no rank is left for {role} ({reason}); the server's log has the cause. It is tried again every few minutes, "
        "and at once by: ditrelay restart RANK"
    )
    return ApiError(503, message, type=SERVER, code="role_down", headers={"Retry-After": "60"})


def no_such_rank(rank: int, count: int) -> ApiError:
    """404: so many ranks there are."""
    allowed = f"0 to {count - 1}" if count else "none while the engine starts"
    return ApiError(404, f"{rank} is no rank; allowed: {allowed}", code="rank_not_found", param="rank")


def no_space(reason: str) -> ApiError:
    """507: the disk is full."""
    message = f"{reason}; delete videos that are done, or make room on the server's disk"
    return ApiError(507, message, type=SERVER, code="no_space", headers={"Retry-After": "30"})


def store_down(reason: str = "") -> ApiError:
    """503: the database of jobs does not answer, or fails."""
    message = reason or "the server's database of jobs does not answer; try again in a few seconds"
    return ApiError(503, message, type=SERVER, code="job_store_down", headers={"Retry-After": "5"})


def unauthorized() -> ApiError:
    """401: the key is missing or wrong. Does not say which."""
    message = "a valid API key is needed: send it as 'Authorization: Bearer KEY', or in x-api-key or api-key"
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer", "Connection": "close"})


def cross_site(origin: str) -> ApiError:
    """403: a page of another web site sent it, and there is no key that would tell whether its owner may."""
    message = (
        f"Origin: pages of other web sites ({shorten(origin)}) may not use this server; allowed: its own pages, "
        "those of --cors-origin, and with --api-key all that have the key"
    )
    return ApiError(403, message, code="cross_site_request", headers={"Connection": "close"})


def strange_host(name: str) -> ApiError:
    """403: called by a name that is not this machine's, as by a web site that lets its own name point here."""
    message = (
        f"Host: {shorten(name)!r} is not a name of this machine; allowed: localhost, addresses, and the names of "
        "--allowed-hosts and --public-url; a server with --api-key takes any name"
    )
    return ApiError(403, message, code="strange_host", headers={"Connection": "close"})


def too_many_connections(limit: int) -> ApiError:
    """503: all connections that there may be are busy."""
    message = f"{limit} connections are busy (--max-connections, or as many as there are file descriptors for)"
    headers = {"Retry-After": "1", "Connection": "close"}
    return ApiError(503, f"{message}; try again in 1 s", type=SERVER, code="too_many_connections", headers=headers)


def out_of_descriptors() -> ApiError:
    """503: a file or a socket that a request needs could not be opened."""
    message = "the server has no file descriptor left (ulimit -n); try again in 1 s"
    return ApiError(503, message, type=SERVER, code="out_of_descriptors", headers={"Retry-After": "1"})


def model_not_found(name: str, served: Sequence[str]) -> ApiError:
    """404: ``name`` is none of those ``served``."""
    message = f"model: {shorten(name)!r} is not served here; served: {', '.join(map(repr, served))}"
    return ApiError(404, message, param="model", code="model_not_found")


def required(param: str, allowed: str = "") -> ApiError:
    """400: the field is missing; ``allowed`` says what it takes, where that isn't plain."""
    message = f"{param}: required" + (f"; allowed: {allowed}" if allowed else "")
    return ApiError(400, message, param=param, code="missing_required_parameter")


def wrong_field(param: str, reason: str) -> ApiError:
    """400: one field is wrong."""
    return ApiError(400, f"{shorten(param)}: {reason}", param=shorten(param), code="invalid_value")


def shorten(text: str, limit: int = 80) -> str:
    """A client's text, cut to a length fit for a message."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def install(app: FastAPI) -> None:
    """Answer every exception that leaves a route in OpenAI's form."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return describe(request, error).response()

    for kind in _describers():
        app.add_exception_handler(kind, handle)


def describe(request: Request, error: Exception) -> ApiError:
    """``error`` as a client may see it."""
    describers = _describers()
    return next(describers[kind] for kind in type(error).__mro__ if kind in describers)(request, error)


def _describers() -> dict[type[Exception], Callable[[Request, Any], ApiError]]:
    return {
        ApiError: lambda request, error: error,
        InvalidRequest: _invalid_request,
        QueueFull: _queue_full,
        RequestFailed: _request_failed,
        RequestCancelled: _closing,
        EngineClosed: _closing,
        OperationalError: _store_down,
        RequestValidationError: _schema_refused,
        OSError: _system_failed,
        Refused: lambda request, error: error.described(),
        HTTPException: _http_error,
        Exception: _unexpected,
    }


def _invalid_request(request: Request, error: InvalidRequest) -> ApiError:
    return ApiError(400, str(error), param=error.param, code="invalid_value")


def _queue_full(request: Request, error: QueueFull) -> ApiError:
    headers = {"Retry-After": str(error.retry_after)}
    return ApiError(429, str(error), type="rate_limit_error", code="queue_full", headers=headers)


def _request_failed(request: Request, error: RequestFailed) -> ApiError:
    for role, reason in request.app.state.context.engine.status().lost_roles:
        return role_lost(role, reason)
    return ApiError(500, str(error), type=SERVER, code="request_failed")


def _closing(request: Request, error: EngineClosed | RequestCancelled) -> ApiError:
    return shutting_down(request.app.state.context.engine.status().failure)


def _store_down(request: Request, error: OperationalError) -> ApiError:
    logger.error("--job-store: %s", str(error.orig).splitlines()[0])  # without the statement, which holds prompts
    return store_down()


def _system_failed(request: Request, error: OSError) -> ApiError:
    if error.errno in EXHAUSTED:  # which others will meet too, so no line for each: the listener tells it
        return out_of_descriptors()
    raise error


def _unexpected(request: Request, error: Exception) -> ApiError:
    # What went wrong is in the log; it may hold what clients must not see.
    return ApiError(500, "internal error; the server's log has the cause", type=SERVER, code="internal_error")


def _http_error(request: Request, error: HTTPException) -> ApiError:
    target = f"{request.method} {shorten(request.url.path)}"
    headers = _allow(request, error) if error.status_code == 405 else dict(error.headers or {})
    message, code = {
        400: ("the body cannot be read as JSON in UTF-8", "invalid_json"),  # FastAPI says it in no other case
        404: (f"{target}: there is nothing at this address; GET / lists what there is", "unknown_url"),
        405: (f"{target}: this method is not allowed here; allowed: {headers.get('Allow')}", "method_not_allowed"),
    }.get(error.status_code, (error.detail, None))
    return ApiError(error.status_code, message, code=code, headers=headers)


def _allow(request: Request, error: HTTPException) -> dict[str, str]:
    """All methods of the address: the router names those of the first route only."""
    methods = set((error.headers or {}).get("Allow", "").split(", ")) - {""}
    for path, operations in request.app.openapi()["paths"].items():
        if compile_path(path)[0].match(route_of(request.scope)):
            methods |= {method.upper() for method in operations}
    if "GET" in methods:  # the page leaves it out
        methods.add("HEAD")
    return {"Allow": ", ".join(sorted(methods))}


def _schema_refused(request: Request, error: RequestValidationError) -> ApiError:
    # Of parameters in the address and of headers: the routes check bodies themselves.
    first = error.errors()[0]
    param = str(first["loc"][1])
    return required(param) if first["type"] == "missing" else wrong_field(param, first["msg"])
