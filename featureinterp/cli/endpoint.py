"""Options that say which endpoint is meant and how it is asked; the same for every verb."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from featureinterp.llm.config import Endpoint

REPLY_TOKENS = typer.Option(None, help="At least so many tokens of room for every reply; as many as each kind needs when not given.")
THINKING_TOKENS = typer.Option(None, help="Room for a model's thoughts beside the reply; 4096 once it turns out to think, when not given.")
EFFORT = typer.Option(None, help="How hard a reasoning model thinks, in its provider's words: none, minimal, low, medium, high.")
EXTRA_BODY = typer.Option(None, help='Fields of every request, as JSON: \'{"provider": {"sort": "price"}}\'.')
EXTRA_HEADER = typer.Option(None, help="A header of every request, 'NAME: VALUE' or 'NAME: env:VARIABLE'; give several.")


def endpoint_of(
    name: str | None,
    base_url: str | None,
    model: str | None,
    api_key_env: str | None,
    concurrency: int,
    rpm: int | None,
    tpm: int | None,
    timeout_s: float,
    max_attempts: int,
    reply_tokens: int | None = None,
    thinking_tokens: int | None = None,
    effort: str | None = None,
    extra_body: str | None = None,
    extra_header: list[str] | None = None,
) -> Endpoint | str | None:
    """The endpoint that the options mean: a name of the configuration file, an address, or the embedded model (None)."""
    from featureinterp.errors import InputError
    from featureinterp.llm.config import Endpoint, load_config

    given = {"reply_tokens": reply_tokens, "thinking_tokens": thinking_tokens, "effort": effort}
    body, headers = _fields(extra_body), _headers(extra_header)
    more: dict[str, Any] = {field: value for field, value in given.items() if value is not None}

    if name is not None and base_url is not None:
        raise InputError("an endpoint is named twice: give --llm or --base-url")
    if name is not None:
        if not more and not body and not headers:
            return name
        named = load_config().endpoint(name)
        return replace(named, extra_body={**named.extra_body, **body}, extra_headers={**named.extra_headers, **headers}, **more)
    if base_url is None and (more or body or headers):
        raise InputError("options for replies, thoughts, fields and headers are for an endpoint: give --llm or --base-url")
    if base_url is None:
        if model is not None:
            raise InputError(f"the model {model!r} needs the address of its endpoint: give --base-url, or leave --llm-model out for the embedded model")
        return None
    if model is None:
        raise InputError("an endpoint needs the name of its model: give --llm-model")
    return Endpoint(
        base_url,
        model,
        api_key_env or None,
        concurrency,
        rpm,
        tpm,
        timeout_s,
        max_attempts,
        **more,
        extra_body=_fields(extra_body),
        extra_headers=_headers(extra_header),
    )


def _fields(text: str | None) -> dict[str, Any]:
    from featureinterp.errors import InputError

    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise InputError(f"--extra-body is no JSON ({error}): give an object such as '{{\"top_p\": 0.9}}'") from None
    if not isinstance(found, dict):
        raise InputError("--extra-body is no JSON object: give one such as '{\"top_p\": 0.9}'")
    return found


def _headers(lines: list[str] | None) -> dict[str, str]:
    from featureinterp.errors import InputError

    found = {}
    for line in lines or ():
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise InputError("--extra-header takes 'NAME: VALUE': write it so")
        found[name.strip()] = value.strip()
    return found
