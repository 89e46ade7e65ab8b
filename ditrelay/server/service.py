"""What the server says about itself: its model, its health, what there is."""

from __future__ import annotations

from fastapi import Request, Response

from ditrelay._version import __version__
from ditrelay.server import playground
from ditrelay.server.context import Context, ContextDep
from ditrelay.server.model_limits import limits_of
from ditrelay.server.problem import RESPONSES
from ditrelay.server.router import Router
from ditrelay.server.schemas import Health, Model, ModelList, Readiness, TopologyState

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


@router.get("/health")
async def health() -> Health:
    """The process lives; it may still be loading."""
    return Health()


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
