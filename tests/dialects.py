"""How endpoints refuse, fail, wait and answer: one named behaviour each, in the form in which it was seen,
for the played endpoint.

``LEARNABLE``: refusals of a parameter, which a client can put otherwise. ``FINAL``: those that it cannot.
``WAITS``: limits, and how long they ask to wait. ``REPLIES``: odd completions. ``PROVIDERS``: whole dialects,
for jobs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from endpoint import Entry, completion, digest_of, play

Body = dict[str, Any]


class Refusal(NamedTuple):
    """What is refused (``when``), and how."""

    when: Callable[[Body], bool]
    status: int
    body: Any

    def __call__(self, entry: Entry, body: Body) -> Any:
        return (self.status, {}, self.body) if "messages" in body and self.when(body) else None


def openai(
    message: str, param: str | None = None, code: str | None = None, kind: str = "invalid_request_error"
) -> Body:
    """OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def through_openrouter(inner: Any, code: int = 400) -> Body:
    """Another provider's error as OpenRouter passes it on."""
    raw = inner if isinstance(inner, str) else json.dumps(inner)
    return {
        "error": {
            "message": "Provider returned error",
            "code": code,
            "metadata": {"raw": raw, "provider_name": "Some"},
        },
        "user_id": "u",
    }


def google(code: int, message: str, status: str, *details: Body) -> list[Body]:
    """Gemini's form: a list."""
    return [{"error": {"code": code, "message": message, "status": status, "details": list(details)}}]


def has(name: str) -> Callable[[Body], bool]:
    """Whether a field is sent."""
    return lambda body: name in body


def form(body: Body) -> str | None:
    """The form of reply that is asked for."""
    return (body.get("response_format") or {}).get("type")


def schema_words(*words: str) -> Callable[[Body], bool]:
    """Whether a schema with one of the words is sent."""
    return lambda body: (
        form(body) == "json_schema" and any(f'"{w}"' in json.dumps(body["response_format"]) for w in words)
    )


def length(body: Body) -> int:
    """The limit of the reply."""
    return int(body.get("max_tokens", body.get("max_completion_tokens", 0)))


def role(name: str) -> Callable[[Body], bool]:
    """Whether a message of that role is sent."""
    return lambda body: any(m["role"] == name for m in body["messages"])


_JSON_WORD = (
    "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'."
)

LEARNABLE: dict[str, Refusal] = {
    "openai-max-completion-tokens": Refusal(
        has("max_tokens"),
        400,
        openai(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            "max_tokens",
            "unsupported_parameter",
        ),
    ),
    "copilot-max-completion-tokens": Refusal(
        has("max_tokens"),
        400,
        {
            "error": {
                "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.",
                "code": "invalid_request_body",
            }
        },
    ),
    "openai-temperature": Refusal(
        lambda b: b.get("temperature", 1) != 1,
        400,
        openai(
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) "
            "value is supported.",
            "temperature",
            "unsupported_value",
        ),
    ),
    "openai-temperature-without-param": Refusal(
        has("temperature"),
        400,
        openai("Unsupported parameter: 'temperature' is not supported with this model."),
    ),
    "openai-stop": Refusal(
        has("stop"),
        400,
        openai(
            "Unsupported parameter: 'stop' is not supported with this model.", "stop", "unsupported_parameter"
        ),
    ),
    "azure-minimum-through-openrouter": Refusal(
        lambda b: length(b) < 16,
        400,
        through_openrouter(
            openai(
                "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, but got "
                "4 instead.",
                "max_output_tokens",
                "integer_below_min_value",
            )
        ),
    ),
    "minimum-in-words": Refusal(
        lambda b: length(b) < 16, 400, openai("max_tokens must be at least 16, got 4")
    ),
    "most-tokens": Refusal(
        lambda b: length(b) > 256,
        400,
        openai(
            "max_tokens is too large: 300. This model supports at most 256 completion tokens, whereas you "
            "provided 300.",
            "max_tokens",
            "invalid_value",
        ),
    ),
    "seed-fastapi": Refusal(
        has("seed"),
        422,
        {
            "detail": [
                {
                    "type": "extra_forbidden",
                    "loc": ["body", "seed"],
                    "msg": "Extra inputs are not permitted",
                    "input": 3,
                }
            ]
        },
    ),
    "seed-mistral": Refusal(
        has("seed"),
        422,
        {
            "object": "error",
            "message": {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "seed"],
                        "msg": "Extra inputs are not permitted",
                        "input": 3,
                    }
                ]
            },
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        },
    ),
    "seed-mistral-old": Refusal(
        has("seed"),
        422,
        {
            "object": "error",
            "message": json.dumps(
                {
                    "detail": [
                        {
                            "type": "extra_forbidden",
                            "loc": ["body", "seed"],
                            "msg": "Extra inputs are not permitted",
                        }
                    ]
                }
            ),
            "type": "internal_error_proxy",
            "param": None,
            "code": "1000",
        },
    ),
    "seed-plain-text": Refusal(has("seed"), 400, b"seed is not supported by this backend"),
    "seed-gemini": Refusal(
        has("seed"),
        400,
        google(
            400,
            'Invalid JSON payload received. Unknown name "seed": Cannot find field.',
            "INVALID_ARGUMENT",
            {
                "@type": "type.googleapis.com/google.rpc.BadRequest",
                "fieldViolations": [
                    {"description": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'}
                ],
            },
        ),
    ),
    "seed-unrecognized": Refusal(has("seed"), 400, openai("Unrecognized request argument supplied: seed")),
    "seed-in-a-200": Refusal(
        has("seed"),
        200,
        {"id": None, "choices": None, "error": {"message": "seed: unsupported", "code": 400}},
    ),
    "requested-parameters": Refusal(
        has("seed"),
        404,
        {
            "error": {
                "message": "No endpoints found that can handle the requested parameters. To learn more "
                "about provider routing, visit: https://x",
                "code": 404,
            }
        },
    ),
    "logprobs-403": Refusal(
        has("logprobs"), 403, openai("You are not allowed to request logprobs from this model", "logprobs")
    ),
    "logprobs-404": Refusal(
        has("logprobs"), 404, {"error": {"message": "No endpoints found that support logprobs.", "code": 404}}
    ),
    "logprobs-gemini": Refusal(
        has("logprobs"), 400, google(400, "Logprobs is not enabled for models/some", "INVALID_ARGUMENT")
    ),
    "logprobs-gaudi": Refusal(
        has("logprobs"),
        400,
        openai(
            "Gaudi doesn't support logprobs. Please remove 'logprobs'/'top_logprobs' from your request to "
            "receive a response.",
            kind="BadRequestError",
        ),
    ),
    "logprobs-500": Refusal(has("logprobs"), 500, {"error": "logprobs are not implemented"}),
    "few-logprobs-vllm": Refusal(
        lambda b: b.get("top_logprobs", 0) > 5,
        400,
        {
            "object": "error",
            "message": "Requested sample logprobs of 10, which is greater than max allowed: 5",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
    ),
    "few-logprobs-together": Refusal(
        lambda b: b.get("top_logprobs", 0) > 1,
        400,
        openai("10 is greater than the maximum of 1 - 'logprobs'", "logprobs"),
    ),
    "few-logprobs-openai": Refusal(
        lambda b: b.get("top_logprobs", 0) > 5,
        400,
        openai(
            "Invalid value for 'top_logprobs': must be less than or equal to 5.",
            "top_logprobs",
            "invalid_value",
        ),
    ),
    "n-llama-cpp": Refusal(
        has("n"),
        400,
        {
            "error": {
                "code": 400,
                "message": "Only one completion choice is allowed",
                "type": "invalid_request_error",
            }
        },
    ),
    "n-llama-cpp-500": Refusal(
        has("n"),
        500,
        {"error": {"code": 500, "message": "Only one completion choice is allowed", "type": "server_error"}},
    ),
    "n-groq": Refusal(has("n"), 400, openai("'n' : number must be at most 1", None)),
    "n-gemini": Refusal(
        has("n"), 400, google(400, "Multiple candidates is not enabled for models/some", "INVALID_ARGUMENT")
    ),
    "n-in-words": Refusal(has("n"), 422, openai("n must be 1 for this model", "n")),
    "schema-openai-bounds": Refusal(
        schema_words("minimum", "minItems", "prefixItems"),
        400,
        openai(
            "Invalid schema for response_format 'reply': In context=('properties', 'levels'), 'minItems' "
            "is not permitted.",
            "response_format",
        ),
    ),
    "schema-openai-items": Refusal(
        schema_words("prefixItems"),
        400,
        openai(
            "Invalid schema for response_format 'reply': In context=('properties', 'levels'), array schema "
            "missing items.",
            "response_format",
        ),
    ),
    "schema-gemini-additional": Refusal(
        schema_words("additionalProperties"),
        400,
        google(
            400,
            'Invalid JSON payload received. Unknown name "additionalProperties" at '
            "'generation_config.response_schema': Cannot find field.",
            "INVALID_ARGUMENT",
        ),
    ),
    "schema-gemini-through-openrouter": Refusal(
        schema_words("additionalProperties"),
        200,
        {"choices": None}
        | through_openrouter(
            google(
                400,
                'Invalid JSON payload received. Unknown name "additionalProperties" at '
                "'generation_config.response_schema': Cannot find field.",
                "INVALID_ARGUMENT",
            )[0]
        ),
    ),
    "schema-anthropic-bounds": Refusal(
        schema_words("minimum", "maximum"),
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "output_format.schema: For 'integer' type, properties maximum, minimum are not "
                "supported",
            },
        },
    ),
    "schema-grammar-500": Refusal(
        schema_words("prefixItems", "minItems"),
        500,
        {"error": {"code": 500, "message": "failed to parse grammar", "type": "server_error"}},
    ),
    "schema-deepseek": Refusal(
        lambda b: form(b) == "json_schema",
        400,
        openai("This response_format type is unavailable now", None, "invalid_request_error"),
    ),
    "schema-and-object": Refusal(
        lambda b: form(b) is not None,
        400,
        openai("Unsupported value: response_format is not supported with this model", "response_format"),
    ),
    "object-wants-the-word": Refusal(
        lambda b: (
            form(b) == "json_schema"
            or (form(b) == "json_object" and "json" not in json.dumps(b["messages"]).lower())
        ),
        400,
        openai(_JSON_WORD, "messages"),
    ),
    "system-gemma": Refusal(
        role("system"),
        400,
        {"object": "error", "message": "System role not supported", "type": "BadRequestError", "code": 400},
    ),
    "system-gemini": Refusal(
        role("system"),
        400,
        google(400, "Developer instruction is not enabled for models/gemma-3-27b-it", "INVALID_ARGUMENT"),
    ),
    "system-o1": Refusal(
        role("system"),
        400,
        openai(
            "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
            "messages[0].role",
            "unsupported_value",
        ),
    ),
    "stream-dashscope": Refusal(
        lambda b: not b.get("stream"),
        400,
        {
            "error": {
                "code": "invalid_parameter_error",
                "param": None,
                "type": "invalid_request_error",
                "message": "This model only support stream mode, please enable the stream parameter to "
                "access the model. ",
            },
            "request_id": "r",
        },
    ),
    "stream-thinking": Refusal(
        lambda b: not b.get("stream"),
        400,
        {
            "error": {
                "code": "invalid_parameter_error",
                "message": "parameter.enable_thinking must be set to false for non-streaming calls",
            }
        },
    ),
}
"""Each with the parameter that stands in the bodies which are sent to it in tests."""


class Final(NamedTuple):
    """A refusal that nothing helps: ``error`` is the name of ours, ``says`` what the sentence has in it."""

    status: int
    body: Any
    error: str
    says: str


_KEY = "EndpointRefusedError"
_CONTENT = "ContentRefusedError"
_BUSY = "EndpointBusyError"
FINAL: dict[str, Final] = {
    "key-openai": Final(
        401, openai("Incorrect API key provided: sk-x.", None, "invalid_api_key"), _KEY, "refused the key"
    ),
    "key-gemini": Final(
        400,
        google(400, "API key not valid. Please pass a valid API key.", "INVALID_ARGUMENT"),
        _KEY,
        "refused the key",
    ),
    "key-vllm": Final(401, {"error": "Unauthorized"}, _KEY, "refused the key"),
    "key-empty": Final(401, b"", _KEY, "refused the key"),
    "credit-402": Final(
        402,
        {"error": {"message": "Insufficient credits. Add more using https://x", "code": 402}},
        _KEY,
        "no credit left",
    ),
    "credit-402-max-tokens": Final(
        402,
        {
            "error": {
                "message": "This request requires more credits, or fewer max_tokens. You requested up to "
                "300 tokens, but can only afford 12.",
                "code": 402,
            }
        },
        _KEY,
        "no credit left",
    ),
    "credit-openai-quota": Final(
        429,
        openai(
            "You exceeded your current quota, please check your plan and billing details.",
            None,
            "insufficient_quota",
            "insufficient_quota",
        ),
        _KEY,
        "no credit left",
    ),
    "credit-anthropic": Final(
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "Your credit balance is too low to access the API.",
            },
        },
        _KEY,
        "no credit left",
    ),
    "credit-deepseek": Final(
        402,
        openai("Insufficient Balance", None, "invalid_request_error", "unknown_error"),
        _KEY,
        "no credit left",
    ),
    "quota-anthropic-month": Final(
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "You have reached your specified API usage limits. You will regain access on "
                "2026-04-01 at 00:00 UTC.",
            },
        },
        _KEY,
        "limit per day or month",
    ),
    "credit-anthropic-spend-limit": Final(
        429,
        {
            "type": "error",
            "error": {
                "type": "rate_limit_error",
                "message": "This request would exceed what your organization may spend.",
                "details": {"error_code": "enforced_spend_limit_reached"},
            },
        },
        _KEY,
        "no credit left",
    ),
    "quota-openrouter-day": Final(
        429,
        {"error": {"message": "Rate limit exceeded: free-models-per-day", "code": 429}},
        _KEY,
        "limit per day",
    ),
    "quota-gemini-day": Final(
        429,
        google(
            429,
            "You exceeded your current quota, please check your plan and billing details.",
            "RESOURCE_EXHAUSTED",
            {"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]},
        ),
        _KEY,
        "limit per day",
    ),
    "place-openai": Final(
        403,
        openai(
            "Country, region, or territory not supported",
            None,
            "unsupported_country_region_territory",
            "request_forbidden",
        ),
        _KEY,
        "country or region",
    ),
    "place-gemini": Final(
        400,
        google(400, "User location is not supported for the API use.", "FAILED_PRECONDITION"),
        _KEY,
        "country or region",
    ),
    "permission-403": Final(
        403,
        {"error": {"message": "Project proj_1 does not have access to it", "type": "invalid_request_error"}},
        _KEY,
        "does not permit this",
    ),
    "permission-gemini": Final(
        403,
        google(403, "The caller does not have permission", "PERMISSION_DENIED"),
        _KEY,
        "does not permit this",
    ),
    "permission-data-policy": Final(
        404,
        {
            "error": {
                "message": "No endpoints available matching your guardrail restrictions and data policy.",
                "code": 404,
            }
        },
        _KEY,
        "does not permit this",
    ),
    "firewall-page": Final(
        403,
        b"<!DOCTYPE html><html><head><title>Attention Required! | Cloudflare</title></head></html>",
        _KEY,
        "firewall",
    ),
    "model-openai": Final(
        404,
        openai("The model `m` does not exist or you do not have access to it.", None, "model_not_found"),
        _KEY,
        "know the model 'm'",
    ),
    "model-ollama": Final(
        404,
        {"error": {"message": 'model "m" not found, try pulling it first', "type": "api_error"}},
        _KEY,
        "know the model 'm'",
    ),
    "model-openrouter": Final(
        400, {"error": {"message": "m is not a valid model ID", "code": 400}}, _KEY, "know the model 'm'"
    ),
    "model-none-left": Final(
        404,
        {"error": {"message": "No endpoints found for vendor/m:free.", "code": 404}},
        _KEY,
        "know the model 'm'",
    ),
    "model-deepseek": Final(400, openai("Model Not Exist"), _KEY, "know the model 'm'"),
    "model-groq": Final(
        400,
        openai(
            "The model `m` has been decommissioned and is no longer supported.", None, "model_decommissioned"
        ),
        _KEY,
        "know the model 'm'",
    ),
    "model-azure": Final(
        404,
        {
            "error": {
                "code": "DeploymentNotFound",
                "message": "The API deployment for this resource does not exist.",
            }
        },
        _KEY,
        "know the model 'm'",
    ),
    "path-fastapi": Final(404, {"detail": "Not Found"}, _KEY, "--base-url"),
    "path-lm-studio": Final(
        200, {"error": "Unexpected endpoint or method. (POST /v1/chat/completions)"}, _KEY, "--base-url"
    ),
    "path-page": Final(200, b"<!DOCTYPE html><html><title>Hello</title></html>", _KEY, "web page"),
    "content-azure": Final(
        400,
        {
            "error": {
                "message": "The response was filtered due to the prompt triggering Azure OpenAI's content "
                "management policy.",
                "type": None,
                "param": "prompt",
                "code": "content_filter",
                "status": 400,
                "innererror": {"code": "ResponsibleAIPolicyViolation"},
            }
        },
        _CONTENT,
        "content management policy",
    ),
    "content-openrouter": Final(
        403,
        {
            "error": {
                "message": 'Your chosen model requires moderation and your input was flagged for "violence"',
                "code": 403,
                "metadata": {
                    "reasons": ["violence"],
                    "flagged_input": "seed n temperature",
                    "provider_name": "OpenAI",
                    "model_slug": "m",
                },
            }
        },
        _CONTENT,
        "violence",
    ),
    "content-openai": Final(
        400,
        openai(
            "Invalid prompt: your prompt was flagged as potentially violating our usage policy.",
            None,
            "invalid_prompt",
        ),
        _CONTENT,
        "usage policy",
    ),
    "content-deepseek": Final(
        400, openai("Content Exists Risk", None, "invalid_request_error"), _CONTENT, "Content Exists Risk"
    ),
    "content-dashscope": Final(
        400,
        {
            "error": {
                "code": "data_inspection_failed",
                "message": "Input data may contain inappropriate content.",
            }
        },
        _CONTENT,
        "inappropriate content",
    ),
    "long-openai": Final(
        400,
        openai(
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 "
            "tokens.",
            "messages",
            "context_length_exceeded",
        ),
        "RequestRefusedError",
        "too long",
    ),
    "long-llama-cpp": Final(
        400,
        {
            "error": {
                "code": 400,
                "message": "the request exceeds the available context size, try increasing it",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": 9000,
                "n_ctx": 4096,
            }
        },
        "RequestRefusedError",
        "too long",
    ),
    "long-vllm-names-a-field": Final(
        400,
        {
            "object": "error",
            "message": "'max_tokens' or 'max_completion_tokens' is too large: 300. This model's maximum "
            "context length is 256 tokens and "
            "your request has 200 input tokens",
            "type": "BadRequestError",
            "code": 400,
        },
        "RequestRefusedError",
        "too long",
    ),
    "request-fastapi": Final(
        422,
        {"detail": [{"loc": ["body", "messages"], "msg": "field required", "type": "missing"}]},
        "RequestRefusedError",
        "field required",
    ),
    "request-plain": Final(400, b"bad request: it is purple", "RequestRefusedError", "it is purple"),
    "busy-overloaded": Final(
        529,
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
        _BUSY,
        "Overloaded",
    ),
    "busy-in-a-200": Final(
        200,
        {"id": None, "choices": None, "error": {"message": "ResourceExhausted: worker limit", "code": 429}},
        _BUSY,
        "worker limit",
    ),
    "credit-zhipu": Final(
        429, {"error": {"code": "1113", "message": "余额不足或无可用资源包,请充值。"}}, _KEY, "no credit left"
    ),
    "credit-z-ai": Final(
        429,
        {
            "error": {
                "code": "1113",
                "message": "Insufficient balance or no resource package. Please recharge.",
            }
        },
        _KEY,
        "no credit left",
    ),
    "quota-zhipu": Final(
        429, {"error": {"code": "1304", "message": "该 API 已达今日调用次数限额"}}, _KEY, "limit per day"
    ),
    "content-zhipu": Final(
        400,
        {"error": {"code": "1301", "message": "系统检测到输入或生成内容可能包含不安全或敏感内容"}},
        _CONTENT,
        "敏感内容",
    ),
    "content-kimi": Final(
        400,
        {
            "error": {
                "type": "content_filter",
                "message": "The request was rejected because it was considered high risk",
            }
        },
        _CONTENT,
        "high risk",
    ),
    "long-kimi": Final(
        400,
        {"error": {"type": "invalid_request_error", "message": "Input token length too long"}},
        "RequestRefusedError",
        "finds the prompt too long",
    ),
    "busy-dashscope-tokens": Final(
        429,
        openai(
            "You exceeded your current quota, please check your plan and billing details. "
            "For details, see: https://help.aliyun.com/zh/model-studio/error-code#token-limit",
            "insufficient_quota",
            "insufficient_quota",
            "insufficient_quota",
        ),
        _BUSY,
        "error-code#token-limit",
    ),
    "busy-gemini-in-words": Final(
        429,
        {
            "error": {
                "message": "You exceeded your current quota, please check your plan. Please retry in 30.638s."
            }
        },
        _BUSY,
        "retry in 30.638s",
    ),
    "busy-openrouter-in-flight": Final(
        402,
        {
            "error": {
                "code": 402,
                "message": "Too much is in flight",
                "metadata": {"limit_source": "openrouter_in_flight_budget"},
            }
        },
        _BUSY,
        "in flight",
    ),
    "busy-groq-flex": Final(
        498, openai("Flex tier capacity exceeded", None, "capacity_exceeded"), _BUSY, "capacity exceeded"
    ),
    "busy-raw": Final(
        429,
        through_openrouter("m is temporarily rate-limited upstream. Please retry shortly", 429),
        _BUSY,
        "rate-limited upstream",
    ),
    "loading-llama-cpp": Final(
        503,
        {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}},
        _BUSY,
        "still loading",
    ),
    "failing-raw": Final(
        502,
        through_openrouter("upstream connect error", 502),
        "EndpointUnavailableError",
        "upstream connect error",
    ),
    "failing-page": Final(
        502,
        b"<html><head><title>502 Bad Gateway</title></head></html>",
        "EndpointUnavailableError",
        "502 Bad Gateway",
    ),
}


class Wait(NamedTuple):
    """A limit that asks to wait, and for how many seconds."""

    status: int
    headers: dict[str, str]
    body: Any
    seconds: float


WAITS: dict[str, Wait] = {
    "retry-after": Wait(429, {"Retry-After": "7"}, {}, 7),
    "retry-after-ms": Wait(
        429, {"retry-after-ms": "1500", "Retry-After": "2"}, openai("Too many requests"), 1.5
    ),
    "retry-delay-gemini": Wait(
        429,
        {},
        google(
            429,
            "You exceeded your current quota, please check your plan and billing details.",
            "RESOURCE_EXHAUSTED",
            {"violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}]},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"},
        ),
        34.5,
    ),
    "reset-openai": Wait(
        429,
        {
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "120ms",
            "x-ratelimit-remaining-tokens": "10",
            "x-ratelimit-reset-tokens": "6m0s",
        },
        openai("Rate limit reached"),
        0.12,
    ),
    "reset-groq": Wait(
        429,
        {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m7.66s"},
        openai("Rate limit reached", None, "rate_limit_exceeded"),
        67.66,
    ),
    "words-groq": Wait(
        429,
        {},
        openai(
            "Rate limit reached for model `m` on tokens per minute (TPM): Limit 15000, Used 11972, "
            "Requested 4351. Please try again in 5.289s. Visit x"
        ),
        5.289,
    ),
    "words-openai": Wait(
        429, {}, openai("Rate limit reached for requests. Limit: 3 / min. Please try again in 1m20s."), 80
    ),
    "words-milliseconds": Wait(429, {}, openai("Please try again in 350ms."), 0.35),
    "estimated-time": Wait(503, {}, {"error": "Model m is currently loading", "estimated_time": 20.5}, 20.5),
    "azure-words": Wait(
        429,
        {},
        {
            "error": {
                "code": "429",
                "message": "Requests have exceeded the token rate limit. Please retry after 6 seconds.",
            }
        },
        6,
    ),
}


def changed(change: Callable[[Body, Body], None]) -> Callable[[Body], Body]:
    """The usual answer, but for its first choice or its message."""

    def answer(body: Body) -> Body:
        whole = play(body)
        change(whole, whole["choices"][0])
        return whole

    return answer


def message(**fields: Any) -> Callable[[Body], Body]:
    """The usual answer with other fields of its message."""
    return changed(lambda whole, choice: choice["message"].update(fields))


def events(whole: Body, *, done: bool = True) -> bytes:
    """A completion as a stream, two characters a piece."""
    pieces: list[Any] = [
        {"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    ]
    for choice in whole["choices"]:
        text, index = choice["message"]["content"] or "", choice["index"]
        pieces += [
            {"id": "x", "choices": [{"index": index, "delta": {"content": text[i : i + 2]}}]}
            for i in range(0, len(text), 2)
        ]
        last = {"index": index, "delta": {}, "finish_reason": choice["finish_reason"]}
        pieces.append(
            {
                "id": "x",
                "choices": [last | ({"logprobs": choice["logprobs"]} if choice.get("logprobs") else {})],
            }
        )
    pieces.append({"id": "x", "choices": [], "usage": whole["usage"]})
    lines = [": comment", *(f"data: {json.dumps(p)}" for p in pieces), *(["data: [DONE]"] if done else [])]
    return "\r\n\r\n".join(lines).encode() + b"\r\n\r\n"


STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}


def streamed(entry: Entry, body: Body) -> Any:
    """Answers as a stream when it is asked for one."""
    return (200, STREAM, events(play(body))) if body.get("stream") else None


def first_of(*dialects: Callable[[Entry, Body], Any]) -> Callable[[Entry, Body], Any]:
    """The first that answers."""
    return lambda entry, body: next((found for d in dialects if (found := d(entry, body)) is not None), None)


def thinking(entry: Entry, body: Body) -> Any:
    """A model that thinks for 200 tokens before it answers."""
    if "messages" not in body or length(body) >= 210:
        return None
    spent = {"prompt_tokens": 11, "completion_tokens": length(body), "total_tokens": 11 + length(body)}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": None, "reasoning_content": "Let me see"},
        "finish_reason": "length",
    }
    return {"id": "x", "choices": [choice], "usage": spent}


def at_path(*paths: str, otherwise: Any = (404, {}, {"detail": "Not Found"})) -> Callable[[Entry, Body], Any]:
    """Answers at some paths only."""
    return lambda entry, body: None if entry.path in paths else otherwise


def azure(entry: Entry, body: Body) -> Any:
    """Azure: the key in ``api-key``, and a version in the query."""
    if entry.key is not None or not entry.headers.get("api-key"):
        return (
            401,
            {},
            {
                "error": {
                    "code": "401",
                    "message": "Access denied due to invalid subscription key or wrong API endpoint.",
                }
            },
        )
    if "api-version=" not in entry.path:
        return 404, {}, {"error": {"code": "404", "message": "Resource not found"}}
    return None


def ignored(*names: str) -> Callable[[Entry, Body], Any]:
    """Plays as if fields had not been sent."""

    def dialect(entry: Entry, body: Body) -> Any:
        return (
            play({name: value for name, value in body.items() if name not in names})
            if "messages" in body
            else None
        )

    return dialect


_OBJECT = {
    "colour": "red",
    "explanation": "words about ",
    "rules": [{"activates_on": "words", "strength": 4}],
    "levels": [],
    "texts": [],
}


def any_object(entry: Entry, body: Body) -> Any:
    """JSON without a schema: an object with everything that may be asked for."""
    if form(body) != "json_object":
        return None
    whole = play(body)
    words = _OBJECT | {"explanation": f"words about {digest_of(body)}"}
    whole["choices"][0]["message"]["content"] = json.dumps(words)
    return whole


_LM_STUDIO_FORMS = Refusal(
    lambda b: form(b) == "json_object",
    400,
    {"error": "'response_format.type' must be 'json_schema' or 'text'"},
)

PROVIDERS: dict[str, Callable[[Entry, Body], Any]] = {
    "openai": first_of(
        LEARNABLE["openai-max-completion-tokens"],
        LEARNABLE["openai-temperature"],
        LEARNABLE["logprobs-403"],
        thinking,
    ),
    "azure": first_of(azure, LEARNABLE["schema-openai-bounds"], LEARNABLE["minimum-in-words"]),
    "openrouter": first_of(
        LEARNABLE["requested-parameters"],
        LEARNABLE["azure-minimum-through-openrouter"],
        LEARNABLE["logprobs-404"],
    ),
    "gemini": first_of(
        LEARNABLE["schema-gemini-additional"],
        LEARNABLE["logprobs-gemini"],
        LEARNABLE["n-gemini"],
        LEARNABLE["seed-gemini"],
    ),
    "anthropic": first_of(
        LEARNABLE["schema-anthropic-bounds"], ignored("logprobs", "top_logprobs", "seed", "n")
    ),
    "together": first_of(LEARNABLE["few-logprobs-together"]),
    "groq": first_of(
        LEARNABLE["n-groq"], LEARNABLE["logprobs-gaudi"], LEARNABLE["schema-deepseek"], any_object
    ),
    "mistral": first_of(LEARNABLE["seed-mistral"], LEARNABLE["logprobs-403"]),
    "deepseek": first_of(
        LEARNABLE["schema-deepseek"], LEARNABLE["object-wants-the-word"], thinking, any_object
    ),
    "dashscope": first_of(LEARNABLE["stream-dashscope"], streamed),
    "vllm": first_of(LEARNABLE["few-logprobs-vllm"], LEARNABLE["system-gemma"]),
    "sglang": first_of(LEARNABLE["seed-fastapi"], thinking),
    "llama.cpp": first_of(LEARNABLE["n-llama-cpp"], LEARNABLE["schema-grammar-500"]),
    "ollama": ignored("n", "logprobs", "top_logprobs"),
    "lm-studio": first_of(
        at_path(
            "/v1/chat/completions",
            otherwise=(200, {}, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}),
        ),
        _LM_STUDIO_FORMS,
    ),
}


def whole(text: str, **fields: Any) -> Body:
    """A completion of one text with other fields of its message."""
    found = completion(text)
    found["choices"][0]["message"].update(fields)
    return found


REFUSED_AT_FIRST = Refusal(lambda _: True, FINAL["credit-402"].status, FINAL["credit-402"].body)
"""Refuses everything."""
