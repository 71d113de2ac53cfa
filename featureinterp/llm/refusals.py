"""What an endpoint means when it refuses, and the endpoint's own words (the tables are in
:mod:`featureinterp.llm.refusal_tables`).

A refusal is first about the request as such (money, key, place, filter, length, model: ``CASES``), then
perhaps about one of its parameters (``PARAMETERS``), and otherwise what its status says. Nothing here knows a
provider by its name: one provider's words come through many gateways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from featureinterp.llm.accepts import Accepts, ReplyForm
from featureinterp.llm.refusal_tables import (
    CASES,
    GENERIC,
    GENERIC_ORDER,
    NAMELESS,
    PARAMETERS,
    Kind,
    kind_of_status,
)
from featureinterp.llm.waiting import wait_s

MAX_WORDS, MAX_ABOUT = 300, 4000


@dataclass(frozen=True)
class Refusal:
    """``status``: HTTP status, or the code inside of a 200. ``words``: what the endpoint says, on one line.
    ``about``: all that a case can be recognised by, in small letters. ``param``: the parameter that it names.
    ``value``: the body, where it is JSON. ``page``: it is a web page."""

    status: int
    words: str
    about: str
    param: str = ""
    value: Any = None
    headers: Mapping[str, str] | None = None
    page: bool = False

    @property
    def kind(self) -> Kind:
        """What it means, when it is not about a parameter."""
        if 300 <= self.status < 400:
            return "redirect"
        if self.page and self.status == 200:
            return "page"
        for case in CASES:
            if case.fits(self.status, self.about):
                return case.kind
        return kind_of_status(self.status)

    @property
    def wait(self) -> float | None:
        """Seconds that the endpoint asks to wait."""
        return wait_s(self.headers or {}, self.value, self.words)


def read_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    """Reads a body in any of the forms that endpoints give: OpenAI's, a list of it, ``detail`` of FastAPI, an
    error in an error's message or in ``metadata.raw``, plain text, or a page."""
    text = body[:200_000].decode("utf-8", "replace").strip()
    value = _json(text)
    if value is None:
        page = "<html" in text[:2000].lower() or text.lower().startswith("<!doctype")
        words = _line(_title(text) if page else text)
        return Refusal(
            status,
            words or "no reason given",
            f"{'<html ' if page else ''}{words}".lower(),
            headers=headers,
            page=page,
        )
    said: list[str] = []
    names: list[str] = []
    params: list[str] = []
    for kind, found in _said(value):
        {"words": said, "names": names, "params": params}[kind].append(found)
    said = [
        w
        for i, w in enumerate(dict.fromkeys(said))
        if not any(w in other for other in list(dict.fromkeys(said))[i + 1 :])
    ]
    words = _line("; ".join(said))
    if params and params[0].lower() not in words.lower():
        words = _line(f"{words} ({params[0]})")
    about = " ".join([*said, *names, *params]).lower()[:MAX_ABOUT]
    return Refusal(
        _status(status, value), words or "no reason given", about, (params or [""])[0].lower(), value, headers
    )


def error_within(value: Any) -> bool:
    """Whether a body of status 200 is an error all the same: it has one, and no choices; or the only choice
    is one (OpenRouter).
    """
    if isinstance(value, list):
        return bool(value) and error_within(value[0])
    if not isinstance(value, dict):
        return False
    choices = value.get("choices")
    if isinstance(choices, list) and choices:
        first = choices[0]
        return (
            isinstance(first, dict)
            and bool(first.get("error"))
            and not (first.get("message") or {}).get("content")
        )
    return (
        bool(value.get("error"))
        or (value.get("object") == "error")
        or ("detail" in value and "choices" not in value)
    )


def _status(status: int, value: Any) -> int:
    """The status, or for a 200 the code that the error gives."""
    if status != 200:
        return status
    for node in _dicts(value):
        for name in ("code", "status", "status_code", "http_status"):
            code = node.get(name)
            if isinstance(code, str) and code.isdigit():
                code = int(code)
            if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600:
                return code
    return 200


def _dicts(value: Any, depth: int = 5) -> Iterator[dict[str, Any]]:
    if depth and isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _dicts(inner, depth - 1)
    elif depth and isinstance(value, list):
        for inner in value[:10]:
            yield from _dicts(inner, depth - 1)


_WORDS = ("message", "detail", "error_description", "description", "msg", "error_msg", "title", "reason")
_NAMES = (
    "code",
    "type",
    "status",
    "error_code",
    "quotaId",
    "reasons",
    "@type",
    "retryDelay",
    "object",
    "limit_source",
)
_INSIDE = (
    "error",
    "errors",
    "metadata",
    "details",
    "innererror",
    "inner_error",
    "violations",
    "fieldViolations",
    "upstream_error",
    "choices",
    "headers",
)


def _said(value: Any, depth: int = 7) -> Iterator[tuple[str, str]]:
    """What a body says: sentences, names of the error, parameters. What it quotes of the request (``input``,
    ``flagged_input``) is left out.
    """
    if depth == 0:
        return
    if isinstance(value, str):
        inner = _json(value)
        if inner is not None:
            yield from _said(inner, depth - 1)
        elif value.strip():
            yield "words", value.strip()
    elif isinstance(value, list):
        for item in value[:10]:
            yield from _said(item, depth - 1)
    elif isinstance(value, dict):
        yield from _said_by(value, depth)


def _said_by(value: dict[str, Any], depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(loc := value.get("loc"), list | tuple):  # FastAPI: {"loc": ["body", "seed"], "msg": "..."}
        yield "params", ".".join(str(part) for part in loc if part != "body")
    for name in ("param", "parameter", "field"):
        if isinstance(param := value.get(name), str) and param:
            yield "params", param
    for name in _WORDS:
        if isinstance(found := value.get(name), str | list | dict):
            yield from _said(found, depth - 1)
    if isinstance(raw := value.get("raw"), str | dict):  # OpenRouter: the provider's own answer
        yield from _said(raw, depth - 1)
    for name in _NAMES:
        found = value.get(name)
        if isinstance(found, str | int) and not isinstance(found, bool):
            yield "names", f"{name.lower()} {found}" if name == "retryDelay" else str(found)
        elif isinstance(found, list):
            yield from (("names", str(item)) for item in found[:10] if isinstance(item, str))
    for name in _INSIDE:
        if isinstance(found := value.get(name), str | list | dict):
            yield from _said(found, depth - 1)


def _json(text: str) -> Any:
    """A list or an object; None for all else."""
    text = text.strip()
    if not text.startswith(("{", "[")):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list) else None


def _title(page: str) -> str:
    found = re.search(r"<title[^>]*>(.*?)</title>", page, re.IGNORECASE | re.DOTALL) or re.search(
        r"<h1[^>]*>(.*?)</h1>", page, re.IGNORECASE | re.DOTALL
    )
    return re.sub(r"<[^>]*>", " ", found[1] if found else page)


def _line(text: str) -> str:
    """One line of printable characters, bounded."""
    return " ".join(
        "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text[: 10 * MAX_WORDS]).split()
    )[:MAX_WORDS]


_LEARNABLE = (200, 400, 403, 404, 415, 422, 500, 501, 502)
_LEAST = re.compile(
    r"(?:max\w*_tokens|maxoutputtokens)\D{0,80}?(?:>=|at least|greater than or equal to|minimum "
    r"value[^0-9]*|minimum (?:is|of))\s*(\d+)|"
    r"below (?:the )?minimum value\D{0,40}?(\d+)"
)
_MOST = re.compile(
    r"(?:max\w*_tokens|maxoutputtokens|completion tokens)\D{0,80}?(?:<=|at most|less than or equal "
    r"to|maximum (?:value )?(?:is|of)|up to)\s*(\d+)|"
    r"supports? at most (\d+) completion tokens|valid range of max\w*_tokens is \[\d+, ?(\d+)\]"
)
_MOST_LOGPROBS = re.compile(
    r"logprobs\D{0,80}?(?:\d+\D{0,60}?)?(?:max(?:imum)? allowed\D{0,10}|<=|at most|less than or equal "
    r"to|between [01] and|in \[[01], ?|maximum of)\s*(\d+)|"
    r"greater than the maximum of (\d+) - 'logprobs'|maximum value\D{0,30}?<= ?(\d+)"
)


def gives_way(refusal: Refusal, sent: Mapping[str, Any], by: Accepts, now: Accepts) -> Accepts | None:
    """What is known after a refusal of the body ``sent``, which was written by ``by``; None when it was about
    nothing that can be put otherwise. ``now``: what is known by now. What another request has learnt
    meanwhile stays, and is not learnt twice."""
    learnt = _step(refusal, sent, by)
    if not learnt:
        return None
    fields = [f for f in learnt if learnt[f] != getattr(by, f) and getattr(now, f) == getattr(by, f)]
    return replace(now, **{f: learnt[f] for f in fields})


def _step(refusal: Refusal, sent: Mapping[str, Any], by: Accepts) -> dict[str, Any]:
    about = refusal.about
    length = sent.get(by.length_field)
    if refusal.status not in _LEARNABLE or refusal.page:
        return {}
    if (
        isinstance(length, int)
        and (least := _first_number(_LEAST, about)) is not None
        and length < least <= 1_000_000
    ):
        return {"least_tokens": least}
    if refusal.kind in ("content", "credit", "key", "long", "loading", "place", "quota", "redirect"):
        return {}
    if isinstance(length, int) and (most := _first_number(_MOST, about)) is not None and 0 < most < length:
        return {"most_tokens": most}
    named = (
        refusal.param.split(".")[-1]
        if not refusal.param.startswith(("response_format", "messages"))
        else refusal.param
    )
    for parameter in PARAMETERS:
        if named and parameter.sent in sent and re.fullmatch(parameter.names, named):
            return _without(parameter.field, about, sent, by)
    if refusal.kind == "model":
        return {}
    for parameter in PARAMETERS:
        said = parameter.sent in sent and re.search(parameter.words, about)
        if said and (found := _without(parameter.field, about, sent, by)):
            return found
    ours = {p.sent for p in PARAMETERS} | {"model", "top_logprobs", "stream_options", by.length_field}
    theirs = any(
        re.search(rf"\b{re.escape(name)}\b", about) for name in sent.keys() - ours
    )  # a field that the user asked for
    if named or (theirs and not re.search(NAMELESS, about)):
        return {}
    if re.search(GENERIC, about):
        carried = {p.field for p in PARAMETERS if p.sent in sent}
        return next((_without(field, about, sent, by) for field in GENERIC_ORDER if field in carried), {})
    return {}


def _without(field: str, about: str, sent: Mapping[str, Any], by: Accepts) -> dict[str, Any]:
    if field == "length_field":
        return (
            {field: "max_completion_tokens"}
            if by.length_field == "max_tokens" and "max_completion_tokens" in about
            else {}
        )
    if field == "reply_form":
        return {field: _looser(by.reply_form, about)} if by.reply_form != "text" else {}
    if field == "stream":
        return {} if by.stream else {field: True}
    if (
        field == "logprobs"
        and (most := _first_number(_MOST_LOGPROBS, about))
        and most < sent.get("top_logprobs", 0)
    ):
        return {"most_logprobs": most}
    if field == "system" and not any(m["role"] == "system" for m in sent["messages"]):
        return {}
    return {field: False}


def _looser(form: ReplyForm, about: str) -> ReplyForm:
    """The next form: a schema with fewer words where the words are the matter, else none at all."""
    if form == "json_object":
        return "text"
    if re.search(r"additional_?properties", about) and not re.search(
        r"additional_?properties['\"]? is required", about
    ):
        return "bare_schema" if form != "bare_schema" else "json_object"
    if form == "json_schema" and re.search(
        r"(min|max)(imum|items|length)|prefix_?items|missing items|not permitted|invalid "
        r"schema|grammar|keyword",
        about,
    ):
        return "plain_schema"
    return (
        "json_object"
        if not re.search(r"json_?object", about) or re.search(r"json_?schema|must be", about)
        else "text"
    )


def _first_number(pattern: re.Pattern[str], about: str) -> int | None:
    found = pattern.search(about)
    return next((int(g) for g in found.groups() if g is not None), None) if found else None
