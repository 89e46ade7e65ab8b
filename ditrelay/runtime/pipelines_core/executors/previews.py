"""What there is to see of a denoise: taken between two steps on its rank, and left in the spool.

A decoder that the head finds idle makes a picture of it (``painter``); a rank that decodes too does so itself. Nothing
waits for any of this.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from ditrelay.runtime.messages import WorkerEvent
from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.pipelines_core.executors.pipeline_executor import describe
from ditrelay.runtime.pipelines_core.executors.progress import Progress, Reached
from ditrelay.runtime.pipelines_core.executors.state_files import DAMAGED, load, save, to_host
from ditrelay.runtime.preview_messages import PreviewTaken
from ditrelay.runtime.request import Request
from ditrelay.runtime.spool import Spool

logger = logging.getLogger(__name__)

_SHOT = "shot"


@dataclass(frozen=True)
class Shot:
    """Of one request after ``step`` of ``total``: what decode takes, its tensors on the host."""

    request: Request
    step: int
    total: int
    state: State


class Outlet(Protocol):
    """Where shots go; called on the taker's thread."""

    def put(self, shot: Shot) -> None: ...

    def forget(self, request_id: str) -> None:
        """The request's denoise is over."""
        ...


def is_due(step: int, total: int, count: int) -> bool:
    """Whether one of ``count`` previews is taken after ``step``: they are spread evenly, and none is after the last."""
    return 0 < step < total and step in {round(number * total / (count + 1)) for number in range(1, count + 1)}


class PreviewTaker:
    """On a rank that denoises. ``take`` belongs to the lane's thread; it never waits and never raises."""

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._refused = False
        self._busy = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="previews")

    def take(self, request: Request, step: int, total: int, estimate: Callable[[], State], progress: Progress) -> None:
        """Take one, if it is time, and the one before is out of the way."""
        if self._refused or self._busy.is_set() or not is_due(step, total, request.params.previews):
            return
        try:
            shot = Shot(request, step, total, to_host(estimate()))
        except Exception as error:  # noqa: BLE001 - whatever it was, the denoise goes on without previews
            self._refused = not isinstance(error, torch.OutOfMemoryError)
            logger.warning("no preview of request %s is taken: %s", request.request_id, describe(error))
            return
        self._busy.set()
        progress.then(lambda reached: self._hand_on(shot, reached))

    def forget(self, request: Request) -> None:
        """Its denoise is over: nothing stays of its previews, once what is still to be written of them is."""
        if request.params.previews:
            self._thread.submit(self._outlet.forget, request.request_id)

    def _hand_on(self, shot: Shot, reached: Reached) -> None:
        if reached.error is None:
            self._thread.submit(self._put, shot)
        else:
            self._busy.clear()

    def _put(self, shot: Shot) -> None:
        try:
            self._outlet.put(shot)
        except Exception as error:  # noqa: BLE001 - as in ``take``
            logger.warning("a preview of request %s is lost: %s", shot.request.request_id, describe(error))
        finally:
            self._busy.clear()


class SpoolOutlet:
    """Shots go to whichever decoder the head finds idle."""

    def __init__(self, rank: int, spool: Spool, emit: Callable[[WorkerEvent], None]) -> None:
        self._rank = rank
        self._spool = spool
        self._emit = emit

    def put(self, shot: Shot) -> None:
        request_id = shot.request.request_id
        unfinished = self._spool.unfinished_preview(request_id)
        moment = StateValue({"step": shot.step, "total": shot.total})
        save(unfinished, request_id, {**shot.state, _SHOT: moment}, checksum=False)
        try:
            os.replace(unfinished, self._spool.preview(request_id))
        except FileNotFoundError:
            return  # the request has ended, and the head has removed what there was of it
        self._emit(PreviewTaken(self._rank, request_id, shot.step))

    def forget(self, request_id: str) -> None:
        self._spool.discard_preview(request_id)


def take_shot(spool: Spool, request: Request) -> Shot | None:
    """The newest of the request, taken out of the spool; ``None`` where there is none any more."""
    request_id = request.request_id
    taken = spool.taken_preview(request_id)
    try:
        os.replace(spool.preview(request_id), taken)
        state = load(taken, request_id)
        moment = state.pop(_SHOT).value
    except DAMAGED:
        return None
    finally:
        with contextlib.suppress(OSError):
            taken.unlink()
    match moment:
        case {"step": int(step), "total": int(total)}:
            return Shot(request, step, total, state)
    return None
