"""A job as its row has it. What a database holds is looked at before it is believed: a row that is not as it should be
is a job that failed, and says why."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from ditrelay.runtime.request import SamplingParams


class JobState(enum.StrEnum):
    """Where a job is; the last three are ends."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in OPEN


OPEN = (JobState.QUEUED, JobState.IN_PROGRESS)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row.

    Attributes:
        id: public name, of our own making.
        model: the name of the model that it is for.
        params: the parameters as they were resolved, and the model's frames per second (``fps``), JSON; the picture to
            start from is kept beside the row.
        fingerprint: tells two requests with one ``idempotency_key`` apart.
        created, started, completed: Unix time in seconds; ``completed`` is when it ended, however it ended.
        error: why it failed.
        file_name: the output, in the output folder; empty before there is one.
        nbytes: size of the output.
        seq: order of submission; the database counts it.
        damage: why its row cannot be read; such a job counts as failed. No column.
    """

    id: str
    model: str
    params: dict[str, Any]
    state: JobState = JobState.QUEUED
    created: float
    started: float | None = None
    completed: float | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""
    error: str | None = None
    file_name: str = ""
    nbytes: int = 0
    seq: int = 0
    damage: str = field(default="", compare=False)


_Id = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]
# In the folder, and not the database itself.
_File = Annotated[str, msgspec.Meta(pattern=r"\A([A-Za-z0-9_-]{1,64}\.[a-z0-9]{1,8})?\Z")]
_Moment = Annotated[float, msgspec.Meta(ge=-1e11, le=1e11)]  # what a calendar has


class _Params(SamplingParams, frozen=True, kw_only=True):
    fps: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    id: _Id
    model: str
    params: _Params
    state: JobState
    created: _Moment
    started: _Moment | None
    completed: _Moment | None
    idempotency_key: str | None
    fingerprint: str
    error: str | None
    file_name: _File
    nbytes: Annotated[int, msgspec.Meta(ge=0)]
    seq: int


NAMES = _Row.__struct_fields__


@dataclass(frozen=True)
class Unreadable:
    """A document that is no JSON."""

    reason: str


def document(text: str | bytes) -> Any:
    """The JSON of a row, as the database's driver asks for it: it never raises, or one row would spoil a whole list."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        return Unreadable(str(error))


def job_of(row: Sequence[Any]) -> Job:
    """The job of a row that has the columns ``NAMES``."""
    values = dict(zip(NAMES, row, strict=True))
    damage = _damage(values)
    return _damaged(values, damage) if damage else Job(**values | {"state": JobState(values["state"])})


def _damage(values: dict[str, Any]) -> str:
    if isinstance(values["params"], Unreadable):
        return f"its row in the database cannot be read: params: {values['params'].reason}"
    try:
        msgspec.convert(values, _Row)
    except msgspec.ValidationError as error:
        return f"its row in the database cannot be read: {error}"
    if not all(math.isfinite(values[name] or 0.0) for name in ("created", "started", "completed")):
        return "its row in the database cannot be read: a time is not a number"
    return ""


def _damaged(values: dict[str, Any], damage: str) -> Job:
    """What is left of it. Where it was ended for its damage before, the row's own reason stays."""
    params, reason = values["params"], values["error"]
    prompt = params.get("prompt") if isinstance(params, dict) else None
    told = values["state"] == JobState.FAILED and isinstance(reason, str)
    return Job(
        id=_as(_Id, values["id"], f"unreadable_{values['seq']}"),
        model=_as(str, values["model"], ""),
        params={"prompt": _as(str, prompt, "")},
        state=JobState.FAILED,
        created=_as(_Moment, values["created"], 0.0),
        completed=_as(_Moment, values["completed"], None),
        error=reason if told else damage,
        fingerprint=_as(str, values["fingerprint"], ""),
        seq=values["seq"],
        damage=damage,
    )


def _as(kind: Any, value: object, otherwise: Any) -> Any:
    try:
        found = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return otherwise
    return otherwise if isinstance(found, float) and not math.isfinite(found) else found
