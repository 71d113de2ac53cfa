"""How long an endpoint asks to wait, in any of the forms in which providers say it."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_IN_WORDS = re.compile(
    r"(?:try again|retry|wait|available)[^.\d]{0,40}?((?:\d+(?:\.\d+)?\s*(?:ms|s|m|h)(?![a-z])\s*)+)"
)
_SECONDS_IN_WORDS = re.compile(r"(?:try again|retry|wait)[^.\d]{0,40}?(\d+(?:\.\d+)?)\s*sec")
_RESETS = ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens", "x-ratelimit-reset", "ratelimit-reset")
_LATER_THAN = 1e9
"""A larger number is a moment in Unix seconds (or, a thousand times that, milliseconds), not a duration."""


def wait_s(
    headers: Mapping[str, str], body: Any = None, words: str = "", now: float | None = None
) -> float | None:
    """Seconds to wait, or None when the endpoint does not say. In this order: ``retry-after-ms`` (Azure),
    ``Retry-After`` in both forms (RFC 9110), ``retryDelay`` of google.rpc.RetryInfo in the body,
    ``estimated_time`` (Hugging Face), the sentence ("try again in 7.66s"), and when a limit that is used up
    is reset: ``x-ratelimit-reset-*`` (OpenAI, Groq: ``6m0s``; OpenRouter: Unix milliseconds, also in the
    body's ``metadata.headers``) and ``anthropic-ratelimit-*-reset`` (RFC 3339)."""
    now = time.time() if now is None else now
    headers = {name.lower(): value for name, value in headers.items()} | _headers_within(body)
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None and milliseconds >= 0:
        return milliseconds / 1000
    for found in (
        retry_after_s(headers.get("retry-after"), now),
        _from_body(body),
        _from_words(words.lower()),
    ):
        if found is not None:
            return found
    return max(_resets(headers, now), default=None)


def retry_after_s(header: str | None, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms (seconds, or an HTTP date); None
    when there is none.
    """
    if not header:
        return None
    seconds = _number(header)
    if seconds is not None:
        return seconds if 0 <= seconds < float("inf") else None
    try:
        moment = email.utils.parsedate_to_datetime(header).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, moment - (time.time() if now is None else now))


def duration_s(text: str) -> float | None:
    """Seconds of ``"6m0s"``, ``"7.66s"``, ``"120ms"`` or ``"1h2m"``; None for anything else."""
    parts = _DURATION.findall(text)
    if not parts or "".join(f"{n}{u}" for n, u in parts) != "".join(text.split()):
        return None
    return sum(float(n) * _UNITS[u] for n, u in parts)


def _number(text: object) -> float | None:
    try:
        found = float(str(text))
    except ValueError:
        return None
    return found if found == found else None


def _resets(headers: Mapping[str, str], now: float) -> Iterator[float]:
    """When each limit that is used up is free again; one that says how much is left, and that it is not
    nothing, is not the cause.
    """
    for name, value in headers.items():
        anthropic = name.startswith("anthropic-ratelimit-") and name.endswith("-reset")
        if name not in _RESETS and not anthropic:
            continue
        left = headers.get(name.replace("-reset", "-remaining"))
        if left is not None and (_number(left) or 0) > 0:
            continue
        seconds = _until(value.strip(), now)
        if seconds is not None and seconds >= 0:
            yield seconds


def _until(value: str, now: float) -> float | None:
    number = _number(value)
    if number is None:
        try:
            return max(0.0, datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp() - now)
        except ValueError:
            return duration_s(value)
    if number > _LATER_THAN:
        return max(0.0, (number / 1000 if number > 1000 * _LATER_THAN else number) - now)
    return number


def _nodes(value: Any, depth: int = 6) -> Iterator[dict[str, Any]]:
    if depth and isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _nodes(inner, depth - 1)
    elif depth and isinstance(value, list):
        for inner in value[:20]:
            yield from _nodes(inner, depth - 1)


def _headers_within(body: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in _nodes(body):
        if isinstance(inner := node.get("headers"), dict):
            found |= {str(name).lower(): str(value) for name, value in inner.items()}
    return found


def _from_body(body: Any) -> float | None:
    for node in _nodes(body):
        if isinstance(delay := node.get("retryDelay"), str) and (seconds := duration_s(delay)) is not None:
            return seconds
        for name in ("estimated_time", "retry_after", "retry_after_seconds"):
            number = node.get(name)
            if isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < _LATER_THAN:
                return float(number)
    return None


def _from_words(words: str) -> float | None:
    if found := _IN_WORDS.search(words):
        return duration_s("".join(found[1].split()))
    if found := _SECONDS_IN_WORDS.search(words):
        return float(found[1])
    return None
