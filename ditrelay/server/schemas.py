"""The JSON of the API: OpenAI's requests, responses and errors, with ditrelay's extensions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from ditrelay.errors import InvalidRequest
from ditrelay.runtime.metrics import Timings
from ditrelay.runtime.request import PictureFormat, SamplingParams
from ditrelay.server.model_limits import ModelLimits

MAX_FIELDS = 50
"""Of one JSON object, and of a form."""

_SIZE = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell it ("\\ud800"); no message to a worker can hold it.
        raise PydanticCustomError("text", "must not contain half a surrogate pair") from error
    return text


def _check_size(size: str) -> str:
    if size != "auto" and not _SIZE.fullmatch(size):
        raise PydanticCustomError("size", "must be 'auto' or WIDTHxHEIGHT in pixels, for instance '128x128'")
    return size


def too_many_fields(count: int) -> str:
    """Why an object of more than ``MAX_FIELDS`` is refused unread: each would become an error of its own, kilobytes in
    size."""
    return f"the body has {count} fields in one object; allowed: {MAX_FIELDS}"


Text = Annotated[str, AfterValidator(_check_text)]
Size = Annotated[
    str,
    AfterValidator(_check_size),
    WithJsonSchema({"type": "string", "pattern": f"^(auto|{_SIZE.pattern})$"}),
]

# What every model has in common, for the OpenAPI page. It is the model's card that checks, and says what it allows.
Prompt = Annotated[Text, WithJsonSchema({"type": "string", "minLength": 1})]
Seed = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0})]
Count = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 1})]
Strength = Annotated[float, WithJsonSchema({"type": "number", "minimum": 0})]

EventFamily = Literal["image_generation", "image_edit"]
"""What the names of a stream's events begin with."""


class ImageGenerationRequest(BaseModel):
    """OpenAI's image generation request, and what it lacks: seed, steps, guidance, negative prompt, height, width.

    ``quality``, ``style``, ``background`` and ``moderation`` are taken only at values that ask for nothing which this
    server does not do. A field set to ``null`` counts as absent.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    events: ClassVar[EventFamily] = "image_generation"

    prompt: Prompt = Field(description="What to draw.")
    model: str | None = Field(None, description="The served model's name; may be left out.")
    n: int | None = Field(1, ge=1, le=10, description="Number of pictures.")
    size: Size | None = Field("auto", description="WIDTHxHEIGHT in pixels, or auto: the model's default.")
    response_format: Literal["url", "b64_json"] | None = Field(
        "url", description="url: an address on this server, valid for an hour; b64_json: the file itself."
    )
    user: str | None = Field(None, description="Ignored.")
    quality: Literal["auto", "standard"] | None = Field(None, description="No effect; see num_inference_steps.")
    style: Literal["natural"] | None = Field(None, description="No effect; prompts are never rewritten.")
    background: Literal["auto", "opaque"] | None = Field(None, description="No effect; pictures are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="No effect; nothing is moderated.")
    output_format: PictureFormat | None = Field("png", description="Format of the picture's file.")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of a jpeg or webp file, 0 (smallest file) to 100, the default."
    )
    stream: bool | None = Field(
        False, description="Answer with server-sent events: progress, and each picture as b64_json when it is finished."
    )
    partial_images: int | None = Field(
        0, ge=0, le=3, description="Small previews of each picture while it is drawn, at most this many."
    )

    seed: Seed | None = Field(None, description="Picture i uses seed + i. Drawn, and returned, where it is absent.")
    num_inference_steps: Count | None = Field(None, description="Denoising steps; default: the model's.")
    guidance_scale: Strength | None = Field(
        None, allow_inf_nan=False, description="Strength of guidance, in the units of the model's own pipeline."
    )
    negative_prompt: Text | None = Field(None, description="What to keep away from; needs guidance.")
    height: Count | None = Field(None, description="Pixels; must not contradict size.")
    width: Count | None = Field(None, description="Pixels; must not contradict size.")

    @model_validator(mode="before")
    @classmethod
    def _check_number_of_fields(cls, fields: object) -> object:
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", too_many_fields(len(fields)))
        return fields

    def check_stream(self) -> None:
        """What a stream cannot give is refused before anything is drawn.

        Raises:
            InvalidRequest: addresses are asked for in a stream.
        """
        if self.stream and self.response_format == "url" and "response_format" in self.model_fields_set:
            raise InvalidRequest(
                "response_format", "a stream holds the files themselves; allowed with stream: b64_json"
            )

    def sampling_params(self) -> Iterator[SamplingParams]:
        """Parameters of every picture asked for, in order.

        Raises:
            InvalidRequest: ``size`` contradicts ``height`` or ``width``.
        """
        height, width = self._height_and_width()
        for index in range(self.n or 1):
            yield SamplingParams(
                prompt=self.prompt,
                negative_prompt=self.negative_prompt,
                height=height,
                width=width,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                seed=None if self.seed is None else self.seed + index,
                output_format=self.output_format,
                output_compression=self.output_compression,
                previews=self.partial_images or 0,
            )

    def as_written(self, error: InvalidRequest) -> InvalidRequest:
        """``error`` with its parameter named as this client wrote it (``size`` where that gave the height)."""
        if error.param in ("height", "width") and getattr(self, error.param) is None and self.size:
            return InvalidRequest("size", f"{error.param} {error.reason}")
        if error.param == "previews":
            return InvalidRequest("partial_images", error.reason)
        return error

    def _height_and_width(self) -> tuple[int | None, int | None]:
        match = _SIZE.fullmatch(self.size or "auto")
        if match is None:
            return self.height, self.width
        width, height = int(match[1]), int(match[2])
        for name, given, of_size in (("height", self.height, height), ("width", self.width, width)):
            if given not in (None, of_size):
                raise InvalidRequest(name, f"{given} contradicts size {self.size}; give only one of the two")
        return height, width


class Picture(BaseModel):
    """One finished picture, as ``url`` or as ``b64_json``."""

    url: str | None = None
    b64_json: str | None = None
    seed: int = Field(description="The seed that draws this picture again.")
    timings: Timings = Field(description="Seconds in each stage and transfer.")


class ImagesResponse(BaseModel):
    """OpenAI's response to an image generation request."""

    created: int = Field(description="Unix time in seconds.")
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: str = Field(description="png, jpeg or webp.")
    size: str = Field(description="WIDTHxHEIGHT in pixels.")


class ImageProgress(BaseModel):
    """An event of a streamed request (not OpenAI's): one of its pictures came further."""

    type: Literal["image_generation.progress", "image_edit.progress"] = "image_generation.progress"
    index: int = Field(description="Which of the n pictures, from 0.")
    job_id: str = Field(description="For /v1/jobs: more about it, and its cancel.")
    state: str = Field(description="queued, encoding, denoising, decoding, or a place between two of them.")
    step: int = Field(description="Denoising steps that are done.")
    total_steps: int = Field(description="0 before the denoise begins.")


class ImageCancelled(BaseModel):
    """The last event of a picture of a streamed request (not OpenAI's) that was cancelled by its job's address."""

    type: Literal["image_generation.cancelled", "image_edit.cancelled"] = "image_generation.cancelled"
    index: int = Field(description="Which of the n pictures, from 0.")
    job_id: str


class ImagePartial(BaseModel):
    """OpenAI's event for a preview, with ditrelay's index, job and step."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"] = "image_generation.partial_image"
    b64_json: str
    created_at: int = Field(description="Unix time in seconds.")
    size: str = Field(description="WIDTHxHEIGHT of the preview in pixels; smaller than the picture.")
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: str = Field(description="png, jpeg or webp.")
    partial_image_index: int = Field(description="Which preview of its picture, from 0.")
    index: int = Field(description="Which of the n pictures, from 0.")
    job_id: str
    step: int = Field(description="The denoising step that it shows.")


class TextAndImageTokens(BaseModel):
    """Part of ``NoUsage``."""

    text_tokens: Literal[0] = 0
    image_tokens: Literal[0] = 0


class NoUsage(BaseModel):
    """OpenAI's clients expect a count of tokens; here nothing is counted in tokens."""

    input_tokens: Literal[0] = 0
    input_tokens_details: TextAndImageTokens = TextAndImageTokens()
    output_tokens: Literal[0] = 0
    total_tokens: Literal[0] = 0


class ImageCompleted(BaseModel):
    """OpenAI's last event for a picture of a streamed request, with ditrelay's index, seed and timings."""

    type: Literal["image_generation.completed", "image_edit.completed"] = "image_generation.completed"
    b64_json: str
    created_at: int = Field(description="Unix time in seconds.")
    size: str = Field(description="WIDTHxHEIGHT in pixels.")
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: str = Field(description="png, jpeg or webp.")
    usage: NoUsage = NoUsage()
    index: int = Field(description="Which of the n pictures, from 0.")
    job_id: str
    seed: int = Field(description="The seed that draws this picture again.")
    timings: Timings = Field(description="Seconds in each stage and transfer.")


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time in seconds at which this server began to serve it.")
    owned_by: str = "ditrelay"
    limits: ModelLimits = Field(description="What a request may ask for; not OpenAI's.")


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether every role is up and warm, and what each role still lacks."""

    ready: bool
    missing: dict[str, list[str]] = Field(description="Per kind of rank, those that are not up and why.")
    down: list[Literal["encode", "denoise", "decode"]] = Field(
        description="Roles that no rank has at the moment: requests that need them wait, or fail where it lasts."
    )


class RankState(BaseModel):
    """One rank, as it is now."""

    rank: int
    role: str = Field(description="Name of its roles together: dit, non_dit, colocated, ...")
    roles: list[str]
    replica: int | None = Field(description="Number of the DiT replica it is part of.")
    pid: int | None
    state: Literal["starting", "up", "down", "failed"] = Field(
        description="down: it is started again; failed: it died too often and is not."
    )
    generation: int = Field(description="How often its process was replaced.")
    reason: str = Field(description="Why it is not up.")
    pending_sends: int = Field(description="Transfers that it sends, at its last heartbeat.")
    pending_recvs: int = Field(description="Transfers that it receives, at its last heartbeat.")
    kept_bytes: int = Field(description="Payloads that it keeps for a re-send, at its last heartbeat.")


class EdgeState(BaseModel):
    """One directed path for tensors between two ranks."""

    source: int
    target: int
    up: bool
    generation: int = Field(description="How often it was made anew.")
    used: int = Field(description="Payloads on the way or waiting at the target.")
    window: int
    nbytes: int


class RequestCounts(BaseModel):
    """Requests (one picture each) that wait and run, and how the others ended since the start."""

    queued: int
    running: int
    done: int
    failed: int
    cancelled: int


class PlacementOption(BaseModel):
    """A way to place the stages on the ranks, and what it makes at most."""

    name: str
    requests_per_second: float


class PlacementAdvice(BaseModel):
    """What the newest requests say of the placement: medians of their stages, and the rates that follow."""

    requests: int = Field(description="That the medians are of, at most 200.")
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    options: list[PlacementOption] = Field(
        description="The present placement first; none where ranks share the cores of a CPU."
    )
    text: str = Field(description="Whether disaggregation pays off here, in words.")


class TopologyState(BaseModel):
    """Every rank and edge, as they are now (at most 0.1 s ago)."""

    ranks: list[RankState]
    edges: list[EdgeState]
    requests: RequestCounts
    placement: PlacementAdvice | None = Field(description="Null before three requests are done.")


class Error(BaseModel):
    """What is wrong and what is allowed instead."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's error form."""

    error: Error


class ErrorEvent(ErrorResponse):
    """The last event of a streamed request that failed after its first event."""

    type: Literal["error"] = "error"
