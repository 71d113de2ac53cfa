"""The adapter over the ``openai`` SDK: any OpenAI-compatible endpoint, by base URL, model, and the name of the variable with the key."""

from __future__ import annotations

import email.utils
import os
import time
from collections.abc import Mapping
from typing import Any

from featureinterp.domain.usage import Usage
from featureinterp.errors import (
    EndpointRefusedError,
    EndpointUnavailableError,
    InputError,
    MalformedReplyError,
)
from featureinterp.llm.types import Reply, Request

DEFAULT_TIMEOUT_S = 120.0


class OpenAIModel:
    """A chat model behind an OpenAI-compatible endpoint. One HTTP client for its lifetime; the SDK's own retries are off.

    ``api_key_env`` names the environment variable that holds the key; the key itself is in no attribute, message or repr.
    Raises ``InputError`` at once when that variable is not set or the address is none.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = "OPENAI_API_KEY",
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"{base_url!r} is not the address of an endpoint: give one like https://host/v1")
        if "@" in base_url.split("//", 1)[1].split("/", 1)[0]:
            raise InputError("the endpoint's address holds a user name or key: name the variable that holds the key with --api-key-env instead")
        key = api_key or (os.environ.get(api_key_env, "") if api_key_env else "none")
        if not key:
            raise InputError(f"the environment variable {api_key_env} with the endpoint's key is not set: set it, or name another with --api-key-env")
        import openai

        self.name = model
        self.base_url = base_url
        self._sdk = openai
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout_s)
        self._extra = dict(extra_body or {})

    def __repr__(self) -> str:
        return f"OpenAIModel({self.base_url!r}, {self.name!r})"

    async def aclose(self) -> None:
        """Closes the HTTP client."""
        await self._client.close()

    async def complete(self, request: Request) -> Reply:
        """Sends one chat completion. Raises ``EndpointUnavailableError`` or ``EndpointRefusedError``, with what to do."""
        start = time.monotonic()
        try:
            completion = await self._client.chat.completions.create(**self._arguments(request))
        except self._sdk.OpenAIError as error:
            raise self._explain(error) from None
        return self._reply(completion, time.monotonic() - start)

    def _arguments(self, request: Request) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "n": request.n,
        }
        if request.seed is not None:
            arguments["seed"] = request.seed
        if request.stop:
            arguments["stop"] = list(request.stop)
        if request.schema is not None:
            arguments["response_format"] = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": dict(request.schema)}}
        if request.top_logprobs:
            arguments |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        if self._extra:
            arguments["extra_body"] = self._extra
        return arguments

    def _reply(self, completion: Any, seconds: float) -> Reply:
        choices = getattr(completion, "choices", None)
        if not choices:
            raise MalformedReplyError(f"{self.base_url} answered without any choice: is it an OpenAI-compatible endpoint?")
        texts, truncated, first = [], [], []
        for choice in choices:
            texts.append(choice.message.content or "")
            truncated.append(choice.finish_reason == "length")
            tokens = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
            first.append({t.token: t.logprob for t in tokens[0].top_logprobs} if tokens else {})
        usage = completion.usage
        spent = Usage(1, usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0, seconds, None)
        return Reply(tuple(texts), tuple(truncated), spent, tuple(first))

    def _explain(self, error: Exception) -> EndpointRefusedError | EndpointUnavailableError:
        """The error of ours for an error of the SDK; the SDK's message is left out where it could quote the request or the key."""
        sdk, where = self._sdk, f"the endpoint {self.base_url}"
        if isinstance(error, sdk.APITimeoutError):
            return EndpointUnavailableError(f"{where} did not answer in time: check that it is up, or raise --timeout-s")
        if isinstance(error, sdk.APIConnectionError):
            return EndpointUnavailableError(f"{where} cannot be reached: check the address and that it is up")
        if isinstance(error, sdk.APIStatusError):
            code = error.status_code
            if code in (401, 403):
                return EndpointRefusedError(f"{where} refused the key (HTTP {code}): check the variable that --api-key-env names")
            if code == 404:
                return EndpointRefusedError(f"{where} does not know the model {self.name!r} or the path (HTTP 404): check --llm-model and --base-url")
            if code in (408, 409, 429) or code >= 500:
                wait = retry_after_s(error.response.headers.get("retry-after"))
                return EndpointUnavailableError(f"{where} is overloaded or failing (HTTP {code}): try again later or lower --concurrency", wait)
            return EndpointRefusedError(f"{where} refused the request (HTTP {code}): {_detail(error)}")
        return EndpointUnavailableError(f"{where} sent an answer that cannot be read ({type(error).__name__})")


def _detail(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    message = body.get("message") or body.get("error") or "no reason given"
    return " ".join(str(message).split())[:300]


def retry_after_s(header: str | None, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms (seconds, or an HTTP date); None when there is none."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(header).timestamp()
    except (TypeError, ValueError):
        return None
    return max(0.0, moment - (time.time() if now is None else now))
