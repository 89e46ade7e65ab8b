"""A picture that a client sends, as the bytes of its file: what it may be, and where it may come from."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from ditrelay.errors import InvalidRequest
from ditrelay.models.picture_files import read_picture
from ditrelay.server.data_urls import payload_of, unpack
from ditrelay.server.remote_media import RemoteMedia

_SMALL = 1 << 16  # what is read in no time; more of it on a thread, so that others go on
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)


class PictureReference(BaseModel):
    """OpenAI's form for a picture that is not a file of a form."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_url: str = Field(description="A data URL; an address only where --allow-remote-media names its host.")


@dataclass(frozen=True)
class Upload:
    """A file of a form: its bytes, and the type that the client says it has ("": it says none). A picture's content
    decides what it is, whatever it is said to be."""

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
        InvalidRequest: it is no picture that is allowed (see ``read_picture``), or comes from where none is taken from.
        ApiError: 429; too many pictures are fetched at a time.
    """
    try:
        content = source.content if isinstance(source, Upload) else await _referred(_address(source), remote, count)
        if len(content) <= _SMALL:
            read_picture(content)
        else:
            await asyncio.to_thread(read_picture, content)
    except InvalidRequest as error:
        raise InvalidRequest(param, error.reason) from error
    return content


def _address(source: PictureReference | str) -> str:
    return source.image_url if isinstance(source, PictureReference) else source


async def _referred(address: str, remote: RemoteMedia | None, count: Callable[[int], None]) -> bytes:
    if (found := payload_of(address)) is not None:
        return await _unpacked(*found)
    if remote is not None and _ADDRESS.match(address):
        return (await remote.fetch(address, count=count)).content
    others = f"http(s) at {', '.join(remote.hosts)}" if remote else "no other address"
    raise InvalidRequest(
        "image",
        f"this is no data URL; allowed: data:image/png;base64,... or a file of a multipart form ({others})",
    )


async def _unpacked(payload: str, is_base64: bool) -> bytes:
    try:
        if len(payload) <= _SMALL:
            return unpack(payload, is_base64=is_base64)
        return await asyncio.to_thread(unpack, payload, is_base64=is_base64)
    except ValueError as error:
        reason = f"its data URL holds no {'base64' if is_base64 else 'data'} ({str(error)[:80]})"
        raise InvalidRequest("image", f"{reason}; allowed: data:image/png;base64,...") from None
