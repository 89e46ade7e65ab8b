"""The options of ``builtin:timed``, the model whose stages sleep. No torch import: the head reads them too."""

from __future__ import annotations

import math
from urllib.parse import parse_qsl

import msgspec

from ditrelay.errors import UnsupportedModel

TIMED_PREFIX = "builtin:timed"
_COUNTS = ("steps", "frames")


class TimedOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``builtin:timed?encode=0.1&denoise=0.3&decode=0.1&steps=4&conditioning_mb=8&latents_mb=1``.

    Attributes:
        encode: seconds of one encode.
        denoise: seconds of a denoise of ``steps`` steps.
        decode: seconds of one decode.
        steps: default number of steps.
        conditioning_mb: size of the conditioning in MB (10**6 bytes).
        latents_mb: size of the latents in MB.
        frames: default number of frames of a clip; 1: it makes pictures.
    """

    encode: float = 0.01
    denoise: float = 0.04
    decode: float = 0.01
    steps: int = 4
    conditioning_mb: float = 1.0
    latents_mb: float = 0.25
    frames: int = 1

    @classmethod
    def parse(cls, model_path: str) -> TimedOptions:
        """Raises ``UnsupportedModel`` for an unknown option or a value that is not a finite number >= 0."""
        given = dict(parse_qsl(model_path.partition("?")[2], keep_blank_values=True))
        if unknown := sorted(set(given) - set(cls.__struct_fields__)):
            allowed = ", ".join(cls.__struct_fields__)
            raise UnsupportedModel(f"{TIMED_PREFIX} has no option {unknown[0]!r}; allowed: {allowed}")
        try:
            options = msgspec.convert(given, cls, strict=False)
        except msgspec.ValidationError as error:
            raise UnsupportedModel(f"{TIMED_PREFIX}: {error}") from error
        values = msgspec.structs.asdict(options)
        for name, value in values.items():
            if not math.isfinite(value) or value < 0 or (name in _COUNTS and value < 1):
                lowest = 1 if name in _COUNTS else 0
                raise UnsupportedModel(f"{TIMED_PREFIX}: {name}={value}; allowed: a number >= {lowest}")
        return options
