"""``POST /v1/images/edits``: pictures that start from a picture."""

from __future__ import annotations

from fastapi import Request, Response

from ditrelay.models.quirks import FAMILIES
from ditrelay.server import detached
from ditrelay.server.bodies import Body, picture_page_entry, read_body
from ditrelay.server.context import Context, ContextDep
from ditrelay.server.edit_schemas import ImageEditRequest
from ditrelay.server.held_bytes import bytes_of
from ditrelay.server.images import respond
from ditrelay.server.problem import RESPONSES, ApiError, required
from ditrelay.server.router import Router
from ditrelay.server.schemas import ImagesResponse
from ditrelay.server.uploads import PictureReference, Upload, picture_of

router = Router(prefix="/v1", tags=["images"], responses=RESPONSES)

_FILES = ("image", "mask")


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
    body = sent.checked(ImageEditRequest)
    context.check_model(body.model)
    _check_edits(context)
    source, count = _source(sent, body), bytes_of(request).add
    body.start_from(await picture_of(source, param="image", remote=context.remote, count=count))
    return await respond(body, request, context)


def _check_edits(context: Context) -> None:
    if not context.engine.card.edits:
        able = ", ".join(family.name for family in FAMILIES if family.edits)
        reason = f"{context.model_name!r} edits no pictures; models of these families do: {able}"
        raise ApiError(400, f"model: {reason}", param="model", code="unsupported_model")


def _source(sent: Body, body: ImageEditRequest) -> Upload | PictureReference | str:
    files = sent.files.get("image", [])
    if len(files) > 1:
        raise ApiError(
            400, f"image: {len(files)} pictures; allowed: one to start from", param="image", code="invalid_value"
        )
    if files:
        return files[0]
    if body.image is None:
        raise required("image", "a file of a form (an empty one counts as none), or a data URL")
    return body.image
