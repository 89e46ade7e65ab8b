"""The body of ``POST /v1/images/generations``: OpenAI's fields, with ditrelay's extensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ditrelay.errors import InvalidRequest
from ditrelay.runtime.request import PictureFormat, SamplingParams
from ditrelay.server.image_answers import EventFamily
from ditrelay.server.request_fields import (
    Count,
    ExtraBody,
    Prompt,
    RequestBody,
    Seed,
    Size,
    Strength,
    Text,
    Whole,
    renamed,
    seed_of,
    size_of,
)

ResponseFormat = Literal["url", "b64_json"]

Pictures = Annotated[int, Field(ge=1, le=10), Whole]
Percent = Annotated[int, Field(ge=0, le=100), Whole]
Previews = Annotated[int, Field(ge=0, le=3), Whole]


class ImageGenerationRequest(RequestBody):
    """OpenAI's image generation request, and what it lacks: seed, steps, guidance, negative prompt, height, width.

    ``quality``, ``style``, ``background`` and ``moderation`` have no effect, and are taken at values that clients send
    always. A field set to ``null`` counts as absent.
    """

    events: ClassVar[EventFamily] = "image_generation"

    prompt: Prompt = Field(description="What to draw.")
    model: str | None = Field(None, description="A name of the served model; may be left out.")
    n: Pictures | None = Field(1, description="Number of pictures; at most --max-queue.")
    size: Size | None = Field("auto", description="WIDTHxHEIGHT in pixels, or auto: the model's default.")
    response_format: ResponseFormat | None = Field(
        None,
        description="b64_json: the file itself; url: an address on this server, for an hour at most. Where it isn't "
        "given: as --default-response-format says, b64_json without that.",
    )
    user: str | None = Field(None, description="Ignored.")
    quality: Literal["auto", "standard", "low", "medium", "high"] | None = Field(
        None, description="No effect; num_inference_steps says how fine a picture is drawn."
    )
    style: Literal["natural", "vivid"] | None = Field(None, description="No effect; prompts are never rewritten.")
    background: Literal["auto", "opaque"] | None = Field(None, description="No effect; pictures are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="No effect; nothing is moderated.")
    output_format: PictureFormat | None = Field("png", description="Format of the picture's file.")
    output_compression: Percent | None = Field(
        None, description="Quality of a jpeg or webp file, 0 (smallest file) to 100, the default."
    )
    stream: bool | None = Field(
        False, description="Answer with server-sent events: progress, and each picture as b64_json when it is finished."
    )
    partial_images: Previews | None = Field(
        0, description="Small previews of each picture while it is drawn, at most this many."
    )

    seed: Seed | None = Field(
        None, description="Picture i uses seed + i. Drawn, and returned, where it is absent or -1."
    )
    num_inference_steps: Count | None = Field(None, description="Denoising steps; default: the model's.")
    guidance_scale: Strength | None = Field(
        None, allow_inf_nan=False, description="Strength of guidance, in the units of the model's own pipeline."
    )
    negative_prompt: Text | None = Field(None, description="What to keep away from; needs guidance.")
    height: Count | None = Field(None, description="Pixels; must not contradict size.")
    width: Count | None = Field(None, description="Pixels; must not contradict size.")
    extra_body: ExtraBody = None

    def check_stream(self) -> None:
        """What a stream cannot give is refused before anything is drawn.

        Raises:
            InvalidRequest: addresses are asked for in a stream.
        """
        if self.stream and self.response_format == "url":
            raise InvalidRequest(
                "response_format", "a stream holds the files themselves; allowed with stream: b64_json"
            )

    def check_count(self, max_queue: int) -> None:
        """More pictures than may wait could never be drawn, however often the client comes back.

        Raises:
            InvalidRequest: ``n`` is larger than ``max_queue``.
        """
        if (self.n or 1) > max_queue:
            raise InvalidRequest("n", f"{self.n} is not allowed; allowed: 1 to {max_queue} (--max-queue)")

    def sampling_params(self) -> Iterator[SamplingParams]:
        """Parameters of every picture asked for, in order.

        Raises:
            InvalidRequest: ``size`` contradicts ``height`` or ``width``.
        """
        height, width = size_of(self.size, self.height, self.width)
        seed = seed_of(self.seed)
        for index in range(self.n or 1):
            yield SamplingParams(
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                height=height,
                width=width,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                seed=None if seed is None else seed + index,
                output_format=self.output_format,
                output_compression=self.output_compression,
                previews=self.partial_images or 0,
            )

    def as_written(self, error: InvalidRequest) -> InvalidRequest:
        """``error`` with its parameter named as this client wrote it (``size`` where that gave the height)."""
        if error.param in ("height", "width") and getattr(self, error.param) is None and self.size:
            return renamed(error, "size")
        if error.param == "previews":
            return InvalidRequest("partial_images", error.reason)
        return error
