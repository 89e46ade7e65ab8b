"""A request's values as the plain types that a message to a worker can hold. No torch import."""

from __future__ import annotations

from contextlib import suppress
from numbers import Integral, Real
from typing import Any

import msgspec

from ditrelay.errors import InvalidRequest
from ditrelay.runtime.request import SamplingParams

_TEXTS = ("prompt", "negative_prompt", "output_format")
_NUMBERS = ("guidance_scale", "strength")


def plain(params: SamplingParams) -> SamplingParams:
    """``params`` with numpy's numbers, and other kinds of numbers, text and bytes, as Python's own.

    Numbers that are of no such kind stay as they are: the checks of their limits refuse them.

    Raises:
        InvalidRequest: a text is none, or can't be written as UTF-8; a picture is not the bytes of a file.
    """
    given = {name: value for name, value in msgspec.structs.asdict(params).items() if value is not None}
    return msgspec.structs.replace(params, **{name: _plain(name, value) for name, value in given.items()})


def _plain(name: str, value: Any) -> Any:
    if name in _TEXTS:
        return _text(name, value)
    if name == "image":
        return _picture(value)
    if isinstance(value, bool):  # it is an int to Python; here it means that an argument went to the wrong field
        return value
    if name in _NUMBERS and isinstance(value, Real):
        with suppress(OverflowError):  # a whole number too large for one is too large for any field
            return float(value)
    return int(value) if isinstance(value, Integral) else value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(name, f"a {type(value).__name__} is not allowed; allowed: a text (str)")
    try:
        return value.encode().decode()
    except UnicodeEncodeError as error:
        # The command line hands bytes that are no UTF-8 on like this.
        raise InvalidRequest(
            name, "it has bytes that are not UTF-8, or half a surrogate pair; leave them out"
        ) from error


def _picture(value: Any) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        reason = f"a {type(value).__name__} is not allowed; allowed: the bytes of a PNG, JPEG, WebP, AVIF or GIF file"
        raise InvalidRequest("image", reason)
    return bytes(value)
