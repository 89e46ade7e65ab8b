"""What a run of ``ditrelay generate`` was asked to make and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ditrelay.runtime.request import SamplingParams
from ditrelay.runtime.tickets import Result
from ditrelay.runtime.trace import TraceFiles


@dataclass(frozen=True)
class Job:
    """One picture or clip to make: resolved parameters and the file it goes to.

    ``overwrites``: the user chose the name; what is there is replaced.
    """

    index: int
    params: SamplingParams
    path: Path
    overwrites: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a job ended: with a result in its file (``media`` is empty), or with an error."""

    job: Job
    result: Result | None = None
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """What became of ``asked`` requests.

    Attributes:
        asked: number of requests; those without an outcome were cut short.
        outcomes: in the order of the jobs.
        seconds: from the first submission to the last end.
        overlap: share of the working time during which at least two stages computed.
        trace: the timeline, where one was asked for and written.
        advice: whether disaggregation pays off, where there is more than one rank.
    """

    asked: int
    outcomes: tuple[Outcome, ...]
    seconds: float
    overlap: float
    trace: TraceFiles | None = None
    advice: str = ""

    @property
    def exit_code(self) -> int:
        return 0 if sum(outcome.error is None for outcome in self.outcomes) == self.asked else 1
