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
    @property
    def max_height(self) -> int | None: ...
    @property
    def max_width(self) -> int | None: ...


def starting_picture(rules: Rules, params: SamplingParams, read: PictureFile | None) -> PictureFile | None:
    """The request's picture, where the model takes one and it was not ``read`` before.

    Raises:
        InvalidRequest: the picture's file is not one.
    """
    if params.image is None or not (rules.edits or rules.needs_image):
        return None
    return read or read_picture(params.image)


def starting_size(
    rules: Rules, params: SamplingParams, picture: PictureFile | None
) -> tuple[int | None, int | None]:
    """Height and width that ``params`` ask for; where they start from a ``picture``, none is ``None``.

    An edited picture keeps its size, rounded to what the model takes; with more pixels than the model's default size it
    is made smaller, in its proportions. A clip has as many pixels as the default, in the proportions of its picture.
    Where a side would be longer than allowed, both are made smaller. A single side that is given decides the other.

    Raises:
        InvalidRequest: the other side of the one that is given would be too long.
    """
    height, width = params.height, params.width
    if picture is None or (height is not None and width is not None):
        return height, width
    if height is not None:
        return height, _other_side(rules, "height", height, picture.width / picture.height, _max_width(rules))
    if width is not None:
        return _other_side(rules, "width", width, picture.height / picture.width, _max_height(rules)), width
    scale = math.sqrt(rules.default_height * rules.default_width / (picture.width * picture.height))
    if rules.edits:
        scale = min(1.0, scale)
    scale = min(scale, _max_height(rules) / picture.height, _max_width(rules) / picture.width)
    return (
        _fitting(rules, picture.height * scale, _max_height(rules)),
        _fitting(rules, picture.width * scale, _max_width(rules)),
    )


def _max_height(rules: Rules) -> int:
    return rules.max_height or rules.max_side


def _max_width(rules: Rules) -> int:
    return rules.max_width or rules.max_side


def _other_side(rules: Rules, name: str, side: object, ratio: float, limit: int) -> int:
    """The side beside ``side``, which the client gives as ``name``, in a picture's proportions."""
    if not isinstance(side, int | float) or not math.isfinite(side):
        return rules.size_multiple  # what is wrong with it is said where sizes are checked
    other = side * ratio
    if other >= limit + rules.size_multiple / 2:
        reason = f"in the picture's proportions the other side has {other:.0f} pixels; allowed: at most {limit}"
        raise InvalidRequest(name, f"{reason} (give both to have it squeezed)")
    return _fitting(rules, other, limit)


def starting_strength(rules: Rules, params: SamplingParams) -> float | None:
    """The default where a picture is given to be edited without one."""
    if rules.edits and params.image is not None and params.strength is None:
        return rules.default_strength or None
    return params.strength


def check_start(rules: Rules, params: SamplingParams, picture: PictureFile | None) -> None:
    """Check the ``picture`` and the strength of resolved ``params``.

    Raises:
        InvalidRequest: names ``image`` or ``strength`` and says what is allowed.
    """
    if params.image is not None and not (rules.needs_image or rules.edits):
        raise InvalidRequest("image", "this model takes no picture; leave it out")
    if params.image is None and rules.needs_image:
        raise InvalidRequest("image", "this model starts from a picture; give a PNG, JPEG, WebP, AVIF or GIF")
    if picture is not None:
        _check_picture(rules, picture)
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


def _fitting(rules: Rules, side: float, limit: int) -> int:
    """The nearest side that the model takes, up to ``limit``."""
    multiple = rules.size_multiple
    return max(multiple, min(round(side / multiple), limit // multiple) * multiple)
