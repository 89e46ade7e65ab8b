"""``ditrelay restart``: asks a running server for a new process of one rank."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from ditrelay.errors import ConfigError, DitrelayError

SECONDS = 30.0


def restart_rank(rank: int, url: str, api_key: str) -> str:
    """What became of it, in one line.

    Raises:
        ConfigError: ``url`` is no address, or no server answers there.
        DitrelayError: the server refuses; says why.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    if not url.startswith(("http://", "https://")):
        raise ConfigError("--url", f"{url!r} is no address; allowed: http://HOST:PORT or https://...")
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/ranks/{rank}/restart", b"", headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            state = json.load(answer)
    except urllib.error.HTTPError as error:
        raise DitrelayError(_refusal(error)) from error
    except (OSError, ValueError) as error:
        raise ConfigError("--url", f"no server answers at {url} ({error})") from error
    return f"rank {state['rank']} ({state['role']}) was {state['state']}; it is started anew"


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answers {error.code} {error.reason}"
