"""From a client's file to what a rank gets: read once, decoded once, however many requests start from it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from ditrelay.errors import InvalidRequest, PicturesFull
from ditrelay.models.card import ModelCard
from ditrelay.models.picture_files import PictureFile, read_picture
from ditrelay.models.quirks import FAMILIES
from ditrelay.runtime.pictures.decoder import Decoding, PictureDecoder
from ditrelay.runtime.pictures.orders import Order
from ditrelay.runtime.request import SamplingParams

MAX_WHOLE = 4096 * 4096
"""Pixels that a model sees of a picture which it looks at as it is; a larger one is made smaller first."""


@dataclass(eq=False)
class Picture:
    """A file that requests start from. Whoever holds it shares its pixels with others that start from the same."""

    content: bytes
    file: PictureFile
    made: dict[tuple[int, int], _Made] = field(default_factory=dict)


@dataclass(eq=False)
class _Made:
    """The pixels at one size, and how many wait for them."""

    decoding: Decoding
    nbytes: int
    waiting: int = 0


class Pictures:
    """The pictures of one engine. Usable from any thread.

    Args:
        card: says in which size its model sees pictures.
        decoder: decodes them; ends with ``close``.
        max_bytes: pixels that may be held at a time. A picture alone is always taken.
        retry_after: seconds after which one that is too much should be tried again.
    """

    def __init__(
        self, card: ModelCard, decoder: PictureDecoder, *, max_bytes: int, retry_after: Callable[[], int]
    ) -> None:
        self._takes = card.edits or card.needs_image
        looks = {family.name for family in FAMILIES if family.looks_at_picture or family.whole_picture}
        self._whole = card.family in looks
        self._decoder = decoder
        self._max_bytes = max_bytes
        self._retry_after = retry_after
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[int, Picture] = weakref.WeakValueDictionary()

    def open(self, params: SamplingParams) -> Picture | None:
        """The picture that ``params`` start from; ``None`` where there is none, or the model takes none.

        Raises:
            InvalidRequest: naming ``image``; as ``read_picture`` has it.
        """
        content = params.image
        if not self._takes or content is None:
            return None
        with self._lock:
            known = self._known.get(id(content))  # it holds the bytes, so that nothing else can have their place
        if known is None or known.content is not content:
            known = Picture(content, read_picture(content))
            with self._lock:
                known = self._known.setdefault(id(content), known)
        return known

    @contextmanager
    def decoding(self, picture: Picture, params: SamplingParams, client: str) -> Iterator[Future[bytes]]:
        """The pixels for resolved ``params``, on their way. When nobody waits inside any more, they are given up.

        Raises:
            PicturesFull: too many are held.
        """
        with self._lock:
            made = self._begun(picture, params, client)
            made.waiting += 1
        try:
            yield made.decoding.future
        finally:
            with self._lock:
                made.waiting -= 1
                given_up = not made.waiting and not made.decoding.future.done()
            if given_up:
                self._decoder.cancel(made.decoding)

    def close(self) -> None:
        """End what is decoded, and all processes."""
        self._decoder.close()

    def _begun(self, picture: Picture, params: SamplingParams, client: str) -> _Made:
        size = (0, 0) if self._whole else (params.width or 0, params.height or 0)
        made = picture.made.get(size)
        if made is None or _has_failed(made.decoding.future):
            file = picture.file
            claimed = file.width * file.height
            nbytes = 3 * (size[0] * size[1] or min(claimed, MAX_WHOLE))
            held = sum(each.nbytes for other in self._known.values() for each in other.made.values())
            if held and held + nbytes > self._max_bytes:
                raise PicturesFull(self._max_bytes, self._retry_after())
            order = Order(picture.content, *size, most=MAX_WHOLE, claimed=claimed)
            made = picture.made[size] = _Made(self._decoder.submit(order, client), nbytes)
        return made


def _has_failed(future: Future[bytes]) -> bool:
    """By no fault of the picture: then it is tried again."""
    if not future.done():
        return False
    error = future.exception()
    return error is not None and not isinstance(error, InvalidRequest)
