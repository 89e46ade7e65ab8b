"""Previews as pictures, on a rank that decodes.

Where its VAE can decode a picture of that size before other work is expected, it does. Else latents are mapped to
colours as the VAE has done it lately, on the host; the map is learnt from the rank's real decodes, of which the warm-up
is the first.
"""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ditrelay.models.adapter import Decoder
from ditrelay.models.previews import ColourMap, latent_grid, middle_of
from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.pipelines_core.executors.lane import Lane
from ditrelay.runtime.pipelines_core.executors.pipeline_executor import describe
from ditrelay.runtime.pipelines_core.executors.previews import Shot, take_shot
from ditrelay.runtime.pipelines_core.executors.stage_run import Emit, free_after
from ditrelay.runtime.pipelines_core.executors.state_files import to_host
from ditrelay.runtime.preview_messages import Previewed
from ditrelay.runtime.request import Request, SamplingParams
from ditrelay.runtime.spool import Spool

if TYPE_CHECKING:
    from ditrelay.models.adapter import Frames, Give, LazyFrames

logger = logging.getLogger(__name__)

LONGER_SIDE = 256  # pixels
QUALITY = 80
QUICK_SECONDS = 0.05  # a longer decode would keep the rank for too long from work that comes unexpectedly
KNOWN_SIZES = 64
_LAST = 100  # on a lane: after all stages


class Painter:
    """Makes shots into small JPEG files.

    All of it happens on a thread of its own; only where the VAE decodes, that comes to the end of the lane's queue.

    Args:
        decoder: makes the pixels of a shot, and of nothing that is to be learnt from.
        lane: the rank's decode lane.
    """

    def __init__(self, rank: int, decoder: Decoder, lane: Lane, spool: Spool, emit: Emit) -> None:
        self._rank = rank
        self._decoder = decoder
        self._lane = lane
        self._spool = spool
        self._emit = emit
        self._colours = ColourMap()
        self._seconds: dict[tuple[int | None, int | None], float] = {}  # that a picture's decode took, by its size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="painter")

    # ------------------------------------------------------------ learning

    @property
    def wants_lessons(self) -> bool:
        return self._colours.wants_more

    def learn(self, grid: torch.Tensor, pixels: LazyFrames) -> None:
        """The VAE has made ``pixels`` of ``grid``, which is on the host when they are."""
        self._thread.submit(self._learn, grid, pixels)

    def took(self, params: SamplingParams, seconds: float) -> None:
        """A picture's decode took so long."""
        self._thread.submit(self._note, (params.height, params.width), seconds)

    def _learn(self, grid: torch.Tensor, pixels: LazyFrames) -> None:
        try:
            frames = pixels()
            self._colours.learn(grid, frames[len(frames) // 2])
        except Exception as error:  # noqa: BLE001 - whatever it was, it costs one lesson
            logger.warning("previews can't learn from a picture: %s", describe(error))

    def _note(self, size: tuple[int | None, int | None], seconds: float) -> None:
        self._seconds.pop(size, None)
        self._seconds[size] = seconds
        if len(self._seconds) > KNOWN_SIZES:
            del self._seconds[next(iter(self._seconds))]

    # ------------------------------------------------------------ painting

    def make(self, request: Request, spare: float) -> None:
        """Make a picture of the request's newest shot in the spool. There is one answer, whatever comes of it.

        Args:
            spare: seconds in which no other work is expected.
        """
        self._thread.submit(self._make, request, time.monotonic() + spare)

    def put(self, shot: Shot) -> None:
        """A shot of this rank's own denoise, which a decode on the lane would hold up."""
        self._show(shot, lambda: self._mapped(shot))

    def forget(self, request_id: str) -> None:
        """Nothing of a shot is kept."""

    def _make(self, request: Request, until: float) -> None:
        try:
            shot = take_shot(self._spool, request)
        except Exception as error:  # noqa: BLE001 - whatever it was, the head waits for an answer
            logger.warning("a preview of request %s can't be read: %s", request.request_id, describe(error))
            shot = None
        if shot is None:
            self._emit(Previewed(self._rank, request.request_id, 0, 0, None, time.monotonic()))
        elif self._may_decode(request.params, until):
            self._lane.put(_LAST, lambda: self._decode(shot, until))
        else:
            self._show(shot, lambda: self._mapped(shot))

    def _may_decode(self, params: SamplingParams, until: float) -> bool:
        """Of a clip there is one frame here, which its VAE may make otherwise than the same one among others."""
        seconds = self._seconds.get((params.height, params.width), math.inf)
        is_picture = (params.num_frames or 1) == 1
        return is_picture and seconds < QUICK_SECONDS and time.monotonic() + seconds < until

    def _decode(self, shot: Shot, until: float) -> None:
        """On the lane, when nothing else is to do there."""
        if time.monotonic() > until:  # there was something else
            self._thread.submit(self._show, shot, lambda: self._mapped(shot))
            return
        try:
            (frames,) = self._decoder.decode([shot.request], shot.state)
        except Exception as error:
            logger.debug("a preview of request %s failed", shot.request.request_id, exc_info=True)
            self._answer(shot, None)
            if isinstance(error, torch.OutOfMemoryError):
                free_after(error)
        else:
            self._thread.submit(self._show, shot, lambda: frames[0])

    def _mapped(self, shot: Shot) -> Frames | None:
        grid = latent_grid(shot.state)
        return None if grid is None else self._colours.draw(grid)

    def _show(self, shot: Shot, pixels: Callable[[], Frames | None]) -> None:
        try:
            made = pixels()
            jpeg = None if made is None else to_jpeg(made)
        except Exception as error:  # noqa: BLE001 - whatever it was, it costs one preview
            logger.warning("a preview of request %s came to nothing: %s", shot.request.request_id, describe(error))
            jpeg = None
        self._answer(shot, jpeg)

    def _answer(self, shot: Shot, jpeg: bytes | None) -> None:
        request_id = shot.request.request_id
        self._emit(Previewed(self._rank, request_id, shot.step, shot.total, jpeg, time.monotonic()))


class LearningDecoder:
    """A rank's real decodes, which tell its painter how latents and colours hang together, and how long one takes."""

    def __init__(self, inner: Decoder, painter: Painter) -> None:
        self._inner = inner
        self._painter = painter

    def decode(self, requests: Sequence[Request], state: State, give: Give | None = None) -> list[Frames]:
        params, began = requests[0].params, time.monotonic()
        grid = latent_grid(state) if self._painter.wants_lessons else None
        if grid is None:
            frames = self._inner.decode(requests, state, give)
        else:
            frames = self._learn(requests, state, give, grid)
        if frames and len(frames[0]) == 1:  # its pixels are on the host, so it is done
            self._painter.took(params, time.monotonic() - began)
        return frames

    def _learn(self, requests: Sequence[Request], state: State, give: Give | None, grid: torch.Tensor) -> list[Frames]:
        on_host = to_host({"grid": StateValue(grid)})["grid"].value
        assert isinstance(on_host, torch.Tensor)
        latents = state["latents"].value
        count = latents.shape[2] if isinstance(latents, torch.Tensor) and latents.ndim == 5 else 1
        parts = _Parts(count // 2, give)
        frames = self._inner.decode(requests, state, parts.give if give is not None else None)
        if frames:
            self._painter.learn(on_host, lambda: middle_of(frames[0], count))
        elif parts.middle is not None:
            self._painter.learn(on_host, parts.middle)
        return frames


class _Parts:
    """Hands a clip's parts on, one for each latent frame, and keeps the one in the ``middle``."""

    def __init__(self, number: int, give: Give | None) -> None:
        self._number = number
        self._give = give
        self.middle: LazyFrames | None = None

    def give(self, part: LazyFrames) -> None:
        assert self._give is not None
        if self._number == 0:
            self.middle = part
        self._number -= 1
        self._give(part)


def to_jpeg(pixels: Frames) -> bytes:
    """A file of uint8 [height, width, 3], made smaller where its longer side has more than ``LONGER_SIDE`` pixels."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((LONGER_SIDE, LONGER_SIDE), Image.Resampling.BOX)
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
