"""A picture that a client sends, as the bytes of its file: what it may be, and where it may come from."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from ditrelay.errors import InvalidRequest
from ditrelay.models.picture_files import read_picture
from ditrelay.server.remote_media import RemoteMedia

_DATA_URL = re.compile(r"data:(image/[a-z0-9+.-]{1,20});base64,", re.IGNORECASE)
_PIECE = 1 << 20  # of base64 text: a multiple of four characters
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
# What a client may call the kinds that are taken; None: it says nothing of the kind.
_DECLARED = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/jpg": "jpeg",
    "image/webp": "webp",
    "application/octet-stream": None,
    "": None,
}


class PictureReference(BaseModel):
    """OpenAI's form for a picture that is not a file of a form."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_url: str = Field(description="A data URL; an address only where --allow-remote-media names its host.")


@dataclass(frozen=True)
class Upload:
    """A file of a form: its bytes, and the type that the client says it has ("": it says none)."""

    content: bytes
    media_type: str

    @property
    def is_absent(self) -> bool:
        """No byte came: what browsers send for a file that nobody has chosen."""
        return not self.content


async def picture_of(
    source: Upload | PictureReference | str, *, param: str, remote: RemoteMedia | None, count: Callable[[int], None]
) -> bytes:
    """The bytes of the one picture that ``source`` is or leads to. Nothing is decoded.

    Args:
        param: the field, for messages.
        remote: fetches from addresses; ``None``: no address is allowed.
        count: as ``RemoteMedia.fetch`` has it.

    Raises:
        InvalidRequest: it is no picture that is allowed (see ``read_picture``), is declared to be of another type, or
            comes from where none is taken from.
        ApiError: 429; too many pictures are fetched at a time.
    """
    try:
        found = source if isinstance(source, Upload) else await _referred(_address(source), remote, count)
        _check_declared(found.media_type, read_picture(found.content).kind)
    except InvalidRequest as error:
        raise InvalidRequest(param, error.reason) from error
    return found.content


def _address(source: PictureReference | str) -> str:
    return source.image_url if isinstance(source, PictureReference) else source


async def _referred(address: str, remote: RemoteMedia | None, count: Callable[[int], None]) -> Upload:
    if match := _DATA_URL.match(address):
        try:
            return Upload(await _decoded(address[match.end() :]), match[1].lower())
        except (binascii.Error, ValueError):
            raise InvalidRequest("image", "its data URL holds no base64; allowed: data:image/png;base64,...") from None
    if remote is not None and _ADDRESS.match(address):
        fetched = await remote.fetch(address, count=count)
        return Upload(fetched.content, (fetched.media_type or "").partition(";")[0].strip().lower())
    others = f"http(s) at {', '.join(remote.hosts)}" if remote else "no other address"
    raise InvalidRequest(
        "image",
        f"this is no data URL; allowed: data:image/png;base64,... or a file of a multipart form ({others})",
    )


async def _decoded(text: str) -> bytes:
    """Raises ``ValueError``. A large text takes a third of a second: in pieces on a thread, so that others go on."""
    if len(text) <= _PIECE:
        return base64.b64decode(text, validate=True)
    pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
    return await asyncio.to_thread(lambda: b"".join(base64.b64decode(piece, validate=True) for piece in pieces))


def _check_declared(declared: str, kind: str) -> None:
    if declared not in _DECLARED:
        raise InvalidRequest("image", f"its type is {declared[:40]!r}; allowed: image/png, image/jpeg, image/webp")
    if _DECLARED[declared] not in (None, kind):
        raise InvalidRequest("image", f"its type is {declared!r} and its content image/{kind}; allowed: the same")
