"""Command-line options made from ``Flag`` values, and the spellings of booleans."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text
from typer.core import TyperCommand

from ditrelay.errors import ConfigError
from ditrelay.runtime.flags import Flag, FlagSpec, format_bytes
from ditrelay.runtime.server_args import server_flags

Command = Callable[..., int]

# Narrower terminals have no room for the longest option, what it takes and its help side by side.
_TABLE_COLUMNS = 90

BOOLEANS_HELP = "Booleans are written --flag, --no-flag or --flag true|false."

# The fields of SamplingParams that are plain values (the limits are the model's: see ModelCard.resolve), and how many.
REQUEST_FLAGS = tuple(
    Flag(name, kind, True, None, FlagSpec(help, "Request", minimum=minimum))
    for name, kind, minimum, help in (
        ("num_images", int, 1, "Pictures per prompt."),
        ("seed", int, 0, "Seed of the noise; number i of several uses seed + i. Drawn where it isn't given."),
        ("num_inference_steps", int, 1, "Denoising steps."),
        ("guidance_scale", float, 0, "Strength of guidance."),
        ("negative_prompt", str, None, "What to keep away from."),
        ("strength", float, 0, "With --image: how much of the picture is drawn anew, up to 1."),
        ("height", int, 1, "Pixels."),
        ("width", int, 1, "Pixels."),
        ("num_frames", int, 1, "Frames of a clip."),
    )
)


def with_flags(
    argument: str, flags: Sequence[Flag], build: Callable[..., object], **defaults: object
) -> Callable[[Command], Command]:
    """Give a typer command one option per flag; the command gets what they build as one argument.

    Args:
        argument: name of the command's argument.
        flags: the options.
        build: called with the values that were given, by name (``ServerArgs``, ``dict``).
        defaults: this command's values where a flag isn't given, in place of the flags' own.
    """
    names = {flag.name for flag in flags}

    def decorate(command: Command) -> Command:
        def run(**values: Any) -> int:
            texts = {flag.name: values[flag.name] for flag in flags}
            lists = {name: ",".join(value) or None for name, value in texts.items() if isinstance(value, list)}
            given = {flag.name: flag.parse(text) for flag in flags if (text := (texts | lists)[flag.name]) is not None}
            others = {name: value for name, value in values.items() if name not in names}
            return command(**others, **{argument: build(**defaults | given)})

        signature = inspect.signature(command, eval_str=True)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != argument]
        parameters = [*own, *(_parameter(flag, defaults.get(flag.name, flag.default)) for flag in flags)]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(flag: Flag, default: object) -> inspect.Parameter:
    """The flag as a parameter: a text (or several), or None where it isn't given. The help alone shows the default."""
    option = typer.Option(
        flag.option, help=_help(flag, default), rich_help_panel=flag.spec.group, metavar=_metavar(flag)
    )
    kind: Any = list[str] | None if flag.spec.is_list else str | None
    annotation = Annotated[kind, option]
    return inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(flag: Flag, default: object) -> str:
    text = escape(flag.spec.help)
    if flag.spec.choices:
        text += f" One of {', '.join(flag.spec.choices)}."
    notes = [flag.limits.replace("of at ", "at ")] if flag.limits else []
    if default is not None:
        shown = format_bytes(default) if flag.spec.is_bytes and isinstance(default, int) else str(default)
        notes.append("default: " + (shown.lower() if flag.kind is bool else shown.removesuffix(".0")))
    shown_notes = escape(f"[{'; '.join(notes)}]")
    return f"{text} [dim]{shown_notes}[/dim]" if notes else text


def _metavar(flag: Flag) -> str:
    named = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "NAME" if flag.spec.choices else "TEXT"}
    return flag.spec.metavar or named[flag.kind]


class SettingsCommand(TyperCommand):
    """A command that takes booleans in every spelling, and flags spelled with underscores.

    Its help has tables where the terminal has room for them, and else a paragraph per option, with no name cut.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        width = shutil.get_terminal_size().columns
        if width >= _TABLE_COLUMNS:
            super().format_help(ctx, formatter)
            return
        formatter.width = width
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        heading = None
        for param in self.get_params(ctx):
            panel = getattr(param, "rich_help_panel", None) or ("Options" if param.opts[0][0] == "-" else "Arguments")
            if panel != heading:
                heading = panel
                formatter.write(f"\n{panel}:\n")
            formatter.write(_paragraph(param, width))
        formatter.write("\n" + textwrap.fill(self.epilog or "", width) + "\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        switches = {flag.option for flag in server_flags() if flag.kind is bool}
        known = {option for param in self.params for option in param.opts}
        return super().parse_args(ctx, normalise(args, switches=switches & known, valued=known - switches))


def _paragraph(param: Any, width: int) -> str:
    """``--seed INTEGER`` and, below it, its help."""
    text = Text.from_markup(getattr(param, "help", None) or "").plain
    words = (param.opts[-1] if param.opts[-1].startswith("-") else "", param.metavar or "")
    lines = textwrap.wrap(text, width - 6)
    return "\n".join([f"  {' '.join(filter(None, words))}", *(f"      {line}" for line in lines), ""])


def normalise(args: Iterable[str], *, switches: Collection[str], valued: Collection[str]) -> list[str]:
    """``args`` with every boolean as ``--flag=true`` or ``--flag=false``, and underscores in flags as dashes.

    The word after a boolean is its value only if it is ``true`` or ``false``: ``--flag "a cat"`` leaves the prompt be.

    Args:
        args: the command line after the command's name.
        switches: the boolean flags.
        valued: the flags that take a value; the word after one is never looked at.

    Raises:
        ConfigError: a boolean is set to something else (``--flag=maybe``).
    """
    words = deque(args)
    out: list[str] = []
    while words:
        word = words.popleft()
        if word == "--":
            return [*out, word, *words]
        typed, equals, value = word.partition("=")
        flag = typed.replace("_", "-")
        positive = "--" + flag.removeprefix("--no-")
        if flag in switches:
            if not equals:
                value = words.popleft() if words and words[0].lower() in ("true", "false") else "true"
            out.append(f"{flag}={value}")
        elif positive in switches and flag.startswith("--no-"):
            if equals:
                raise ConfigError(typed, f"takes no value; allowed: {typed} or {positive}=true|false")
            out.append(f"{positive}=false")
        elif flag in valued:
            out.append(flag + equals + value)
            if not equals and words:
                out.append(words.popleft())
        else:
            out.append(word)
    return out
