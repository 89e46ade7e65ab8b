"""``python -m ditrelay`` = ``ditrelay``."""

from __future__ import annotations

import os
import signal
import sys

# What is imported before ``run`` has taken over Ctrl-C is as little as can be.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

EXIT_INTERRUPTED = 130


def run(program: Callable[[], int] | None = None) -> NoReturn:
    """The program. Ctrl-C ends it at once, with a line that says so, also while it imports and while workers start.

    Args:
        program: what to run, the command line where not given. Its value is the exit code.
    """
    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
            signal.signal(signal.SIGINT, _interrupt)
        if program is not None:
            code = program()
        else:
            from ditrelay.cli import main

            code = main()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    leave(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C: say at once that it was noticed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.write(2, b"interrupted\n")
    raise KeyboardInterrupt


def leave(code: int) -> NoReturn:
    """End the process, without waiting for a start of the engine that was given up.

    Its thread may be importing torch for seconds more, and the interpreter's orderly end would pull that from under it.
    """
    import threading

    from ditrelay.errors import START_THREAD

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is under way
    if any(thread.name.startswith(START_THREAD) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
