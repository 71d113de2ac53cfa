"""The adapter for any OpenAI-compatible endpoint, by base URL, model, and the name of the variable with the
key.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import anyio

from featureinterp.domain.chat import Reply, Request
from featureinterp.domain.usage import Usage
from featureinterp.errors import (
    ContentRefusedError,
    EmptyReplyError,
    EndpointBusyError,
    EndpointRefusedError,
    EndpointUnavailableError,
    InputError,
    LanguageModelError,
    RequestRefusedError,
)
from featureinterp.files import valid_unicode, whole_characters
from featureinterp.llm.accepts import Accepts, Options
from featureinterp.llm.address import check_key, read_address, read_headers, read_key
from featureinterp.llm.answers import collect, is_stream, read_choices, reply_of, thinks
from featureinterp.llm.bounds import bounded
from featureinterp.llm.refusals import Refusal, error_within, gives_way, read_refusal
from featureinterp.llm.secrets import Secrets
from featureinterp.llm.tls import certificate_problem, context_for
from featureinterp.llm.usage import reported_usage
from featureinterp.tasks import Turns

DEFAULT_TIMEOUT_S = 120.0
MAX_CONNECTIONS = 1024
MAX_EXCHANGES = 24
"""So often one request is put otherwise at most."""
_CHAT, _COMPLETIONS = "chat/completions", "completions"


_NOT_OF_FORM = ("key", "credit", "quota", "place", "busy", "loading")
"""Kinds of refusals that another form of the request would meet, too."""


class _RefusedError(Exception):
    """An answer that is no completion."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.words)
        self.refusal = refusal


class OpenAIModel:
    """A model behind an OpenAI-compatible endpoint. One HTTP client for its lifetime, which tries nothing
    again by itself.

    ``api_key_env`` names the environment variable that holds the key; the key itself is in no attribute,
    message or repr. None: no key is sent, but to OpenAI itself that of ``OPENAI_API_KEY``, which nobody else
    gets to see unless it is named. ``timeout_s`` bounds a whole exchange, also one that is answered drop by
    drop. ``reply_tokens``, ``thinking_tokens``, ``effort``, ``extra_body``: :class:`Options`.
    ``extra_headers``: sent with every request; a value ``env:NAME`` is that of the variable. ``accepts``:
    what is known of the endpoint; ``remember`` is called with it whenever something was learnt and has
    worked. Raises ``InputError`` at once when a variable is not set, a key cannot be one or the address is
    none.
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
        extra_headers: Mapping[str, str] | None = None,
        reply_tokens: int | None = None,
        thinking_tokens: int | None = None,
        effort: str | None = None,
        accepts: Accepts | None = None,
        remember: Callable[[Accepts], None] = lambda _: None,
    ) -> None:
        self._address = read_address(base_url)
        key, self._key_env = (api_key, None) if api_key else read_key(api_key_env, self._address.host)
        if api_key:
            check_key(api_key, "the key of the endpoint")
        self.name = model
        self.base_url = self._address.base + self._address.query
        self.timeout_s = timeout_s
        self.accepts = accepts or Accepts()
        self.options = Options(reply_tokens, thinking_tokens, effort, dict(extra_body or {}))
        self._known, self._remember = self.accepts, remember
        own, hidden = read_headers(extra_headers or {})
        self._secrets = Secrets(key, *hidden)
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            **self._address.headers(key),
            **own,
        }
        self._client = self._open()
        self._turns = Turns()

    def _open(self) -> Any:
        import httpx2

        from featureinterp.llm.transport import EndpointClient

        limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
        outside = (
            not self._address.loopback
        )  # this machine is reached directly, whatever proxy there is for others
        try:
            return EndpointClient(
                self.base_url,
                self._secrets,
                limits=limits,
                timeout=self.timeout_s,
                verify=context_for(self._address.tls),
                trust_env=outside,
            )
        except (ValueError, ImportError) as error:
            raise InputError(
                f"the proxy of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY) cannot be used: {error}"
            ) from None

    def __repr__(self) -> str:
        return f"OpenAIModel({self.base_url!r}, {self.name!r})"

    @property
    def identity(self) -> list[Any]:
        """What beside a request determines the answer."""
        return [self.base_url, dict(self.options.extra or {}), *self.options.identity]

    def room(self, request: Request) -> int:
        """Tokens that the reply to a request may have at present."""
        return self.accepts.room(request, self.options)

    async def aclose(self) -> None:
        """Closes the HTTP client."""
        await self._client.aclose()

    async def complete(self, request: Request) -> Reply:
        """Sends one completion, and again as long as the endpoint refuses a parameter that can be left out or
        put otherwise, when a model turns out to think and had no room for it.

        Raises ``EndpointUnavailableError``, ``EndpointRefusedError``, ``RequestRefusedError`` or
        ``MalformedReplyError``, with what to do.
        """
        await self._turns.take()
        spent = Usage()
        try:
            for _ in range(MAX_EXCHANGES):
                by = self.accepts
                try:
                    if request.prompt:
                        return await self._read(request)
                    start = time.monotonic()
                    completion = await self._post(_CHAT, by.body(self.name, request, self.options), by)
                except _RefusedError as refused:
                    if not self._learn(refused.refusal, request, by):
                        raise self._explain(refused.refusal) from None
                    continue
                usage = reported_usage(completion, time.monotonic() - start)
                room = by.room(request, self.options)
                choices = bounded(read_choices(completion, self.base_url), request, room, self.base_url)
                if not choices:
                    spent += usage
                    raise EmptyReplyError(
                        f"{self.base_url} answered without any choice: is it an OpenAI-compatible endpoint?"
                    )
                if thinks(choices, completion) and not by.thinks:
                    self.accepts = replace(self.accepts, thinks=True)
                    cut = all(c.end == "cut" and not c.text.strip() for c in choices)
                    if cut and self.room(request) > room:
                        spent += usage
                        continue
                self._worked()
                reply = reply_of(choices, usage, self.base_url)
                return replace(reply, usage=spent + usage if spent.requests else usage, room=room)
            raise EndpointRefusedError(
                f"the endpoint {self.base_url} refuses a request in every form that is known: check what "
                "it is with 'llm test'"
            )
        except LanguageModelError as error:
            if spent.requests:
                error.billed = True
                error.usage = spent if error.usage is None else spent + error.usage
            raise

    async def _post(self, call: str, body: Mapping[str, Any], by: Accepts) -> Any:
        """The JSON that an endpoint answers, collected where it comes as a stream. Raises ``_RefusedError``
        for an answer that is an error.
        """
        import httpx2

        from featureinterp.llm.transport import read_json

        path = by.path if by.path is not None else self._address.paths[0]
        try:
            with anyio.fail_after(self.timeout_s):
                content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
                response = await self._client.post(
                    self._address.call(call, path), content=content, headers=self._headers
                )
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise self._broken(error) from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise self._broken(error) from None
        raw, kind = response.content, response.headers.get("content-type", "")
        if not response.is_success:
            raise _RefusedError(read_refusal(response.status_code, response.headers, raw))
        try:
            value = (
                collect(raw, read=lambda part: read_json(part, self.base_url))
                if is_stream(kind, raw)
                else read_json(raw, self.base_url)
            )
        except ValueError as error:
            if b"<html" in raw[:2000].lower():
                raise _RefusedError(read_refusal(200, response.headers, raw)) from None
            problem = str(error) if "broke off" in str(error) else type(error).__name__
            raise EndpointUnavailableError(
                f"the endpoint {self.base_url} sent an answer that cannot be read ({problem}): check that "
                "it is an OpenAI-compatible endpoint"
            ) from None
        if error_within(value):
            raise _RefusedError(read_refusal(200, response.headers, json.dumps(value).encode()))
        return whole_characters(value) if b"\\u" in raw else value

    def _learn(self, refusal: Refusal, request: Request, by: Accepts) -> bool:
        """Whether the request can be put otherwise after a refusal of what was sent, by ``by``; it then is,
        from now on. What another request has learnt meanwhile counts, too."""
        if request.prompt:
            return False
        sent = by.body(self.name, request, self.options)
        learnt = gives_way(refusal, sent, by, self.accepts)
        if learnt is not None and learnt.body(self.name, request, self.options) != sent:
            self.accepts = learnt
            return True
        return refusal.kind in ("page", "path") and self._other_path(by)

    def _other_path(self, by: Accepts) -> bool:
        paths = self._address.paths
        place = paths.index(by.path) if by.path in paths else 0
        if self.accepts.path != by.path:
            return True
        if place + 1 == len(paths):
            self.accepts = replace(self.accepts, path=None)
            return False
        self.accepts = replace(self.accepts, path=paths[place + 1])
        return True

    def _worked(self) -> None:
        """Passes on what was learnt, once it has led to an answer."""
        if self.accepts != self._known:
            self._known = self.accepts
            self._remember(self.accepts)

    async def _read(self, request: Request) -> Reply:
        """Probabilities at places of a prompt, from the completions API, in a way that it knows."""
        ways: tuple[Literal["prompt_logprobs", "echo"], ...] = ("prompt_logprobs", "echo")
        start, by = time.monotonic(), self.accepts
        first = ways.index(by.prompt_logprobs) if by.prompt_logprobs else len(ways)
        for way in ways[first:]:
            arguments: dict[str, Any] = {
                "model": self.name,
                "prompt": list(request.prompt),
                "max_tokens": 1,
                "temperature": 0.0,
            }
            arguments |= (
                {"echo": True, "logprobs": request.top_logprobs}
                if way == "echo"
                else {"prompt_logprobs": request.top_logprobs}
            )
            try:
                completion = await self._post(_COMPLETIONS, arguments | dict(self.options.extra or {}), by)
            except _RefusedError as refused:
                refusal = refused.refusal
                if refusal.status not in (200, 400, 404, 405, 415, 422, 501) or refusal.kind in _NOT_OF_FORM:
                    raise
                continue
            found = read_prompt(completion, request.read_at)
            if found is not None:
                self.accepts = replace(self.accepts, prompt_logprobs=way)
                return Reply(
                    ("",), (False,), reported_usage(completion, time.monotonic() - start), ({},), found
                )
        self.accepts = replace(self.accepts, prompt_logprobs=None)
        raise EndpointRefusedError(
            f"the endpoint {self.base_url} gives no probabilities of a prompt's tokens: vLLM does "
            "(/v1/completions with prompt_logprobs, or echo with "
            "logprobs), llama.cpp's server and OpenAI's chat models do not; use --simulator rated, or a "
            "local simulator"
        )

    def _broken(self, error: Exception) -> LanguageModelError:
        """The error of ours when there is no answer at all."""
        import httpx2

        where = f"the endpoint {self.base_url}"
        if problem := certificate_problem(error):
            hint = (
                "set SSL_CERT_FILE to the file with its authority's certificate, or correct the address "
                "(http or https)"
            )
            return EndpointRefusedError(f"{where} cannot be reached safely, {problem}: {hint}")
        late = isinstance(error, TimeoutError | httpx2.ReadTimeout | httpx2.WriteTimeout | httpx2.PoolTimeout)
        if late:
            late_error = EndpointUnavailableError(
                f"{where} did not answer within {self.timeout_s:g} s: check that it is up, or raise "
                "--timeout-s"
            )
            late_error.billed = not isinstance(
                error, httpx2.PoolTimeout
            )  # it is likely to end what nobody waits for any more
            return late_error
        if isinstance(error, httpx2.ProxyError):
            return EndpointUnavailableError(
                f"{where} cannot be reached through the proxy of the environment: check HTTPS_PROXY, or "
                "add the host to NO_PROXY"
            )
        return EndpointUnavailableError(
            f"{where} cannot be reached, or broke the connection: check the address and that it is up"
        )

    def _explain(self, refusal: Refusal) -> LanguageModelError:
        """The error of ours for what the endpoint says, with its own words."""
        where, code = (
            f"the endpoint {self.base_url}",
            f"HTTP {refusal.status}" if refusal.status != 200 else "an error within HTTP 200",
        )
        said = valid_unicode(self._secrets.clean(refusal.words))
        named = (
            f"the environment variable {self._key_env}"
            if self._key_env
            else "the variable that --api-key-env names"
        )
        wait = refusal.wait
        asked = "" if wait is None else f", which asks to wait {wait:,.0f} s"
        sentences: Mapping[str, tuple[type[LanguageModelError], str, str]] = {
            "key": (EndpointRefusedError, "refused the key", f"check {named}"),
            "credit": (
                EndpointRefusedError,
                "has no credit left for this key",
                "pay or raise the limit there, and run the same command again",
            ),
            "quota": (
                EndpointRefusedError,
                "has reached a limit per day or month",
                "run the same command again when it is reset, or take another plan",
            ),
            "place": (
                EndpointRefusedError,
                "is not offered in this country or region",
                "use another endpoint",
            ),
            "permission": (
                EndpointRefusedError,
                "does not permit this",
                f"check what {named} may do, and the model's name",
            ),
            "firewall": (
                EndpointRefusedError,
                "did not answer, a firewall or proxy before it did",
                "check the address and the network",
            ),
            "redirect": (
                EndpointRefusedError,
                "redirects to another address",
                "give that address with --base-url",
            ),
            "model": (EndpointRefusedError, f"does not know the model {self.name!r}", "check --llm-model"),
            "page": (
                EndpointRefusedError,
                "answered with a web page",
                "check --base-url: is it that of an OpenAI-compatible endpoint?",
            ),
            "path": (
                EndpointRefusedError,
                f"does not know the path or the model {self.name!r}",
                "check --base-url and --llm-model",
            ),
            "content": (
                ContentRefusedError,
                "refuses the content of this request",
                "it is a failure of this feature alone, and is not asked again",
            ),
            "long": (
                RequestRefusedError,
                "finds the prompt too long",
                "show fewer or shorter windows, or choose a model with a longer context",
            ),
            "loading": (EndpointBusyError, "is still loading the model", "wait for it"),
            "busy": (
                EndpointBusyError,
                f"is busy or limits its requests{asked}",
                "lower --concurrency, or set --rpm and --tpm",
            ),
            "failing": (EndpointUnavailableError, "is failing", "try again later"),
            "request": (RequestRefusedError, "refused the request", ""),
        }
        kind, what, hint = sentences[refusal.kind]
        message = f"{where} {what} ({code}): {said.removesuffix('.') if hint else said}" + (
            f"; {hint}" if hint else ""
        )
        return kind(message, wait) if issubclass(kind, EndpointUnavailableError) else kind(message)


def read_prompt(completion: Any, places: tuple[int, ...]) -> tuple[dict[str, float], ...] | None:
    """Alternatives at ``places`` of a prompt that was sent as token ids, from either form of answer; None
    when it holds none.

    vLLM's ``prompt_logprobs``: per token None or ``{token id: {logprob, decoded_token}}``. The completions
    API with ``echo``: ``logprobs.top_logprobs``, per token None or ``{text: logprob}``.
    """
    try:
        choice = (completion.get("choices") or [{}])[0]
        per_token = (
            choice.get("prompt_logprobs")
            or completion.get("prompt_logprobs")
            or (choice.get("logprobs") or {}).get("top_logprobs")
        )
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
            text, probability = (
                (value.get("decoded_token"), value.get("logprob"))
                if isinstance(value, dict)
                else (name, value)
            )
            if isinstance(text, str) and isinstance(probability, int | float):
                found[text] = max(float(probability), found.get(text, float("-inf")))
        if not found:
            return None
        out.append(found)
    return tuple(out)
