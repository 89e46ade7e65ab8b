"""``ditrelay generate``: prompts in, picture files out, every request in flight at once."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ditrelay.cli_progress import Display, LiveDisplay, PlainDisplay
from ditrelay.cli_report import print_report
from ditrelay.cli_run import Job, Outcome, Run
from ditrelay.errors import ConfigError, DitrelayError, InvalidRequest, QueueFull, RequestFailed
from ditrelay.runtime import logs
from ditrelay.runtime.request import Sampling, SamplingParams, spread
from ditrelay.runtime.server_args import ServerArgs

if TYPE_CHECKING:
    from ditrelay.engine import Engine, Progress, Ticket
    from ditrelay.models.card import ModelCard

EngineFactory = Callable[[ServerArgs], "Engine"]

DEFAULT_DIRECTORY = Path("ditrelay-output")
_MEDIA_SUFFIX = {"image": ".png", "video": ".mp4"}
_MEDIA_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".mp4", ".webm", ".mov"})
_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class Order:
    """What the command line asks for.

    Attributes:
        prompts: one request each, times ``num_images``.
        num_images: pictures per prompt.
        output: the file or directory to write, or None for a name made from the prompt.
        sampling: the other fields of ``SamplingParams``, where given. Number i of several uses ``seed + i``.
    """

    prompts: tuple[str, ...]
    num_images: int = 1
    output: Path | None = None
    sampling: Sampling = field(default_factory=Sampling)


def default_engine(settings: ServerArgs) -> Engine:
    from ditrelay.engine import Engine

    return Engine(settings)


def generate(settings: ServerArgs, order: Order, make_engine: EngineFactory = default_engine) -> Run:
    """Make everything that ``order`` asks for, showing progress on stderr and a report on stdout.

    A request that fails does not stop the others. On Ctrl-C all are cancelled and the engine is closed.

    Raises:
        ConfigError, InvalidRequest: wrong input; nothing was started.
        DitrelayError: the engine did not start.
        KeyboardInterrupt: interrupted; what was done by then is in its files.
    """
    params = _expand(order)
    engine = make_engine(settings)
    resolved = _resolve(engine.card, params)
    jobs = _jobs(engine.card, order, resolved)
    console = Console(stderr=True)
    display = LiveDisplay(console) if console.is_terminal else PlainDisplay(sys.stderr)
    runner = _Runner(engine, jobs, display)
    try:
        with display.starting(engine, settings.num_gpus):
            logs.configure(settings.log_level)
            engine.start()
        with display.running([job.params.prompt for job in jobs]):
            runner.run()
    finally:
        engine.close(timeout=_CLOSE_SECONDS)
        print_report(runner.report())
    return runner.report()


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a prompt file that are not blank; of standard input for ``-``; none for no file.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    if path is None:
        return []
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--prompt-file", f"cannot read {path}: {_reason(error)}") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]  # splitlines also cuts at U+2028 and others
    if not prompts:
        raise ConfigError("--prompt-file", f"{path} has no prompt; allowed: one prompt a line")
    return prompts


def read_image(path: Path | None) -> bytes | None:
    """The bytes of the picture to start from.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError("--image", f"cannot read {path}: {_reason(error)}") from error


def slug(prompt: str) -> str:
    """``"A red apple!"`` -> ``"a-red-apple"``: a short file name without suffix."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "output"


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"


def _expand(order: Order) -> list[SamplingParams]:
    """The requests: every prompt ``num_images`` times, with consecutive seeds where there is one."""
    if not order.prompts:
        raise ConfigError("PROMPT", "there is none; give one or more prompts, or --prompt-file")
    return spread(order.prompts, order.num_images, **order.sampling)


def _resolve(card: ModelCard, params: list[SamplingParams]) -> list[SamplingParams]:
    resolved = []
    for i, each in enumerate(params):
        try:
            resolved.append(card.resolve(each))
        except InvalidRequest as error:
            if error.param != "prompt":
                raise
            number = f"number {i + 1}: " if len(params) > 1 else ""
            raise ConfigError("PROMPT", f"{number}{error.reason}") from error
    return resolved


def _jobs(card: ModelCard, order: Order, params: list[SamplingParams]) -> list[Job]:
    """A file for each request, in a directory that is there and can be written to: what is drawn must not be lost.

    Raises:
        ConfigError: ``--output`` cannot be what it is asked to be.
    """
    suffix, given = _MEDIA_SUFFIX[card.media], order.output
    try:
        if len(params) == 1 and given is not None and given.suffix.lower() in _MEDIA_SUFFIXES:
            _check_file(given, suffix)
            return [Job(0, params[0], given, overwrites=True)]
        if len(params) == 1:
            path = _make_directory(given or Path()) / (slug(params[0].prompt) + suffix)
            return [Job(0, params[0], _unused(path))]
        directory, width = _make_directory(given or DEFAULT_DIRECTORY), len(str(len(params)))
        names = [f"{i:0{width}}-{slug(each.prompt)}{suffix}" for i, each in enumerate(params, start=1)]
        return [Job(i, each, _unused(directory / names[i])) for i, each in enumerate(params)]
    except OSError as error:
        raise ConfigError("--output", f"cannot write to {given or 'this directory'}: {_reason(error)}") from error


def _check_file(path: Path, suffix: str) -> None:
    if path.suffix.lower() != suffix:
        raise ConfigError("--output", f"{path}: the model makes {suffix} files; allowed: a name with that suffix")
    if path.is_dir():
        raise ConfigError("--output", f"{path} is a directory; allowed: a file name")
    if not path.exists():
        _make_directory(path.parent)
    elif not os.access(path, os.W_OK):
        raise ConfigError("--output", f"{path} is there and cannot be written to; choose another")


def _make_directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--output", f"cannot make the directory {path}: {_reason(error)}") from error
    with tempfile.TemporaryFile(dir=path):  # the only way to know, whatever file system it is
        return path


def _unused(path: Path) -> Path:
    """``path``, with a number where a file of that name exists: a name that nobody chose overwrites nothing."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def _write(job: Job, media: bytes) -> Path:
    """The file of ``job``, whole or not there. Where another run has taken a name that nobody chose, it is another.

    Raises:
        OSError: it cannot be written.
    """
    path = job.path
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            file = path.open("wb" if job.overwrites else "xb")
        except FileExistsError:
            path = _unused(job.path)
            continue
        try:
            with file:
                file.write(media)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path


class _Runner:
    """Submits jobs, follows their progress and saves their results, on the calling thread."""

    def __init__(self, engine: Engine, jobs: list[Job], display: Display) -> None:
        self._engine = engine
        self._display = display
        self._asked = len(jobs)
        self._waiting = deque(jobs)
        self._running: dict[str, tuple[Job, Ticket]] = {}
        self._outcomes: list[Outcome] = []
        self._events: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        self._began = self._ended = time.monotonic()

    def run(self) -> None:
        """Until every job has ended. An exception (Ctrl-C) cancels those that have not."""
        self._began = time.monotonic()
        with self._cancelling():
            while self._waiting or self._running:
                self._submit()
                self._follow()

    def report(self) -> Run:
        """What has ended so far."""
        outcomes = tuple(sorted(self._outcomes, key=lambda outcome: outcome.job.index))
        trace = self._engine.trace_files if self._engine.args.trace else None
        advice = self._engine.advice() if self._engine.topology.world_size > 1 else None
        said = advice.text if advice else ""
        return Run(self._asked, outcomes, self._ended - self._began, self._engine.overlap(), trace, said)

    @contextlib.contextmanager
    def _cancelling(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for _, ticket in self._running.values():
                ticket.cancel()
            raise

    def _submit(self) -> None:
        """As many of the waiting jobs as the engine's queue takes."""
        while self._waiting:
            job = self._waiting[0]
            try:
                ticket = self._engine.submit(job.params)
            except QueueFull:
                return
            except DitrelayError as error:
                self._end(Outcome(self._waiting.popleft(), error=str(error)))
                continue
            self._running[ticket.request_id] = self._waiting.popleft(), ticket
            ticket.subscribe(self._events.put)

    def _follow(self) -> None:
        """One event, if one comes soon."""
        try:
            progress = self._events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return
        job, ticket = self._running[progress.request_id]
        self._display.update(job.index, progress)
        if progress.state.ended:
            del self._running[progress.request_id]
            self._collect(job, ticket)

    def _collect(self, job: Job, ticket: Ticket) -> None:
        """Save the result of a request that ended."""
        try:
            result = ticket.result(timeout=0)
            path = _write(job, result.media)
        except QueueFull:
            self._waiting.append(job)
        except RequestFailed as error:
            self._end(Outcome(job, error=error.reason))
        except OSError as error:
            self._end(Outcome(job, error=f"cannot write {job.path}: {_reason(error)}"))
        except DitrelayError as error:
            self._end(Outcome(job, error=str(error)))
        else:
            # Its file is written: of hundreds of pictures none stays in memory.
            self._end(Outcome(replace(job, path=path), replace(result, media=b"")))

    def _end(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._ended = time.monotonic()
        seconds = outcome.result.timings.total if outcome.result else 0.0
        self._display.ended(outcome.job.index, seconds, outcome.error)
