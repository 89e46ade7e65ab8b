"""``ditrelay generate``: prompts in, picture files out, every request in flight at once."""

from __future__ import annotations

import contextlib
import queue
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ditrelay.cli_files import Folders, format_of, plan_files, reason, write
from ditrelay.cli_progress import Display, LiveDisplay, PlainDisplay
from ditrelay.cli_report import print_report
from ditrelay.cli_run import Job, Outcome, Run
from ditrelay.errors import START_THREAD, ConfigError, DitrelayError, InvalidRequest, QueueFull, RequestFailed
from ditrelay.runtime import logs
from ditrelay.runtime.request import Sampling, SamplingParams, spread
from ditrelay.runtime.server_args import ServerArgs

if TYPE_CHECKING:
    from ditrelay.engine import Engine, Progress, Ticket
    from ditrelay.models.card import ModelCard

EngineFactory = Callable[[ServerArgs], "Engine"]

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
    if not order.prompts:
        raise ConfigError("PROMPT", "there is none; give one or more prompts, or --prompt-file")
    engine = make_engine(settings)
    params = _expand(order, engine.card)
    resolved = _resolve(engine.card, params)
    if resolved[0].image is not None:  # all start from the same; a damaged one should not cost the start of an engine
        engine.check_picture(resolved[0])
    console = Console(stderr=True)
    display = LiveDisplay(console) if console.is_terminal else PlainDisplay(sys.stderr)
    with Folders() as folders:
        jobs = plan_files(engine.card, order.output, resolved, folders)
        runner = _Runner(engine, jobs, display)
        is_interrupted = False
        try:
            with display.starting(engine, settings.num_gpus):
                logs.configure(settings.log_level)
                _start(engine)
            with display.running([job.params.prompt for job in jobs]):
                runner.run()
        except KeyboardInterrupt:
            is_interrupted = True
            raise
        finally:
            engine.close(timeout=_CLOSE_SECONDS, at_once=is_interrupted)
            print_report(runner.report())
    return runner.report()


def _start(engine: Engine) -> None:
    """On a thread of its own: Ctrl-C must not wait for what it imports."""
    ThreadPoolExecutor(1, START_THREAD).submit(engine.start).result()


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a prompt file that are neither blank nor a ``# comment``; of standard input for ``-``.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    if path is None:
        return []
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--prompt-file", f"cannot read {path}: {reason(error)}") from error
    lines = [line.strip() for line in text.split("\n")]  # splitlines also cuts at U+2028 and others
    prompts = [line for line in lines if line and line != "#" and not line.startswith("# ")]
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
        raise ConfigError("--image", f"cannot read {path}: {reason(error)}") from error


def _expand(order: Order, card: ModelCard) -> list[SamplingParams]:
    """The requests: every prompt ``num_images`` times, with consecutive seeds where there is one."""
    sampling = order.sampling.copy()
    if card.media == "image" and (wanted := format_of(order.output)):
        sampling["output_format"] = wanted
    return spread(order.prompts, order.num_images, **sampling)


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
            path = write(job, result.media)
        except QueueFull:
            self._waiting.append(job)
        except RequestFailed as error:
            self._end(Outcome(job, error=error.reason))
        except OSError as error:
            self._end(Outcome(job, error=f"cannot write {job.path}: {reason(error)}"))
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
