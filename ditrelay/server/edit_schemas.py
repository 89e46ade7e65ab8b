"""The JSON and the form of ``/v1/images/edits``: OpenAI's fields, with ditrelay's extensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import msgspec
from pydantic import Field, PrivateAttr, WithJsonSchema

from ditrelay.errors import InvalidRequest
from ditrelay.runtime.request import SamplingParams
from ditrelay.server.image_answers import EventFamily
from ditrelay.server.image_schemas import ImageGenerationRequest
from ditrelay.server.picture_fields import PictureReferences
from ditrelay.server.request_fields import Size

Share = Annotated[float, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 1})]


class ImageEditRequest(ImageGenerationRequest):
    """OpenAI's request for pictures that start from one, and what it lacks: strength, and what generations take.

    ``input_fidelity`` and the fields without effect there have none here. A field set to ``null`` counts as absent.
    """

    events: ClassVar[EventFamily] = "image_edit"

    image: PictureReferences | None = Field(
        None,
        description="The picture to start from (PNG, JPEG, WebP, AVIF, GIF): a file of a form (image, image[]), a data "
        "URL, or a list of one; or else images.",
    )
    images: PictureReferences | None = Field(
        None, description='In place of image, as OpenAI\'s JSON names it: [{"image_url": a data URL}].'
    )
    size: Size | None = Field(
        "auto", description="WIDTHxHEIGHT in pixels, or auto: that of the picture, as near as the model can."
    )
    strength: Share | None = Field(
        None,
        allow_inf_nan=False,
        description="How much of the picture is drawn anew: above 0, up to 1; as many of the steps are done.",
    )
    mask: None = Field(None, description="Not there: the whole picture is drawn anew, by strength.")
    input_fidelity: Literal["low", "high"] | None = Field(None, description="No effect; see strength.")

    _picture: bytes = PrivateAttr(b"")
    _picture_field: str = PrivateAttr("image")

    def start_from(self, picture: bytes, field: str) -> None:
        """Draw from the picture with these bytes, wherever it came from; ``field`` brought it."""
        self._picture = picture
        self._picture_field = field

    def sampling_params(self) -> Iterator[SamplingParams]:
        """As of ``ImageGenerationRequest``, with the picture."""
        for params in super().sampling_params():
            yield msgspec.structs.replace(params, image=self._picture, strength=self.strength)

    def as_written(self, error: InvalidRequest) -> InvalidRequest:
        if error.param == "image":
            return InvalidRequest(self._picture_field, error.reason)
        return super().as_written(error)
