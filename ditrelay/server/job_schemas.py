"""The JSON of ``/v1/jobs`` and ``/v1/activity``, and the events of a job."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from ditrelay.runtime.metrics import Timings
from ditrelay.server.request_fields import WARNINGS
from ditrelay.server.schemas import Error

JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


class JobInfo(BaseModel):
    """A picture or a video that waits, is made, or ended of late."""

    id: str
    object: Literal["job"] = "job"
    kind: Literal["image", "video"]
    status: JobStatus
    stage: str | None = Field(description="What is done for it now (encoding, denoising, decoding, ...).")
    step: int = Field(description="Denoising steps done.")
    total_steps: int
    position: int | None = Field(description="Place in the queue; 1 is next.")
    eta_seconds: float | None = Field(description="Seconds that the denoise still takes, once its pace is known.")
    prompt: str
    created_at: int = Field(description="Unix time in seconds.")
    url: str | None = Field(description="Where the file is, for as long as it is kept, once it is completed.")
    error: Error | None = Field(description="Why it failed.")


class JobList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobInfo]
    warnings: list[str] = Field(default_factory=list, description=WARNINGS)


class Queued(BaseModel):
    """It waits; told again when its place changes, at most once a second."""

    position: int | None = Field(description="Place in the queue; 1 is next.")


class Encoding(BaseModel):
    """Its text (and picture) is encoded."""


class Denoising(BaseModel):
    """The denoise began (step 0), or did a step. Beginning anew after a fault, it counts from 0 again."""

    step: int
    total_steps: int
    eta_seconds: float | None = Field(description="Seconds that the denoise still takes, once its pace is known.")


class Preview(BaseModel):
    """What it looked like after a step; later steps may be done by now."""

    step: int
    b64_jpeg: str = Field(description="A small JPEG file in base64.")


class Decoding(BaseModel):
    """The picture, or the clip's frames and file, are made."""


class Completed(BaseModel):
    """The last event of what went well."""

    url: str
    media_type: str
    width: int
    height: int
    seed: int = Field(description="The seed that makes it again.")
    timings: Timings | None = Field(description="Seconds in each stage and transfer; null after a restart.")


class Failed(BaseModel):
    """The last event of what failed."""

    error: Error


class Cancelled(BaseModel):
    """The last event of what was cancelled or deleted."""


JobEvent = Queued | Encoding | Denoising | Preview | Decoding | Completed | Failed | Cancelled


class Rank(BaseModel):
    """One rank, and its part."""

    rank: int
    role: str = Field(description="Name of its roles together: dit, non_dit, colocated, ...")
    roles: list[str]
    replica: int | None = Field(description="Number of the DiT replica it is part of.")


class Lane(BaseModel):
    """One kind of work of one unit of ranks."""

    rank: int = Field(description="The unit's leader, which the activities name.")
    kind: Literal["encode", "send", "receive", "denoise", "decode"]
    title: str = Field(description="The unit's ranks in words: rank 3, ranks 0-1.")
    role: str = Field(description="The unit's part in words: DiT, non-DiT, encoder, ...")


class TopologyEvent(BaseModel):
    """The first event of ``/v1/activity``."""

    now: float = Field(description="Seconds on the clock of the activities' moments.")
    model: str
    ranks: list[Rank]
    lanes: list[Lane] = Field(description="In the order in which a request meets them.")


class ActivityEvent(BaseModel):
    """A piece of work began, came a step further, or ended. Later events of one piece have the same ``began``."""

    now: float = Field(description="Seconds, when this was sent, on the clock of the moments below.")
    rank: int
    kind: Literal["encode", "send", "receive", "denoise", "decode"]
    request_id: str
    job_id: str | None = Field(description="The job that it is for; null where there is none (the warm-up).")
    began: float
    ended: float | None = Field(description="null while it is under way.")
    step: int = Field(description="Steps that a denoise has done.")
    total_steps: int
