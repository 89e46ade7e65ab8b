"""Bodies that are JSON or a form, as OpenAI's clients send them where a file may be among the fields."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from ditrelay.runtime.server_args import ServerArgs
from ditrelay.server.encodings import JsonSize
from ditrelay.server.forms import FORM, read_form
from ditrelay.server.picture_fields import REFERENCES_SCHEMA
from ditrelay.server.problem import ApiError, Refused, required, shorten, wrong_field
from ditrelay.server.request_fields import MAX_FIELDS, RequestBody, too_many_fields
from ditrelay.server.uploads import Upload

JSON = "application/json"

Schema = TypeVar("Schema", bound=RequestBody)


@dataclass(frozen=True)
class Body:
    """A request's fields. Those of a form are text, or the files sent under one name.

    Attributes:
        files: of a form, by field; a field named ``image[]`` counts as ``image``.
        file_fields: those that may be files.
    """

    fields: dict[str, Any]
    files: dict[str, list[Upload]]
    is_form: bool
    file_fields: Collection[str] = ()

    def checked(self, schema: type[Schema], *, extra: str = "refuse") -> Schema:
        """The fields that are no files, as ``schema`` has them.

        Args:
            extra: ``ignore`` leaves out what no schema knows, and the body tells so.

        Raises:
            ApiError: 400; names the first field that is wrong.
        """
        fields = self.fields
        unknown_files = [name for name in self.files if name not in self.file_fields]
        ignored = []
        if extra == "ignore":
            ignored = [name for name in fields if name not in schema.model_fields] + unknown_files
            fields = {name: value for name, value in fields.items() if name in schema.model_fields}
        elif unknown_files:
            reason = f"it is a file; files are taken as: {', '.join(sorted(self.file_fields))}"
            raise wrong_field(unknown_files[0], reason)
        body = self._validated(schema, fields)
        if extra == "ignore":
            body.ignoring([shorten(name) for name in ignored])
        return body

    def _validated(self, schema: type[Schema], fields: dict[str, Any]) -> Schema:
        try:
            # What is in a form is text: 7 is "7" there.
            return schema.model_validate(fields, strict=False if self.is_form else None)
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
        return _whole(await _form_body(request, files), request, files)
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
    return _whole(Body(document, {}, is_form=False), request, files)


def _whole(body: Body, request: Request, files: Collection[str]) -> Body:
    """``body`` with the fields of its ``extra_body`` beside the others."""
    args: ServerArgs = request.app.state.context.engine.args
    _check_text(body.fields, files, args.max_request_bytes)
    if body.fields.get("extra_body") is None:
        return body
    spread = replace(body, fields=_spread(body.fields, args.max_json_bytes))
    _check_text(spread.fields, files, args.max_request_bytes)
    return spread


def _check_text(fields: dict[str, Any], files: Collection[str], limit: int) -> None:
    """Only what may hold a picture may be as large as one. Where nothing may, the limit of the body is the same."""
    texts = (value for name, value in fields.items() if name not in files and isinstance(value, str))
    if files and sum(map(len, texts)) > limit:
        reason = f"the fields other than {', '.join(files)} are larger than {limit} bytes (--max-request-bytes)"
        raise ApiError(413, reason, code="body_too_large")


def page_entry(schema: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI page's entry for JSON bodies of ``schema``."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schema.model_json_schema()}}}}


def picture_page_entry(schema: type[BaseModel], picture: str, *, required: bool) -> dict[str, Any]:
    """The same where its field ``picture`` may be a file of a form, or refer to one."""
    whole = {name: part for name, part in schema.model_json_schema().items() if name != "$defs"}
    if required:
        whole["required"] = [*whole["required"], picture]
    forms = {FORM: {"type": "string", "format": "binary"}, JSON: REFERENCES_SCHEMA}
    description = {"description": whole["properties"][picture]["description"]}
    content = {
        kind: {"schema": whole | {"properties": whole["properties"] | {picture: form | description}}}
        for kind, form in forms.items()
    }
    return {"requestBody": {"required": True, "content": content}}


def _spread(fields: dict[str, Any], max_json: int) -> dict[str, Any]:
    """``fields`` with those of ``extra_body`` beside them, as some clients send what OpenAI does not have."""
    inner = fields["extra_body"]
    if isinstance(inner, str):
        try:
            JsonSize(max_json).feed(inner.encode())
            inner = json.loads(inner, object_pairs_hook=_object)
        except Refused as error:
            raise wrong_field("extra_body", error.detail) from None
        except (ValueError, RecursionError):
            inner = None
    if not isinstance(inner, dict):
        raise wrong_field("extra_body", "it must be a JSON object of fields")
    if "extra_body" in inner:
        raise wrong_field("extra_body", "it is in itself; leave the inner one out")
    outer = {name: value for name, value in fields.items() if name != "extra_body"}
    for name in inner:
        if outer.get(name) not in (None, inner[name], _as_text(inner[name])):
            raise wrong_field(name, "it is another one in extra_body; give only one of the two")
    return inner | {name: value for name, value in outer.items() if value is not None or name not in inner}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields) > MAX_FIELDS:
        raise ApiError(400, too_many_fields(len(fields)), code="invalid_json")
    return dict(fields)


async def _form_body(request: Request, files: Collection[str]) -> Body:
    form = await read_form(request)
    body = Body({}, {}, is_form=True, file_fields=files)
    for name, text in form.texts:
        field = name.removesuffix("[]")
        before = body.fields.get(field)
        if name != field and isinstance(before, list):
            before.append(text)
        elif before is None:
            body.fields[field] = text if name == field else [text]
        else:
            raise wrong_field(field, "it is given twice")
    for name, file in form.files:
        if not file.is_absent:
            body.files.setdefault(name.removesuffix("[]"), []).append(file)
    for name in body.files.keys() & body.fields.keys():
        raise wrong_field(name, "it is given twice")
    return body
