"""Keys that must not land anywhere: finding them in what an endpoint sends, and in what a user configures."""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from featureinterp.errors import InputError, MalformedReplyError

HIDDEN = "***"
SHORTEST = 8
"""Shorter values ("none", "EMPTY", "ollama") are placeholders and words of ordinary texts."""
_LONG = 16
_KEPT = b"abcdefghijklmnopqrstuvwxyz0123456789"
_DROPPED = bytes(sorted(set(range(256)) - set(_KEPT)))
_ESCAPE = re.compile(rb"\\+u00([0-9a-fA-F]{2})|\\+x([0-9a-fA-F]{2})")


class Secrets:
    """Texts that are replaced wherever an endpoint repeats them: as they are, in other case, spelled with
    marks between their letters, backwards, and in the encodings that cost little to look for (JSON's and
    Python's escapes, HTML's, those of an address, hexadecimal, base64 and lists of character codes). Who
    knows the key can always hide it in a form that nobody looks for.
    """

    def __init__(self, *values: str | None) -> None:
        self._values = sorted({v for v in values if v and len(v) >= SHORTEST}, key=len, reverse=True)
        self._exact = tuple(v.encode() for v in self._values)
        self._any_case = tuple(v.lower().encode() for v in self._values if len(v) >= _LONG)
        self._packed = tuple({form for v in self._values for form in _packed_forms(v)})
        self._patterns = [
            re.compile(_spaced(form), re.IGNORECASE) for v in self._values for form in _written_forms(v)
        ]

    def found_in(self, data: bytes) -> bool:
        """Whether a secret is in ``data`` (UTF-8) in any of the forms."""
        if not self._exact:
            return False
        plain = _unescaped(data)
        lower = plain.lower()
        packed = lower.translate(None, _DROPPED)
        written = any(value in plain for value in self._exact) or any(
            value in lower for value in self._any_case
        )
        return written or any(form in packed for form in self._packed)

    def clean(self, text: str) -> str:
        """The text with each secret replaced; a text that still holds one is replaced as a whole."""
        if not self.found_in(text.encode("utf-8", "surrogatepass")):
            return text
        for value in self._values:
            text = text.replace(value, HIDDEN)
        for pattern in self._patterns:
            text = pattern.sub(HIDDEN, text)
        return HIDDEN if self.found_in(text.encode("utf-8", "surrogatepass")) else text

    def clean_body(self, body: bytes) -> bytes:
        """The body of a reply with each secret replaced, within its JSON when it is that.

        Raises ``MalformedReplyError`` when a secret is spread over several of its values.
        """
        if not self.found_in(body):
            return body
        try:
            cleaned = json.dumps(self._clean_value(json.loads(body)), ensure_ascii=False).encode(
                "utf-8", "surrogatepass"
            )
        except (ValueError, RecursionError):
            return self.clean(body.decode("utf-8", "replace")).encode()
        if self.found_in(cleaned):
            raise MalformedReplyError(
                "the endpoint's reply repeats the key in pieces: it is not read, and not kept"
            )
        return cleaned

    def _clean_value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, list):
            return [self._clean_value(v) for v in value]
        if isinstance(value, dict):
            return {self.clean(k): self._clean_value(v) for k, v in value.items()}
        return value


def _unescaped(data: bytes) -> bytes:
    """Without the escapes of JSON, addresses and HTML; each is looked for only where its mark is."""
    if b"\\u00" in data or b"\\x" in data:
        data = _ESCAPE.sub(lambda m: bytes.fromhex((m[1] or m[2]).decode()), data)
    if b"%" in data:
        data = urllib.parse.unquote_to_bytes(data)
    if b"&#" in data:
        data = html.unescape(data.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
    return data


def _encoded(value: str) -> list[str]:
    """The encodings of a secret that are looked for."""
    raw = value.encode()
    found = [value[::-1], raw.hex(), "".join(map(str, raw))]
    for offset in range(
        3
    ):  # base64 reads three bytes at a time, so that a text looks different at each offset
        bits = 8 * (offset + len(raw))
        coded = base64.b64encode(b"\0" * offset + raw + b"\0" * 3).decode()
        found.append(coded[-(-8 * offset // 6) : bits // 6])
    return found


def _packed_forms(value: str) -> list[bytes]:
    """The forms as they are once everything but letters and digits is dropped. A value that could be an
    ordinary word or a phrase is looked for in itself only as it is written."""
    forms = _encoded(value)
    if len(value) >= _LONG and any(c.isdigit() for c in value):
        forms.append(value)
    packed = [form.lower().encode().translate(None, _DROPPED) for form in forms]
    return [form for form in packed if len(form) >= SHORTEST]


def _written_forms(value: str) -> list[str]:
    return [value, *_encoded(value)] if len(value) >= _LONG else _encoded(value)


def _spaced(form: str) -> str:
    """A pattern of the form with marks between its characters."""
    characters = [re.escape(c) for c in form if c.isascii() and c.isalnum()] or [re.escape(form)]
    return r"[\W_]{0,8}".join(characters)


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_SECRET_NAMES = re.compile(
    r"(^|[-_.])(api[-_]?key|key|token|secret|sig(nature)?|pass(word|wd)?|pwd|auth(orization)?|code|credentials?|sas|jwt|bearer)s?($|[-_.])",
    re.I,
)
_FIELD_NAMES = re.compile(
    r"api[-_]?key|secret|passw|authorization|bearer|(access|auth|api|session|id)[-_]?token|^token$|^key$",
    re.I,
)
_BEGINNINGS = re.compile(r"(?=\S*\d)(sk|pk|rk|gsk|hf|xai|ghp|nvapi|AIza|eyJ)[-_A-Za-z0-9]{12,}|Bearer \S{8,}")
_VERSION = re.compile(
    r"(v?\d{1,4}([.-]\d{1,4}){0,3}([.-]?(alpha|beta|preview|rc|latest)\d{0,2})?|true|false|preview|latest|beta|alpha)\Z",
    re.I,
)
_PLACES = {"deployment", "location", "model", "project", "provider", "region"}
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9.-]{0,30}\Z")


def check_address(address: str) -> None:
    """Raises ``InputError``, without repeating it, for an address that holds a secret: a user name, a
    fragment, or a query that is more than a version (``?api-version=2024-10-21``), a switch or the name of a
    place (``?region=…``)."""
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError as error:
        raise InputError("the endpoint's address cannot be read: give one like https://host/v1") from error
    if "@" in parts.netloc or parts.fragment:
        raise InputError(
            "the endpoint's address holds a user name or key: name the variable that holds the key with "
            "--api-key-env instead"
        )
    for name, value in urllib.parse.parse_qsl(parts.query, keep_blank_values=True):
        word = bool(_WORD.match(value)) and name.lower() in _PLACES
        if (
            looks_secret(name)
            or looks_like_key(name)
            or looks_like_key(value)
            or not (_VERSION.match(value) or word or not value)
        ):
            shown = name if _NAME.match(name.replace("-", "_")) and not looks_like_key(name) else "a field"
            raise InputError(
                f"the endpoint's address holds what may be a key (in its query: {shown[:40]}): name the "
                "variable that holds the key "
                "with --api-key-env instead; versions such as ?api-version=2024-10-21 may stay"
            )


def check_variable(name: str | None) -> None:
    """Raises ``InputError``, without repeating it, for a key that was given where the name of its variable
    belongs.
    """
    if name and (not _NAME.match(name) or looks_like_key(name)):  # an empty name: no key is sent
        raise InputError(
            "what was given as the name of the variable with the key is no name, and may be the key "
            "itself: put the key "
            "into an environment variable, and give the variable's name"
        )


def check_fields(fields: Mapping[str, Any], where: str) -> None:
    """Raises ``InputError`` for fields that hold a key, at any depth; they would be written into every job's
    folder.
    """
    for name, value in _leaves(fields):
        if isinstance(value, str) and value and (_FIELD_NAMES.search(name) or _BEGINNINGS.match(value)):
            raise InputError(
                f"{where}.{name[:40]} holds what may be a key, which would be kept in the job's folder: "
                "name the variable that holds the key with api_key_env instead"
            )


def looks_secret(name: str) -> bool:
    """Whether the name of a field says that it holds a secret."""
    return bool(_SECRET_NAMES.search(name))


def looks_like_key(value: str) -> bool:
    """Whether a value looks random enough to be a key: long, of one piece, with digits among small letters
    (or a known beginning).
    """
    if _BEGINNINGS.match(value):
        return True
    piece = max(re.split(r"[^A-Za-z0-9]+", value), key=len)
    changes = sum(a.isdigit() != b.isdigit() for a, b in itertools.pairwise(piece))
    return len(piece) >= 20 and changes >= 3 and any(c.islower() for c in piece)


def _leaves(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value
