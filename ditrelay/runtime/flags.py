"""A setting as a dataclass field, a command-line flag and its help text: what each may be, and how it is read."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

from ditrelay.errors import ConfigError

T = TypeVar("T")

_WEEK = 7 * 24 * 3600.0
_BYTE_UNITS: dict[str, int] = (
    {"": 1, "b": 1}
    | {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}
    | {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
)


@dataclass(frozen=True)
class FlagSpec:
    """What a field's metadata says about its flag.

    Attributes:
        help: one sentence for ``--help``.
        group: the heading of the flag in ``--help``.
        choices: allowed strings; empty: any non-empty string.
        minimum: smallest allowed number.
        above: the number must be larger than this.
        maximum: largest allowed number.
        metavar: placeholder in ``--help`` (``SECONDS``).
        is_bytes: the command line accepts ``512MiB`` and the like.
        suffix: how a file name must end (``.json``).
        is_list: a text with commas; on the command line the flag may also be given several times.
    """

    help: str
    group: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    metavar: str | None = None
    is_bytes: bool = False
    suffix: str | None = None
    is_list: bool = False


def flag(default: T, group: str, help: str, *, secret: bool = False, **spec: Any) -> T:
    """A dataclass field with its flag; typed as the field's value, as ``dataclasses.field`` is.

    ``spec``: fields of ``FlagSpec``. A ``secret`` is not in the dataclass's ``repr``, which may end in a log.
    """
    value: T = dataclasses.field(default=default, repr=not secret, metadata={"flag": FlagSpec(help, group, **spec)})
    return value


def seconds(default: float, help: str) -> float:
    """A time limit."""
    return flag(default, "Limits", help, above=0, maximum=_WEEK, metavar="SECONDS")


@dataclass(frozen=True)
class Flag:
    """One field of ``ServerArgs`` as a command-line flag.

    Attributes:
        name: the field (``sp_degree``).
        kind: ``bool``, ``int``, ``float`` or ``str``.
        optional: ``None`` is allowed.
        default: the field's default.
        spec: its help text and limits.
    """

    name: str
    kind: type
    optional: bool
    default: object
    spec: FlagSpec

    @property
    def option(self) -> str:
        """The spelling on the command line (``--sp-degree``)."""
        return "--" + self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        """What the flag takes, in words: ``an integer from 0 to 65535``."""
        if self.kind is bool:
            return "true or false"
        if self.spec.suffix:
            return f"a file name that ends in {self.spec.suffix}"
        if self.kind is str:
            return ", ".join(self.spec.choices) or "a text that is not empty"
        noun = "a number" if self.kind is float else "an integer"
        if self.spec.is_bytes:
            noun = "a number of bytes (with a unit or without: 512MiB, 1GiB)"
        return f"{noun} {self.limits}".rstrip()

    @property
    def limits(self) -> str:
        """The smallest and the largest number allowed, in words; nothing where there is neither."""
        if self.spec.minimum is not None and self.spec.maximum is not None:
            return f"from {self.spec.minimum:g} to {self.spec.maximum:g}"
        bounds = (("of at least", self.spec.minimum), ("above", self.spec.above), ("of at most", self.spec.maximum))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)

    def check(self, value: object) -> object:
        """``value`` as the field keeps it (an int where a float is asked for becomes one).

        Raises:
            ConfigError: the value is of another type or outside the limits.
        """
        if value is None and self.optional:
            return value
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        # ``type(...) is``: True is an int to isinstance, and means that an argument went to the wrong field.
        if type(value) is not self.kind or not self._within(value):
            raise self.error(value)
        return value

    def parse(self, text: str) -> object:
        """The value that ``text`` on the command line stands for.

        Raises:
            ConfigError: it stands for none, or for one that is not allowed.
        """
        try:
            return self.check(self._convert(text.strip()))
        except (ValueError, OverflowError):
            raise self.error(text) from None

    def error(self, value: object) -> ConfigError:
        return ConfigError(self.option, f"{value!r} is not allowed; allowed: {self.allowed}")

    def _convert(self, text: str) -> object:
        if self.kind is bool:
            return parse_bool(text)
        if self.spec.is_bytes:
            return parse_bytes(text)
        return self.kind(text)

    def _within(self, value: object) -> bool:
        if isinstance(value, str) and self.spec.suffix:
            return PurePath(value).suffix == self.spec.suffix
        if isinstance(value, str):
            return value in self.spec.choices if self.spec.choices else bool(value.strip())
        assert isinstance(value, int | float)
        low, above, high = self.spec.minimum, self.spec.above, self.spec.maximum
        return (
            math.isfinite(value)
            and (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
        )


def as_flag(field: dataclasses.Field[Any], hint: Any) -> Flag:
    """The flag of a field made by ``flag``; ``hint`` is the field's type, or that or ``None``."""
    optional = isinstance(hint, types.UnionType)
    kind = typing.get_args(hint)[0] if optional else hint
    return Flag(field.name, kind, optional, field.default, field.metadata["flag"])


def parse_bool(text: str) -> bool:
    """``true``/``false`` (also yes/no, on/off, 1/0, in any case).

    Raises:
        ValueError: it is none of these.
    """
    word = text.lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def parse_bytes(text: str) -> int:
    """``"512MiB"`` -> 536870912. Units: B, KiB, MiB, GiB, TiB (powers of 1024), KB, MB, GB, TB (of 1000), in any case.

    Raises:
        ValueError: it is not a number of bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    factor = _BYTE_UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a number of bytes such as 512MiB")
    return round(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor


def format_bytes(count: int) -> str:
    """536870912 -> ``"512MiB"``: in the largest unit that keeps it whole, so that ``parse_bytes`` reads it back."""
    units = [(f"{prefix}iB", 1024**power) for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K"))]
    return next((f"{count // size}{unit}" for unit, size in units if count and count % size == 0), f"{count}B")
