"""Decodes clients' pictures, a few at a time and in turn: each in a process that may die of it, and nothing else."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from ditrelay.errors import EngineClosed, InvalidRequest, RequestCancelled
from ditrelay.models.raw_picture import pack
from ditrelay.runtime.pictures.orders import Answer, Order
from ditrelay.runtime.pictures.process import DecodingProcess, Died

logger = logging.getLogger(__name__)

_ATTEMPTS = 2  # a process that somebody else killed says nothing of its picture


@dataclass(eq=False)
class Decoding:
    """One picture on its way.

    Attributes:
        future: the pixels, as ``raw_picture.pack`` has them; or ``InvalidRequest`` (naming ``image``), ``OSError``
            where no process can be started, ``RequestCancelled``, or ``EngineClosed``.
    """

    order: Order
    client: str
    future: Future[bytes] = field(default_factory=Future)
    process: DecodingProcess | None = None


class PictureDecoder:
    """Usable from any thread. Processes start when they are needed, and stay for the next pictures.

    Args:
        at_once: pictures decoded at a time.
        per_client: of one client. Those that nobody is named for, as in the Python API, may be all.
    """

    def __init__(self, *, at_once: int = 2, per_client: int = 1) -> None:
        self._at_once = at_once
        self._per_client = per_client
        self._lock = threading.Lock()
        self._waiting: list[Decoding] = []
        self._running: list[Decoding] = []
        self._idle: list[DecodingProcess] = []
        self._threads = 0
        self._closed = False

    def submit(self, order: Order, client: str = "") -> Decoding:
        """Decode in turn; one client's pictures wait for each other, not for those of others."""
        decoding = Decoding(order, client)
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is shut down")
            self._waiting.append(decoding)
            if self._threads >= self._at_once:
                return decoding
            self._threads += 1
        try:
            threading.Thread(target=self._work, name="pictures", daemon=True).start()
        except RuntimeError as error:  # the machine has no thread left; another one may come to it
            with self._lock:
                self._threads -= 1
                if not self._threads and decoding in self._waiting:
                    self._waiting.remove(decoding)
                    _end(decoding, OSError(11, f"no thread to decode a picture: {error}"))
        return decoding

    def cancel(self, decoding: Decoding) -> None:
        """Nobody wants it any more: what computes for it is ended at once."""
        with self._lock:
            if decoding in self._waiting:
                self._waiting.remove(decoding)
            _end(decoding, RequestCancelled("of a picture"))
            if decoding.process is not None:
                decoding.process.kill()

    def close(self) -> None:
        """End all processes, and what waits."""
        with self._lock:
            self._closed = True
            ended, self._waiting = self._waiting + self._running, []
            for decoding in ended:
                _end(decoding, EngineClosed("the engine is shut down"))
                if decoding.process is not None:
                    decoding.process.kill()
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()

    # ------------------------------------------------------------ on a thread of its own

    def _work(self) -> None:
        while (decoding := self._next()) is not None:
            try:
                self._decode(decoding)
            except OSError as error:
                _end(decoding, error)
            finally:
                with self._lock:
                    self._running.remove(decoding)

    def _next(self) -> Decoding | None:
        """The first whose client has a place. ``None``: the thread is over."""
        with self._lock:
            busy = Counter(each.client for each in self._running)
            for place, each in enumerate(self._waiting):
                if not each.client or busy[each.client] < self._per_client:
                    self._running.append(each)
                    return self._waiting.pop(place)
            self._threads -= 1
            return None

    def _decode(self, decoding: Decoding) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            process = self._hired(decoding, anew=attempt > 1)
            if process is None:
                return
            try:
                answer = process.decode(decoding.order)
            except Died as death:
                if self._left(decoding) or not (death.is_late or attempt == _ATTEMPTS):
                    continue
                return _end(decoding, _of_death(death, decoding.order))
            self._give_back(process, decoding)
            return _settle(decoding, answer)

    def _hired(self, decoding: Decoding, *, anew: bool) -> DecodingProcess | None:
        """A process for it, after a death a new one; ``None``: it has been cancelled."""
        with self._lock:
            if decoding.future.done():
                return None
            decoding.process = self._idle.pop() if self._idle and not anew else None
        process = decoding.process or DecodingProcess()
        with self._lock:
            decoding.process = process
            if not decoding.future.done():
                return process
        process.end()
        return None

    def _left(self, decoding: Decoding) -> bool:
        with self._lock:
            decoding.process = None
            return decoding.future.done()

    def _give_back(self, process: DecodingProcess, decoding: Decoding) -> None:
        with self._lock:
            decoding.process = None
            if not self._closed and not decoding.future.done():
                return self._idle.append(process)
        process.end()


def _settle(decoding: Decoding, answer: Answer) -> None:
    if answer.is_refused:
        reason = f"it can't be read ({answer.content.decode('utf-8', 'replace')})"
        return _end(decoding, InvalidRequest("image", f"{reason}; allowed: a whole PNG, JPEG, WebP, AVIF or GIF"))
    with suppress(InvalidStateError):
        decoding.future.set_result(pack(answer.width, answer.height, answer.content))


def _of_death(death: Died, order: Order) -> InvalidRequest:
    if death.is_late:
        reason = f"it takes more than {order.cpu_seconds:.1f} s to decode, too long for its size; save it anew"
    else:
        logger.error("a process ended over a picture of %d bytes: %s", len(order.content), death.how)
        reason = f"its decoder ended over it ({death.how}); save it anew, or send another format"
    return InvalidRequest("image", reason)


def _end(decoding: Decoding, error: Exception) -> None:
    with suppress(InvalidStateError):
        decoding.future.set_exception(error)
