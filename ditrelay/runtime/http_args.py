"""The settings of where the server listens, by which names it is called, and which proxies and web sites it trusts."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from ditrelay.errors import ConfigError
from ditrelay.runtime.flags import flag

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_NAME = re.compile(r"\*|(\*?\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?")
_PORTS = {"http": ":80", "https": ":443"}
_NOBODY = "none"


@dataclass(frozen=True, kw_only=True)
class HttpArgs:
    """That part of ``ServerArgs``."""

    host: str = flag(
        "127.0.0.1",
        "Server",
        "Address to listen on, or several with commas; :: alone is IPv6 and IPv4.",
        metavar="ADDRESS",
        is_list=True,
    )
    port: int = flag(30000, "Server", "Port to listen on; 0: a free one.", minimum=0, maximum=65535)
    uds: str | None = flag(None, "Server", "Unix socket to listen on, in place of --host and --port.", metavar="PATH")
    root_path: str | None = flag(
        None,
        "Server",
        "Path under which a reverse proxy shows the server (/draw), whether the proxy cuts it off or not.",
        metavar="PATH",
    )
    public_url: str | None = flag(
        None,
        "Server",
        "Address by which clients reach the server (https://a.example/draw); addresses in answers begin with it.",
        metavar="URL",
    )
    forwarded_allow_ips: str = flag(
        "127.0.0.1,::1",
        "Server",
        "Addresses or networks of proxies whose X-Forwarded- headers count, with commas; * is all, none nobody. "
        "Over --uds everybody's count.",
        metavar="ADDRESSES",
        is_list=True,
    )
    allowed_hosts: str | None = flag(
        None,
        "Server",
        "Further names by which clients may call the server, with commas (a.example, *.b.example; * is any). "
        "Without a key only names of this machine and addresses are allowed.",
        metavar="NAMES",
        is_list=True,
    )
    cors_origin: str | None = flag(
        None,
        "Server",
        "Web sites whose pages may use the server, with commas (https://a.example, http://localhost:3000; * is all).",
        metavar="ORIGINS",
        is_list=True,
    )

    def check_http(self) -> None:
        """Raises ``ConfigError`` where one of these settings cannot be read."""
        if not self.hosts:
            raise ConfigError("--host", f"{self.host!r} names no address")
        _read_url(self.public_url)
        given = (self.root_path or "").rstrip("/")
        if given and not is_prefix(given):
            raise ConfigError("--root-path", f"{self.root_path!r} is no path; allowed: /draw, /pictures/draw")
        path = _read_url(self.public_url)[2]
        if given and path and path != given:
            reason = f"{self.root_path!r} is not the path of --public-url; allowed: {path}, or only one of the two"
            raise ConfigError("--root-path", reason)
        for name in self.allowed_names:
            if not _NAME.fullmatch(name):
                raise ConfigError("--allowed-hosts", f"{name!r} is no name; allowed: a.example, *.b.example, *")
        for origin in self.cors_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                reason = f"{origin!r} is no origin; allowed: https://a.example, http://localhost:3000, *"
                raise ConfigError("--cors-origin", reason)
        self.proxy_networks  # noqa: B018 - reads the setting

    @property
    def hosts(self) -> tuple[str, ...]:
        """``host``, one by one; an IPv6 address may be in brackets."""
        return tuple(dict.fromkeys(each.strip("[]") for each in _split(self.host)))

    @property
    def prefix(self) -> str:
        """The path that is before every address of the server; empty where there is none."""
        return (self.root_path or "").rstrip("/") or _read_url(self.public_url)[2]

    @property
    def public_origin(self) -> tuple[str, str] | None:
        """(scheme, host and port) of ``public_url``."""
        scheme, place, _ = _read_url(self.public_url)
        return (scheme, place) if scheme else None

    @property
    def allowed_names(self) -> tuple[str, ...]:
        """``allowed_hosts``, one by one, in lower case."""
        return tuple(each.lower() for each in _split(self.allowed_hosts))

    @property
    def cors_origins(self) -> tuple[str, ...]:
        """``cors_origin``, one by one, as browsers write them."""
        return tuple(_as_browsers_do(each) for each in _split(self.cors_origin))

    @property
    def proxy_networks(self) -> tuple[Network, ...] | None:
        """Where proxies are whose headers count; ``None``: everywhere.

        Raises:
            ConfigError: one is no address and no network.
        """
        given = _split(self.forwarded_allow_ips)
        if "*" in given:
            return None
        try:
            return tuple(ipaddress.ip_network(each, strict=False) for each in given if each != _NOBODY)
        except ValueError as error:
            reason = f"{error}; allowed: 10.0.0.7, 10.0.0.0/8, several with commas, *, {_NOBODY}"
            raise ConfigError("--forwarded-allow-ips", reason) from error

    @property
    def trusts_sockets(self) -> bool:
        """Whether the headers of whoever comes over the Unix socket count."""
        return _split(self.forwarded_allow_ips) != (_NOBODY,)


def is_prefix(path: str) -> bool:
    """Whether ``path`` may stand before every address of a server (``/draw``)."""
    return _PREFIX.fullmatch(path) is not None


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(each.strip() for each in (text or "").split(",") if each.strip())


def _as_browsers_do(origin: str) -> str:
    origin = origin.lower().rstrip("/")
    return origin.removesuffix(_PORTS.get(origin.partition("://")[0], "/"))


def _read_url(text: str | None) -> tuple[str, str, str]:
    """Scheme, host with port, and path; all empty where there is no address."""
    if text is None:
        return "", "", ""
    try:
        url = urlsplit(text.strip())
        is_whole = bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        raise _no_url(text) from None
    path = url.path.rstrip("/")
    if not is_whole or url.scheme not in _PORTS or url.query or url.fragment or url.username is not None:
        raise _no_url(text)
    if path and not is_prefix(path):
        raise _no_url(text)
    return url.scheme, url.netloc.lower(), path


def _no_url(text: str) -> ConfigError:
    return ConfigError("--public-url", f"{text!r} is no address; allowed: https://a.example, https://a.example/draw")
