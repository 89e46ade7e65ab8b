"""The JSON and the form of ``/v1/images/edits``: OpenAI's fields, with ditrelay's extensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import msgspec
from pydantic import Field, PrivateAttr, WithJsonSchema

from ditrelay.runtime.request import SamplingParams
from ditrelay.server.schemas import EventFamily, ImageGenerationRequest
from ditrelay.server.uploads import PictureReference

Share = Annotated[float, WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 1})]


class ImageEditRequest(ImageGenerationRequest):
    """OpenAI's request for pictures that start from one, and what it lacks: strength, and what generations take.

    ``input_fidelity`` and the fields without effect there are taken only at values that ask for nothing which this
    server does not do. A field set to ``null`` counts as absent.
    """

    events: ClassVar[EventFamily] = "image_edit"

    image: str | PictureReference | None = Field(
        None,
        description="The picture to start from (PNG, JPEG, WebP, AVIF, GIF): a file of a form (image, image[]), or a "
        "data URL.",
    )
    strength: Share | None = Field(
        None,
        allow_inf_nan=False,
        description="How much of the picture is drawn anew: above 0, up to 1; as many of the steps are done.",
    )
    mask: None = Field(None, description="Not there: the whole picture is drawn anew, by strength.")
    input_fidelity: Literal["low"] | None = Field(None, description="No effect; see strength.")

    _picture: bytes = PrivateAttr(b"")

    def start_from(self, picture: bytes) -> None:
        """Draw from the picture with these bytes, wherever it came from."""
        self._picture = picture

    def sampling_params(self) -> Iterator[SamplingParams]:
        """As of ``ImageGenerationRequest``, with the picture."""
        for params in super().sampling_params():
            yield msgspec.structs.replace(params, image=self._picture, strength=self.strength)
