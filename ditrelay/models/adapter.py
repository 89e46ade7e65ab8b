"""The one interface between the engine and a model: encode, begin / step / finish, decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ditrelay.runtime.payloads import State
from ditrelay.runtime.request import Request

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Frames = npt.NDArray[np.uint8]
    LazyFrames = Callable[[], Frames]  # waits until they are there
    Give = Callable[[LazyFrames], None]


class DenoiseSession(Protocol):
    """A denoise in progress, advanced one step at a time, so that several may interleave on one thread.

    It belongs to the thread that called ``begin``: step, finish and abandon it there.
    """

    @property
    def total_steps(self) -> int:
        """Number of steps of this denoise; known after ``begin``."""
        ...

    @property
    def steps_done(self) -> int: ...


class Decoder(Protocol):
    """The part of a model that makes pixels."""

    def decode(self, requests: Sequence[Request], state: State, give: Give | None = None) -> list[Frames]:
        """Pixels per request: uint8 array [frames, height, width, 3]; one frame for image models.

        Args:
            give: takes the frames of a clip in parts, in order, as they are made. An adapter that can do so calls it
                and returns none; what it raises ends the decode.
        """
        ...


class StageAdapter(Decoder, Protocol):
    """One model on one rank, with the components of that rank's roles only.

    Every method takes the requests of one batch; a batch has length 1 for now and an adapter refuses a longer one with
    ``ValueError``. All methods of one adapter may be called from two threads only where they belong to different roles
    (encode beside decode). Encode and decode run under ``torch.no_grad()`` set by the caller's thread; a denoise sets
    it for each of its turns itself, since a context that spans two turns would leak into other sessions.

    Source of the split: the blocks of diffusers' Modular Diffusers (text_encoder | denoise | decode).
    """

    @property
    def conditioning_names(self) -> frozenset[str]:
        """Names of the values that may cross the edge encode -> denoise."""
        ...

    @property
    def latents_names(self) -> frozenset[str]:
        """Names of the values that may cross the edge denoise -> decode."""
        ...

    def encode(self, requests: Sequence[Request]) -> State:
        """Text (and image) conditioning. Raises ``InvalidRequest`` for what only the encoder can know (a bad image)."""
        ...

    def begin(self, requests: Sequence[Request], state: State) -> DenoiseSession:
        """Timesteps, initial noise (CPU generator seeded with the request's seed), everything before the first step."""
        ...

    def step(self, session: DenoiseSession) -> bool:
        """One scheduler step. True while steps remain."""
        ...

    def capture(self, session: DenoiseSession) -> State:
        """What the steps so far have made of the session, between two steps; its tensors are those of the session.

        Raises:
            CodecError: this denoise can't be written down, so that one that is interrupted has to start over.
        """
        ...

    def restore(self, session: DenoiseSession, captured: State) -> None:
        """Lead a session that has just begun, for the same request, to where ``capture`` was called on another."""
        ...

    def preview(self, session: DenoiseSession) -> State:
        """What ``finish`` would give if the picture were done now; of a clip, one frame in the middle.

        Call between two steps of a request that wants previews. Changes nothing, waits for nothing.
        """
        ...

    def finish(self, session: DenoiseSession) -> State:
        """The values that decode needs (latents first among them). Call once ``step`` returned False."""
        ...

    def abandon(self, session: DenoiseSession) -> None:
        """Give a session up between two steps and free its tensors. May be called at any time, also twice."""
        ...
