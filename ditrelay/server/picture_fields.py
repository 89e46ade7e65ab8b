"""A field that refers to pictures: one or several, in the forms that OpenAI's clients send."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from ditrelay.server.uploads import PictureReference

ALLOWED = 'a data URL, {"image_url": a data URL}, a list of one of these, or a file of a multipart form'

_ONE = {"anyOf": [{"type": "string"}, PictureReference.model_json_schema()]}
REFERENCES_SCHEMA: dict[str, Any] = {"anyOf": [*_ONE["anyOf"], {"type": "array", "items": _ONE, "minItems": 1}]}


def _references(value: Any) -> Any:
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    if not items:
        raise _refused("it is an empty list")
    return [_address(item) for item in items]


def _address(item: Any) -> str:
    if isinstance(item, str):
        return item
    if not isinstance(item, dict):
        raise _refused("it is no reference to a picture")
    if "file_id" in item:
        raise _refused("file_id names a file that was uploaded before, and there are none here")
    if isinstance(item.get("image_url"), str) and len(item) == 1:
        return str(item["image_url"])
    raise _refused("it is an object, but not one with image_url alone, a text")


def _refused(reason: str) -> PydanticCustomError:
    return PydanticCustomError("picture", f"{reason}; allowed: {ALLOWED}")


PictureReferences = Annotated[list[str], BeforeValidator(_references), WithJsonSchema(REFERENCES_SCHEMA)]
"""The addresses of one picture or several (data URLs, where nothing else is allowed)."""
