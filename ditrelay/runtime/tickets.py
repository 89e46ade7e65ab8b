"""What a client holds of a request: its progress, its result, the means to cancel it."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from PIL import Image

from ditrelay.errors import InvalidRequest
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.pipelines_core.media import encode_picture
from ditrelay.runtime.request import PictureFormat, Request, RequestState, SamplingParams

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES: Mapping[str, PictureFormat] = MappingProxyType(
    {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
)


@dataclass(frozen=True)
class Progress:
    """A request reached ``state``; while denoising, ``step`` of ``total_steps`` are done. ``at``: monotonic seconds.

    ``preview``: a small JPEG file of what the picture looked like after ``step``; later steps may be done by then.
    """

    request_id: str
    state: RequestState
    step: int = 0
    total_steps: int = 0
    at: float = 0.0
    preview: bytes | None = None


@dataclass(frozen=True, repr=False)
class Result:
    """A finished picture or clip.

    Attributes:
        media: the file's bytes, in the format that ``media_type`` names.
        params: every parameter as it was used, the seed among them.
        timings: where the time went.
    """

    request_id: str
    params: SamplingParams
    media: bytes
    media_type: str
    width: int
    height: int
    num_frames: int
    timings: Timings

    @property
    def seed(self) -> int:
        assert self.params.seed is not None
        return self.params.seed

    @property
    def image(self) -> Image.Image:
        """The picture, decoded. Raises ``ValueError`` for a clip."""
        if self._is_clip:
            raise ValueError(f"request {self.request_id} made a clip ({self.media_type}); use .media or .save()")
        return Image.open(io.BytesIO(self.media))

    def save(self, path: str | Path) -> Path:
        """Write the file; makes missing folders. Returns the path.

        The file is written as it is, where ``path`` has its suffix or none; a picture becomes a PNG, JPEG or WebP file
        where the suffix is of another of these formats (``output_format`` saves that work).

        Raises:
            InvalidRequest: the suffix is of a format that the result can't have.
        """
        path = Path(path)
        media = self._as(path.suffix.lower())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(media)
        return path

    def _as(self, suffix: str) -> bytes:
        if not suffix or suffix in self._suffixes:
            return self.media
        if self._is_clip or suffix not in PICTURE_SUFFIXES:
            allowed = self._suffixes if self._is_clip else PICTURE_SUFFIXES
            raise InvalidRequest("path", f"a {self.media_type} has no suffix {suffix}; allowed: {', '.join(allowed)}")
        return encode_picture(self.image, PICTURE_SUFFIXES[suffix])

    @property
    def _is_clip(self) -> bool:
        return not self.media_type.startswith("image/")

    @property
    def _suffixes(self) -> tuple[str, ...]:
        """Those of the file as it is."""
        kind = self.media_type.partition("/")[2]
        return (".mp4",) if self._is_clip else tuple(s for s, name in PICTURE_SUFFIXES.items() if name == kind)

    def __repr__(self) -> str:
        what = f"{self.width}x{self.height}" + (f", {self.num_frames} frames" if self.num_frames > 1 else "")
        return (
            f"<Result {self.request_id}: {self.media_type}, {what}, {len(self.media)} bytes, seed {self.params.seed}, "
            f"{self.timings.total:.2f} s>"
        )

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows of a picture."""
        if self._is_clip:
            return None
        return self.media if self.media_type == "image/png" else encode_picture(self.image, "png")

    def _repr_html_(self) -> str | None:
        """What a notebook shows of a clip."""
        if not self._is_clip:
            return None
        data = b64encode(self.media).decode()
        return f'<video controls loop muted autoplay src="data:{self.media_type};base64,{data}"></video>'


class Ticket:
    """One submitted request. Usable from any thread."""

    def __init__(self, request: Request, cancel: Callable[[str], None], shared: object = None) -> None:
        self.request_id = request.request_id
        self._shared = shared  # with other requests, for as long as this one has not ended
        self.params = request.params
        self._cancel = cancel
        self.future: Future[Result] = Future()
        self.future.set_running_or_notify_cancel()  # only the engine ends it: see ``cancel``
        self._history: list[Progress] = []
        self._subscribers: list[Callable[[Progress], None]] = []
        self._changed = threading.Condition()

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end.

        Raises:
            RequestFailed, RequestCancelled, InvalidRequest, QueueFull: how else it may end.
            TimeoutError: it has not ended within ``timeout`` seconds; it goes on.
        """
        try:
            return self.future.result(timeout)
        except TimeoutError:
            if self.future.done():
                raise
            raise TimeoutError(f"request {self.request_id} has not ended within {timeout:g} s") from None

    def done(self) -> bool:
        return self.future.done()

    def cancel(self) -> None:
        """Ask for the end; ``result`` then raises ``RequestCancelled`` unless the request was faster."""
        if not self.future.done():
            self._cancel(self.request_id)

    def events(self) -> Iterator[Progress]:
        """Every change from the submission on; waits for the next and ends with the request."""
        position = 0
        while True:
            with self._changed:
                while len(self._history) == position:
                    self._changed.wait()
                news = self._history[position:]
            yield from news
            position += len(news)
            if news[-1].state.ended:
                return

    def subscribe(self, callback: Callable[[Progress], None]) -> None:
        """Call ``callback`` with every change, those that were already included. It must be quick: the engine waits.

        One that raises is told nothing more.
        """
        with self._changed:
            for progress in self._history:
                callback(progress)
            self._subscribers.append(callback)

    # ------------------------------------------------------------ called by the engine

    def report(self, progress: Progress) -> None:
        with self._changed:
            self._history.append(progress)
            for callback in list(self._subscribers):
                self._tell(callback, progress)
            self._changed.notify_all()

    def _tell(self, callback: Callable[[Progress], None], progress: Progress) -> None:
        try:
            callback(progress)
        except BaseException:  # a client's own, SystemExit too: the engine and its other clients' requests go on
            logger.exception("a subscriber of request %s raised; it is told nothing more", self.request_id)
            self._subscribers.remove(callback)

    def succeed(self, result: Result, at: float) -> None:
        self._settle(lambda: self.future.set_result(result))
        self.report(Progress(self.request_id, RequestState.DONE, at=at))

    def fail(self, error: Exception, state: RequestState, at: float) -> None:
        self._settle(lambda: self.future.set_exception(error))
        self.report(Progress(self.request_id, state, at=at))

    def _settle(self, settle: Callable[[], None]) -> None:
        self._shared = None
        try:
            settle()
        except BaseException:  # a callback of the future, or a client that has set it itself: as in ``_tell``
            logger.exception("the future of request %s raised when it was set", self.request_id)


class Cancellable(Protocol):
    """A ticket, for threads or for asyncio."""

    def cancel(self) -> None: ...


@contextlib.contextmanager
def cancelled_on_error(tickets: Sequence[Cancellable]) -> Iterator[None]:
    """What raises inside ends all of them: nobody else has them, and they would keep the ranks from other work."""
    try:
        yield
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
