"""Data URLs (RFC 2397), as clients write them: with parameters or without a type, and base64 as it comes.

The type is not kept: what a picture is, its content says.
"""

from __future__ import annotations

import base64
import binascii
import re

_HEAD = re.compile(r'\s*data:((?:[^,"]|"[^"]*")*),', re.IGNORECASE)
_LONGEST_HEAD = 4096
_PIECE = 1 << 20  # characters that are read at a time, so that the event loop has its turn in between
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_BLANKS = b" \t\r\n\f\v"
_ONE_ALPHABET = bytes.maketrans(b"-_", b"+/")  # base64url has these two


def payload_of(address: str) -> tuple[str, bool] | None:
    """The data of a data URL, still packed, and whether it is base64. ``None``: ``address`` is another kind."""
    match = _HEAD.match(address[:_LONGEST_HEAD])
    if match is None:
        return None
    is_base64 = match[1].rpartition(";")[2].strip().lower() == "base64"
    return address[match.end() :], is_base64


def unpack(payload: str, *, is_base64: bool) -> bytes:
    """The bytes of what ``payload_of`` gives. A large one takes a while: call it on a thread.

    Raises:
        ValueError: it is not what it is said to be.
    """
    parts: list[bytes] = []
    rest, escaped, padded = b"", b"", False
    for at in range(0, len(payload), _PIECE):
        piece, escaped = _unescaped(escaped + payload[at : at + _PIECE].encode("ascii"))
        if not is_base64:
            parts.append(piece)
            continue
        piece = rest + piece.translate(_ONE_ALPHABET, _BLANKS)
        if padded and piece:
            raise ValueError("something follows its end")
        whole = len(piece) - len(piece) % 4
        parts.append(_decoded(piece[:whole]))
        rest, padded = piece[whole:], piece[:whole].endswith(b"=")
    if not is_base64:
        return b"".join([*parts, escaped])
    rest = (rest + escaped.translate(_ONE_ALPHABET, _BLANKS)).rstrip(b"=")
    return b"".join([*parts, _decoded(rest + b"=" * (-len(rest) % 4))])


def _unescaped(piece: bytes) -> tuple[bytes, bytes]:
    """``piece`` without its escapes, and what may be the beginning of one."""
    if b"%" not in piece:
        return piece, b""
    cut = piece.rfind(b"%", max(0, len(piece) - 2))
    cut = len(piece) if cut < 0 else cut
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), piece[:cut]), piece[cut:]


def _decoded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
