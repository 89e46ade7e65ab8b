"""The JSON of what a server says of itself and of its models, and of every error."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from ditrelay.server.model_limits import ModelLimits


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time in seconds at which this server began to serve it.")
    owned_by: str = "ditrelay"
    limits: ModelLimits = Field(description="What a request may ask for; not OpenAI's.")


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok", "failed"] = "ok"
    reason: str = Field(default="", description="Why it has failed; the server ends then.")


class Readiness(BaseModel):
    """Whether every role is up and warm, and what each role still lacks."""

    ready: bool
    missing: dict[str, list[str]] = Field(description="Per kind of rank, those that are not up and why.")
    down: list[Literal["encode", "denoise", "decode"]] = Field(
        description="Roles that no rank has at the moment: requests that need them wait, or fail where it lasts."
    )


class RankState(BaseModel):
    """One rank, as it is now."""

    rank: int
    role: str = Field(description="Name of its roles together: dit, non_dit, colocated, ...")
    roles: list[str]
    replica: int | None = Field(description="Number of the DiT replica it is part of.")
    pid: int | None
    state: Literal["starting", "up", "down", "failed"] = Field(
        description="down: it is started again soon; failed: it died too often and is tried again after minutes."
    )
    generation: int = Field(description="How often its process was replaced.")
    reason: str = Field(description="Why it is not up.")
    pending_sends: int = Field(description="Transfers that it sends, at its last heartbeat.")
    pending_recvs: int = Field(description="Transfers that it receives, at its last heartbeat.")
    kept_bytes: int = Field(description="Payloads that it keeps for a re-send, at its last heartbeat.")


class EdgeState(BaseModel):
    """One directed path for tensors between two ranks."""

    source: int
    target: int
    up: bool
    generation: int = Field(description="How often it was made anew.")
    used: int = Field(description="Payloads on the way or waiting at the target.")
    window: int
    nbytes: int


class RequestCounts(BaseModel):
    """Requests (one picture each) that wait and run, and how the others ended since the start."""

    queued: int
    running: int
    done: int
    failed: int
    cancelled: int


class PlacementOption(BaseModel):
    """A way to place the stages on the ranks, and what it makes at most."""

    name: str
    requests_per_second: float


class PlacementAdvice(BaseModel):
    """What the newest requests say of the placement: medians of their stages, and the rates that follow."""

    requests: int = Field(description="That the medians are of, at most 200.")
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    options: list[PlacementOption] = Field(
        description="The present placement first; none where ranks share the cores of a CPU."
    )
    text: str = Field(description="Whether disaggregation pays off here, in words.")


class TopologyState(BaseModel):
    """Every rank and edge, as they are now (at most 0.1 s ago)."""

    ranks: list[RankState]
    edges: list[EdgeState]
    requests: RequestCounts
    placement: PlacementAdvice | None = Field(description="Null before three requests are done.")


class Error(BaseModel):
    """What is wrong and what is allowed instead."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's error form."""

    error: Error


class ErrorEvent(ErrorResponse):
    """The last event of a streamed request that failed after its first event."""

    type: Literal["error"] = "error"
