"""The JSON of ``/v1/videos``: OpenAI's video objects, with ditrelay's extensions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from ditrelay.errors import InvalidRequest
from ditrelay.models.card import ModelCard
from ditrelay.runtime.request import SamplingParams
from ditrelay.server.picture_fields import PictureReferences
from ditrelay.server.request_fields import (
    WARNINGS,
    AnyCount,
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

_MAX_SECONDS = 3600.0
_PREVIEWS = 4

Seconds = Annotated[float, Field(gt=0, le=_MAX_SECONDS, allow_inf_nan=False, strict=False)]
Rate = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
One = Annotated[int, Field(ge=1, le=1), Whole]


class VideoRequest(RequestBody):
    """OpenAI's request for a video, and what it lacks: frames, seed, steps, guidance, negative prompt.

    A field set to ``null`` counts as absent.
    """

    prompt: Prompt = Field(description="What to show.")
    model: str | None = Field(None, description="A name of the served model; may be left out.")
    seconds: Seconds | None = Field(
        None, description="Length, as a number or as text; the nearest that the model can make."
    )
    size: Size | None = Field(
        "auto",
        description="WIDTHxHEIGHT in pixels, or auto: the model's default, in the proportions of input_reference.",
    )
    input_reference: PictureReferences | None = Field(
        None, description="The picture to start from, for models that take one: a data URL, or a file of a form."
    )
    user: str | None = Field(None, description="Ignored.")

    num_frames: Count | None = Field(None, description="In place of seconds.")
    fps: Rate | None = Field(
        None,
        description="Frames a second: only the model's own, which is in its limits. With --extra-fields ignore another "
        "one is ignored.",
    )
    height: Count | None = Field(None, description="Pixels; must not contradict size.")
    width: Count | None = Field(None, description="Pixels; must not contradict size.")
    n: One | None = Field(None, description="A request makes one video.")
    num_outputs_per_prompt: One | None = Field(None, description="The same, as other servers name it.")
    seed: Seed | None = Field(None, description="Drawn where it is absent or -1.")
    num_inference_steps: Count | None = Field(None, description="Denoising steps; default: the model's.")
    guidance_scale: Strength | None = Field(
        None, allow_inf_nan=False, description="Strength of guidance, in the units of the model's own pipeline."
    )
    negative_prompt: Text | None = Field(None, description="What to keep away from; needs guidance.")
    previews: AnyCount | None = Field(
        None, description="Small pictures of the work in progress in the job's events, at most; default: 4, if it can."
    )
    extra_body: ExtraBody = None

    def sampling_params(self, card: ModelCard, picture: bytes | None) -> SamplingParams:
        """The parameters asked for, not yet resolved.

        Args:
            card: the served model's.
            picture: to start from.

        Raises:
            InvalidRequest: fields contradict each other.
        """
        height, width = size_of(self.size, self.height, self.width)
        if self.fps not in (None, card.fps):
            reason = f"{self.fps:g} is not allowed; allowed: {card.fps}, the rate of this model's clips"
            self.refuse_or_warn("fps", reason)
        return SamplingParams(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            height=height,
            width=width,
            num_frames=self._frames(card),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=seed_of(self.seed),
            image=picture,
            previews=(_PREVIEWS if card.previews else 0) if self.previews is None else self.previews,
        )

    def as_written(self, error: InvalidRequest) -> InvalidRequest:
        """``error`` with its parameter named as this client wrote it (``size`` where that gave the height)."""
        names = {"image": "input_reference"}
        if error.param in ("height", "width") and getattr(self, error.param) is None:
            names[error.param] = "size"
        if self.seconds is not None:
            names["num_frames"] = "seconds"
        return renamed(error, names.get(error.param, error.param))

    def _frames(self, card: ModelCard) -> int | None:
        if self.seconds is None:
            return self.num_frames
        if self.num_frames is not None:
            raise InvalidRequest("num_frames", "it contradicts seconds; give only one of the two")
        frames = round((self.seconds * card.fps - 1) / card.frame_multiple) * card.frame_multiple + 1
        if frames > card.max_num_frames:
            longest = card.max_num_frames / card.fps
            raise InvalidRequest("seconds", f"{self.seconds:g} is too long; allowed: at most {longest:.2f}")
        return max(frames, 1)


class VideoError(BaseModel):
    """Why a video failed."""

    code: str
    message: str


class Video(BaseModel):
    """One video, from its submission on."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: int = Field(ge=0, le=100, description="Percent.")
    stage: str | None = Field(description="What is done for it now (encoding, denoising, decoding, ...).")
    step: int = Field(description="Denoising steps done.")
    eta_seconds: float | None = Field(description="Seconds that the denoise still takes, once its pace is known.")
    created_at: int = Field(description="Unix time in seconds.")
    started_at: int | None
    completed_at: int | None = Field(description="When it ended, however it ended.")
    expires_at: int | None = Field(description="When the server may remove it.")
    prompt: str
    seconds: str
    size: str = Field(description="WIDTHxHEIGHT in pixels.")
    num_frames: int
    num_inference_steps: int
    seed: int = Field(description="The seed that makes this video again.")
    error: VideoError | None
    remixed_from_video_id: None = None
    warnings: list[str] = Field(default_factory=list, description=f"In the answer to its request. {WARNINGS}")


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """A video that is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
