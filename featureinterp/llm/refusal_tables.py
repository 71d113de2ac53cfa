"""What endpoints are known to say when they refuse: kinds of refusals, and parameters that can be put
otherwise, each with its sources.

A source says what was seen, and where: a page, ``owner/project#number`` of a public report on GitHub that
shows the body, or an RFC. "Words seen at" a provider: they stand in public code, but on no page and in no
report that is known.
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
    """``statuses``: empty for all. ``words``: must be found. ``but``: must not. ``sources``: where such
    bodies were seen.
    """

    kind: Kind
    statuses: tuple[int, ...]
    words: str
    sources: tuple[str, ...]
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
        ("openrouter_in_flight_budget: openrouter.ai/docs/api_reference/errors-and-debugging",),
    ),
    Case(
        "busy",
        (429,),
        r"allocationquota|error-code#token-limit|allocated quota exceeded",
        (
            "DashScope's limit of tokens per minute in the words of OpenAI's insufficient_quota: "
            "can1357/oh-my-pi#8476",
        ),
    ),
    Case(
        "firewall",
        (403, 503),
        r"attention required|cloudflare|error code: 10\d\d|you have been blocked|<html",
        (
            "Cloudflare 'Attention Required!': forpublicai/platform.publicai.co#8",
            "Cloudflare 403 'used Cloudflare to restrict access', error 1010: "
            "JohnnyZ93/oai-compatible-copilot#287",
        ),
    ),
    Case(
        "quota",
        (),
        r"per[ _-]?day|perday|\brpd\b|\btpd\b|daily (limit|quota)|per[ _-]?month|monthly "
        r"(limit|quota)|weekly limit|regain access on|"
        r"今日调用次数限额|使用上限",
        (
            "OpenRouter free-models-per-day: Gitlawb/openclaude#936",
            "Gemini 'Requests per day per user per tier': google-gemini/gemini-cli#10513",
            "Gemini quotaId GenerateRequestsPerDayPerProjectPerModel: words seen at Gemini",
            "Groq 'tokens per day (TPD)': continuedev/continue#10920",
            "Anthropic 400 'You have reached your specified API usage limits. You will regain access on "
            "2026-04-01': anthropics/claude-code#38035",
            "Zhipu 1304, 1308 and 1310: docs.bigmodel.cn/cn/api/api-code",
        ),
        but=r"per[ _-]?minute|perminute",
    ),
    Case(
        "credit",
        (400, 401, 402, 403, 429),
        r"insufficient[_ ](quota|balance|credit|funds)|credit[_ ]balance|billing|more credits|out of "
        r"credits|no credits|"
        r"exceeded your current quota|spend(ing)?[_ ]limit|arrearage|overdue|account is not "
        r"active|prepaid|top up|payment required|余额不足|已欠费",
        (
            "OpenAI 429 insufficient_quota: NVIDIA-NeMo/Guardrails#371",
            "Anthropic 400 'Your credit balance is too low': anthropics/claude-quickstarts#229; 429 "
            "enforced_spend_limit_reached: "
            "learn.microsoft.com/microsoft-cloud/dev/dev-proxy/concepts/anthropic-529-overloaded-error",
            "DeepSeek 402 'Insufficient Balance': api-docs.deepseek.com/quick_start/error_codes",
            "DashScope Arrearage: help.aliyun.com/en/model-studio/error-code",
            "Zhipu 429 with code 1113: zai-org/GLM-5#148, continuedev/continue#11823",
        ),
        but=_PER_MINUTE,
    ),
    Case("credit", (402,), r"", ("402 Payment Required: RFC 9110, openrouter.ai/docs/errors",)),
    Case(
        "place",
        (),
        r"(country|region|territory|location).{0,40}(not "
        r"(supported|available)|unsupported)|unsupported_country|not available in your (country|region)",
        (
            "OpenAI 403 unsupported_country_region_territory: home-assistant/core#120072",
            "Gemini 400 'User location is not supported': google-gemini/gemini-cli#24641",
        ),
    ),
    Case(
        "loading",
        (),
        r"loading model|model.{0,80}(is )?(currently |still )?(loading|being loaded|warming "
        r"up|starting)|cold start|failed_to_load_in_time",
        (
            "llama.cpp 503 'Loading model': mostlygeek/llama-swap#146",
            "Hugging Face 503 'is currently loading' with estimated_time: huggingface/unity-api#18",
        ),
        but=r"error loading|failed to load|unable to load",
    ),
    Case(
        "permission",
        (404,),
        r"guardrail restrictions|data policy|privacy",
        (
            "OpenRouter 404 'No endpoints available matching your guardrail restrictions and data policy': "
            "truefoundry/models#826",
        ),
    ),
    Case(
        "content",
        (),
        r"content[_ -]?(filter|policy|management)|responsibleai|moderation|flagged|safety "
        r"(system|filter|setting|reason)|usage polic|"
        r"prohibited[_ ]content|data_?inspection_?failed|inappropriate content|content exists "
        r"risk|sensitive (content|information|words)|敏感内容|"
        r"invalid_prompt|guardrail|blocked (by|due|because)|\bno_?image\b|recitation|policy violation",
        (
            "Azure 400 content_filter: compl-ai/compl-ai#20",
            "OpenRouter 403 flagged_input: openrouter.ai/docs/errors",
            "OpenAI 400 invalid_prompt: alan-turing-institute/t0-1#69",
            "DeepSeek 400 'Content Exists Risk': deepseek-ai/DeepSeek-V2#30",
            "DashScope data_inspection_failed: QwenLM/qwen-code#3145",
            "Kimi content_filter: platform.kimi.com/docs/api/errors",
            "Zhipu 1301: docs.bigmodel.cn/cn/api/api-code",
        ),
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
        (
            "OpenAI 400 context_length_exceeded: chathub-dev/chathub#126",
            "llama.cpp exceed_context_size_error: ggml-org/llama.cpp#15780",
            "vLLM 'maximum context length is 8192 tokens': ruipeterpan/specreason#4",
            "Gemini 'The input token count (134123) exceeds the maximum': google-gemini/gemini-cli#12214",
            "Groq 413 'Request too large for model': autohandai/code-cli#377",
            "Kimi 'Input token length too long': platform.kimi.com/docs/api/errors",
            "DashScope 'Range of input length should be': help.aliyun.com/en/model-studio/error-code",
        ),
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
        (
            "OpenAI 404 model_not_found: Aider-AI/aider#2030",
            "Ollama 404 'not found, try pulling it first': netease-youdao/QAnything#555",
            "OpenRouter 404 'No endpoints found for': vyancharuk/nodejs-api-boilerplate#16",
            "DeepSeek 400 'Model Not Exist': ConardLi/easy-dataset#9",
            "Groq 400 model_decommissioned: ItzCrazyKns/Vane#771",
            "Azure 404 DeploymentNotFound: Azure-Samples/azure-search-openai-demo-csharp#379",
        ),
        but=r"is not supported (with|by|for) th(is|e) model|not supported when|response_format|logprob",
    ),
    Case(
        "key",
        (400, 401, 403),
        r"api[_ -]?key|invalid[_ ](authentication|token|credential)|incorrect "
        r"key|unauthori[sz]ed|authentication|bearer|access token|invalid x-api-key",
        (
            "OpenAI 401 'Incorrect API key provided': platform.openai.com/docs/guides/error-codes",
            "Gemini 400 'API key not valid', API_KEY_INVALID: cequence-io/openai-scala-client#109",
            "Azure 401 'invalid subscription key': SciSharp/BotSharp#386",
            "Anthropic 401 authentication_error: docs.claude.com/en/api/errors",
            "vLLM 401 'Unauthorized': words seen at vLLM's server",
        ),
    ),
    Case("key", (401,), r"", ("401 Unauthorized: RFC 9110",)),
    Case(
        "busy",
        (),
        r"rate[_ -]?limit|too many requests|resource[_ ]?exhausted|overloaded|over capacity|capacity "
        r"exceeded|server is busy|throttl|"
        r"concurrency limit|queue is full|no available (model )?provider",
        (
            "OpenAI 429 'Rate limit reached for requests': platform.openai.com/docs/guides/error-codes",
            "Gemini 429 RESOURCE_EXHAUSTED: n4ze3m/page-assist#406",
            "Anthropic 529 overloaded_error: docs.claude.com/en/api/errors",
        ),
    ),
    Case(
        "path",
        (404, 405),
        r"\A\s*\Z|<html|\bnot found\b|no route|unknown (endpoint|path|url|request url)|invalid url|cannot "
        r"post|method not allowed|(resource|page) not found",
        (
            "OpenAI 404 'Invalid URL (POST /v1/chat/completions)': chatboxai/chatbox#199",
            "FastAPI {'detail': 'Not Found'}: fastapi.tiangolo.com/tutorial/handling-errors",
            "Express 'Cannot POST': github.com/pillarjs/finalhandler",
        ),
    ),
    Case(
        "path",
        (),
        r"unexpected endpoint or method",
        ("LM Studio answers 200 with it: lmstudio-ai/lmstudio-bug-tracker#618",),
    ),
)


def kind_of_status(status: int) -> Kind:
    """What a status means by itself. 498 is Groq's flex tier without capacity
    (console.groq.com/docs/flex-processing), 529 Anthropic's overloaded_error."""
    if status in (425, 429, 498, 503, 529):
        return "busy"
    if status in (408, 409) or status >= 500:
        return "failing"
    kinds: dict[int, Kind] = {403: "permission", 404: "path", 405: "path"}
    return kinds.get(status, "request")


class Parameter(NamedTuple):
    """``field``: of :class:`Accepts`. ``names``: as an endpoint calls it in ``param``. ``sent``: in a body.
    ``words``: what a refusal of it says.
    """

    field: str
    names: str
    sent: str
    words: str
    sources: tuple[str, ...]


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
        (
            "DashScope 400 'This model only support stream mode': FoundationAgents/OpenManus#330",
            "DashScope 400 'enable_thinking must be set to false for non-streaming calls': "
            "infiniflow/ragflow#8972",
        ),
    ),
    Parameter(
        "length_field",
        r"max_tokens",
        "max_tokens",
        r"max_completion_tokens",
        ("OpenAI 400 unsupported_parameter: ITSpecialist111/ai_automation_suggester#38",),
    ),
    Parameter(
        "logprobs",
        r"(top_)?logprobs",
        "logprobs",
        r"log_?\s?prob(s|abilit)",
        (
            "OpenAI 400 \"This model does not support the 'logprobs' parameter\": openai/openai-python#1080",
            "OpenAI 403 'You are not allowed to request logprobs from this model': words seen at OpenAI",
            "Gemini 400 'Logprobs is not enabled': mscraftsman/generative-ai#135",
            "vLLM 'max allowed: 5': vllm-project/vllm#5299",
            "Together \"5 is greater than the maximum of 1 - 'logprobs'\": stanford-crfm/helm#2325",
        ),
    ),
    Parameter(
        "seed",
        "seed",
        "seed",
        r"\bseed\b",
        (
            "Mistral 422 extra_forbidden with loc ['body', 'seed'], its own name is random_seed: "
            "langchain-ai/langchain-azure#82",
        ),
    ),
    Parameter(
        "several",
        "n|candidate_?count",
        "n",
        r"['\"`]n['\"`]|\bn ?(=|>|<|!=|must|should|is not|is un|greater|value|parameter)|only n\b|one "
        r"completion|"
        r"(multiple|several|number of) (choices|completions|candidates)|candidate_?count|best_of",
        (
            "llama.cpp 'Only one completion choice is allowed': algorithmicsuperintelligence/optillm#8",
            "Groq 400 'n must be at most 1': stanfordnlp/dspy#1155",
        ),
    ),
    Parameter(
        "temperature",
        "temperature",
        "temperature",
        r"\btemperature\b",
        ("OpenAI 400 unsupported_value 'Only the default (1) value is supported': cline/cline#341",),
    ),
    Parameter(
        "stop",
        "stop|stop_sequences",
        "stop",
        r"['\"`]stop['\"`]|\bstop (sequence|parameter|is not)",
        ("OpenAI 400 unsupported_parameter, for o3 and later: crewAIInc/crewAI#2738",),
    ),
    Parameter(
        "system",
        r"messages\[\d+\]\.role",
        "messages",
        r"(system|developer) ?(role|message|prompt|instruction)s?.{0,40}"
        + _NOT
        + r"|does not support 'system'|"
        r"roles? must alternate|only user(,| and) (assistant|model) roles",
        (
            "vLLM 400, Gemma's template 'System role not supported': huggingface/chat-ui#1386",
            "Gemini 400 'Developer instruction is not enabled': 0xPlaygrounds/rig#788",
            "OpenAI 400 \"'messages[0].role' does not support 'system'\", o1-mini: TheR1D/shell_gpt#636",
        ),
    ),
    Parameter(
        "reply_form",
        r"response_format.*|text\.format.*|.*schema.*|guided_json",
        "response_format",
        r"response_?format|response mime|json_?schema|json_?object|json mode|structured[ "
        r"_]output|grammar|guided|schema|additional_?properties|prefix_?items|"
        r"\b(min|max)_?items\b|propert(y|ies) ['\"]?(minimum|maximum)|the word 'json'",
        (
            "OpenAI 400 \"'minItems' is not permitted\": "
            "community.openai.com/t/min-maxitems-are-not-supported-in-structured-output/958567",
            "OpenAI 400 \"must contain the word 'json'\": "
            "portkey.ai/error-library/response-format-error-10006",
            "Gemini \"Unknown name 'additionalProperties'\": zed-industries/zed#44875",
            "llama.cpp 'failed to parse grammar': ggml-org/llama.cpp#19051",
            "LM Studio \"'response_format.type' must be 'json_schema' or 'text'\": words seen at LM Studio",
        ),
    ),
)
GENERIC = (
    r"requested parameters|unsupported parameter|unknown parameter|extra "
    r"(inputs|fields)|unrecogni[sz]ed (request )?(argument|parameter|field)"
)
NAMELESS = "requested parameters"
"""Of these, what names no field, though a word of it may be the name of one ("provider routing")."""
GENERIC_ORDER = ("seed", "several", "logprobs", "reply_form", "temperature", "stop")
"""A refusal that names nothing (OpenRouter 404 'No endpoints found that can handle the requested parameters':
Ammaar-Alam/minebench#119) is tried without each in turn.
"""
