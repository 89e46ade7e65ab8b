"""``ditrelay serve`` with the built-in model, 3 DiT + 1 non-DiT ranks on the CPU, and the playground's address."""

from __future__ import annotations

from ditrelay.__main__ import run

PORT = 30000
FLAGS = (
    "--device=cpu",
    "--enable-disagg",
    "--num-gpus=4",
    "--num-non-dit-ranks=1",
)


def main() -> int:
    from ditrelay.cli import main as ditrelay

    port = free_port()
    print(f"The playground is at http://127.0.0.1:{port}/")
    print("The model takes some seconds to load; the page says when it is ready. Ctrl-C ends the server.", flush=True)
    return ditrelay(["serve", *FLAGS, f"--port={port}"])


def free_port() -> int:
    """The usual one, or another where that is taken."""
    from ditrelay.errors import ConfigError
    from ditrelay.server.sockets import listen

    for port in (PORT, 0):
        try:
            with listen("127.0.0.1", port) as listener:
                found: int = listener.getsockname()[1]
                return found
        except ConfigError:
            continue
    raise SystemExit("no port is free")


if __name__ == "__main__":
    run(main)
