"""What endpoints are known to say when they refuse: kinds of refusals, and parameters that can be put
otherwise, each with its source.

A source is a provider's page, or ``project#number`` of a public report on GitHub that shows the body.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Kind = Literal[
    "busy",
    "content",
    "credit",
    "failing",
    "firewall",
    "key",
    "loading",
    "long",
    "model",
    "page",
    "path",
    "permission",
    "place",
    "quota",
    "redirect",
    "request",
]


class Case(NamedTuple):
    """``statuses``: empty for all. ``words``: must be found. ``but``: must not. ``source``: where such a body
    was seen.
    """

    kind: Kind
    statuses: tuple[int, ...]
    words: str
    source: str
    but: str = ""

    def fits(self, status: int, about: str) -> bool:
        """Whether a refusal is such a case, by its status and by what it says in small letters."""
        if self.statuses and status not in self.statuses:
            return False
        return bool(re.search(self.words, about)) and not (self.but and re.search(self.but, about))


_PER_MINUTE = r"per[ _-]?(minute|second|hour)|perminute|\brpm\b|\btpm\b|retrydelay|(retry|try again) in \d"
CASES: tuple[Case, ...] = (
    Case(
        "busy",
        (402,),
        r"in_flight_budget",
        "openrouter.ai/docs/api_reference/errors-and-debugging: limit_source openrouter_in_flight_budget",
    ),
    Case(
        "busy",
        (429,),
        r"allocationquota|error-code#token-limit|allocated quota exceeded",
        "DashScope's limit of tokens per minute in the words of OpenAI's insufficient_quota "
        "(can1357/oh-my-pi#8476)",
    ),
    Case(
        "firewall",
        (403, 503),
        r"attention required|cloudflare|error code: 10\d\d|you have been blocked|<html",
        "Cloudflare's pages for blocked clients",
    ),
    Case(
        "quota",
        (),
        r"per[ _-]?day|perday|\brpd\b|\btpd\b|daily (limit|quota)|per[ _-]?month|monthly "
        r"(limit|quota)|weekly limit|"
        r"今日调用次数限额|使用上限",
        "OpenRouter free-models-per-day; Gemini quotaId GenerateRequestsPerDayPerProjectPerModel; Groq "
        "'requests per day (RPD)'; Zhipu 1304, 1308 and "
        "1310 (docs.bigmodel.cn/cn/api/api-code)",
        but=r"per[ _-]?minute|perminute",
    ),
    Case(
        "credit",
        (400, 401, 402, 403, 429),
        r"insufficient[_ ](quota|balance|credit|funds)|credit balance|billing|more credits|out of "
        r"credits|no credits|"
        r"exceeded your current quota|spend(ing)? limit|arrearage|overdue|account is not "
        r"active|prepaid|top up|payment required|余额不足|已欠费",
        "OpenAI 429 insufficient_quota; Anthropic 400 'credit balance is too low'; DeepSeek 402 "
        "'Insufficient Balance'; DashScope Arrearage "
        "(help.aliyun.com/en/model-studio/error-code); Zhipu 429 with code 1113 (zai-org/GLM-5#148, "
        "continuedev/continue#11823)",
        but=_PER_MINUTE,
    ),
    Case("credit", (402,), r"", "RFC 9110: 402 Payment Required; openrouter.ai/docs/errors"),
    Case(
        "place",
        (),
        r"(country|region|territory|location).{0,40}(not "
        r"(supported|available)|unsupported)|unsupported_country|not available in your (country|region)",
        "OpenAI 403 unsupported_country_region_territory; Gemini 400 'User location is not supported' "
        "(google-gemini/gemini-cli#24641)",
    ),
    Case(
        "loading",
        (),
        r"loading model|model.{0,80}(is )?(currently |still )?(loading|being loaded|warming "
        r"up|starting)|cold start|failed_to_load_in_time",
        "llama.cpp 503 'Loading model' (llama-swap#146); Hugging Face 503 'is currently loading' with "
        "estimated_time",
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
        r"content[_ -]?(filter|policy|management)|responsibleai|moderation|flagged|safety "
        r"(system|filter|setting|reason)|usage polic|"
        r"prohibited[_ ]content|data_?inspection_?failed|inappropriate content|content exists "
        r"risk|sensitive (content|information|words)|敏感内容|"
        r"invalid_prompt|guardrail|blocked (by|due|because)|\bno_?image\b|recitation|policy violation",
        "Azure 400 content_filter (compl-ai#20); OpenRouter 403 flagged_input (openrouter.ai/docs/errors); "
        "DeepSeek 400 'Content Exists Risk' "
        "(deepseek-ai/DeepSeek-V2#30); DashScope data_inspection_failed (QwenLM/qwen-code#3145); Kimi "
        "content_filter (platform.kimi.com/docs/api/errors); "
        "Zhipu 1301 (docs.bigmodel.cn/cn/api/api-code); OpenAI invalid_prompt",
        but=r"not valid json|unsupported (value|parameter)",
    ),
    Case(
        "long",
        (400, 413, 422, 500),
        r"context[_ ]?(length|size|window)|maximum context|prompt is too long|too many (input |prompt "
        r")?tokens|input (is )?too long|"
        r"exceeds? the (available|maximum|model'?s?) (context|number of "
        r"tokens|input)|exceed_context_size|string_above_max_length|"
        r"maximum (input|prompt) (length|tokens)|longer than the (model|maximum)|input token count|too "
        r"large for model|"
        r"input token length|model token limit|range of input length",
        "OpenAI context_length_exceeded; llama.cpp exceed_context_size_error; vLLM 'maximum context "
        "length'; Gemini 'input token count'; Groq 413 "
        "(autohandai/code-cli#377); Kimi 'Input token length too long' "
        "(platform.kimi.com/docs/api/errors); DashScope 'Range of input length should be'",
    ),
    Case(
        "model",
        (400, 404, 422),
        r"model[_ ]not[_ ]found|not a valid model|invalid model|unknown model|no such model|model not "
        r"exist|model_?decommissioned|"
        r"(model|deployment)\b.{0,120}(does not exist|not found|not exist|is not "
        r"(available|supported|found|loaded|deployed)|unavailable|decommissioned|"
        r"deprecated|no longer)|deploymentnotfound|no endpoints found for|try pulling it|no models? "
        r"loaded|no route for model",
        "OpenAI 404 model_not_found; Ollama 404 'model not found, try pulling it first'; OpenRouter 'No "
        "endpoints found for' (nodejs-api-boilerplate#16); "
        "DeepSeek 400 'Model Not Exist' (ConardLi/easy-dataset#9); Groq 400 model_decommissioned; Azure "
        "DeploymentNotFound",
        but=r"is not supported (with|by|for) th(is|e) model|not supported when|response_format|logprob",
    ),
    Case(
        "key",
        (400, 401, 403),
        r"api[_ -]?key|invalid[_ ](authentication|token|credential)|incorrect "
        r"key|unauthori[sz]ed|authentication|bearer|access token|invalid x-api-key",
        "OpenAI 401 invalid_api_key; Gemini 400 API_KEY_INVALID; vLLM 401 Unauthorized; Azure 401 'invalid "
        "subscription key'",
    ),
    Case("key", (401,), r"", "RFC 9110: 401 Unauthorized"),
    Case(
        "busy",
        (),
        r"rate[_ -]?limit|too many requests|resource[_ ]?exhausted|overloaded|over capacity|capacity "
        r"exceeded|server is busy|throttl|"
        r"concurrency limit|queue is full|no available (model )?provider",
        "OpenAI 429; Gemini 429 RESOURCE_EXHAUSTED (page-assist#406); Anthropic 529 overloaded_error",
    ),
    Case(
        "path",
        (404, 405),
        r"\A\s*\Z|<html|\bnot found\b|no route|unknown (endpoint|path|url|request url)|invalid url|cannot "
        r"post|method not allowed|(resource|page) not found",
        "FastAPI {'detail': 'Not Found'}; Express 'Cannot POST'; OpenAI 'Invalid URL (POST /v1/...)'",
    ),
    Case(
        "path",
        (),
        r"unexpected endpoint or method",
        "LM Studio answers 200 with it (lmstudio-bug-tracker#618)",
    ),
)


def kind_of_status(status: int) -> Kind:
    """What a status means by itself. 498 is Groq's flex tier without capacity
    (console.groq.com/docs/flex-processing), 529 Anthropic's overloaded_error."""
    if status in (425, 429, 498, 503, 529):
        return "busy"
    if status in (408, 409) or status >= 500:
        return "failing"
    return {403: "permission", 404: "path", 405: "path"}.get(status, "request")  # type: ignore[return-value]


class Parameter(NamedTuple):
    """``field``: of :class:`Accepts`. ``names``: as an endpoint calls it in ``param``. ``sent``: in a body.
    ``words``: what a refusal of it says.
    """

    field: str
    names: str
    sent: str
    words: str
    source: str


_NOT = (
    r"(not|n't|un|only|must|cannot|invalid|extra|forbidden|refus|remove|requires?|ignored|greater|exceed"
    r"|at most|maximum)"
)
PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        "stream",
        "stream",
        "messages",
        r"only supports? stream|stream(ing)? (mode )?(only|is required|required|must)|non-?stream|must (be "
        r")?stream|enable the stream",
        "DashScope 400 'This model only support stream mode' (OpenManus#330); 'enable_thinking must be set "
        "to false for non-streaming calls'",
    ),
    Parameter(
        "length_field",
        r"max_tokens",
        "max_tokens",
        r"max_completion_tokens",
        "OpenAI 400 unsupported_parameter (ai_automation_suggester#38)",
    ),
    Parameter(
        "logprobs",
        r"(top_)?logprobs",
        "logprobs",
        r"log_?\s?prob(s|abilit)",
        "OpenAI 403 'not allowed to request logprobs'; Gemini 400 'Logprobs is not enabled' "
        "(mscraftsman/generative-ai#135); "
        "vLLM 'max allowed: 5' (vllm#5299); Together \"5 is greater than the maximum of 1 - 'logprobs'\" "
        "(helm#2325)",
    ),
    Parameter(
        "seed",
        "seed",
        "seed",
        r"\bseed\b",
        "Mistral 422 extra_forbidden with loc ['body', 'seed'] (langchain-ai/langchain-azure#82); its own "
        "name is random_seed",
    ),
    Parameter(
        "several",
        "n|candidate_?count",
        "n",
        r"['\"`]n['\"`]|\bn ?(=|>|<|!=|must|should|is not|is un|greater|value|parameter)|only n\b|one "
        r"completion|"
        r"(multiple|several|number of) (choices|completions|candidates)|candidate_?count|best_of",
        "llama.cpp 'Only one completion choice is allowed' (optillm#8); Groq 400 'n must be at most 1' "
        "(stanfordnlp/dspy#1155)",
    ),
    Parameter(
        "temperature",
        "temperature",
        "temperature",
        r"\btemperature\b",
        "OpenAI 400 unsupported_value 'Only the default (1) value is supported' (cline#341)",
    ),
    Parameter(
        "stop",
        "stop|stop_sequences",
        "stop",
        r"['\"`]stop['\"`]|\bstop (sequence|parameter|is not)",
        "OpenAI 400 unsupported_parameter, for o3 and later (crewAIInc/crewAI#2738)",
    ),
    Parameter(
        "system",
        r"messages\[\d+\]\.role",
        "messages",
        r"(system|developer) ?(role|message|prompt|instruction)s?.{0,40}"
        + _NOT
        + r"|does not support 'system'|"
        r"roles? must alternate|only user(,| and) (assistant|model) roles",
        "vLLM, llama.cpp: Gemma's template 'System role not supported'; Gemini 400 'Developer instruction "
        "is not enabled' (0xPlaygrounds/rig#788); "
        "o1-mini 'messages[0].role'",
    ),
    Parameter(
        "reply_form",
        r"response_format.*|text\.format.*|.*schema.*|guided_json",
        "response_format",
        r"response_?format|response mime|json_?schema|json_?object|json mode|structured[ "
        r"_]output|grammar|guided|schema|additional_?properties|prefix_?items|"
        r"\b(min|max)_?items\b|propert(y|ies) ['\"]?(minimum|maximum)|the word 'json'",
        "OpenAI 400 'Invalid schema for response_format'; Gemini \"Unknown name 'additionalProperties'\" "
        "(zed#44875); llama.cpp 'failed to parse grammar'; "
        "OpenAI \"must contain the word 'json'\"",
    ),
)
GENERIC = (
    r"requested parameters|unsupported parameter|unknown parameter|extra "
    r"(inputs|fields)|unrecogni[sz]ed (request )?(argument|parameter|field)"
)
NAMELESS = "requested parameters"
"""Of these, what names no field, though a word of it may be the name of one ("provider routing")."""
GENERIC_ORDER = ("seed", "several", "logprobs", "reply_form", "temperature", "stop")
"""A refusal that names nothing (OpenRouter 404 'No endpoints found that can handle the requested parameters',
buzz#3018) is tried without each in turn.
"""
