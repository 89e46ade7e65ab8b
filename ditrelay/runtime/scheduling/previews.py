"""Previews of pictures that are being denoised: made by decoders that have nothing else to do, else not at all.

Nothing waits for one. A preview holds no credit and no buffer, and a request may end while one of it is made. The
newest of a request is the one that counts, and one of it is made at a time, so they come in order.
"""

from __future__ import annotations

import logging
import math
from itertools import islice

from msgspec import structs

from ditrelay.runtime.preview_messages import Preview, Previewed, PreviewTaken
from ditrelay.runtime.request import Request, RequestState
from ditrelay.runtime.scheduling.ledger import Ledger, at_worker
from ditrelay.runtime.scheduling.state import Record, UnitState
from ditrelay.runtime.scheduling.watches import Watch

logger = logging.getLogger(__name__)

# Of the decoders with the least to do, those that are looked at for one with nothing.
LOOKED_AT = 8

# With more requests than that there is always something to do soon.
MANY_REQUESTS = 32

# Seconds that a decoder has for its answer while it has no other work. One takes milliseconds, beside a busy machine or
# behind what the decoder learns from its last clip a few seconds; what takes longer is hardly worth seeing any more.
ANSWER_SECONDS = 30.0


class Previews:
    """Owns which previews wait for a decoder, and ``UnitState.preview``."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: dict[Record, None] = {}  # the one that waits for the longest time first
        self._made: set[Record] = set()  # at some unit, just now
        self._owed: Watch[UnitState] = Watch(ANSWER_SECONDS)

    def taken(self, event: PreviewTaken) -> None:
        found = at_worker(self._ledger, event.rank, event.request_id, "denoise")
        if found is not None and _is_wanted(found[0]):
            self._waiting.setdefault(found[0])

    def made(self, event: Previewed) -> None:
        """A preview is made, or came to nothing. A rank that denoises and decodes makes its own unasked."""
        unit = self._ledger.units[event.rank]
        if unit.preview is not None and unit.preview.id == event.request_id:
            self._end(unit, unit.preview)

    def unit_lost(self, unit: UnitState) -> None:
        """A preview may be what ended it: of that request there are no more."""
        if unit.preview is not None:
            unit.preview.previews = False
            self._end(unit, unit.preview)

    def tick(self) -> None:
        """Gives up answers that do not come. Of that request no more are made, so one that is only late is in order."""
        while (unit := self._owed.due(self._ledger.now)) is not None:
            record = unit.preview
            assert record is not None, f"unit {unit.leader} owes no preview"
            if unit.load:  # which goes first there, so its time is not the preview's
                self._owed.start(unit, self._ledger.now)
                continue
            record.previews = False
            waited = f"did not answer for a preview of request {record.id} within {ANSWER_SECONDS:g} s"
            logger.warning("%s %s; it is asked for those of other requests", unit.unit, waited)

    def pump(self) -> None:
        """Gives previews that wait to decoders that idle."""
        while self._waiting and not _is_wanted(oldest := next(iter(self._waiting))):
            del self._waiting[oldest]
        if not self._waiting:
            return
        for unit in self._idle_decoders():
            ready = (record for record in self._waiting if _is_wanted(record) and record not in self._made)
            record = next(ready, None)
            if record is None:
                return
            del self._waiting[record]
            self._begin(unit, record)

    def _idle_decoders(self) -> list[UnitState]:
        units = (self._ledger.units[leader] for _, leader in islice(self._ledger.boards["decode"].order, LOOKED_AT))
        return [unit for unit in units if unit.idles]

    def _begin(self, unit: UnitState, record: Record) -> None:
        if unit.preview is not None:  # which was given up
            self._end(unit, unit.preview)
        unit.preview = record
        self._made.add(record)
        self._owed.start(unit, self._ledger.now)
        self._ledger.out.append(Preview(unit.leader, _without_picture(record.request), self._spare()))

    def _end(self, unit: UnitState, record: Record) -> None:
        unit.preview = None
        self._made.discard(record)
        self._owed.stop(unit)

    def _spare(self) -> float:
        """Seconds until a decoder gets work, as far as can be told: what is next are the decodes of what denoises."""
        live = [record for record in self._ledger.records.values() if not record.state.ended]
        return 0.0 if len(live) > MANY_REQUESTS else min(map(self._until_decode, live), default=0.0)

    def _until_decode(self, record: Record) -> float:
        """0 where it is not known, or something else comes first: its encode, or that of the next request."""
        if record.state not in (RequestState.AT_DIT, RequestState.DENOISING) or record.at is None:
            return 0.0
        params = record.request.params
        steps = math.ceil((params.num_inference_steps or 0) * (params.strength or 1.0)) - record.step
        return max(0, steps) * (self._ledger.stages.usual(record, record.at) or 0.0)


def _without_picture(request: Request) -> Request:
    """Decode has no use for what an edit started from, which may have megabytes."""
    return structs.replace(request, params=structs.replace(request.params, image=None))


def _is_wanted(record: Record) -> bool:
    return record.previews and record.state is RequestState.DENOISING
