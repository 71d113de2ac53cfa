"""What an endpoint means when it refuses: one table of cases, each with its source, and the endpoint's own words.

A refusal is first about the request as such (money, key, place, filter, length, model: ``CASES``), then perhaps about one of its parameters
(``PARAMETERS``), and otherwise what its status says. Nothing here knows a provider by its name: one provider's words come through many gateways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from featureinterp.llm.accepts import Accepts, ReplyForm
from featureinterp.llm.waiting import wait_s

Kind = Literal[
    "busy", "content", "credit", "failing", "firewall", "key", "loading", "long", "model", "page", "path", "permission", "place", "quota", "redirect", "request"
]
MAX_WORDS, MAX_ABOUT = 300, 4000


@dataclass(frozen=True)
class Refusal:
    """``status``: HTTP status, or the code inside of a 200. ``words``: what the endpoint says, on one line. ``about``: all that a case can be
    recognised by, in small letters. ``param``: the parameter that it names. ``value``: the body, where it is JSON. ``page``: it is a web page."""

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
            if case.fits(self):
                return case.kind
        return _kind_of_status(self.status)

    @property
    def wait(self) -> float | None:
        """Seconds that the endpoint asks to wait."""
        return wait_s(self.headers or {}, self.value, self.words)


class Case(NamedTuple):
    """``statuses``: empty for all. ``words``: must be found. ``but``: must not. ``source``: where such a body was seen."""

    kind: Kind
    statuses: tuple[int, ...]
    words: str
    source: str
    but: str = ""

    def fits(self, refusal: Refusal) -> bool:
        """Whether a refusal is such a case."""
        if self.statuses and refusal.status not in self.statuses:
            return False
        return bool(re.search(self.words, refusal.about)) and not (self.but and re.search(self.but, refusal.about))


_PER_MINUTE = r"per[ _-]?(minute|second|hour)|perminute|\brpm\b|\btpm\b|retrydelay"
CASES: tuple[Case, ...] = (
    Case("firewall", (403, 503), r"attention required|cloudflare|error code: 10\d\d|you have been blocked|<html", "Cloudflare's pages for blocked clients"),
    Case(
        "quota",
        (),
        r"per[ _-]?day|perday|\brpd\b|\btpd\b|daily (limit|quota)|per[ _-]?month|monthly (limit|quota)|weekly limit",
        "OpenRouter free-models-per-day; Gemini quotaId GenerateRequestsPerDayPerProjectPerModel; Groq 'requests per day (RPD)'",
        but=r"per[ _-]?minute|perminute",
    ),
    Case(
        "credit",
        (400, 401, 402, 403, 429),
        r"insufficient[_ ](quota|balance|credit|funds)|credit balance|billing|more credits|out of credits|no credits|"
        r"exceeded your current quota|spend(ing)? limit|arrearage|overdue|account is not active|prepaid|top up|payment required",
        "OpenAI 429 insufficient_quota; Anthropic 400 'credit balance is too low'; DeepSeek 402 'Insufficient Balance'; OpenRouter 402; DashScope Arrearage",
        but=_PER_MINUTE,
    ),
    Case("credit", (402,), r"", "RFC 9110: 402 Payment Required; openrouter.ai/docs/errors"),
    Case(
        "place",
        (),
        r"(country|region|territory|location).{0,40}(not (supported|available)|unsupported)|unsupported_country|not available in your (country|region)",
        "OpenAI 403 unsupported_country_region_territory; Gemini 400 FAILED_PRECONDITION 'User location is not supported'",
    ),
    Case(
        "loading",
        (),
        r"loading model|model.{0,80}(is )?(currently |still )?(loading|being loaded|warming up|starting)|cold start|failed_to_load_in_time",
        "llama.cpp 503 'Loading model' (llama-swap#146); Hugging Face 503 'is currently loading' with estimated_time",
        but=r"error loading|failed to load|unable to load",
    ),
    Case(
        "permission",
        (404,),
        r"guardrail restrictions|data policy|privacy",
        "OpenRouter 404 'No endpoints available matching your guardrail restrictions and data policy'",
    ),
    Case(
        "content",
        (),
        r"content[_ -]?(filter|policy|management)|responsibleai|moderation|flagged|safety (system|filter|setting|reason)|usage polic|"
        r"prohibited[_ ]content|data_?inspection_?failed|inappropriate content|content exists risk|sensitive (content|information|words)|"
        r"invalid_prompt|guardrail|blocked (by|due|because)|\bno_?image\b|recitation|policy violation",
        "Azure 400 content_filter (compl-ai#20); OpenRouter 403 flagged_input (openrouter.ai/docs/errors); DeepSeek 400 'Content Exists Risk'; "
        "DashScope data_inspection_failed; OpenAI invalid_prompt",
        but=r"not valid json|unsupported (value|parameter)",
    ),
    Case(
        "long",
        (400, 413, 422, 500),
        r"context[_ ]?(length|size|window)|maximum context|prompt is too long|too many (input |prompt )?tokens|input (is )?too long|"
        r"exceeds? the (available|maximum|model'?s?) (context|number of tokens|input)|exceed_context_size|string_above_max_length|"
        r"maximum (input|prompt) (length|tokens)|longer than the (model|maximum)|input token count|too large for model",
        "OpenAI context_length_exceeded; llama.cpp exceed_context_size_error; vLLM 'maximum context length'; Gemini 'input token count'; Groq 413",
    ),
    Case(
        "model",
        (400, 404, 422),
        r"model[_ ]not[_ ]found|not a valid model|invalid model|unknown model|no such model|model not exist|model_?decommissioned|"
        r"(model|deployment)\b.{0,120}(does not exist|not found|not exist|is not (available|supported|found|loaded|deployed)|unavailable|decommissioned|"
        r"deprecated|no longer)|deploymentnotfound|no endpoints found for|try pulling it|no models? loaded|no route for model",
        "OpenAI 404 model_not_found; Ollama 404 'model not found, try pulling it first'; OpenRouter 'No endpoints found for' (nodejs-api-boilerplate#16); "
        "DeepSeek 400 'Model Not Exist'; Groq 400 model_decommissioned; Azure DeploymentNotFound",
        but=r"is not supported (with|by|for) th(is|e) model|not supported when|response_format|logprob",
    ),
    Case(
        "key",
        (400, 401, 403),
        r"api[_ -]?key|invalid[_ ](authentication|token|credential)|incorrect key|unauthori[sz]ed|authentication|bearer|access token|invalid x-api-key",
        "OpenAI 401 invalid_api_key; Gemini 400 API_KEY_INVALID; vLLM 401 Unauthorized; Azure 401 'invalid subscription key'",
    ),
    Case("key", (401,), r"", "RFC 9110: 401 Unauthorized"),
    Case(
        "busy",
        (),
        r"rate[_ -]?limit|too many requests|resource[_ ]?exhausted|overloaded|over capacity|capacity exceeded|server is busy|throttl|"
        r"concurrency limit|queue is full|no available (model )?provider",
        "OpenAI 429; Gemini 429 RESOURCE_EXHAUSTED (page-assist#406); Anthropic 529 overloaded_error",
    ),
    Case(
        "path",
        (404, 405),
        r"\A\s*\Z|<html|\bnot found\b|no route|unknown (endpoint|path|url|request url)|invalid url|cannot post|method not allowed|(resource|page) not found",
        "FastAPI {'detail': 'Not Found'}; Express 'Cannot POST'; OpenAI 'Invalid URL (POST /v1/...)'",
    ),
    Case("path", (), r"unexpected endpoint or method", "LM Studio answers 200 with such an error"),
)


def _kind_of_status(status: int) -> Kind:
    if status in (425, 429, 498, 503, 529):  # 498: Groq's flex capacity; 529: Anthropic's overloaded_error
        return "busy"
    if status in (408, 409) or status >= 500:
        return "failing"
    return {403: "permission", 404: "path", 405: "path"}.get(status, "request")  # type: ignore[return-value]


def read_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    """Reads a body in any of the forms that endpoints give: OpenAI's, a list of it, ``detail`` of FastAPI, an error in an error's message or in
    ``metadata.raw``, plain text, or a page."""
    text = body[:200_000].decode("utf-8", "replace").strip()
    value = _json(text)
    if value is None:
        page = "<html" in text[:2000].lower() or text.lower().startswith("<!doctype")
        words = _line(_title(text) if page else text)
        return Refusal(status, words or "no reason given", f"{'<html ' if page else ''}{words}".lower(), headers=headers, page=page)
    said: list[str] = []
    names: list[str] = []
    params: list[str] = []
    for kind, found in _said(value):
        {"words": said, "names": names, "params": params}[kind].append(found)
    said = [w for i, w in enumerate(dict.fromkeys(said)) if not any(w in other for other in list(dict.fromkeys(said))[i + 1 :])]
    words = _line("; ".join(said))
    if params and params[0].lower() not in words.lower():
        words = _line(f"{words} ({params[0]})")
    about = " ".join([*said, *names, *params]).lower()[:MAX_ABOUT]
    return Refusal(_status(status, value), words or "no reason given", about, (params or [""])[0].lower(), value, headers)


def error_within(value: Any) -> bool:
    """Whether a body of status 200 is an error all the same: it has one, and no choices; or the only choice is one (OpenRouter)."""
    if isinstance(value, list):
        return bool(value) and error_within(value[0])
    if not isinstance(value, dict):
        return False
    choices = value.get("choices")
    if isinstance(choices, list) and choices:
        first = choices[0]
        return isinstance(first, dict) and bool(first.get("error")) and not (first.get("message") or {}).get("content")
    return bool(value.get("error")) or (value.get("object") == "error") or ("detail" in value and "choices" not in value)


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
_NAMES = ("code", "type", "status", "quotaId", "reasons", "@type", "retryDelay", "object")
_INSIDE = ("error", "errors", "metadata", "details", "innererror", "inner_error", "violations", "fieldViolations", "upstream_error", "choices", "headers")


def _said(value: Any, depth: int = 7) -> Iterator[tuple[str, str]]:
    """What a body says: sentences, names of the error, parameters. What it quotes of the request (``input``, ``flagged_input``) is left out."""
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
    found = re.search(r"<title[^>]*>(.*?)</title>", page, re.IGNORECASE | re.DOTALL) or re.search(r"<h1[^>]*>(.*?)</h1>", page, re.IGNORECASE | re.DOTALL)
    return re.sub(r"<[^>]*>", " ", found[1] if found else page)


def _line(text: str) -> str:
    """One line of printable characters, bounded."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text[: 10 * MAX_WORDS]).split())[:MAX_WORDS]


class Parameter(NamedTuple):
    """``field``: of :class:`Accepts`. ``names``: as an endpoint calls it in ``param``. ``sent``: in a body. ``words``: what a refusal of it says."""

    field: str
    names: str
    sent: str
    words: str
    source: str


_NOT = r"(not|n't|un|only|must|cannot|invalid|extra|forbidden|refus|remove|requires?|ignored|greater|exceed|at most|maximum)"
PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        "stream",
        "stream",
        "messages",
        r"only supports? stream|stream(ing)? (mode )?(only|is required|required|must)|non-?stream|must (be )?stream|enable the stream",
        "DashScope 400 'This model only support stream mode' (OpenManus#330); 'enable_thinking must be set to false for non-streaming calls'",
    ),
    Parameter("length_field", r"max_tokens", "max_tokens", r"max_completion_tokens", "OpenAI 400 unsupported_parameter (ai_automation_suggester#38)"),
    Parameter(
        "logprobs",
        r"(top_)?logprobs",
        "logprobs",
        r"log_?\s?prob(s|abilit)",
        "OpenAI 403 'not allowed to request logprobs'; Gemini 400 'Logprobs is not enabled' (generative-ai#135); vLLM 'max allowed: 5' (vllm#5299); "
        "Together \"5 is greater than the maximum of 1 - 'logprobs'\" (helm#2325)",
    ),
    Parameter(
        "seed", "seed", "seed", r"\bseed\b", "Mistral 422 extra_forbidden for seed (its name is random_seed); FastAPI's detail with loc ['body', 'seed']"
    ),
    Parameter(
        "several",
        "n|candidate_?count",
        "n",
        r"['\"`]n['\"`]|\bn ?(=|>|<|!=|must|should|is not|is un|greater|value|parameter)|only n\b|one completion|"
        r"(multiple|several|number of) (choices|completions|candidates)|candidate_?count|best_of",
        "llama.cpp 'Only one completion choice is allowed'; Groq 400 \"'n' : number must be at most 1\"; Ollama ignores it; vLLM \"n must be 1\"",
    ),
    Parameter(
        "temperature", "temperature", "temperature", r"\btemperature\b", "OpenAI 400 unsupported_value 'Only the default (1) value is supported' (cline#341)"
    ),
    Parameter(
        "stop",
        "stop|stop_sequences",
        "stop",
        r"['\"`]stop['\"`]|\bstop (sequence|parameter|is not)",
        "OpenAI o-series 400 \"'stop' is not supported with this model\"",
    ),
    Parameter(
        "system",
        r"messages\[\d+\]\.role",
        "messages",
        r"(system|developer) ?(role|message|prompt|instruction)s?.{0,40}" + _NOT + r"|does not support 'system'|"
        r"roles? must alternate|only user(,| and) (assistant|model) roles",
        "vLLM, llama.cpp: Gemma's template 'System role not supported'; Gemini 400 'Developer instruction is not enabled'; o1-mini 'messages[0].role'",
    ),
    Parameter(
        "reply_form",
        r"response_format.*|text\.format.*|.*schema.*|guided_json",
        "response_format",
        r"response_?format|response mime|json_?schema|json_?object|json mode|structured[ _]output|grammar|guided|schema|additional_?properties|prefix_?items|"
        r"\b(min|max)_?items\b|propert(y|ies) ['\"]?(minimum|maximum)|the word 'json'",
        "OpenAI 400 'Invalid schema for response_format'; Gemini \"Unknown name 'additionalProperties'\" (zed#44875); llama.cpp 'failed to parse grammar'; "
        "OpenAI \"must contain the word 'json'\"",
    ),
)
_GENERIC = r"requested parameters|unsupported parameter|unknown parameter|extra (inputs|fields)|unrecogni[sz]ed (request )?(argument|parameter|field)"
_GENERIC_ORDER = ("seed", "several", "logprobs", "reply_form", "temperature", "stop")
"""A refusal that names nothing (OpenRouter 404 'No endpoints found that can handle the requested parameters', buzz#3018) is tried without each in turn."""
_LEARNABLE = (200, 400, 403, 404, 415, 422, 500, 501, 502)
_LEAST = re.compile(
    r"(?:max\w*_tokens|maxoutputtokens)\D{0,80}?(?:>=|at least|greater than or equal to|minimum value[^0-9]*|minimum (?:is|of))\s*(\d+)|"
    r"below (?:the )?minimum value\D{0,40}?(\d+)"
)
_MOST = re.compile(
    r"(?:max\w*_tokens|maxoutputtokens|completion tokens)\D{0,80}?(?:<=|at most|less than or equal to|maximum (?:value )?(?:is|of)|up to)\s*(\d+)|"
    r"supports? at most (\d+) completion tokens|valid range of max\w*_tokens is \[\d+, ?(\d+)\]"
)
_MOST_LOGPROBS = re.compile(
    r"logprobs\D{0,80}?(?:\d+\D{0,60}?)?(?:max(?:imum)? allowed\D{0,10}|<=|at most|less than or equal to|between [01] and|in \[[01], ?|maximum of)\s*(\d+)|"
    r"greater than the maximum of (\d+) - 'logprobs'|maximum value\D{0,30}?<= ?(\d+)"
)


def gives_way(refusal: Refusal, sent: Mapping[str, Any], by: Accepts, now: Accepts) -> Accepts | None:
    """What is known after a refusal of the body ``sent``, which was written by ``by``; None when it was about nothing that can be put otherwise.
    ``now``: what is known by now. What another request has learnt meanwhile stays, and is not learnt twice."""
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
    if isinstance(length, int) and (least := _first_number(_LEAST, about)) is not None and length < least <= 1_000_000:
        return {"least_tokens": least}
    if refusal.kind in ("content", "credit", "key", "long", "loading", "place", "quota", "redirect"):
        return {}
    if isinstance(length, int) and (most := _first_number(_MOST, about)) is not None and 0 < most < length:
        return {"most_tokens": most}
    named = refusal.param.split(".")[-1] if not refusal.param.startswith(("response_format", "messages")) else refusal.param
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
    if named or any(re.search(rf"\b{re.escape(name)}\b", about) for name in sent.keys() - ours):  # a field that the user asked for
        return {}
    if re.search(_GENERIC, about):
        carried = {p.field for p in PARAMETERS if p.sent in sent}
        return next((_without(field, about, sent, by) for field in _GENERIC_ORDER if field in carried), {})
    return {}


def _without(field: str, about: str, sent: Mapping[str, Any], by: Accepts) -> dict[str, Any]:
    if field == "length_field":
        return {field: "max_completion_tokens"} if by.length_field == "max_tokens" and "max_completion_tokens" in about else {}
    if field == "reply_form":
        return {field: _looser(by.reply_form, about)} if by.reply_form != "text" else {}
    if field == "stream":
        return {} if by.stream else {field: True}
    if field == "logprobs" and (most := _first_number(_MOST_LOGPROBS, about)) and most < sent.get("top_logprobs", 0):
        return {"most_logprobs": most}
    if field == "system" and not any(m["role"] == "system" for m in sent["messages"]):
        return {}
    return {field: False}


def _looser(form: ReplyForm, about: str) -> ReplyForm:
    """The next form: a schema with fewer words where the words are the matter, else none at all."""
    if form == "json_object":
        return "text"
    if re.search(r"additional_?properties", about) and not re.search(r"additional_?properties['\"]? is required", about):
        return "bare_schema" if form != "bare_schema" else "json_object"
    if form == "json_schema" and re.search(r"(min|max)(imum|items|length)|prefix_?items|missing items|not permitted|invalid schema|grammar|keyword", about):
        return "plain_schema"
    return "json_object" if not re.search(r"json_?object", about) or re.search(r"json_?schema|must be", about) else "text"


def _first_number(pattern: re.Pattern[str], about: str) -> int | None:
    found = pattern.search(about)
    return next((int(g) for g in found.groups() if g is not None), None) if found else None
