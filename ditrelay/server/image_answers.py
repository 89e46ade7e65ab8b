"""The JSON of finished pictures, and of the events while they are drawn: OpenAI's, with ditrelay's extensions."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from ditrelay.runtime.metrics import Timings
from ditrelay.server.request_fields import WARNINGS

EventFamily = Literal["image_generation", "image_edit"]
"""What the names of a stream's events begin with."""


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


class Picture(BaseModel):
    """One finished picture, as ``url`` or as ``b64_json``."""

    url: str | None = None
    b64_json: str | None = None
    seed: int = Field(description="The seed that draws this picture again.")
    timings: Timings = Field(description="Seconds in each stage and transfer.")


class ImagesResponse(BaseModel):
    """OpenAI's response to a request for pictures, as of its gpt-image models."""

    created: int = Field(description="Unix time in seconds.")
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: str = Field(description="png, jpeg or webp.")
    size: str = Field(description="WIDTHxHEIGHT in pixels.")
    usage: NoUsage = NoUsage()
    warnings: list[str] | None = Field(None, description=WARNINGS)


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
    warnings: list[str] = Field(default_factory=list, description=WARNINGS)
