"""A multipart form, read into memory: the bytes of bodies are counted and limited before they come here."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ditrelay.server.problem import ApiError, shorten, wrong_field
from ditrelay.server.request_fields import MAX_FIELDS
from ditrelay.server.uploads import Upload

FORM = "multipart/form-data"

MAX_FILES = 20
# What the whole form may be said to be in. A single field may be in any of ``_CHARSETS``.
_WHOLE = ("utf-8", "ascii")
# What browsers still send. Of all the codecs that Python knows, some raise, and punycode would take hours for what a
# body may hold.
_CHARSETS = frozenset(
    {
        *_WHOLE,
        "utf-16",
        "iso8859-1",
        "iso8859-2",
        "iso8859-15",
        "cp1250",
        "cp1251",
        "cp1252",
        "cp1254",
        "cp1256",
        "koi8-r",
        "koi8-u",
        "shift_jis",
        "euc_jp",
        "iso2022_jp",
        "gb2312",
        "gbk",
        "gb18030",
        "big5",
        "euc_kr",
    }
)
_CHARSET_FIELD = "_charset_"  # RFC 7578, 4.6: the charset of every field that names none


@dataclass(frozen=True)
class Form:
    """The parts of a form, in order: (name, text) and (name, file)."""

    texts: list[tuple[str, str]]
    files: list[tuple[str, Upload]]


async def read_form(request: Request) -> Form:
    """The form that is the body of ``request``.

    Raises:
        ApiError: 400; it is no form, is cut off, has too many parts, or has text in a charset that is not read.
    """
    _, options = parse_options_header(request.headers["content-type"])
    if _codec(options.get(b"charset", b"utf-8")) not in _WHOLE:
        raise ApiError(400, "Content-Type: a form's charset must be utf-8", code="invalid_content_type")
    if not options.get(b"boundary"):
        raise _unreadable(f"its boundary is missing; send Content-Type: {FORM}; boundary=...")
    try:
        reader = _Reader(options[b"boundary"])
        async for chunk in request.stream():
            reader.feed(chunk)
    except FormParserError as error:
        raise _unreadable(str(error)) from None
    if not reader.ended:
        boundary = shorten(options[b"boundary"].decode("latin-1"))
        raise _unreadable(f"it ends before its last boundary, --{boundary}--; it was cut off")
    return _form(reader.parts)


@dataclass
class _Part:
    """One part as it comes: its headers' names and values, and its bytes."""

    header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    headers: dict[bytes, bytes] = field(default_factory=dict)
    content: bytearray = field(default_factory=bytearray)

    def end_header(self) -> None:
        name, value = self.header
        self.headers[bytes(name).lower()] = bytes(value)
        self.header = (bytearray(), bytearray())


class _Reader:
    """Takes a form apart as its bytes come."""

    def __init__(self, boundary: bytes) -> None:
        self.parts: list[_Part] = []
        self.ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self.parts[-1].header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self.parts[-1].header[1].extend(data[start:end]),
                "on_header_end": lambda: self.parts[-1].end_header(),
                "on_part_data": lambda data, start, end: self.parts[-1].content.extend(data[start:end]),
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Raises ``FormParserError`` where it is no form, ``ApiError`` where it has too many parts."""
        self._parser.write(chunk)

    def _begin(self) -> None:
        if len(self.parts) >= MAX_FIELDS + MAX_FILES:
            raise _too_many("parts", MAX_FIELDS + MAX_FILES)
        self.parts.append(_Part())

    def _end(self) -> None:
        self.ended = True


def _form(parts: list[_Part]) -> Form:
    texts: list[tuple[str, _Part]] = []
    files: list[tuple[str, Upload]] = []
    for part in parts:
        _, options = parse_options_header(part.headers.get(b"content-disposition"))
        name = _name(options)
        if b"filename" in options:
            kind, _ = parse_options_header(part.headers.get(b"content-type"))
            files.append((name, Upload(bytes(part.content), kind.decode("latin-1"))))
        else:
            texts.append((name, part))
    for what, count, allowed in (("fields", len(texts), MAX_FIELDS), ("files", len(files), MAX_FILES)):
        if count > allowed:
            raise _too_many(what, allowed)
    default = next((bytes(part.content) for name, part in texts if name == _CHARSET_FIELD), b"utf-8")
    return Form([(name, _text(name, part, default)) for name, part in texts if name != _CHARSET_FIELD], files)


def _name(options: dict[bytes, bytes]) -> str:
    if b"name" not in options:
        raise _unreadable('a part has no name; send Content-Disposition: form-data; name="..." with each')
    try:
        return options[b"name"].decode()
    except UnicodeDecodeError:
        raise _unreadable("the name of a field is not UTF-8") from None


def _text(name: str, part: _Part, default: bytes) -> str:
    """The text of a field, which says its charset in its own headers or has that of the form."""
    _, options = parse_options_header(part.headers.get(b"content-type"))
    given = options.get(b"charset", default)
    codec = _codec(given)
    if codec not in _CHARSETS:
        said = shorten(given.decode("latin-1"), 40)
        raise wrong_field(name, f"its charset {said!r} is not read; allowed: {', '.join(sorted(_CHARSETS))}")
    try:
        return part.content.decode(codec)
    except UnicodeDecodeError as error:
        way_out = "send UTF-8, or name its charset (Content-Type: text/plain; charset=... of the part)"
        raise wrong_field(name, f"byte {error.start} is not {codec}; {way_out}") from None


def _codec(charset: bytes) -> str:
    """Python's name for it; empty where it has none."""
    try:
        return codecs.lookup(charset.decode("ascii").strip()).name
    except (LookupError, ValueError):
        return ""


def _too_many(what: str, allowed: int) -> ApiError:
    return _unreadable(f"it has too many {what}; allowed: {allowed}")


def _unreadable(reason: str) -> ApiError:
    return ApiError(400, f"the form cannot be read: {reason}", code="invalid_form")
