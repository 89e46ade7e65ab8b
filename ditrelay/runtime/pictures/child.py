"""The process that decodes: one picture after the other, each within its time and its memory, until the head ends.

It imports Pillow and nothing heavy, so that a new one is there at once.
"""

from __future__ import annotations

import resource
import signal
import socket
from pathlib import Path

from PIL import AvifImagePlugin

from ditrelay.models.picture_decoding import ERRORS, decode, fitted
from ditrelay.runtime.pictures.orders import Answer, Heading, receive_order, send_answer

WALL_FACTOR = 10.0
"""How much longer than its computing time a picture may take on a machine that is busy with other things."""


def main(descriptor: int = 0) -> None:
    """Answer what comes over the socket ``descriptor``."""
    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal or a service manager sends to all: the head
        signal.signal(number, signal.SIG_IGN)  # drains, and its end is ours
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # else one for each core, and memory for it
    connection = socket.socket(fileno=descriptor)
    while (order := receive_order(connection)) is not None:
        send_answer(connection, _answered(*order))
        del order  # its memory is the next one's


def _answered(heading: Heading, content: bytes) -> Answer:
    _limit_memory(_in_use() + heading.memory)
    signal.setitimer(signal.ITIMER_PROF, heading.cpu_seconds)  # whose signal ends the process, wherever it is
    signal.setitimer(signal.ITIMER_REAL, heading.cpu_seconds * WALL_FACTOR + 1.0)
    try:
        image = fitted(decode(content, most=heading.claimed), heading.width, heading.height, heading.most)
        return Answer(False, image.width, image.height, image.tobytes())
    except MemoryError:
        return _refused("it needs more memory than a picture of its size has to")
    except ERRORS as error:
        return _refused(str(error)[:200])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _limit_memory(resource.RLIM_INFINITY)


def _refused(reason: str) -> Answer:
    return Answer(True, 0, 0, reason.encode("utf-8", "replace"))


def _limit_memory(nbytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    soft = nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (hard if nbytes == resource.RLIM_INFINITY else soft, hard))


def _in_use() -> int:
    """Bytes of addresses that the process has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
