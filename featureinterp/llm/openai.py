"""The adapter over the ``openai`` SDK: any OpenAI-compatible endpoint, by base URL, model, and the name of the variable with the key."""

from __future__ import annotations

import email.utils
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import anyio

from featureinterp.domain.usage import Usage
from featureinterp.errors import (
    EndpointRefusedError,
    EndpointUnavailableError,
    InputError,
    LanguageModelError,
    MalformedReplyError,
    RequestRefusedError,
)
from featureinterp.llm.roles import as_text
from featureinterp.llm.secrets import Secrets, check_address, check_variable
from featureinterp.llm.types import Reply, Request
from featureinterp.llm.usage import reported_usage
from featureinterp.tasks import Turns

DEFAULT_TIMEOUT_S = 120.0
MAX_CONNECTIONS = 1024
ReplyForm = Literal["json_schema", "json_object", "text"]
_CHAT, _COMPLETIONS = "chat/completions", "completions"
_FORMS: tuple[ReplyForm, ...] = ("json_schema", "json_object", "text")


@dataclass
class Accepts:
    """What an endpoint takes, learnt from its refusals: each is tried once and left out from then on. ``reply_form``: the strictest form of
    a structured reply. ``several``: replies to one request. ``prompt_logprobs``: the field that asks for them, None when neither is taken."""

    reply_form: ReplyForm = "json_schema"
    logprobs: bool = True
    seed: bool = True
    temperature: bool = True
    several: bool = True
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    prompt_logprobs: Literal["prompt_logprobs", "echo"] | None = "prompt_logprobs"


class OpenAIModel:
    """A model behind an OpenAI-compatible endpoint. One HTTP client for its lifetime; the SDK's own retries are off.

    ``api_key_env`` names the environment variable that holds the key; the key itself is in no attribute, message or repr. None: no key
    is sent, but to OpenAI itself that of ``OPENAI_API_KEY``, which nobody else gets to see unless it is named.
    ``timeout_s`` bounds a whole request, also one that is answered drop by drop. Raises ``InputError`` at once when that variable is
    not set or the address is none.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        extra_body: Mapping[str, Any] | None = None,
        accepts: Accepts | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"{base_url!r} is not the address of an endpoint: give one like https://host/v1")
        check_address(base_url)
        check_variable(api_key_env)
        if api_key_env is None and api_key is None and urlsplit(base_url).hostname == "api.openai.com":
            api_key_env = "OPENAI_API_KEY"
        key = api_key or (os.environ.get(api_key_env, "") if api_key_env else "none")
        if not key:
            raise InputError(f"the environment variable {api_key_env} with the endpoint's key is not set: set it, or name another with --api-key-env")
        import openai

        self.name = model
        self.base_url = base_url
        self.timeout_s = timeout_s
        self.accepts = accepts or Accepts()
        self._key_env = api_key_env
        self._sdk = openai
        self._extra = dict(extra_body or {})
        from featureinterp.llm.transport import EndpointClient, read_json

        self._read_json = read_json
        self._secrets = Secrets(key)
        client = EndpointClient(base_url, self._secrets, limits=_limits(MAX_CONNECTIONS), timeout=timeout_s)
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout_s, http_client=client)
        self._turns = Turns()
        base = self._client.base_url  # whole addresses, which the SDK would put together and take apart again with every request
        self._addresses = {path: str(base.copy_with(raw_path=base.raw_path + path.encode())) for path in (_CHAT, _COMPLETIONS)}

    def __repr__(self) -> str:
        return f"OpenAIModel({self.base_url!r}, {self.name!r})"

    @property
    def identity(self) -> list[Any]:
        """What beside a request determines the answer."""
        return [self.base_url.rstrip("/"), self._extra]

    async def aclose(self) -> None:
        """Closes the HTTP client."""
        await self._client.close()

    async def complete(self, request: Request) -> Reply:
        """Sends one completion, once more for each parameter that the endpoint turns out not to take.

        Raises ``EndpointUnavailableError``, ``EndpointRefusedError`` or ``MalformedReplyError``, with what to do.
        """
        await self._turns.take()
        start = time.monotonic()
        while True:
            try:
                with anyio.fail_after(self.timeout_s):
                    if request.prompt:
                        return await self._read(request, start)
                    completion = await self._post(_CHAT, self._arguments(request))
                return self._reply(completion, time.monotonic() - start)
            except TimeoutError:
                raise EndpointUnavailableError(self._late()) from None
            except (self._sdk.OpenAIError, ValueError) as error:  # a body that is no JSON is a ValueError
                if not self._give_way(error, request):
                    raise self._explain(error, time.monotonic() - start) from None

    def _arguments(self, request: Request) -> dict[str, Any]:
        accepts = self.accepts
        arguments: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": m.role, "content": as_text(m.content)} for m in request.messages],
            accepts.length_field: request.max_tokens,
        }
        if accepts.temperature:
            arguments["temperature"] = request.temperature
        if request.n != 1 and accepts.several:
            arguments["n"] = request.n
        if request.seed is not None and accepts.seed:
            arguments["seed"] = request.seed
        if request.stop:
            arguments["stop"] = list(request.stop)
        if request.schema is not None and accepts.reply_form == "json_schema":
            arguments["response_format"] = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": dict(request.schema)}}
        elif request.schema is not None and accepts.reply_form == "json_object":
            arguments["response_format"] = {"type": "json_object"}
        if request.top_logprobs and accepts.logprobs:
            arguments |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return arguments | self._extra

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that an endpoint answers. The SDK's typed methods build a tree of models out of each request and reply, which costs more than
        everything else together."""
        return self._read_json(await self._client.post(self._addresses[path], cast_to=bytes, body=body), self.base_url)

    def _give_way(self, error: Exception, request: Request) -> bool:
        """Whether a refusal was about a parameter that can be left out or put otherwise; it then is, from now on."""
        if request.prompt or not isinstance(error, self._sdk.APIStatusError) or error.status_code not in (400, 415, 422, 501):
            return False
        accepts, about = self.accepts, _about(error)
        if accepts.length_field in about and "max_completion_tokens" in about and accepts.length_field == "max_tokens":
            accepts.length_field = "max_completion_tokens"
        elif request.top_logprobs and accepts.logprobs and "logprob" in about:
            accepts.logprobs = False
        elif request.seed is not None and accepts.seed and re.search(r"\bseed\b", about):
            accepts.seed = False
        elif request.n != 1 and accepts.several and re.search(r"\bn\b", about):
            accepts.several = False
        elif accepts.temperature and "temperature" in about:
            accepts.temperature = False
        elif request.schema is not None and accepts.reply_form != "text" and _speaks_of_form(about):
            accepts.reply_form = _FORMS[_FORMS.index(accepts.reply_form) + 1]
        else:
            return False
        return True

    async def _read(self, request: Request, start: float) -> Reply:
        """Probabilities at places of a prompt, from the completions API, in whichever of the two ways the endpoint knows."""
        ways = ("prompt_logprobs", "echo")
        first = ways.index(self.accepts.prompt_logprobs) if self.accepts.prompt_logprobs else len(ways)
        for way in ways[first:]:
            arguments: dict[str, Any] = {"model": self.name, "prompt": list(request.prompt), "max_tokens": 1, "temperature": 0.0}
            arguments |= {"echo": True, "logprobs": request.top_logprobs} if way == "echo" else {"prompt_logprobs": request.top_logprobs}
            try:
                completion = await self._post(_COMPLETIONS, arguments | self._extra)
            except self._sdk.APIStatusError as error:
                if error.status_code not in (400, 404, 405, 415, 422, 501):
                    raise
                continue
            found = read_prompt(completion, request.read_at)
            if found is not None:
                self.accepts.prompt_logprobs = way  # type: ignore[assignment]
                return Reply(("",), (False,), self._usage(completion, time.monotonic() - start), ({},), found)
        self.accepts.prompt_logprobs = None
        raise EndpointRefusedError(
            f"the endpoint {self.base_url} gives no probabilities of a prompt's tokens: vLLM does (/v1/completions with prompt_logprobs, or echo with "
            "logprobs), llama.cpp's server and OpenAI's chat models do not; use --simulator rated, or a local simulator"
        )

    def _reply(self, completion: Any, seconds: float) -> Reply:
        choices = completion.get("choices") if isinstance(completion, dict) else None
        if not choices:
            raise MalformedReplyError(f"{self.base_url} answered without any choice: is it an OpenAI-compatible endpoint?")
        texts, truncated, first = [], [], []
        try:
            for choice in choices:
                texts.append(str(choice["message"].get("content") or ""))
                truncated.append(choice.get("finish_reason") == "length")
                tokens = (choice.get("logprobs") or {}).get("content") or []
                first.append({str(t["token"]): float(t["logprob"]) for t in tokens[0].get("top_logprobs") or ()} if tokens else {})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"[:100]
            raise MalformedReplyError(f"{self.base_url} answered in another form than OpenAI's ({problem}): is it an OpenAI-compatible endpoint?") from None
        return Reply(tuple(texts), tuple(truncated), self._usage(completion, seconds), tuple(first))

    @staticmethod
    def _usage(completion: Any, seconds: float) -> Usage:
        return reported_usage(completion, seconds)

    def _late(self) -> str:
        return f"the endpoint {self.base_url} did not answer within {self.timeout_s:g} s: check that it is up, or raise --timeout-s"

    def _explain(self, error: Exception, seconds: float) -> LanguageModelError:
        """The error of ours for an error of the SDK; the SDK's message is left out where it could quote the request or the key."""
        sdk, where = self._sdk, f"the endpoint {self.base_url}"
        if isinstance(error, sdk.APITimeoutError) and seconds >= 0.9 * self.timeout_s:  # a broken connection is reported as one, too
            return EndpointUnavailableError(self._late())
        if isinstance(error, sdk.APIConnectionError):
            return EndpointUnavailableError(f"{where} cannot be reached, or broke the connection: check the address and that it is up")
        if isinstance(error, sdk.APIStatusError):
            code = error.status_code
            if code in (401, 403):
                named = f"the environment variable {self._key_env}" if self._key_env else "the variable that --api-key-env names"
                return EndpointRefusedError(f"{where} refused the key (HTTP {code}): check {named}")
            if code == 404:
                return EndpointRefusedError(f"{where} does not know the model {self.name!r} or the path (HTTP 404): check --llm-model and --base-url")
            if code in (408, 409, 429) or code >= 500:
                wait = retry_after_s(error.response.headers.get("retry-after"))
                return EndpointUnavailableError(f"{where} is overloaded or failing (HTTP {code}): try again later or lower --concurrency", wait)
            return RequestRefusedError(f"{where} refused the request (HTTP {code}): {self._safe(_message(error))}")
        return EndpointUnavailableError(f"{where} sent an answer that cannot be read ({type(error).__name__}): check that it is an OpenAI-compatible endpoint")

    def _safe(self, text: str) -> str:
        """A text of the endpoint's on one line, bounded, without the key should it be quoted."""
        return " ".join(self._secrets.clean(text).split())[:300]


def _limits(connections: int) -> Any:
    import httpx2

    return httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)


def _message(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("error")
    return str(body.get("message") or (inner.get("message") if isinstance(inner, dict) else inner) or "no reason given")


def _about(error: Any) -> str:
    """What a refusal says, in small letters, with the name of the parameter when it is given."""
    body = error.body if isinstance(error.body, dict) else {}
    return f"{_message(error)} {body.get('param') or ''}".lower()


def _speaks_of_form(about: str) -> bool:
    return bool(re.search(r"response_?format|json_schema|json_object|json schema|structured output|grammar|guided", about))


def read_prompt(completion: Any, places: tuple[int, ...]) -> tuple[dict[str, float], ...] | None:
    """Alternatives at ``places`` of a prompt that was sent as token ids, from either form of answer; None when it holds none.

    vLLM's ``prompt_logprobs``: per token None or ``{token id: {logprob, decoded_token}}``. The completions API with ``echo``:
    ``logprobs.top_logprobs``, per token None or ``{text: logprob}``.
    """
    try:
        choice = (completion.get("choices") or [{}])[0]
        per_token = choice.get("prompt_logprobs") or completion.get("prompt_logprobs") or (choice.get("logprobs") or {}).get("top_logprobs")
    except (AttributeError, KeyError, TypeError):
        return None
    if not isinstance(per_token, list) or not places or len(per_token) <= max(places):
        return None
    out = []
    for place in places:
        found: dict[str, float] = {}
        alternatives = per_token[place]
        if not isinstance(alternatives, dict):
            return None
        for name, value in alternatives.items():
            text, probability = (value.get("decoded_token"), value.get("logprob")) if isinstance(value, dict) else (name, value)
            if isinstance(text, str) and isinstance(probability, int | float):
                found[text] = max(float(probability), found.get(text, float("-inf")))
        if not found:
            return None
        out.append(found)
    return tuple(out)


def retry_after_s(header: str | None, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms (seconds, or an HTTP date); None when there is none."""
    if not header:
        return None
    try:
        seconds = float(header)
        return seconds if 0 <= seconds < float("inf") else None
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(header).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, moment - (time.time() if now is None else now))
