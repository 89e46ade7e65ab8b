"""Routes that can be read by GET and by HEAD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


class Router(APIRouter):
    """Answers HEAD as GET at every address (RFC 9110): download tools and load balancers ask by it.

    The HTTP server leaves the body out. On the OpenAPI page there is GET only.
    """

    def get(self, path: str, **how: Any) -> Callable[[Endpoint], Endpoint]:
        """As FastAPI's."""
        by_get, by_head = super().get(path, **how), super().head(path, **how | {"include_in_schema": False})

        def add(endpoint: Endpoint) -> Endpoint:
            return by_head(by_get(endpoint))

        return add
