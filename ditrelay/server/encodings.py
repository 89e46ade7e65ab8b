"""Bodies that come compressed, and the size of a JSON body before it is read."""

from __future__ import annotations

import zlib

from ditrelay.server.problem import Refused

PIECE = 64 << 10
"""Bytes that are unpacked at a time: a small body may hold a large one."""

TAKEN = "gzip, identity"

_WHITE_SPACE = b" \t\r\n"
_BEFORE_IT = _WHITE_SPACE + b"\xef\xbb\xbf"  # the mark that some editors begin a text in UTF-8 with
_BEGINS = b"{[\0\xff\xfe"  # also what begins in UTF-16
_OF_A_LIST = 32  # bytes that a list or an object counts for

_GZIP = 31  # zlib's window bits for gzip with its header


def check_encoding(name: str) -> bool:
    """Whether a body with the ``Content-Encoding`` ``name`` is gzip. Raises ``Refused`` (415) where it is anything else
    than that or plain."""
    name = name.strip().lower()
    if name in ("", "identity"):
        return False
    if name in ("gzip", "x-gzip"):
        return True
    reason = f"Content-Encoding: {name[:40]!r} is not taken; allowed: {TAKEN}"
    raise Refused(415, reason, code="unsupported_encoding", headers={"Accept-Encoding": TAKEN})


class Inflater:
    """Unpacks gzip piece by piece."""

    def __init__(self) -> None:
        self._gzip = zlib.decompressobj(_GZIP)
        self._waiting = b""

    def feed(self, data: bytes) -> None:
        """What came; nothing may be left to take."""
        self._waiting += data

    def take(self) -> bytes:
        """Up to ``PIECE`` bytes more of what was fed; none: it is all out. Raises ``Refused`` (400): it is damaged."""
        if self._gzip.eof and not self._waiting:
            return b""
        try:
            piece = self._gzip.decompress(self._waiting, PIECE)
        except zlib.error:
            raise _damaged("it can't be unpacked") from None
        self._waiting = self._gzip.unconsumed_tail
        if self._gzip.unused_data:
            raise _damaged("something follows its end")
        return piece

    def end(self) -> None:
        """Nothing more comes. Raises ``Refused`` (400): its end is missing."""
        if not self._gzip.eof:
            raise _damaged("its end is missing")


def _damaged(reason: str) -> Refused:
    return Refused(400, f"the body is not gzip, as Content-Encoding says: {reason}", code="invalid_encoding")


class JsonSize:
    """Counts the bytes of a JSON text that are outside of its strings, as it comes.

    What is in a string costs a reader next to nothing, nor does white space. Outside every third byte may be a list of
    its own: 32 MiB of these take seconds to read, in which nothing else is done. So a list, or an object, counts more.

    Args:
        limit: bytes outside of strings, at most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._outside = 0
        self._in_string = False
        self._began = False
        self._ignored = False
        self._rest = b""  # a backslash whose second half is yet to come

    def feed(self, data: bytes) -> None:
        """Raises ``Refused`` (400): too much is outside, or it is not UTF-8."""
        if self._ignored or not self._has_begun(data):
            return
        if b"\0" in data:  # none is in JSON, and UTF-16 would be counted wrong
            raise Refused(400, "the body is not JSON in UTF-8", code="invalid_json")
        data = (self._rest + data).replace(b"\\\\", b"")
        self._rest = b"\\" if data.endswith(b"\\") else b""
        data = data.replace(b'\\"', b"")
        quotes = data.count(b'"')
        self._count(quotes)
        first = 1 if self._in_string else 0
        outside = b"".join(data.split(b'"')[first::2]).translate(None, _WHITE_SPACE)
        self._count(len(outside) + (_OF_A_LIST - 1) * (outside.count(b"[") + outside.count(b"{")))
        self._in_string ^= bool(quotes % 2)

    def _has_begun(self, data: bytes) -> bool:
        """What begins as neither an object nor a list is refused by its reader at once, however long it is."""
        if not self._began and (text := data.lstrip(_BEFORE_IT)):
            self._began = True
            self._ignored = text[0] not in _BEGINS
        return self._began and not self._ignored

    def _count(self, nbytes: int) -> None:
        self._outside += nbytes
        if self._outside > self._limit:
            reason = f"the JSON has more than {self._limit} bytes outside of its strings (--max-json-bytes)"
            raise Refused(400, reason, code="invalid_json")
