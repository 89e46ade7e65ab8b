"""``POST /v1/images/edits``: pictures that start from a picture."""

from __future__ import annotations

from fastapi import Request, Response

from ditrelay.models.quirks import FAMILIES
from ditrelay.server import detached
from ditrelay.server.bodies import Body, picture_page_entry, read_body
from ditrelay.server.context import Context, ContextDep
from ditrelay.server.edit_schemas import ImageEditRequest
from ditrelay.server.held_bytes import bytes_of
from ditrelay.server.image_answers import ImagesResponse
from ditrelay.server.images import respond
from ditrelay.server.problem import RESPONSES, ApiError, required, wrong_field
from ditrelay.server.router import Router
from ditrelay.server.uploads import Upload, picture_of

router = Router(prefix="/v1", tags=["images"], responses=RESPONSES)

_PICTURES = ("image", "images")
_FILES = (*_PICTURES, "mask")


@router.post(
    "/images/edits",
    response_model=ImagesResponse,
    response_model_exclude_none=True,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "The pictures, or with stream the events."},
        **detached.RESPONSES,
    },
    openapi_extra=picture_page_entry(ImageEditRequest, "image", required=True),
)
async def edit_image(request: Request, context: ContextDep) -> Response:
    """Draw pictures that start from a picture: the less strength, the more of it stays."""
    sent = await read_body(request, files=_FILES)
    if sent.files.get("mask") or sent.fields.get("mask") is not None:
        reason = "there are no masks here; leave it out (strength says how much of the whole picture is drawn anew)"
        raise ApiError(400, f"mask: {reason}", param="mask", code="unsupported_parameter")
    body = sent.checked(ImageEditRequest, extra=context.engine.args.extra_fields)
    context.check_model(body.model)
    _check_edits(context)
    name, source = _source(sent, body)
    body.start_from(
        await picture_of(source, param=name, remote=context.remote, count=bytes_of(request).add), field=name
    )
    return await respond(body, request, context)


def _check_edits(context: Context) -> None:
    if not context.engine.card.edits:
        able = ", ".join(family.name for family in FAMILIES if family.edits)
        reason = f"{context.model_name!r} edits no pictures; models of these families do: {able}"
        raise ApiError(400, f"model: {reason}", param="model", code="unsupported_model")


def _source(sent: Body, body: ImageEditRequest) -> tuple[str, Upload | str]:
    """The one picture to start from, and the field that brought it."""
    given = {name: sent.files.get(name) or getattr(body, name) for name in _PICTURES}
    names = [name for name, pictures in given.items() if pictures]
    if not names:
        raise required("image", "a file of a form (an empty one counts as none), or a data URL")
    name = names[0]
    if len(names) > 1:
        raise wrong_field("images", "it is given beside image; give only one of the two")
    if len(given[name]) > 1:
        raise wrong_field(name, f"{len(given[name])} pictures; allowed: one to start from")
    return name, given[name][0]
