"""One process that decodes, as the head sees it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path

from ditrelay.runtime.pictures.child import WALL_FACTOR
from ditrelay.runtime.pictures.orders import Answer, Order, receive_answer, send_order

_ROOT = str(Path(__file__).parents[3])
_CHILD = f"import sys; sys.path.insert(0, {_ROOT!r}); from ditrelay.runtime.pictures.child import main; main()"
_END_SECONDS = 5.0
_TEXT = 4096


class Died(Exception):
    """The process has ended without an answer.

    Attributes:
        is_late: it had used up its time.
        how: for messages.
    """

    def __init__(self, how: str, *, is_late: bool) -> None:
        super().__init__(how)
        self.how = how
        self.is_late = is_late


class DecodingProcess:
    """Starts with the constructor. Used by one thread at a time, but for ``kill``.

    Raises:
        OSError: it can't be started.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _CHILD],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's signals are the head's business
                )
            except OSError:
                ours.close()
                raise
        self._connection = ours
        self.end = weakref.finalize(self, _end, self._process, ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    def decode(self, order: Order) -> Answer:
        """Raises ``Died``; then the process is of no use any more."""
        seconds = order.cpu_seconds * WALL_FACTOR
        self._connection.settimeout(seconds)
        most = max(3 * (order.width * order.height or min(order.most, order.claimed)), _TEXT)
        answer, is_late = None, False
        try:
            send_order(self._connection, order)
            answer = receive_answer(self._connection, most)
        except TimeoutError:
            is_late = True
        except OSError:  # the connection broke
            pass
        if answer is not None:
            return answer
        self.end()
        code = self._process.returncode
        is_late = is_late or code in (-signal.SIGPROF, -signal.SIGALRM)
        raise Died(f"signal {-code}" if code < 0 else f"exit code {code}", is_late=is_late)

    def kill(self) -> None:
        """From any thread: whoever waits for its answer is told that it died."""
        self._process.kill()


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.poll() is None:
            process.wait(0.05)  # one that is about to end by a signal of its own says so
    process.kill()
    connection.close()
    process.wait(_END_SECONDS)
