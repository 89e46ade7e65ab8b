"""A request that starts from a picture: its size where none is given, and how much of the picture is drawn anew."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ditrelay.errors import InvalidRequest
from ditrelay.models.picture_files import PictureFile, read_picture
from ditrelay.runtime.request import SamplingParams

if TYPE_CHECKING:
    from ditrelay.models.card import ModelCard

_MIN_SIDE = 64
_MAX_RATIO = 8


def starting_size(card: ModelCard, params: SamplingParams) -> tuple[int | None, int | None]:
    """Height and width that ``params`` ask for; where the model edits pictures and one is given, none is ``None``.

    A picture keeps its size, rounded to what the model takes; with more pixels than the model's default size it is
    made smaller, in its proportions. A single side that is given decides the other.

    Raises:
        InvalidRequest: the picture's file is not one.
    """
    height, width = params.height, params.width
    if not card.edits or params.image is None or (height is not None and width is not None):
        return height, width
    picture = read_picture(params.image)
    if height is not None:
        return height, _fitting(card, height * picture.width / picture.height)
    if width is not None:
        return _fitting(card, width * picture.height / picture.width), width
    scale = min(1.0, math.sqrt(card.default_height * card.default_width / (picture.width * picture.height)))
    return _fitting(card, picture.height * scale), _fitting(card, picture.width * scale)


def starting_strength(card: ModelCard, params: SamplingParams) -> float | None:
    """The default where a picture is given to be edited without one."""
    if card.edits and params.image is not None and params.strength is None:
        return card.default_strength or None
    return params.strength


def check_start(card: ModelCard, params: SamplingParams) -> None:
    """Check the picture and the strength of resolved ``params``.

    Raises:
        InvalidRequest: names ``image`` or ``strength`` and says what is allowed.
    """
    if params.image is not None and not (card.needs_image or card.edits):
        raise InvalidRequest("image", "this model takes no picture; leave it out")
    if params.image is None and card.needs_image:
        raise InvalidRequest("image", "this model starts from a picture; give a PNG, JPEG or WebP")
    if params.image is not None:
        _check_picture(card, read_picture(params.image))
    if params.strength is not None:
        _check_strength(card, params, params.strength)


def _check_picture(card: ModelCard, picture: PictureFile) -> None:
    """Source of the limits for pictures that a model looks at: ``Flux2ImageProcessor.check_image_input``."""
    if not card.edits or card.default_strength:
        return
    shorter, longer = sorted((picture.width, picture.height))
    if shorter < _MIN_SIDE or longer > _MAX_RATIO * shorter:
        reason = f"at least {_MIN_SIDE} pixels a side, and one side at most {_MAX_RATIO} times the other"
        raise InvalidRequest("image", f"{picture.width}x{picture.height} is not allowed; allowed: {reason}")


def _check_strength(card: ModelCard, params: SamplingParams, strength: float) -> None:
    if not card.default_strength:
        raise InvalidRequest("strength", "this model does not start from a picture by strength; leave it out")
    if params.image is None:
        raise InvalidRequest("strength", "it is for a picture to start from, and there is none; leave it out")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise InvalidRequest("strength", f"{strength!r} is not allowed; allowed: above 0, and at most 1")
    # As the pipelines count (``get_timesteps``), where the last of the steps may be lost to rounding.
    steps = params.num_inference_steps or 1
    if int(steps - steps * strength) >= steps:
        raise InvalidRequest("strength", f"{strength!r} leaves no step of {steps}; allowed: at least 0.001")


def _fitting(card: ModelCard, side: float) -> int:
    """The nearest side that the model takes."""
    multiple = card.size_multiple
    return min(max(multiple, round(side / multiple) * multiple), card.max_side)
