"""One short request per unit, so that every rank has computed before the first client."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image

from ditrelay.errors import RequestFailed, StartupError
from ditrelay.models.card import ModelCard
from ditrelay.runtime.request import SamplingParams
from ditrelay.runtime.server_args import ServerArgs
from ditrelay.runtime.tickets import Ticket
from ditrelay.runtime.topology import Topology


def warm_up(submit: Callable[[SamplingParams], Ticket], card: ModelCard, topology: Topology, args: ServerArgs) -> None:
    """Draw as many pictures at once as there are units of one kind, and wait for them.

    Raises:
        StartupError: they failed, or were not done within ``--startup-timeout``.
    """
    count = max(len(topology.encoders), len(topology.replicas), len(topology.decoders))
    image = _grey_picture(card) if card.needs_image else None
    params = SamplingParams(prompt="warm-up", num_inference_steps=2, seed=0, image=image)
    tickets = [submit(params) for _ in range(min(count, args.max_queue))]
    limit = args.startup_timeout
    try:
        for ticket in tickets:
            ticket.result(limit)
    except TimeoutError:
        reason = f"the warm-up was not done within --startup-timeout {limit:g} s; raise it, or set --no-warmup"
        raise StartupError(reason) from None
    except RequestFailed as error:
        raise StartupError(f"the warm-up failed: {error.reason}") from error


def _grey_picture(card: ModelCard) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (card.default_width, card.default_height), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()
