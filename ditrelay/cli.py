"""The command line: ``ditrelay generate | serve | restart | doctor``."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ditrelay.__main__ import EXIT_INTERRUPTED
from ditrelay._version import __version__
from ditrelay.cli_flags import BOOLEANS_HELP, REQUEST_FLAGS, SettingsCommand, with_flags
from ditrelay.errors import ConfigError, DitrelayError, InvalidRequest
from ditrelay.runtime.request import Sampling
from ditrelay.runtime.server_args import ServerArgs, server_flags
from ditrelay.runtime.topology import Topology

if TYPE_CHECKING:
    from ditrelay.cli_generate import EngineFactory

DEFAULT_URL = "http://127.0.0.1:30000"
EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(name="ditrelay", add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def main(argv: Sequence[str] | None = None, *, make_engine: EngineFactory | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 (failed), 2 (wrong input) or 130 (interrupted).

    Args:
        argv: words after the program's name; ``sys.argv`` by default.
        make_engine: makes the engine of ``generate``; for tests.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt may have letters that its encoding lacks
    try:
        return app(args=words, standalone_mode=False, prog_name="ditrelay", obj=make_engine) or 0
    except typer.TyperException as error:
        return _fail(_usage_message(error), EXIT_USAGE)
    except InvalidRequest as error:
        return _fail(f"--{error.param.replace('_', '-')}: {error.reason}", EXIT_USAGE)
    except ConfigError as error:
        return _fail(error.on_command_line, EXIT_USAGE)
    except DitrelayError as error:
        return _fail(error.on_command_line, EXIT_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED


def _fail(message: str, code: int) -> int:
    typer.echo("error: " + " ".join(message.splitlines()), err=True)
    return code


def _usage_message(error: typer.TyperException) -> str:
    if isinstance(error, typer.BadParameter) and error.param is not None and error.message:
        return f"{max(error.param.opts, key=len)}: {error.message}"
    return error.format_message()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ditrelay {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve diffusion transformers; encode, denoise and decode run on ranks of their own, at the same time."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command(cls=SettingsCommand, epilog=BOOLEANS_HELP)
@with_flags("settings", server_flags(), ServerArgs, log_level="warning", warmup=False)
@with_flags("sampling", REQUEST_FLAGS, dict)
def generate(
    ctx: typer.Context,
    settings: ServerArgs,
    sampling: dict[str, Any],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to draw; several prompts run at once.", metavar="PROMPT")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="One prompt a line; lines that begin with # and a space are comments. - reads standard input.",
            metavar="FILE",
            rich_help_panel="Request",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="A file, or a directory for several pictures. Named after the prompt where it isn't given.",
            metavar="PATH",
            rich_help_panel="Request",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture to start from, for models that can.", metavar="FILE", rich_help_panel="Request"),
    ] = None,
) -> int:
    """Draw pictures or clips and show where the time went. What isn't given is the model's default."""
    from ditrelay.cli_generate import Order, default_engine, generate, read_image, read_prompts

    order = Order(
        prompts=(*(prompts or ()), *read_prompts(prompt_file)),
        num_images=sampling.pop("num_images", 1),
        output=output,
        sampling=cast(Sampling, sampling | {"image": read_image(image)}),
    )
    return generate(settings, order, ctx.obj or default_engine).exit_code


@app.command(cls=SettingsCommand, epilog=BOOLEANS_HELP)
@with_flags("settings", server_flags(), ServerArgs)
def serve(settings: ServerArgs) -> int:
    """Serve the model over HTTP until interrupted."""
    typer.echo(Topology.build(settings).plan())
    from ditrelay.server.app import serve

    return serve(settings)


@app.command()
def restart(
    rank: Annotated[int, typer.Argument(min=0, help="Number of the rank, as GET /v1/topology shows it.")],
    url: Annotated[str, typer.Option(help="Address of the running server.")] = DEFAULT_URL,
    api_key: Annotated[
        str, typer.Option(help="The server's key.", envvar="DITRELAY_API_KEY", show_default=False)
    ] = "",
) -> int:
    """Start a new process for a rank of a running server, also where the rank was given up."""
    from ditrelay.cli_restart import restart_rank

    typer.echo(restart_rank(rank, url, api_key))
    return 0


@app.command()
def doctor(
    num_processes: Annotated[int, typer.Option(min=2, help="Processes of the communication self-check.")] = 4,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds the self-check may take.")] = 120.0,
    self_check: Annotated[bool, typer.Option(help="Run the communication self-check.")] = True,
) -> int:
    """Show versions, devices and features, and check that processes can talk to each other."""
    from ditrelay.doctor import examine

    return examine(num_processes=num_processes if self_check else 0, timeout=timeout)
