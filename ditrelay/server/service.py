"""What the server says about itself: its model, its health, what there is."""

from __future__ import annotations

from fastapi import Request, Response

from ditrelay._version import __version__
from ditrelay.server import playground
from ditrelay.server.context import Context, ContextDep
from ditrelay.server.model_limits import limits_of
from ditrelay.server.problem import RESPONSES
from ditrelay.server.router import Router
from ditrelay.server.schemas import Health, Model, ModelList, RankState, Readiness, TopologyState

router = Router(tags=["service"], responses=RESPONSES)


@router.get("/", include_in_schema=False, response_model=None)
async def index(request: Request, context: ContextDep) -> Response | dict[str, str | list[str]]:
    """The playground for browsers; for programs, where to go from here."""
    if playground.is_browser(request.headers):
        return playground.page()
    paths = request.app.openapi()["paths"]
    return {
        "name": "ditrelay",
        "version": __version__,
        "model": context.model_name,
        "docs": "/docs",
        "endpoints": [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods],
    }


@router.get(
    "/health",
    response_model_exclude_unset=True,
    responses={503: {"model": Health, "description": "The engine has ended and will not return."}},
)
async def health(context: ContextDep, response: Response) -> Health:
    """The process lives; it may still be loading. Where its engine has failed it is about to end, and says so."""
    failure = context.engine.status().failure
    response.status_code = 503 if failure else 200
    return Health(status="failed", reason=failure) if failure else Health(status="ok")


@router.get("/ready", responses={503: {"model": Readiness, "description": "Not every role is up and warm."}})
async def ready(context: ContextDep, response: Response) -> Readiness:
    """Whether every role is up and warm."""
    readiness = context.readiness()
    response.status_code = 200 if readiness.ready else 503
    return readiness


@router.get("/v1/topology")
async def topology(context: ContextDep) -> TopologyState:
    """Which rank does what, and how it is."""
    return context.topology()


@router.post("/v1/ranks/{rank}/restart", status_code=202)
async def restart(rank: int, context: ContextDep) -> RankState:
    """Start a new process for a rank (for all ranks of its replica) at once, also where it was given up.

    Its requests go on elsewhere or later. The answer shows the rank as it was; `GET /v1/topology` what comes of it.
    """
    state = context.rank(rank)
    context.engine.restart(rank)
    return state


@router.get("/v1/models")
async def list_models(context: ContextDep) -> ModelList:
    """The served model, under each of its names."""
    return ModelList(data=[_model(context, name) for name in context.engine.args.model_names])


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, context: ContextDep) -> Model:
    """One served model."""
    context.check_model(model_id)
    return _model(context, model_id)


def _model(context: Context, name: str) -> Model:
    return Model(id=name, created=context.created, limits=limits_of(context.engine.card))
