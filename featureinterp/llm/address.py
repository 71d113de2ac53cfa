"""Where an endpoint is, read from whatever form of its address a user has at hand, and the key that opens
it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from featureinterp.errors import InputError
from featureinterp.llm.secrets import check_address, check_variable, looks_like_key

_CALLS = re.compile(r"/(chat/completions|completions|responses|embeddings|models|messages)/*\Z")
PATHS = ("/v1", "")
"""What may stand between an address and a call."""
_AZURE = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")
_OWN_HEADERS = {"host", "content-length", "content-type", "transfer-encoding", "connection"}
_SECRET_HEADER = re.compile(r"authori[sz]ation|key|token|secret|cookie|password", re.IGNORECASE)
_QUOTES = "\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb"


@dataclass(frozen=True, slots=True)
class Address:
    """``base``: without the call and without a slash at its end. ``query``: what is sent with every call,
    with its ``?``. ``paths``: what may stand between the base and the call, the likeliest first.
    ``key_header``: the header that carries the key."""

    base: str
    query: str = ""
    paths: tuple[str, ...] = ("",)
    key_header: str = "authorization"

    @property
    def host(self) -> str:
        """The host's name, without its port."""
        return urlsplit(self.base).hostname or ""

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.base.startswith("https:")

    @property
    def loopback(self) -> bool:
        """Whether it is this machine."""
        return is_loopback(self.host)

    def call(self, name: str, path: str = "") -> str:
        """The whole address of a call."""
        return f"{self.base}{path}/{name}{self.query}"

    def headers(self, key: str | None) -> dict[str, str]:
        """The header with the key; none without a key."""
        if key is None:
            return {}
        return {self.key_header: f"Bearer {key}" if self.key_header == "authorization" else key}


def read_address(text: str) -> Address:
    """The address of an endpoint, as a base URL with or without ``/v1``, or as that of a whole call. Azure's
    (by its host, or by ``api-version`` in the query) take the key in the header ``api-key``. Raises
    ``InputError`` for what is no address, or holds a key."""
    base = text.strip().rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise InputError(f"{text!r} is not the address of an endpoint: give one like https://host/v1")
    check_address(base)
    try:
        parts = urlsplit(base)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise InputError(
            f"{text!r} is not the address of an endpoint ({error}): give one like https://host/v1"
        ) from None
    if not host or port == 0 or any(c.isspace() for c in base):
        raise InputError(f"{text!r} is not the address of an endpoint: give one like https://host/v1")
    path, query = parts.path.rstrip("/"), f"?{parts.query}" if parts.query else ""
    path = _CALLS.sub("", path).rstrip("/")
    azure = host.endswith(_AZURE) or "api-version=" in query
    root = f"{parts.scheme}://{parts.netloc}"
    if azure and not path:
        path = "/openai/v1"
    if not path:
        paths: tuple[str, ...] = PATHS
    elif azure or re.search(r"/v\d\w*(/openai)?\Z", path):
        paths = ("",)
    else:
        paths = PATHS[::-1]
    return Address(root + path, query, paths, "api-key" if azure else "authorization")


def is_loopback(host: str) -> bool:
    """Whether a host's name stands for this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(variable: str | None, host: str) -> tuple[str | None, str | None]:
    """The key and the name of its variable. None: no key, but to OpenAI itself that of ``OPENAI_API_KEY``;
    empty: no key. Raises ``InputError``, which never shows the key, when the variable is not set or what it
    holds cannot be a key."""
    if variable is None and host == "api.openai.com":
        variable = "OPENAI_API_KEY"
    if not variable:
        return None, None
    check_variable(variable)
    key = os.environ.get(variable, "")
    if not key:
        raise InputError(
            f"the environment variable {variable} with the endpoint's key is not set: set it, or name "
            "another with --api-key-env"
        )
    check_key(key, f"the environment variable {variable}")
    return key, variable


def check_headers(headers: Mapping[str, str]) -> None:
    """Raises ``InputError`` for a header that cannot be sent, and for a key that is written out, which would
    be kept in the job's folder.
    """
    for name, value in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or name.lower() in _OWN_HEADERS:
            raise InputError(
                f"{name[:40]!r} cannot be an extra header: give the name of one that is not part of every "
                "request"
            )
        if not value.startswith("env:") and (_SECRET_HEADER.search(name) or looks_like_key(value)):
            raise InputError(
                f"the header {name} is a key, which would be kept in the job's folder: put it into a "
                "variable and give env:VARIABLE"
            )
        if not value.isprintable() or not value.isascii():
            raise InputError(
                f"the header {name} holds a line break or a character that no header has: correct it"
            )


def read_headers(headers: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Headers with the values of the variables that ``env:NAME`` names, and those values. Raises
    ``InputError`` for what :func:`check_headers` refuses and for a variable that is not set."""
    check_headers(headers)
    found: dict[str, str] = {}
    hidden: list[str] = []
    for name, value in headers.items():
        if value.startswith("env:"):
            value = os.environ.get(variable := value[4:], "")
            if not value:
                raise InputError(
                    f"the environment variable {variable} for the header {name} is not set: set it, or "
                    "leave the header out"
                )
            if not value.isprintable() or not value.isascii():
                raise InputError(
                    f"the environment variable {variable} for the header {name} holds a line break or a "
                    "character that no header has: correct it"
                )
            hidden.append(value)
        found[name] = value
    return found, hidden


def check_key(key: str, where: str) -> None:
    """Raises ``InputError`` when a key holds what no key holds; it would be refused, or break the request
    apart.
    """
    problem = None
    if "\n" in key or "\r" in key:
        problem = "a line break, perhaps from a file"
    elif any(c.isspace() for c in key):
        problem = (
            "the word Bearer, which is added by itself" if key.lower().startswith("bearer ") else "a space"
        )
    elif key[0] in _QUOTES or key[-1] in _QUOTES:
        problem = "quotes around the key"
    elif not key.isascii() or not key.isprintable():
        problem = "a character that no key has"
    if problem:
        raise InputError(f"{where} holds {problem}: set it to the key alone")
