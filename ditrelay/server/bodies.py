"""Bodies that are JSON or a form, as OpenAI's clients send them where a file may be among the fields."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from ditrelay.server.forms import FORM, read_form
from ditrelay.server.problem import ApiError, required, shorten, wrong_field
from ditrelay.server.schemas import MAX_FIELDS, too_many_fields
from ditrelay.server.uploads import PictureReference, Upload

JSON = "application/json"

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
        raise wrong_field(param, first["msg"])


async def read_body(request: Request, *, files: Collection[str] = ()) -> Body:
    """The body of a request.

    Args:
        files: the fields that may be files of a form; none: no form is taken.

    Raises:
        ApiError: 400; it is neither JSON nor a form, or has a file where none is expected. 413; its text is too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM and files:
        return _checked_text(await _form_body(request, files), request, files)
    content = await request.body()  # whatever it is: a client that still sends would not see the answer
    if kind != JSON and not kind.endswith("+json"):
        allowed = f"{JSON} or {FORM}" if files else JSON
        raise ApiError(400, f"Content-Type: must be {allowed}", code="invalid_content_type")
    try:
        document = json.loads(content, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return _checked_text(Body(document, {}, is_form=False), request, files)


def _checked_text(body: Body, request: Request, files: Collection[str]) -> Body:
    """``body``. Only what may hold a picture may be as large as one."""
    if not files:  # then the limit of the body is the same
        return body
    limit: int = request.app.state.context.engine.args.max_request_bytes
    texts = (value for name, value in body.fields.items() if name not in files and isinstance(value, str))
    if sum(map(len, texts)) > limit:
        reason = f"the fields other than {', '.join(files)} are larger than {limit} bytes (--max-request-bytes)"
        raise ApiError(413, reason, code="body_too_large")
    return body


def page_entry(schema: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI page's entry for JSON bodies of ``schema``."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schema.model_json_schema()}}}}


def picture_page_entry(schema: type[BaseModel], picture: str, *, required: bool) -> dict[str, Any]:
    """The same where its field ``picture`` may be a file of a form, or refer to one."""
    whole = {name: part for name, part in schema.model_json_schema().items() if name != "$defs"}
    if required:
        whole["required"] = [*whole["required"], picture]
    reference: dict[str, Any] = {"anyOf": [{"type": "string"}, PictureReference.model_json_schema()]}
    forms = {FORM: {"type": "string", "format": "binary"}, JSON: reference}
    description = {"description": whole["properties"][picture]["description"]}
    content = {
        kind: {"schema": whole | {"properties": whole["properties"] | {picture: form | description}}}
        for kind, form in forms.items()
    }
    return {"requestBody": {"required": True, "content": content}}


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields) > MAX_FIELDS:
        raise ApiError(400, too_many_fields(len(fields)), code="invalid_json")
    return dict(fields)


async def _form_body(request: Request, files: Collection[str]) -> Body:
    form = await read_form(request)
    body = Body({}, {}, is_form=True)
    for name, text in form.texts:
        if name in body.fields:
            raise wrong_field(name, "it is given twice")
        body.fields[name] = text
    for name, file in form.files:
        name = name.removesuffix("[]")
        if file.is_absent:
            continue
        if name not in files:
            raise wrong_field(name, f"it is a file; files are taken as: {', '.join(sorted(files))}")
        body.files.setdefault(name, []).append(file)
    for name in body.files.keys() & body.fields.keys():
        raise wrong_field(name, "it is given twice")
    return body
