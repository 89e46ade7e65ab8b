"""Bodies that are JSON or a form, as OpenAI's clients send them where a file may be among the fields."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Scope

from ditrelay.server.problem import ApiError, shorten
from ditrelay.server.schemas import MAX_FIELDS, too_many_fields
from ditrelay.server.uploads import PictureReference, Upload

FORM = "multipart/form-data"
_MAX_FILES = 20
# Of all that Python knows, some raise, and punycode would take hours for what a body may hold.
_CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii"})
_NO_LIMIT = sys.maxsize  # of one field: that of the whole body is enough

Schema = TypeVar("Schema", bound=BaseModel)


@dataclass
class HeldBytes:
    """Bytes of clients that are in memory: bodies of requests that are not answered yet, pictures fetched for them, and
    pictures to start from where nobody waits for the answer. Belongs to the event loop's thread."""

    nbytes: int = 0

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Around the time for which ``nbytes`` more are held."""
        self.nbytes += nbytes
        try:
            yield
        finally:
            self.nbytes -= nbytes


@dataclass
class RequestBytes:
    """What one request has brought into memory: its body, and the pictures fetched for it.

    Args:
        held: counts what all have.
        max_total: what all may have.
        retry_after: seconds after which a client that is turned away should come back.
    """

    held: HeldBytes
    max_total: int
    retry_after: Callable[[], int]
    nbytes: int = 0

    def add(self, nbytes: int) -> None:
        """Count ``nbytes`` more. Raises ``HTTPException`` (429) where all have too much."""
        self.nbytes += nbytes
        self.held.nbytes += nbytes
        if self.held.nbytes > self.max_total:
            seconds = str(self.retry_after())
            reason = f"requests with {self.max_total} bytes are under way (--max-total-bytes)"
            raise refused(429, f"{reason}; try again in {seconds} s", {"Retry-After": seconds})

    def release(self) -> None:
        """The request has ended."""
        self.held.nbytes -= self.nbytes
        self.nbytes = 0


_BYTES = "ditrelay.bytes"  # in the scope of a request


def count_bytes(scope: Scope, counted: RequestBytes) -> None:
    """Let the routes find ``counted``."""
    scope[_BYTES] = counted


def bytes_of(request: Request) -> RequestBytes:
    """What ``request`` has brought into memory."""
    counted: RequestBytes = request.scope[_BYTES]
    return counted


def refused(status: int, detail: str, headers: Mapping[str, str] | None = None) -> HTTPException:
    """Turns a request away whose body may still be on its way, so its connection is closed."""
    # An HTTPException is what FastAPI lets through while it reads a body.
    return HTTPException(status, detail, headers={"Connection": "close", **(headers or {})})


@dataclass(frozen=True)
class Body:
    """A request's fields. Those of a form are text, or the files sent under one name.

    Attributes:
        files: of a form, by field; a field named ``image[]`` counts as ``image``.
    """

    fields: dict[str, Any]
    files: dict[str, list[Upload]]
    is_form: bool

    def checked(self, schema: type[Schema]) -> Schema:
        """The fields that are no files, as ``schema`` has them.

        Raises:
            ApiError: 400; names the first field that is wrong.
        """
        try:
            # What is in a form is text: 7 is "7" there.
            return schema.model_validate(self.fields, strict=False if self.is_form else None)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = shorten(str(first["loc"][0]) if first["loc"] else "body")
        if first["type"] == "extra_forbidden":
            known = ", ".join(schema.model_fields)
            raise ApiError(400, f"{param}: unknown field; known: {known}", param=param, code="unknown_parameter")
        if first["type"] == "missing":
            raise required(param)
        raise _wrong(param, first["msg"])


async def read_body(request: Request, *, files: Collection[str]) -> Body:
    """The body of a request.

    Args:
        files: the fields that may be files of a form.

    Raises:
        ApiError: 400; it is neither JSON nor a form, or has a file where none is expected.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM:
        return await _read_form(request, files)
    if kind != "application/json":
        raise ApiError(400, f"Content-Type: must be application/json or {FORM}", code="invalid_content_type")
    try:
        document = json.loads(await request.body(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return Body(document, {}, is_form=False)


def page_entry(schema: type[BaseModel], picture: str, *, required: bool) -> dict[str, Any]:
    """The OpenAPI page's entry for bodies of ``schema``, whose field ``picture`` may be a file or refer to one."""
    whole = {name: part for name, part in schema.model_json_schema().items() if name != "$defs"}
    if required:
        whole["required"] = [*whole["required"], picture]
    reference: dict[str, Any] = {"anyOf": [{"type": "string"}, PictureReference.model_json_schema()]}
    forms = {FORM: {"type": "string", "format": "binary"}, "application/json": reference}
    description = {"description": whole["properties"][picture]["description"]}
    content = {
        kind: {"schema": whole | {"properties": whole["properties"] | {picture: form | description}}}
        for kind, form in forms.items()
    }
    return {"requestBody": {"required": True, "content": content}}


def required(param: str) -> ApiError:
    """400: the field is missing."""
    return ApiError(400, f"{param}: required", param=param, code="missing_required_parameter")


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields) > MAX_FIELDS:
        raise ApiError(400, too_many_fields(len(fields)), code="invalid_json")
    return dict(fields)


async def _read_form(request: Request, files: Collection[str]) -> Body:
    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        raise ApiError(400, "Content-Type: a form's charset must be utf-8", code="invalid_content_type")
    body = Body({}, {}, is_form=True)
    try:
        async with request.form(max_files=_MAX_FILES, max_fields=MAX_FIELDS, max_part_size=_NO_LIMIT) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    await _add_file(body, name.removesuffix("[]"), value, files)
                elif name in body.fields:
                    raise _wrong(name, "it is given twice")
                else:
                    body.fields[name] = value
    except HTTPException as error:
        if error.status_code != 400:  # the limits on bodies speak for themselves
            raise
        raise ApiError(400, f"the form cannot be read: {error.detail}", code="invalid_form") from None
    for name in body.files.keys() & body.fields.keys():
        raise _wrong(name, "it is given twice")
    return body


async def _add_file(body: Body, name: str, file: UploadFile, files: Collection[str]) -> None:
    if name not in files:
        raise _wrong(name, f"it is a file; files are taken as: {', '.join(sorted(files))}")
    kind = (file.content_type or "").partition(";")[0].strip().lower()
    body.files.setdefault(name, []).append(Upload(await file.read(), kind))


def _wrong(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{shorten(param)}: {reason}", param=shorten(param), code="invalid_value")
