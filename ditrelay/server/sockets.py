"""What the server listens on: TCP addresses, or a Unix socket."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING

from ditrelay.errors import ConfigError
from ditrelay.server.addresses import address_of

if TYPE_CHECKING:
    from ditrelay.runtime.server_args import ServerArgs

_FREE_PORT_TRIES = 20
_PROBE_SECONDS = 1.0

# As a loopback port: who may reach the socket is said by the folder that it lies in.
_UNIX_MODE = 0o666


@contextmanager
def listening(args: ServerArgs) -> Iterator[list[socket.socket]]:
    """The sockets that ``args`` ask for; closed at the end, and the file of a Unix socket removed.

    Raises:
        ConfigError: an address or the port cannot be had.
    """
    with ExitStack() as stack:
        if args.uds is not None:
            found = [stack.enter_context(_unix_socket(args.uds))]
        else:
            found = [stack.enter_context(closing(each)) for each in listen_on(args.hosts, args.port)]
        yield found


def listen_on(hosts: tuple[str, ...], port: int) -> list[socket.socket]:
    """A listening socket for each host, all with the same port; ``port`` 0 takes a free one.

    Raises:
        ConfigError: an address or the port cannot be had.
    """
    tries = _FREE_PORT_TRIES if port == 0 and len(hosts) > 1 else 1
    for left in reversed(range(tries)):
        sockets: list[socket.socket] = []
        try:
            for host in hosts:
                taken = sockets[0].getsockname()[1] if sockets else port
                sockets.append(listen(host, taken, alone=len(hosts) == 1))
            return sockets
        except ConfigError as error:
            for each in sockets:
                each.close()
            if not left or not sockets or error.flag != "--port":
                raise
    raise AssertionError("the last try returns or raises")


def listen(host: str, port: int, *, alone: bool = True) -> socket.socket:
    """A listening TCP socket; ``port`` 0 takes a free one. ``::`` is IPv4, too, where it is ``alone``.

    Raises:
        ConfigError: the address or the port cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        both = alone and address[0] == "::" and socket.has_dualstack_ipv6()
        listener = socket.create_server(address, family=family, dualstack_ipv6=both)
    except UnicodeError as error:
        raise ConfigError("--host", f"{host!r} is not an address or a host name") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError("--port", f"{port} is taken on {host}; choose another, or 0 for a free one") from error
        flag = "--port" if error.errno == errno.EACCES else "--host"
        raise ConfigError(flag, f"cannot listen on {host}:{port}: {error.strerror}") from error
    # Its connections inherit this, and asyncio sets it only on those of sockets that it made. Without it the body of an
    # answer may wait 40 ms for the client to acknowledge the headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


@contextmanager
def _unix_socket(path: str) -> Iterator[socket.socket]:
    _remove_left_behind(path)
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        try:
            listener.bind(path)
            os.chmod(path, _UNIX_MODE)
            listener.listen()
        except OSError as error:
            raise ConfigError("--uds", f"cannot listen on {path}: {error.strerror or error}") from error
        made = os.stat(path)
        try:
            yield listener
        finally:
            with suppress(OSError):
                if os.path.samestat(made, os.stat(path)):  # else it is the next server's
                    os.unlink(path)


def _remove_left_behind(path: str) -> None:
    """Remove the file of a server that was killed.

    Raises:
        ConfigError: it is another's: of a server that lives, or no socket.
    """
    try:
        kind = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(kind):
        raise ConfigError("--uds", f"{path} is there and no socket; choose another path")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(path)
        except ConnectionRefusedError:  # nobody listens
            with suppress(OSError):
                os.unlink(path)
            return
        except OSError:
            pass
    raise ConfigError("--uds", f"another server listens on {path}; choose another path")


def name_of(listener: socket.socket) -> str:
    """Where it listens, as an address for clients."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    host, port = name[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_open_to_others(listener: socket.socket) -> bool:
    """Whether other machines may reach it."""
    if listener.family == socket.AF_UNIX:
        return False
    address = address_of(listener.getsockname()[0])
    return address is None or not address.is_loopback
