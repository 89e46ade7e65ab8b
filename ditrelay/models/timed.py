"""A model whose stages sleep: measures the engine without the noise of real compute, and fails on demand.

On a GPU the encode is a kernel that spins: as with a real encoder, the thread has launched it long before it is done.

Real tensors of the given size move between the stages; the picture depends on every byte of them, so a payload that
was corrupted or swapped shows.
"""

from __future__ import annotations

import os
import re
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from ditrelay.errors import InvalidRequest
from ditrelay.models.timed_options import TimedOptions
from ditrelay.models.values import only
from ditrelay.runtime.payloads import State, StateValue
from ditrelay.runtime.request import Request, SamplingParams

if TYPE_CHECKING:
    from ditrelay.models.adapter import DenoiseSession, Frames, Give

_FAULT = re.compile(r"\[(fail|hang|exit|invalid|oom) (encode|denoise|decode)\]")
_HANG_SECONDS = 3600.0
_EXIT_CODE = 9
_TICKS = 20_000_000  # some 10 ms
_OVERSLEPT = 0.0003  # seconds by which a sleep may end late; the last of it is spent awake


@dataclass
class TimedSession:
    """A denoise that sleeps. ``spent``: seconds that ``begin`` took, which the first step makes up for."""

    params: SamplingParams
    digest: int
    total_steps: int
    spent: float
    steps_done: int = 0
    latents: torch.Tensor | None = field(default=None, repr=False)
    abandoned: bool = field(default=False, repr=False)


class TimedAdapter:
    """``StageAdapter`` of ``builtin:timed``. On a CPU encode and decode hold one lock, as if they shared a device.

    A prompt with ``[fail STAGE]``, ``[hang STAGE]``, ``[exit STAGE]`` or ``[invalid STAGE]`` makes that stage raise
    ``RuntimeError``, sleep an hour, end the process with code 9, or raise ``InvalidRequest``; ``[oom STAGE]`` raises
    ``torch.OutOfMemoryError`` the first time that an adapter sees that prompt there. In the denoise that happens half
    way through the steps.
    """

    conditioning_names = frozenset({"conditioning", "masks", "prompt_chars"})
    latents_names = frozenset({"latents"})

    def __init__(self, options: TimedOptions, *, device: str = "cpu", world_size: int = 1) -> None:
        """With ``world_size`` > 1, each step has a collective on the default group, as a parallel model has."""
        self._options = options
        self._device = torch.device(device)
        self._world_size = world_size
        self._lock = threading.Lock()
        self._ran_out: set[tuple[str, str]] = set()
        self._spinner = _Spinner(self._device) if self._device.type == "cuda" else None

    def encode(self, requests: Sequence[Request]) -> State:
        params = only(requests).params
        self._fault("encode", params)
        with self._encoding():
            digest = zlib.crc32(params.prompt.encode(), _seed(params) & 0xFFFFFFFF)
            return {
                "conditioning": StateValue(self._pattern(digest, self._options.conditioning_mb)),
                "masks": StateValue([self._pattern(digest + i, 64e-6) for i in (1, 2)]),
                "prompt_chars": StateValue(len(params.prompt)),
            }

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        if self._spinner is not None:
            self._spinner.launch(self._options.encode)
            yield
            return
        with self._lock, _Lasting(self._options.encode):
            yield

    def begin(self, requests: Sequence[Request], state: State) -> TimedSession:
        began, params = time.monotonic(), only(requests).params
        digest = _digest(state)
        total_steps = params.num_inference_steps or self._options.steps
        return TimedSession(params, digest, total_steps, spent=time.monotonic() - began)

    def step(self, session: DenoiseSession) -> bool:
        session = _own(session)
        if session.abandoned or session.steps_done >= session.total_steps:
            raise ValueError("no steps remain in this session")
        spent, session.spent = session.spent, 0.0
        with _Lasting(self._options.denoise / self._options.steps - spent):
            if session.steps_done == session.total_steps // 2:
                self._fault("denoise", session.params)
            if self._world_size > 1:
                dist.all_reduce(torch.ones(1, device=self._device))
            session.steps_done += 1
            session.digest = zlib.crc32(session.steps_done.to_bytes(4, "little"), session.digest)
            if session.steps_done == session.total_steps:
                session.latents = self._pattern(session.digest, self._options.latents_mb)
        return session.steps_done < session.total_steps

    def capture(self, session: DenoiseSession) -> State:
        session = _own(session)
        return {"steps_done": StateValue(session.steps_done), "digest": StateValue(session.digest)}

    def restore(self, session: DenoiseSession, captured: State) -> None:
        session, steps, digest = _own(session), captured["steps_done"].value, captured["digest"].value
        assert isinstance(steps, int) and isinstance(digest, int)
        session.steps_done, session.digest = steps, digest

    def preview(self, session: DenoiseSession) -> State:
        return {"latents": StateValue(self._pattern(_own(session).digest, 64e-6))}

    def finish(self, session: DenoiseSession) -> State:
        return {"latents": StateValue(_own(session).latents)}

    def abandon(self, session: DenoiseSession) -> None:
        _own(session).abandoned = True

    def decode(self, requests: Sequence[Request], state: State, give: Give | None = None) -> list[Frames]:
        params = only(requests).params
        self._fault("decode", params)
        with self._lock, _Lasting(self._options.decode):
            noise = np.random.default_rng(_digest(state))
            size = (params.num_frames or 1, params.height or 64, params.width or 64, 3)
            return [noise.integers(0, 256, size, dtype=np.uint8)]

    def _fault(self, stage: str, params: SamplingParams) -> None:
        for kind, where in _FAULT.findall(params.prompt):
            if where != stage:
                continue
            match kind:
                case "fail":
                    raise RuntimeError(f"{stage} fails because the prompt asks for it")
                case "hang":
                    time.sleep(_HANG_SECONDS)
                case "exit":
                    os._exit(_EXIT_CODE)
                case "oom":
                    self._run_out(stage, params.prompt)
                case _:
                    raise InvalidRequest("prompt", f"{stage} refuses it because the prompt asks for it")

    def _run_out(self, stage: str, prompt: str) -> None:
        if (stage, prompt) not in self._ran_out:
            self._ran_out.add((stage, prompt))
            raise torch.OutOfMemoryError(f"{stage} runs out of memory because the prompt asks for it")

    def _pattern(self, digest: int, megabytes: float) -> torch.Tensor:
        """int32 tensor [n]: cheap to make, different for each digest, no two elements alike."""
        count = max(1, round(megabytes * 1e6 / 4))
        return torch.arange(count, dtype=torch.int32, device=self._device) + (digest & 0x3FFFFFFF)


class _Lasting:
    """A block that takes at least ``seconds`` in all."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._until = time.monotonic() + self._seconds

    def __exit__(self, *_: object) -> None:
        time.sleep(max(0.0, self._until - time.monotonic() - _OVERSLEPT))
        while time.monotonic() < self._until:
            time.sleep(0.0)


class _Spinner:
    """A kernel that keeps one SM busy for about a given time: it counts ticks of the clock, measured here once."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            _spin(_TICKS)  # out of idle, to the clock that it works at
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            _spin(_TICKS)
            ended.record()
            ended.synchronize()
        self._ticks_per_second = _TICKS / (began.elapsed_time(ended) / 1000)

    def launch(self, seconds: float) -> None:
        """On the current stream; does not wait."""
        _spin(round(seconds * self._ticks_per_second))


def _spin(ticks: int) -> None:
    torch.cuda._sleep(ticks)  # type: ignore[no-untyped-call]


def _own(session: DenoiseSession) -> TimedSession:
    if not isinstance(session, TimedSession):
        raise TypeError(f"a TimedSession is needed, not a {type(session).__name__}")
    return session


def _seed(params: SamplingParams) -> int:
    return params.seed or 0


def _digest(state: State) -> int:
    """CRC-32 over every value of the state, in the order of the names."""
    digest = 0
    for _, value in sorted(state.items()):
        content = value.value
        tensors = [content] if isinstance(content, torch.Tensor) else content if isinstance(content, list) else []
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                digest = zlib.crc32(tensor.cpu().numpy().data, digest)
        if not tensors:
            digest = zlib.crc32(repr(content).encode(), digest)
    return digest
