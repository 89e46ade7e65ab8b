"""What requests to the served model may ask for, as clients that show a form need it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from ditrelay.models.card import MAX_GUIDANCE, ModelCard


class SizeLimits(BaseModel):
    """Of a picture or of a clip's frames, in pixels."""

    multiple: int = Field(description="Width and height are multiples of it.")
    max_side: int
    max_pixels: int = Field(description="Width times height.")
    default_width: int
    default_height: int


class ClipLimits(BaseModel):
    """Of a clip's length."""

    fps: int
    frame_multiple: int = Field(description="The number of frames is k * frame_multiple + 1.")
    max_num_frames: int
    default_num_frames: int


class ModelLimits(BaseModel):
    """What a request may ask for, and what it gets where it doesn't."""

    media: Literal["image", "video"]
    size: SizeLimits
    clip: ClipLimits | None = Field(description="Of models that make videos.")
    max_prompt_chars: int
    min_steps: int
    max_steps: int
    default_steps: int
    guidance: bool = Field(description="Takes guidance_scale.")
    default_guidance_scale: float
    max_guidance_scale: float
    negative_prompt: bool = Field(description="Takes negative_prompt.")
    needs_image: bool = Field(description="Starts from a picture, always.")
    edits: bool = Field(description="May start from a picture.")
    default_strength: float = Field(description="Of a request that starts from a picture; 0: the model takes none.")
    previews: bool = Field(description="Can show what a picture looks like while it is drawn.")


def limits_of(card: ModelCard) -> ModelLimits:
    """What ``card`` allows."""
    clip = ClipLimits(
        fps=card.fps,
        frame_multiple=card.frame_multiple,
        max_num_frames=card.max_num_frames,
        default_num_frames=card.default_num_frames,
    )
    return ModelLimits(
        media=card.media,
        size=SizeLimits(
            multiple=card.size_multiple,
            max_side=card.max_side,
            max_pixels=card.max_pixels,
            default_width=card.default_width,
            default_height=card.default_height,
        ),
        clip=clip if card.media == "video" else None,
        max_prompt_chars=card.max_prompt_chars,
        min_steps=card.min_steps,
        max_steps=card.max_steps,
        default_steps=card.default_num_inference_steps,
        guidance=card.supports_guidance,
        default_guidance_scale=card.default_guidance_scale,
        max_guidance_scale=MAX_GUIDANCE,
        negative_prompt=card.supports_negative_prompt,
        needs_image=card.needs_image,
        edits=card.edits,
        default_strength=card.default_strength,
        previews=card.previews,
    )
