"""Drive a denoise loop that somebody else wrote one step at a time.

diffusers' loops (of blocks and of pipelines) offer no way to stop between two steps. So the loop runs in a greenlet and
a hook inside it calls ``pause`` before each step. Many loops can interleave on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from ditrelay.models.uploads import AsyncUploads


class _Loop(greenlet):  # type: ignore[misc]
    """``skip``: so many steps are done already. ``scope``: what the loop last showed of itself."""

    skip = 0
    scope: object = None


def pause(total_steps: int, step: int = 0, scope: object = None) -> bool:
    """Called inside a driven loop before each step: give control back to the driver until the step is wanted.

    Args:
        step: which one, from 0. Only a loop that tells can be made to skip steps.
        scope: the object in which the loop keeps its place; the driver shows it as its ``scope``.

    Returns:
        False: leave the step out and come back with the next.
    """
    loop = getcurrent()
    if not isinstance(loop, _Loop) or loop.parent is None:
        raise RuntimeError("pause() outside a StepDriver")
    if step < loop.skip:
        return False
    loop.scope = scope
    loop.parent.switch(total_steps)
    return step >= loop.skip


class StepDriver:
    """A loop that advances on demand. Bound to the thread that made it.

    Greenlets share the thread's torch state: a ``no_grad`` that one entered and another left would switch gradients on
    for all. So each turn of the loop runs under a ``no_grad`` of its own here, which ends with the turn; what the loop
    itself restores is then always "off".
    """

    def __init__(self, loop: Callable[[], object]) -> None:
        self._greenlet = _Loop(loop)
        self.total_steps = 0
        self.steps_done = 0

    @property
    def scope(self) -> object:
        """What the loop handed to the last ``pause``."""
        return self._greenlet.scope

    @property
    def finished(self) -> bool:
        """The loop returned, raised, or was closed."""
        return bool(self._greenlet.dead)

    def start(self) -> None:
        """Run everything before the first step; ``total_steps`` is known then. Raises what the loop raises."""
        uploads = AsyncUploads() if torch.cuda.is_available() else nullcontext()  # type: ignore[no-untyped-call]
        with uploads:
            total = self._turn()
        if self.finished:
            raise RuntimeError("the loop ended without a step")
        self.total_steps = int(total)  # type: ignore[call-overload]

    def step(self) -> bool:
        """Run one step; after the last one also the rest of the loop. True while steps remain."""
        if self.finished:
            raise ValueError("no steps remain in this session")
        self._turn()
        self.steps_done += 1
        return not self.finished

    def skip_to(self, step: int) -> None:
        """Leave out the steps before ``step`` (from 0): another process has done them. Before the first step only."""
        if self.steps_done or not 0 < step < self.total_steps:
            raise ValueError(f"step {self.steps_done} of {self.total_steps} can't be followed by step {step}")
        self._greenlet.skip = step
        self._turn()
        if self.finished:
            raise RuntimeError(f"the loop ended before its step {step}")
        self.steps_done = step

    def close(self) -> None:
        """Unwind the loop where it stands, so that everything it holds is freed. Does nothing where it ended."""
        if self._greenlet and not self.finished:
            with torch.no_grad():
                self._greenlet.throw(GreenletExit)
        self._greenlet.scope = None

    def __del__(self) -> None:
        # Python would unwind a forgotten loop outside any no_grad of ours, which would leave gradients switched off.
        self.close()

    def _turn(self) -> object:
        with torch.no_grad():
            return self._greenlet.switch()
