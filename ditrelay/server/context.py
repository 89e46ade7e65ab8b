"""What the routes share: the engine and the finished files, one set per application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from ditrelay.server.board import Board
from ditrelay.server.files import FileStore
from ditrelay.server.held_bytes import HeldBytes
from ditrelay.server.image_jobs import ImageJobs
from ditrelay.server.jobs import Jobs
from ditrelay.server.problem import model_not_found, no_such_rank, not_ready, role_lost, shutting_down
from ditrelay.server.remote_media import RemoteMedia
from ditrelay.server.schemas import (
    EdgeState,
    PlacementAdvice,
    PlacementOption,
    RankState,
    Readiness,
    RequestCounts,
    TopologyState,
)
from ditrelay.server.traffic import Traffic

if TYPE_CHECKING:
    from ditrelay.async_engine import AsyncEngine
    from ditrelay.runtime.placement import Advice
    from ditrelay.runtime.status import EngineStatus, WorkerStatus


@dataclass
class Context:
    """One application's state.

    Attributes:
        engine: does the work.
        files: pictures to be fetched by address.
        recent_files: those that their clients have got in the answer, for whoever follows their jobs.
        held: what clients have sent and is still in memory.
        traffic: what the clients' connections hold.
        board: the jobs: all pictures, and the videos where the model makes them.
        closed: set at the end, for streams that have no end of their own.
        started: the engine's start is complete. Stays true while a lost worker is replaced: requests wait then.
        draining: the end has begun: no request is taken any more.
        closing: nor is any that runs brought to its end.
        running: requests for pictures that were taken and are not answered yet.
        created: Unix time in seconds at which this application was made.
        tasks: what goes on though nobody waits for it.
    """

    engine: AsyncEngine
    files: FileStore = field(default_factory=FileStore)
    recent_files: FileStore = field(
        default_factory=lambda: FileStore(max_files=200, max_bytes=64 << 20, lifetime=600.0)
    )
    held: HeldBytes = field(init=False)
    traffic: Traffic = field(default_factory=Traffic)
    board: Board = field(default_factory=Board)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    started: bool = False
    draining: bool = False
    closing: bool = False
    running: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _watching: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        args = self.engine.args
        self.held = HeldBytes(max_total=args.max_total_bytes, max_client=args.client_share)

    @property
    def jobs(self) -> Jobs | None:
        """Videos to be made; ``None`` for models that make pictures, and before the store is open."""
        return self.board.videos

    @property
    def images(self) -> ImageJobs:
        return self.board.images

    @cached_property
    def remote(self) -> RemoteMedia | None:
        """Fetches pictures from the hosts of ``--allow-remote-media``; ``None`` where there are none."""
        args = self.engine.args
        max_bytes = min(args.max_upload_bytes, args.max_total_bytes)
        return RemoteMedia(args.media_hosts, max_bytes=max_bytes) if args.media_hosts else None

    @property
    def model_name(self) -> str:
        return self.engine.args.model_name

    async def start(self) -> AsyncEngine:
        """Open the job store, where the model makes videos, and start the engine.

        Raises:
            ConfigError, StartupError: one of the two is not possible.
        """
        if self.engine.card.media == "video":
            self.board.videos = await Jobs.open(self.engine)
        self._watching = asyncio.create_task(self.board.watch_places())
        await self.engine.start()
        if self.jobs is not None:
            self.jobs.start()
        return self.engine

    async def close(self) -> None:
        """Close the engine; its requests that run end now, and jobs go on with the next server."""
        self.draining = self.closing = True
        self.closed.set()
        if self._watching is not None:
            self._watching.cancel()
        if self.jobs is not None:
            await self.jobs.close()
        await self.engine.close(at_once=not self.started)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Around the work for one request that was taken."""
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    async def drain(self) -> None:
        """Take no more requests; returns once those that run are answered."""
        self.draining = True
        if self.running:
            await self._idle.wait()

    def readiness(self) -> Readiness:
        """What each role still lacks; under ``engine`` what is not one worker's."""
        status = self.engine.status()
        missing: dict[str, list[str]] = {"engine": ["shutting down"]} if self.draining else {}
        if status.trouble:
            missing["engine"] = [status.trouble]
        for worker in status.workers:
            if worker.state != "up":
                reason = f" ({worker.reason})" if worker.reason else ""
                missing.setdefault(worker.role, []).append(f"rank {worker.rank} is {worker.state}{reason}")
        if not status.ready and not missing:
            missing["engine"] = ["warming up" if status.workers else "starting"]
        trouble = self.jobs.trouble if self.jobs is not None else ""
        if trouble:
            missing["jobs"] = [trouble]
        roles = dict.fromkeys(role for worker in status.workers for role in worker.roles)
        up = {role for worker in status.workers if worker.state == "up" for role in worker.roles}
        ready = status.ready and not self.draining and not status.trouble and not trouble
        return Readiness(ready=ready, missing=missing, down=[role for role in roles if role not in up])

    def topology(self) -> TopologyState:
        """Every rank and edge, as they are now."""
        status = self.engine.status()
        return TopologyState(
            ranks=[_rank_state(worker) for worker in status.workers],
            edges=_edge_states(status),
            requests=RequestCounts(
                queued=status.queued,
                running=status.running,
                done=status.done,
                failed=status.failed,
                cancelled=status.cancelled,
            ),
            placement=_placement(self.engine.advice()),
        )

    def rank(self, rank: int) -> RankState:
        """Raises ``ApiError`` (404) where there is no such rank, or none yet."""
        workers = self.engine.status().workers
        if not 0 <= rank < len(workers):
            raise no_such_rank(rank, len(workers))
        return _rank_state(workers[rank])

    def check_roles(self) -> None:
        """Raises ``ApiError`` (503) where all ranks of a role that every picture needs were given up."""
        for role, reason in self.engine.status().lost_roles:
            raise role_lost(role, reason)

    def check_open(self) -> None:
        """Raises ``ApiError`` (503) before the engine takes requests and after."""
        if self.draining:
            raise shutting_down(self.engine.status().failure)
        if not self.started:
            missing = "; ".join(f"{role}: {', '.join(why)}" for role, why in self.readiness().missing.items())
            raise not_ready(f"the model is loading ({missing})")
        self.check_roles()

    def check_model(self, name: str | None) -> None:
        """Raises ``ApiError`` (404) where ``name`` is given and is not one of the served model."""
        names = self.engine.args.model_names
        if name is not None and name not in names:
            raise model_not_found(name, names)


def _rank_state(worker: WorkerStatus) -> RankState:
    beat = worker.memory
    return RankState(
        rank=worker.rank,
        role=worker.role,
        roles=list(worker.roles),
        replica=worker.replica,
        pid=worker.pid,
        state=worker.state,
        generation=worker.restarts,
        reason=worker.reason,
        pending_sends=beat.pending_sends if beat else 0,
        pending_recvs=beat.pending_recvs if beat else 0,
        kept_bytes=beat.kept if beat else 0,
    )


def _placement(advice: Advice | None) -> PlacementAdvice | None:
    if advice is None:
        return None
    return PlacementAdvice(
        requests=advice.seconds.requests,
        encode_seconds=advice.seconds.encode,
        denoise_seconds=advice.seconds.denoise,
        decode_seconds=advice.seconds.decode,
        options=[PlacementOption(name=each.name, requests_per_second=each.rate) for each in advice.options],
        text=advice.text,
    )


def _edge_states(status: EngineStatus) -> list[EdgeState]:
    return [
        EdgeState(
            source=edge.edge.src,
            target=edge.edge.dst,
            up=edge.up,
            generation=edge.generation,
            used=edge.used,
            window=edge.window,
            nbytes=edge.nbytes,
        )
        for edge in status.edges
    ]


async def _context(request: Request) -> Context:  # what is not async, FastAPI would call on another thread
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(_context)]
