"""MP4 files that are written while their frames come out of the VAE."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ditrelay.runtime.pipelines_core.media import Media, encode_clip

if TYPE_CHECKING:
    from ditrelay.models.adapter import Frames, LazyFrames

# Clips that a rank encodes at a time: the one whose frames come, and the rest of the one before it.
ENCODERS = 2


class ClipEncoders:
    """The encoders of one rank, each with a thread of its own; ``limit`` bounds them and the clips in memory.

    Args:
        fps: frames a second of every clip.
        timeout: seconds that anything here waits for anything else.
    """

    def __init__(self, fps: int, timeout: float, limit: int = ENCODERS) -> None:
        self._fps = fps
        self._timeout = timeout
        self._limit = limit
        self._free = threading.BoundedSemaphore(limit)

    def open(self) -> ClipFile:
        """A new clip. Waits while ``limit`` others are open: decoding on would only pile up their frames.

        Raises:
            RuntimeError: none of them ended within the time-out.
        """
        if not self._free.acquire(timeout=self._timeout):
            raise RuntimeError(f"none of this rank's {self._limit} video encoders came free within {self._timeout:g} s")
        return ClipFile(self._fps, self._timeout, ended=self._free.release)


class ClipFile:
    """One clip. ``add`` its frames in order, then ``finish`` or ``abandon`` it; an error shows in ``finish``."""

    def __init__(self, fps: int, timeout: float, ended: Callable[[], object]) -> None:
        self._fps = fps
        self._timeout = timeout
        self._ended = ended
        self._parts: queue.SimpleQueue[LazyFrames | None] = queue.SimpleQueue()
        self._abandoned = False
        self._file: Future[Media] = Future()
        threading.Thread(target=self._run, name="clip-encoder", daemon=True).start()

    def add(self, part: LazyFrames) -> None:
        """Encode what ``part`` returns; it is called, and waits for the device, on the encoder's thread."""
        self._parts.put(part)

    def finish(self) -> Media:
        """The file, once the frames that were added are encoded.

        Raises:
            RuntimeError, OSError, ValueError: it could not be encoded.
        """
        self._parts.put(None)
        try:
            return self._file.result(self._timeout)
        except TimeoutError:
            raise RuntimeError(f"the video was not encoded within {self._timeout:g} s") from None

    def abandon(self) -> None:
        """Nobody wants it any more: stop, at the next part at the latest."""
        self._abandoned = True
        self._parts.put(None)

    def _run(self) -> None:
        try:
            self._file.set_result(encode_clip(self._frames(), self._fps))
        except Exception as error:  # noqa: BLE001 - whatever it was, ``finish`` raises it
            self._file.set_exception(error)
        finally:
            self._ended()

    def _frames(self) -> Iterator[Frames]:
        while (part := self._next()) is not None:
            frames = part()
            if self._abandoned:
                return
            yield frames

    def _next(self) -> LazyFrames | None:
        try:
            return self._parts.get(timeout=self._timeout)
        except queue.Empty:
            raise RuntimeError(f"no frame of the video came within {self._timeout:g} s") from None
