"""One tree of exceptions. Every message names the setting or input at fault and the way out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

START_THREAD = "ditrelay-start"  # the name of threads that start an engine, which an early end does not wait for

_FLAG = re.compile(r"--(no-)?([a-z][a-z0-9-]*[a-z0-9])")


class DitrelayError(Exception):
    """Root of every error that ditrelay raises on purpose.

    A message names settings as the command line does (``--sp-degree``). One that leaves the Python API names them as
    Python does (``sp_degree``): see ``settings_as_fields``.
    """

    _as_fields = False

    @property
    def on_command_line(self) -> str:
        """The message with settings as flags, wherever the error was raised."""
        return super().__str__()

    def __str__(self) -> str:
        return fields_of_flags(self.on_command_line) if self._as_fields else self.on_command_line


def fields_of_flags(text: str) -> str:
    """``"--sp-degree: ...; or --no-warmup"`` -> ``"sp_degree: ...; or warmup=False"``."""
    return _FLAG.sub(lambda m: m[2].replace("-", "_") + ("=False" if m[1] else ""), text)


@contextlib.contextmanager
def settings_as_fields() -> Iterator[None]:
    """What is raised inside goes to a Python caller: its message names the fields of ``ServerArgs``, not flags."""
    try:
        yield
    except DitrelayError as error:
        error._as_fields = True
        raise


class ConfigError(DitrelayError):
    """A setting is wrong. Raised before any process starts.

    Args:
        flag: the setting, spelled as on the command line (``--sp-degree``).
        reason: what is wrong and what is allowed.
    """

    def __init__(self, flag: str, reason: str) -> None:
        super().__init__(f"{flag}: {reason}")
        self.flag = flag


class UnsupportedModel(ConfigError):
    """The model folder is incomplete or its family is not supported."""

    def __init__(self, reason: str) -> None:
        super().__init__("--model-path", reason)


class InvalidRequest(DitrelayError):
    """One field of a generation request is wrong.

    Args:
        param: the field's name as the client wrote it.
        reason: what is wrong and what is allowed.
    """

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(f"{param}: {reason}")
        self.param = param
        self.reason = reason


class QueueFull(DitrelayError):
    """The queue limit is reached; try again after ``retry_after`` seconds."""

    def __init__(self, limit: int, retry_after: int) -> None:
        super().__init__(f"the queue is full ({limit} requests wait, --max-queue); try again in {retry_after} s")
        self.retry_after = retry_after


class PicturesFull(QueueFull):
    """Pictures to start from take all the memory that they may; try again after ``retry_after`` seconds."""

    def __init__(self, limit: int, retry_after: int) -> None:
        reason = f"decoded pictures with {limit} bytes are held (--max-total-bytes)"
        DitrelayError.__init__(self, f"{reason}; try again in {retry_after} s")
        self.retry_after = retry_after


class RequestFailed(DitrelayError):
    """A request ended without a picture."""

    def __init__(self, request_id: str, reason: str) -> None:
        super().__init__(f"request {request_id} failed: {reason}")
        self.request_id = request_id
        self.reason = reason


class RequestCancelled(DitrelayError):
    """A request was cancelled before it was done."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request {request_id} was cancelled")
        self.request_id = request_id


class EngineClosed(DitrelayError):
    """The engine is shut down or never started."""


class StartupError(DitrelayError):
    """The engine could not start: a worker died or did not become ready in time."""


class TransferError(DitrelayError):
    """A transfer between two ranks failed.

    Args:
        edge: the directed edge, for instance ``3->0``.
        seq: the transfer's sequence number on that edge.
        request_id: whose tensors were moved, or ``None`` where nobody's.
    """

    def __init__(self, edge: str, reason: str, *, seq: int | None = None, request_id: str | None = None) -> None:
        what = f"transfer {edge}" + (f" #{seq}" if seq is not None else "")
        super().__init__(f"{what}{f' of request {request_id}' if request_id else ''}: {reason}")
        self.edge = edge
        self.seq = seq
        self.request_id = request_id
        self.reason = reason


class TransferTimeout(TransferError):
    """A transfer did not complete within ``--dist-timeout``."""


class TransferCorrupt(TransferError):
    """The received bytes do not match the sender's checksum."""


class ReplicaBroken(DitrelayError):
    """A denoise failed and left a replica's ranks in different places; the replica must be started again."""


class CodecError(DitrelayError):
    """A value cannot cross an edge: it is neither a tensor, a list of tensors, nor plain JSON data."""
