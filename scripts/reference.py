"""Writes docs/api.md from the server's OpenAPI schema and docs/flags.md from ``ServerArgs``.

``python scripts/reference.py`` writes them; with ``--check`` it only says which are out of date, and ends with 1.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ditrelay.async_engine import AsyncEngine
from ditrelay.cli_flags import BOOLEANS_HELP, REQUEST_FLAGS
from ditrelay.runtime.flags import Flag, format_bytes
from ditrelay.runtime.server_args import ServerArgs, server_flags
from ditrelay.server.app import create_app

DOCS = Path(__file__).resolve().parent.parent / "docs"
SOURCE = "This page is written by `python scripts/reference.py`; a test fails when it is out of date."

Schema = Mapping[str, Any]

# ---------------------------------------------------------------- flags

FLAGS_INTRO = f"""# The flags

{SOURCE}

Every flag is a field of `ServerArgs`: `--sp-degree 2` is `sp_degree=2`. {BOOLEANS_HELP}
Bytes take units (`512MiB`), times are in seconds. `ditrelay serve` and `ditrelay generate` take all of these; what is
longer to say is in [usage.md](usage.md)."""

GENERATE_INTRO = """## Of `ditrelay generate` only

Beside these `PROMPT...`, `--prompt-file FILE`, `--output PATH` and `--image FILE`. Without a default: the model's."""


def flags_page() -> str:
    parts = [FLAGS_INTRO]
    for group, flags in groupby(server_flags(), key=lambda flag: flag.spec.group):
        parts.append(f"## {group}\n\n{_flag_table(list(flags))}")
    parts.append(f"{GENERATE_INTRO}\n\n{_flag_table(REQUEST_FLAGS)}")
    return "\n\n".join(parts) + "\n"


def _flag_table(flags: Sequence[Flag]) -> str:
    rows = [[f"`{flag.option}`", _default(flag), _allowed(flag), flag.spec.help] for flag in flags]
    return table(["flag", "default", "allowed", ""], rows)


def _default(flag: Flag) -> str:
    if flag.default is None:
        return ""
    if flag.spec.is_bytes and isinstance(flag.default, int):
        return f"`{format_bytes(flag.default)}`"
    shown = str(flag.default).lower() if flag.kind is bool else str(flag.default).removesuffix(".0")
    return f"`{shown}`"


def _allowed(flag: Flag) -> str:
    if flag.spec.choices:
        return ", ".join(f"`{choice}`" for choice in flag.spec.choices)
    if flag.spec.is_bytes:
        return "bytes"
    return flag.allowed.removeprefix("an ").removeprefix("a ").replace("text that is not empty", "text")


# ---------------------------------------------------------------- HTTP

API_INTRO = f"""# The HTTP API

{SOURCE}

Addresses, fields and limits, from the server's own schema (`/openapi.json`; `/docs` shows it with forms to try). How to
use them: [usage.md](usage.md#over-http), [clients.md](clients.md). What a model allows (sizes, steps, frames) is in
`GET /v1/models`. A field that is `null` counts as absent; an unknown one is refused, or ignored with a warning
(`--extra-fields`). Every error is an [ErrorResponse](#errorresponse)."""


class Api:
    """The page of one OpenAPI document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._paths: Mapping[str, Mapping[str, Any]] = document["paths"]
        self._schemas: Mapping[str, Schema] = document["components"]["schemas"]

    def page(self) -> str:
        operations = [
            (f"{method.upper()} {path}", what) for path, ways in self._paths.items() for method, what in ways.items()
        ]
        tags = list(dict.fromkeys(what["tags"][0] for _, what in operations))
        parts = [API_INTRO, self._contents(operations)]
        for tag in tags:
            parts.append(f"## {tag.capitalize()}")
            parts += [self._operation(name, what) for name, what in operations if what["tags"][0] == tag]
        parts.append("## Objects")
        parts += [self._object(name) for name in sorted(self._used(operations))]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def _contents(self, operations: Sequence[tuple[str, Any]]) -> str:
        rows = [[f"[`{name}`](#{_anchor(name)})", _first_sentence(what["description"])] for name, what in operations]
        return table(["", ""], rows)

    def _operation(self, name: str, what: Mapping[str, Any]) -> str:
        parts = [f"### {name}", _text(what["description"])]
        if parameters := what.get("parameters"):
            rows = [self._parameter(each) for each in parameters]
            parts.append(table(["parameter", "in", "type", "default", ""], rows))
        if body := what.get("requestBody"):
            kinds = " or ".join(f"`{kind}`" for kind in sorted(body["content"]))
            # A form has the same fields as the JSON object, and its files beside them.
            schema = self._resolved(
                body["content"].get("application/json", next(iter(body["content"].values())))["schema"]
            )
            parts.append(f"Body ({kinds}):\n\n{self._fields(schema)}")
        parts.append("\n".join(self._answers(what["responses"])))
        return "\n\n".join(parts)

    def _parameter(self, parameter: Mapping[str, Any]) -> list[str]:
        schema = parameter["schema"]
        need = "" if not parameter.get("required") or parameter["in"] == "path" else " (required)"
        text = parameter.get("description") or schema.get("description", "")
        return [
            f"`{parameter['name']}`",
            parameter["in"] + need,
            self._type(schema, asked=True),
            _value(schema),
            _line(text),
        ]

    def _answers(self, responses: Mapping[str, Any]) -> Iterator[str]:
        for status, response in responses.items():
            if status in ("4XX", "5XX"):
                continue
            kinds = []
            for kind, content in (response.get("content") or {}).items():
                schema = content.get("schema") or {}
                kinds.append(f"{self._type(schema)}" if "$ref" in schema else f"`{kind}`")
            description = response["description"].removeprefix("Successful Response")
            yield f"- **{status}**: " + _text("; ".join(filter(None, [" or ".join(kinds), description])))

    def _object(self, name: str) -> str:
        schema = self._schemas[name]
        return f"### {name}\n\n{_text(schema.get('description', ''))}\n\n{self._fields(schema)}"

    def _fields(self, schema: Schema) -> str:
        required, asked = schema.get("required", ()), schema.get("additionalProperties") is False
        rows = []
        for name, field in schema.get("properties", {}).items():
            default = "" if not asked else "required" if name in required else _value(field)
            rows.append([f"`{name}`", self._type(field, asked=asked), default, _line(field.get("description", ""))])
        return table(["field", "type", "default", ""], rows)

    def _used(self, operations: Sequence[tuple[str, Any]]) -> set[str]:
        """The objects that answers lead to; bodies are shown where they are taken."""
        found: set[str] = set()
        waiting = [each for _, what in operations for each in _references(what["responses"])]
        waiting += [
            each for _, what in operations for each in _inner_references(what.get("requestBody", {}), self._schemas)
        ]
        while waiting:
            if (name := waiting.pop()) not in found:
                found.add(name)
                waiting += _references(self._schemas[name])
        return found

    def _resolved(self, schema: Schema) -> Schema:
        return self._schemas[_name(schema["$ref"])] if "$ref" in schema else schema

    def _type(self, schema: Schema, *, asked: bool = False) -> str:
        """In words: ``integer 1 to 10``, ``list of Video``. What a client sends (``asked``) may always be null."""
        if "$ref" in schema:
            return f"[{(name := _name(schema['$ref']))}](#{name.lower()})"
        if "anyOf" in schema:
            options = [self._type(option) for option in schema["anyOf"] if option.get("type") != "null"]
            null = [] if asked or len(options) == len(schema["anyOf"]) else ["null"]
            return " or ".join(options + null)
        if "enum" in schema or "const" in schema:
            return ", ".join(f"`{_shown(value)}`" for value in schema.get("enum", [schema.get("const")]))
        match schema.get("type"):
            case "array":
                return f"list of {self._type(schema['items'])}"
            case "object" if isinstance(schema.get("additionalProperties"), dict):
                return f"map of {self._type(schema['additionalProperties'])}"
            case "integer" | "number" as kind:
                return kind + _bounds(schema)
            case "string" if schema.get("format") == "binary":
                return "file"
            case None:
                return "any"
            case kind:
                return str(kind)


def _bounds(schema: Schema) -> str:
    low, high, above = schema.get("minimum"), schema.get("maximum"), schema.get("exclusiveMinimum")
    if low is not None and high is not None:
        return f" {low:g} to {high:g}"
    parts = [f"above {above:g}" if above is not None else "", f"from {low:g}" if low is not None else ""]
    parts.append(f"up to {high:g}" if high is not None else "")
    text = " ".join(filter(None, parts))
    return f" {text}" if text else ""


def _value(schema: Schema) -> str:
    default = schema.get("default")
    if default is None:
        return ""
    return f"`{_shown(default)}`"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _references(value: Any) -> list[str]:
    """Names of all objects that ``value`` refers to."""
    if isinstance(value, Mapping):
        here = [_name(value["$ref"])] if isinstance(value.get("$ref"), str) else []
        return here + [name for each in value.values() for name in _references(each)]
    if isinstance(value, list):
        return [name for each in value for name in _references(each)]
    return []


def _inner_references(body: Any, schemas: Mapping[str, Schema]) -> list[str]:
    """Names of the objects inside of a body, which itself is shown with its address."""
    return [inner for name in _references(body) for inner in _references(schemas.get(name, {}))] + [
        name for name in _references(body) if not name.endswith("Request")
    ]


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def _text(text: str) -> str:
    return text.replace("``", "`").strip()


def _line(text: str) -> str:
    return " ".join(_text(text).split())


def _first_sentence(text: str) -> str:
    return _line(text).partition(". ")[0].partition(": ")[0].removesuffix(".")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Without the columns that are empty in every row."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [
        [header[i] for i in kept],
        ["---"] * len(kept),
        *([row[i].replace("|", "\\|") for i in kept] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------------------------------- both


def pages() -> dict[str, str]:
    """The content of each page, by the name of its file."""
    document = create_app(AsyncEngine(ServerArgs(device="cpu"))).openapi()
    return {"api.md": Api(document).page(), "flags.md": flags_page()}


def stale(folder: Path = DOCS) -> list[str]:
    """Names of the pages that are not as they would be written now."""
    return [
        name for name, text in pages().items() if not (folder / name).exists() or (folder / name).read_text() != text
    ]


def main(check: bool) -> int:
    old = stale()
    if check:
        for name in old:
            print(f"docs/{name} is out of date: python scripts/reference.py", file=sys.stderr)
        return bool(old)
    for name, text in pages().items():
        (DOCS / name).write_text(text)
    print(f"written: {', '.join(old) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a page is out of date")
    sys.exit(main(parser.parse_args().check))
