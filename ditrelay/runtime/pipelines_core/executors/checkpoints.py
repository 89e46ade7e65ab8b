"""How far the denoises of a rank are, on disk every few steps, so that after its death another process can go on.

A checkpoint is a safetensors file with a JSON header. Nothing of it stalls the device: the tensors are copied into
pinned memory on the lane's own stream, and a thread writes them once the device has done so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ditrelay.errors import CodecError
from ditrelay.runtime.payloads import State
from ditrelay.runtime.pipelines_core.executors.pipeline_executor import describe
from ditrelay.runtime.pipelines_core.executors.progress import Progress, Reached
from ditrelay.runtime.pipelines_core.executors.state_files import DAMAGED, NOT_WRITTEN, load, save, to_host
from ditrelay.runtime.spool import Spool

logger = logging.getLogger(__name__)


class Checkpoints:
    """Those of one rank's denoises. ``read`` and ``keep`` belong to the lane's thread, ``remove`` to any.

    Args:
        spool: where the files are.
        steps: every how many steps one is written.
    """

    def __init__(self, spool: Spool, steps: int) -> None:
        self._spool = spool
        self._steps = steps
        self._refused = False
        self._writing = threading.Event()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")

    def read(self, request_id: str) -> State | None:
        """Where another process left the request; ``None`` where none did, or left a damaged file (it is removed)."""
        file = self._spool.file(request_id)
        if not file.exists():
            return None
        try:
            state = load(file, request_id)
        except DAMAGED as error:
            logger.warning("the checkpoint of request %s can't be read, so it starts over: %s", request_id, error)
            self._spool.discard(request_id)
            return None
        logger.info("the denoise of request %s goes on where another process left it", request_id)
        return state

    def keep(self, request_id: str, step: int, capture: Callable[[], State], progress: Progress) -> None:
        """Write where the request is, if it is time. On a disk that is slower than the steps, some are left out."""
        if step % self._steps or self._refused or self._writing.is_set():
            return
        try:
            state = to_host(capture())
        except CodecError as error:
            self._refused = True
            logger.warning("no checkpoints are written, so that a denoise that is interrupted starts over: %s", error)
            return
        except RuntimeError as error:  # no memory for the copy; after an error of the device the next step fails
            logger.warning("no checkpoint of request %s after step %d: %s", request_id, step, describe(error))
            return
        self._writing.set()
        progress.then(lambda reached: self._submit(request_id, state, reached))

    def remove(self, request_id: str) -> None:
        """The request's denoise is over: its file goes, once what is still to be written of it is."""
        self._writer.submit(self._spool.discard, request_id)

    def _submit(self, request_id: str, state: State, reached: Reached) -> None:
        if reached.error is None:
            self._writer.submit(self._write, request_id, state)

    def _write(self, request_id: str, state: State) -> None:
        unfinished = self._spool.unfinished(request_id)
        try:
            save(unfinished, request_id, state)
            with contextlib.suppress(FileNotFoundError):  # the request has ended, and the head has removed its files
                os.replace(unfinished, self._spool.file(request_id))
        except NOT_WRITTEN as error:
            logger.warning("the checkpoint of request %s could not be written: %s", request_id, error)
            unfinished.unlink(missing_ok=True)
        finally:
            self._writing.clear()
