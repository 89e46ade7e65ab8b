"""A request that starts from a picture: its size where none is given, and how much of the picture is drawn anew."""

from __future__ import annotations

import math
from typing import Protocol

from ditrelay.errors import InvalidRequest
from ditrelay.models.picture_files import PictureFile, read_picture
from ditrelay.runtime.request import SamplingParams

_MIN_SIDE = 64
_MAX_RATIO = 8


class Rules(Protocol):
    """What a ``ModelCard`` says of pictures that a request starts from, and of sizes."""

    @property
    def edits(self) -> bool: ...
    @property
    def needs_image(self) -> bool: ...
    @property
    def default_strength(self) -> float: ...
    @property
    def default_height(self) -> int: ...
    @property
    def default_width(self) -> int: ...
    @property
    def size_multiple(self) -> int: ...
    @property
    def max_side(self) -> int: ...


def starting_size(rules: Rules, params: SamplingParams) -> tuple[int | None, int | None]:
    """Height and width that ``params`` ask for; where the model takes a picture and one is given, none is ``None``.

    An edited picture keeps its size, rounded to what the model takes; with more pixels than the model's default size it
    is made smaller, in its proportions. A clip has as many pixels as the default, in the proportions of its picture. A
    single side that is given decides the other.

    Raises:
        InvalidRequest: the picture's file is not one.
    """
    height, width = params.height, params.width
    takes_picture = rules.edits or rules.needs_image
    if not takes_picture or params.image is None or (height is not None and width is not None):
        return height, width
    picture = read_picture(params.image)
    if height is not None:
        return height, _fitting(rules, height * picture.width / picture.height)
    if width is not None:
        return _fitting(rules, width * picture.height / picture.width), width
    scale = math.sqrt(rules.default_height * rules.default_width / (picture.width * picture.height))
    if rules.edits:
        scale = min(1.0, scale)
    return _fitting(rules, picture.height * scale), _fitting(rules, picture.width * scale)


def starting_strength(rules: Rules, params: SamplingParams) -> float | None:
    """The default where a picture is given to be edited without one."""
    if rules.edits and params.image is not None and params.strength is None:
        return rules.default_strength or None
    return params.strength


def check_start(rules: Rules, params: SamplingParams) -> None:
    """Check the picture and the strength of resolved ``params``.

    Raises:
        InvalidRequest: names ``image`` or ``strength`` and says what is allowed.
    """
    if params.image is not None and not (rules.needs_image or rules.edits):
        raise InvalidRequest("image", "this model takes no picture; leave it out")
    if params.image is None and rules.needs_image:
        raise InvalidRequest("image", "this model starts from a picture; give a PNG, JPEG or WebP")
    if params.image is not None:
        _check_picture(rules, read_picture(params.image))
    if params.strength is not None:
        _check_strength(rules, params, params.strength)


def _check_picture(rules: Rules, picture: PictureFile) -> None:
    """Source of the limits for pictures that a model looks at: ``Flux2ImageProcessor.check_image_input``."""
    if not rules.edits or rules.default_strength:
        return
    shorter, longer = sorted((picture.width, picture.height))
    if shorter < _MIN_SIDE or longer > _MAX_RATIO * shorter:
        reason = f"at least {_MIN_SIDE} pixels a side, and one side at most {_MAX_RATIO} times the other"
        raise InvalidRequest("image", f"{picture.width}x{picture.height} is not allowed; allowed: {reason}")


def _check_strength(rules: Rules, params: SamplingParams, strength: float) -> None:
    if not rules.default_strength:
        raise InvalidRequest("strength", "this model does not start from a picture by strength; leave it out")
    if params.image is None:
        raise InvalidRequest("strength", "it is for a picture to start from, and there is none; leave it out")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise InvalidRequest("strength", f"{strength!r} is not allowed; allowed: above 0, and at most 1")
    # As the pipelines count (``get_timesteps``), where the last of the steps may be lost to rounding.
    steps = params.num_inference_steps or 1
    if int(steps - steps * strength) >= steps:
        raise InvalidRequest("strength", f"{strength!r} leaves no step of {steps}; allowed: at least 0.001")


def _fitting(rules: Rules, side: float) -> int:
    """The nearest side that the model takes."""
    multiple = rules.size_multiple
    return min(max(multiple, round(side / multiple) * multiple), rules.max_side)
