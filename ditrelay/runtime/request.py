"""What a client asks for, and the states that a request passes through."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, TypedDict, Unpack

import msgspec
from msgspec.structs import replace

from ditrelay.errors import InvalidRequest

PictureFormat = Literal["png", "jpeg", "webp"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """One picture or one clip. ``None`` means: the model's default (see ``ModelCard.resolve``).

    Attributes:
        prompt: what to draw.
        negative_prompt: what to keep away from; needs guidance.
        height: pixels.
        width: pixels.
        num_frames: frames of a clip; 1 for image models.
        num_inference_steps: denoising steps.
        guidance_scale: strength of guidance, in the units of the model's own pipeline.
        seed: seed of the CPU noise generator, 0 <= seed < 2**63; drawn at submission when absent.
        image: the file of a picture (PNG, JPEG, WebP, AVIF, GIF) to start from, for image-to-video and image-to-image.
        strength: image-to-image: how much of the picture is drawn anew, 0 < strength <= 1; as many steps are left out.
        output_format: of a picture's file; PNG where absent. Clips are MP4 files whatever it says.
        output_compression: quality of a JPEG or WebP file, 0 (smallest file) to 100 (the default: finest picture).
        previews: how many small pictures of the work in progress are wanted at most, 0 to 10. They change nothing else.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    image: bytes | None = None
    strength: float | None = None
    output_format: PictureFormat | None = None
    output_compression: int | None = None
    previews: int = 0

    def __repr__(self) -> str:
        """What was given, a picture by its size: its bytes would fill a terminal or a log."""
        values = [(name, getattr(self, name)) for name in self.__struct_fields__]
        return f"SamplingParams({', '.join(f'{name}={_shown(value)}' for name, value in values if value is not None)})"


def _shown(value: object) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else repr(value)


class Sampling(TypedDict, total=False):
    """The fields of ``SamplingParams`` besides the prompt, as keywords of ``Engine.generate``."""

    negative_prompt: str | None
    height: int | None
    width: int | None
    num_frames: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    seed: int | None
    image: bytes | None
    strength: float | None
    output_format: PictureFormat | None
    output_compression: int | None
    previews: int


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted request: resolved parameters (no ``None`` where the model has a default) under a unique id.

    ``patient``: it waits for its turn as long as it takes; ``--request-timeout`` counts only while it is computed.
    """

    request_id: str
    params: SamplingParams
    patient: bool = False


def without_picture(request: Request) -> Request:
    """The request for ranks that do not encode: its picture may have megabytes. Whether it has one is still told."""
    if not request.params.image:
        return request
    return replace(request, params=replace(request.params, image=b""))


def spread(prompt: str | Sequence[str], num_images: int, **sampling: Unpack[Sampling]) -> list[SamplingParams]:
    """``num_images`` parameter sets for each prompt; with one seed given, number i gets seed + i.

    Raises:
        InvalidRequest: that would be none, or the prompt is neither a text nor several.
    """
    if not isinstance(num_images, int) or isinstance(num_images, bool) or num_images < 1:
        raise InvalidRequest("num_images", f"{num_images!r} is not allowed; allowed: 1 or more")
    if not isinstance(prompt, Sequence):
        reason = f"a {type(prompt).__name__} is not allowed; allowed: a text (str), or a list of texts"
        raise InvalidRequest("prompt", reason)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    texts = [text for text in prompts for _ in range(num_images)]
    first = SamplingParams(prompt="", **sampling)
    return [replace(first, prompt=text, seed=_seed(first.seed, i)) for i, text in enumerate(texts)]


def _seed(first: object, index: int) -> object:
    """What is no number is refused like every wrong value, when the defaults are filled in."""
    return int(first) + index if isinstance(first, Integral) and not isinstance(first, bool) else first


class RequestState(enum.StrEnum):
    """Where a request is. ``LEGAL`` says which state may follow which."""

    QUEUED = "queued"
    ENCODING = "encoding"
    ENCODED = "encoded"  # conditioning held by the encoder
    TO_DIT = "to_dit"  # conditioning on its way
    AT_DIT = "at_dit"  # conditioning waits at the replica
    DENOISING = "denoising"
    DENOISED = "denoised"  # latents held by the replica
    TO_DECODER = "to_decoder"  # latents on their way
    AT_DECODER = "at_decoder"  # latents wait at the decoder
    DECODING = "decoding"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in ENDED


_S = RequestState
ENDED = frozenset({_S.DONE, _S.FAILED, _S.CANCELLED})
_ORDER = [s for s in _S if s not in ENDED]

# Forward one place; back to where the tensors still are when a worker or an edge is lost; or to an end.
LEGAL: dict[RequestState, frozenset[RequestState]] = {
    state: frozenset(
        ({_ORDER[i + 1]} if i + 1 < len(_ORDER) else {_S.DONE})
        | ({_S.QUEUED} if i else set())
        | ({_S.ENCODED} if i > _ORDER.index(_S.ENCODED) else set())
        | ({_S.DENOISED} if i > _ORDER.index(_S.DENOISED) else set())
        | {_S.FAILED, _S.CANCELLED}
    )
    for i, state in enumerate(_ORDER)
} | {state: frozenset() for state in ENDED}
