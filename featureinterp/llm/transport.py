"""The HTTP client of an endpoint. What it returns is bounded, holds no secret, and comes from the address
that was given.
"""

from __future__ import annotations

import json
import math
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx2
import openai

from featureinterp.errors import EndpointRefusedError, MalformedReplyError
from featureinterp.llm.secrets import HIDDEN, Secrets

MAX_REPLY_BYTES = 4 * 2**20
"""Of one reply, after decompression. 100,000 tokens are less than 1 MB."""
READ_BYTES_PER_BYTE = 512
"""A prompt that is read comes back with the probabilities of every token: so many bytes more for each byte of
the request.
"""
MAX_READ_BYTES = 64 * 2**20
MAX_ERROR_BYTES = 64 * 2**10
MAX_HEADERS = 100
MAX_HEADER_BYTES = 2048
_DROPPED = {b"content-encoding", b"content-length", b"transfer-encoding", b"set-cookie", b"connection"}


class EndpointClient(openai.DefaultAioHttpClient):
    """Sends requests to ``where`` and nowhere else.

    A reply is read to its end, at most ``most_bytes`` of it, and ``secrets`` are replaced in body and headers
    before anybody sees them. Raises ``MalformedReplyError`` for what is too large or no HTTP, and
    ``EndpointRefusedError`` for a redirect. Keeps no cookies.
    """

    def __init__(self, where: str, secrets: Secrets, **options: Any) -> None:
        self._where, self._secrets = where, secrets
        self._made: list[Any] = []
        super().__init__(**{**options, "follow_redirects": False})

    def _init_transport(self, *args: Any, **options: Any) -> Any:
        self._made.append(made := super()._init_transport(*args, **options))
        return made

    def _init_proxy_transport(self, *args: Any, **options: Any) -> Any:
        self._made.append(made := super()._init_proxy_transport(*args, **options))
        return made

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        options |= {"stream": True, "follow_redirects": False}
        try:
            response = await super().send(request, **options)
            try:
                self._check_redirect(response)
                body = await self._read(response, most_bytes(request))
            finally:
                await response.aclose()
                self._forget_cookies()
        except (httpx2.DecodingError, aiohttp.ClientResponseError) as error:
            raise MalformedReplyError(
                f"the endpoint {self._where} sent what is no HTTP answer, or headers that are too long or "
                "too many "
                f"({type(error).__name__}): check that the address is that of an OpenAI-compatible endpoint"
            ) from None
        body = self._secrets.clean_body(body if response.is_success else bounded_error(body))
        return httpx2.Response(
            response.status_code, headers=self._kept_headers(response), content=body, request=request
        )

    async def _read(self, response: httpx2.Response, most: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in response.aiter_bytes():
            size += len(part)
            if size > most:
                raise MalformedReplyError(
                    f"the endpoint {self._where} sent a reply of more than {most / 2**20:.0f} MB, which is "
                    "no answer to what it was "
                    "asked: check that it is an OpenAI-compatible endpoint"
                )
            parts.append(part)
        return b"".join(parts)

    def _kept_headers(self, response: httpx2.Response) -> list[tuple[bytes, bytes]]:
        """The reply's headers but those of its transfer and cookies."""
        kept = [
            (k, v)
            for k, v in response.headers.raw
            if k.lower() not in _DROPPED and len(k) + len(v) <= MAX_HEADER_BYTES
        ]
        cleaned = (
            (k, self._secrets.clean(v.decode("latin-1")).encode("latin-1", "replace"))
            for k, v in kept[:MAX_HEADERS]
        )
        return [(k, v) for k, v in cleaned if not self._secrets.found_in(k)]

    def _check_redirect(self, response: httpx2.Response) -> None:
        if not 300 <= response.status_code < 400:
            return
        target = shown_address(self._secrets.clean(response.headers.get("location", "")))
        raise EndpointRefusedError(
            f"the endpoint {self._where} redirects to {target or 'nowhere'} (HTTP {response.status_code}), "
            "which is not followed, so "
            "that prompts and keys go nowhere else: if that address is the right one, give it with --base-url"
        )

    def _forget_cookies(self) -> None:
        self.cookies.clear()
        for transport in self._made:
            if isinstance(session := getattr(transport, "client", None), aiohttp.ClientSession):
                session.cookie_jar.clear()


def most_bytes(request: httpx2.Request) -> int:
    """How large the reply to a request may be."""
    if "/chat/" in request.url.path:
        return MAX_REPLY_BYTES
    return min(MAX_READ_BYTES, MAX_REPLY_BYTES + READ_BYTES_PER_BYTE * len(request.content))


def shown_address(address: str) -> str:
    """An address from elsewhere for a message: without query, user name and marks that a terminal would act
    on.
    """
    try:
        parts = urlsplit(address)
    except ValueError:
        return HIDDEN
    host = parts.netloc.rsplit("@", 1)[-1]
    whole = f"{parts.scheme}://{host}{parts.path}" if host else parts.path
    return "".join(c for c in whole if c.isprintable() and c.isascii())[:160]


def read_json(body: bytes, where: str) -> Any:
    """The JSON of a reply; NaN, which no field of a reply can be, becomes None. Halves of characters stay:
    the pieces of a stream may be cut between them.

    Raises ``MalformedReplyError`` for one that is nested too deep, and ``ValueError`` for what is no JSON.
    """
    try:
        return json.loads(body, parse_constant={"Infinity": math.inf, "-Infinity": -math.inf}.get)
    except RecursionError:
        raise MalformedReplyError(
            f"the endpoint {where} sent an answer that is nested too deep to be read: check that it is an "
            "OpenAI-compatible endpoint"
        ) from None


def bounded_error(body: bytes) -> bytes:
    """The body of an error, so that who reads it as JSON is not led too deep."""
    if len(body) > MAX_ERROR_BYTES:
        return body[:MAX_ERROR_BYTES].decode("utf-8", "ignore").encode()
    try:
        json.loads(body)
    except ValueError:
        pass
    except RecursionError:
        return b"an error that is nested too deep to be read"
    return body
