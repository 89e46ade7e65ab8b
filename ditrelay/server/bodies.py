"""Bodies that are JSON or a form, as OpenAI's clients send them where a file may be among the fields."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ditrelay.server.problem import ApiError, shorten
from ditrelay.server.schemas import MAX_FIELDS, too_many_fields
from ditrelay.server.uploads import PictureReference, Upload

FORM = "multipart/form-data"
_MAX_FILES = 20
# Of all that Python knows, some raise, and punycode would take hours for what a body may hold.
_CHARSETS = frozenset({b"utf-8", b"utf8", b"us-ascii"})
_NO_LIMIT = sys.maxsize  # of one field: that of the whole body is enough

Schema = TypeVar("Schema", bound=BaseModel)


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
        ApiError: 400; it is neither JSON nor a form, or has a file where none is expected. 413; its text is too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM:
        return _checked_text(await _read_form(request, files), request, files)
    if kind != "application/json":
        raise ApiError(400, f"Content-Type: must be application/json or {FORM}", code="invalid_content_type")
    try:
        document = json.loads(await request.body(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return _checked_text(Body(document, {}, is_form=False), request, files)


def _checked_text(body: Body, request: Request, files: Collection[str]) -> Body:
    """``body``. Only what may hold a picture may be as large as one."""
    limit: int = request.app.state.context.engine.args.max_request_bytes
    texts = (value for name, value in body.fields.items() if name not in files and isinstance(value, str))
    if sum(map(len, texts)) > limit:
        reason = f"the fields other than {', '.join(files)} are larger than {limit} bytes (--max-request-bytes)"
        raise ApiError(413, reason, code="body_too_large")
    return body


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
    for name, value in (await _parsed(request)).multi_items():
        if isinstance(value, UploadFile):
            await _add_file(body, name.removesuffix("[]"), value, files)
        elif name in body.fields:
            raise _wrong(name, "it is given twice")
        else:
            body.fields[name] = value
    for name in body.files.keys() & body.fields.keys():
        raise _wrong(name, "it is given twice")
    return body


class _InMemory(MultiPartParser):
    """Keeps files where they have come to, and are counted, already: a temporary folder may be full, or none."""

    spool_max_size = 0  # no limit


async def _parsed(request: Request) -> FormData:
    async with aclosing(request.stream()) as stream:
        limits = {"max_files": _MAX_FILES, "max_fields": MAX_FIELDS, "max_part_size": _NO_LIMIT}
        parser = _InMemory(request.headers, stream, **limits)
        try:
            return await parser.parse()
        except MultiPartException as error:
            raise ApiError(400, f"the form cannot be read: {error.message}", code="invalid_form") from None


async def _add_file(body: Body, name: str, file: UploadFile, files: Collection[str]) -> None:
    if name not in files:
        raise _wrong(name, f"it is a file; files are taken as: {', '.join(sorted(files))}")
    kind = (file.content_type or "").partition(";")[0].strip().lower()
    body.files.setdefault(name, []).append(Upload(await file.read(), kind))


def _wrong(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{shorten(param)}: {reason}", param=shorten(param), code="invalid_value")
