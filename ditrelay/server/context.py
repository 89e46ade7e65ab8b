"""What the routes share: the engine and the finished files, one set per application."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from ditrelay.server.files import FileStore
from ditrelay.server.problem import model_not_found, not_ready, shutting_down
from ditrelay.server.schemas import Readiness

if TYPE_CHECKING:
    from ditrelay.engine import AsyncEngine


@dataclass
class Context:
    """One application's state.

    Attributes:
        engine: does the work.
        files: pictures to be fetched by address.
        started: the engine's start is complete. Stays true while a lost worker is replaced: requests wait then.
        closing: the end has begun.
        created: Unix time in seconds at which this application was made.
    """

    engine: AsyncEngine
    files: FileStore = field(default_factory=FileStore)
    started: bool = False
    closing: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        return self.engine.args.model_name

    async def close(self) -> None:
        """Close the engine; its requests that run end now."""
        self.closing = True
        await self.engine.close()

    def readiness(self) -> Readiness:
        """What each role still lacks; under ``engine`` what is not one worker's."""
        status = self.engine.status()
        missing: dict[str, list[str]] = {}
        for worker in status.workers:
            if worker.state != "up":
                reason = f" ({worker.reason})" if worker.reason else ""
                missing.setdefault(worker.role, []).append(f"rank {worker.rank} is {worker.state}{reason}")
        if not status.ready and not missing:
            missing["engine"] = ["warming up" if status.workers else "starting"]
        return Readiness(ready=status.ready, missing=missing)

    def check_open(self) -> None:
        """Raises ``ApiError`` (503) before the engine takes requests and after."""
        if self.closing:
            raise shutting_down()
        if not self.started:
            missing = "; ".join(f"{role}: {', '.join(why)}" for role, why in self.readiness().missing.items())
            raise not_ready(f"the model is loading ({missing})")

    def check_model(self, name: str | None) -> None:
        """Raises ``ApiError`` (404) where ``name`` is given and is not the served model."""
        if name is not None and name != self.model_name:
            raise model_not_found(name, self.model_name)


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(_context)]
