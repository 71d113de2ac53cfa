"""What a request must be before the service looks at it: with the token, from no other site's page, and not too large."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

from featureinterp.errors import InputError

MAX_BODY = 64_000


class Gate:
    """Lets in what carries the token and is not too large; all else is answered here."""

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.lower(): v for k, v in scope["headers"]}
        if self.token is not None and scope["path"] != "/health" and not _carries(headers.get(b"authorization", b""), self.token):
            problem = JSONResponse(
                {"detail": "the token is missing or wrong: send 'Authorization: Bearer TOKEN'"}, 401, {"WWW-Authenticate": "Basic realm=featureinterp"}
            )
            await problem(scope, receive, send)
            return
        if scope["path"] != "/health" and not _is_own(scope["method"], headers, self.token):
            await JSONResponse({"detail": "the request comes from a page of another site"}, 403)(scope, receive, send)
            return
        body = b""
        more = scope["method"] not in ("GET", "HEAD")
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BODY:
                await JSONResponse({"detail": f"the body is larger than {MAX_BODY:,} bytes"}, 413)(scope, receive, send)
                return
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


def _is_own(method: str, headers: dict[bytes, bytes], token: str | None) -> bool:
    """Whether no other site's page in the user's browser sent a request: pages may not change anything here, and without a token they may
    not reach the service under a name of their own either (DNS rebinding)."""
    host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
    if token is None and not _is_local(urlsplit(f"//{host}").hostname or ""):
        return False
    return method in ("GET", "HEAD") or origin is None or urlsplit(origin.decode("latin-1")).netloc == host


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _carries(header: bytes, token: str) -> bool:
    """Whether an Authorization header holds the token: as a bearer token, or as the password that a browser asks for."""
    kind, _, value = header.decode("latin-1").partition(" ")
    if kind.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(value.strip().encode(), token.encode())


def check_binding(host: str, token: str | None) -> None:
    """Raises ``InputError`` when the service would be open to other machines without a token."""
    if not _is_local(host) and not token:
        raise InputError(f"the address {host} can be reached from other machines: give a token with --token-env, or bind to 127.0.0.1")
    if token is not None and len(token) < 16:
        raise InputError("the token is shorter than 16 characters: give a longer one")
