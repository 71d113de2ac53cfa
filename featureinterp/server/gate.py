"""What a request must be before the service looks at it: with the token, from no other site's page, and not
too large.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

from featureinterp.errors import InputError

MAX_BODY = 64_000
_HOST = re.compile(r"(\[(?P<six>[0-9A-Fa-f:.]+)\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(:(?P<port>[0-9]{0,5}))?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")


class Gate:
    """Lets in what carries the token and is not too large; all else is answered here."""

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self.token = app, token

    def _refusal(self, scope: dict[str, Any], headers: dict[bytes, bytes]) -> JSONResponse | None:
        """The answer to a request that is not let in, its body unread."""
        if (mistake := _mistake(scope["headers"])) is not None:
            return JSONResponse({"detail": mistake}, 400)
        if scope["path"] == "/health":
            return None
        if self.token is not None and not _carries(headers.get(b"authorization", b""), self.token):
            ask = {"WWW-Authenticate": "Basic realm=featureinterp"}
            detail = "the token is missing or wrong: send 'Authorization: Bearer TOKEN'"
            return JSONResponse({"detail": detail}, 401, ask)
        if not _is_own(scope["method"], headers, self.token):
            return JSONResponse({"detail": "the request comes from a page of another site"}, 403)
        return None

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.lower(): v for k, v in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
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
                await JSONResponse({"detail": f"the body is larger than {MAX_BODY:,} bytes"}, 413)(
                    scope, receive, send
                )
                return
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


def _mistake(headers: list[tuple[bytes, bytes]]) -> str | None:
    """What is wrong with the headers that say where a request comes from and where it goes, if anything."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if (name := name.lower()) in (b"host", b"origin", b"authorization"):
            if name in found:
                return f"there are several headers {name.decode().title()}"
            found[name] = value
    if not _is_host(found.get(b"host", b"").decode("latin-1")):
        return "the header Host names no host"
    origin = found.get(b"origin", b"null").decode("latin-1")
    scheme, _, host = origin.partition("://")
    if origin != "null" and not (_SCHEME.fullmatch(scheme) and host and _is_host(host)):
        return "the header Origin is no origin"
    return None


def _is_host(text: str) -> bool:
    """Whether a text is a host with or without a port, as RFC 9110 has it, or empty."""
    found = _HOST.fullmatch(text)
    if found is None or int(found["port"] or 0) > 65535:
        return False
    try:
        return found["six"] is None or ipaddress.IPv6Address(found["six"]) is not None
    except ValueError:
        return False


def _is_own(method: str, headers: dict[bytes, bytes], token: str | None) -> bool:
    """Whether no other site's page in the user's browser sent a request: pages may not change anything here,
    and without a token they may not reach the service under a name of their own either (DNS rebinding)."""
    host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
    if token is None and not _is_local(urlsplit(f"//{host}").hostname or ""):
        return False
    same = origin is None or origin.decode("latin-1").partition("://")[2].lower() == host.lower()
    return method in ("GET", "HEAD") or same


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _carries(header: bytes, token: str) -> bool:
    """Whether an Authorization header holds the token: as a bearer token, or as the password that a browser
    asks for.
    """
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
        raise InputError(
            f"the address {host} can be reached from other machines: give a token with --token-env, or "
            "bind to 127.0.0.1"
        )
    if token is not None and len(token) < 16:
        raise InputError("the token is shorter than 16 characters: give a longer one")
