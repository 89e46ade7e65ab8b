"""What the bodies of requests have in common: the types of their fields, and what is said of a field that is wrong."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, WithJsonSchema
from pydantic_core import PydanticCustomError

from ditrelay.errors import InvalidRequest

MAX_FIELDS = 50
"""Of one JSON object, and of a form."""

WARNINGS = "What was ignored of the request; only with --extra-fields ignore."

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
_BEGINS_WITH_A_NUMBER = re.compile(r"-?[0-9]+ ")


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell it ("\\ud800"); no message to a worker can hold it.
        raise PydanticCustomError("text", "must not contain half a surrogate pair") from error
    return text


def _check_size(size: str) -> str:
    if size != "auto" and not _SIZE.fullmatch(size):
        raise PydanticCustomError("size", "must be 'auto' or WIDTHxHEIGHT in pixels, for instance '128x128'")
    return size


def _whole(value: Any) -> Any:
    # JSON knows no integers: 1.0 is what some clients write for 1.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def too_many_fields(count: int) -> str:
    """Why an object of more than ``MAX_FIELDS`` is refused unread: each would become an error of its own, kilobytes in
    size."""
    return f"the body has {count} fields in one object; allowed: {MAX_FIELDS}"


Text = Annotated[str, AfterValidator(_check_text)]
Size = Annotated[
    str,
    AfterValidator(_check_size),
    WithJsonSchema({"type": "string", "pattern": f"^(auto|{_SIZE.pattern})$"}),
]
Whole = BeforeValidator(_whole)
"""For every integer."""

# What every model has in common, for the OpenAPI page. It is the model's card that checks, and says what it allows.
Prompt = Annotated[Text, WithJsonSchema({"type": "string", "minLength": 1})]
Seed = Annotated[int, Whole, WithJsonSchema({"type": "integer", "minimum": -1})]
Count = Annotated[int, Whole, WithJsonSchema({"type": "integer", "minimum": 1})]
AnyCount = Annotated[int, Whole, WithJsonSchema({"type": "integer", "minimum": 0})]
Strength = Annotated[float, WithJsonSchema({"type": "number", "minimum": 0})]


class RequestBody(BaseModel):
    """A request's body. A field set to ``null`` counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    _warnings: list[str] = PrivateAttr(default_factory=list)
    _lenient: bool = PrivateAttr(False)

    @property
    def warnings(self) -> list[str]:
        """What of it is ignored."""
        return self._warnings

    def ignoring(self, names: list[str]) -> None:
        """It may ask for what the server does not do, and had fields of these ``names``, which no schema knows."""
        self._lenient = True
        self._warnings += [f"{name}: unknown field, ignored" for name in names]

    def refuse_or_warn(self, param: str, reason: str) -> None:
        """Raises ``InvalidRequest`` where the server is not told to ignore such a thing."""
        if not self._lenient:
            raise InvalidRequest(param, reason)
        self._warnings.append(f"{param}: {reason}; ignored")


def size_of(size: str | None, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    """Height and width, by whichever field they are given.

    Raises:
        InvalidRequest: ``size`` contradicts one of the two.
    """
    match = _SIZE.fullmatch(size or "auto")
    if match is None:
        return height, width
    for name, given, of_size in (("height", height, int(match[2])), ("width", width, int(match[1]))):
        if given not in (None, of_size):
            raise InvalidRequest(name, f"{given} contradicts size {size}; give only one of the two")
    return int(match[2]), int(match[1])


def seed_of(seed: int | None) -> int | None:
    """``None`` where it is to be drawn; -1 means that in other servers."""
    return None if seed == -1 else seed


def renamed(error: InvalidRequest, name: str) -> InvalidRequest:
    """``error`` under the name by which the client wrote its field; which side or count it is of is still said."""
    keeps = error.param != name and _BEGINS_WITH_A_NUMBER.match(error.reason)
    return InvalidRequest(name, f"{error.param} {error.reason}" if keeps else error.reason)


ExtraBody = Annotated[
    dict[str, Any] | None,
    Field(description="An object (in a form: JSON text) of fields that count as if they stood beside it."),
]
