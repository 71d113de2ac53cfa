"""Options that say which endpoint is meant and how it is asked; the same for every verb."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from featureinterp.cli.options import given

if TYPE_CHECKING:
    from featureinterp.llm.config import Endpoint

RPM = typer.Option(None, help="Requests per minute at most.")
TPM = typer.Option(None, help="Tokens per minute at most.")
TIMEOUT_S = typer.Option(None, help="Seconds that one request may take; 120 when nothing else is known.")
MAX_ATTEMPTS = typer.Option(None, help="Attempts at one request; 6 when nothing else is known.")
REPLY_TOKENS = typer.Option(
    None, help="At least so many tokens of room for every reply; as many as each kind needs when not given."
)
THINKING_TOKENS = typer.Option(
    None,
    help="Room for a model's thoughts beside the reply; 4096 once it turns out to think, when not given.",
)
EFFORT = typer.Option(
    None, help="How hard a reasoning model thinks, in its provider's words: none, minimal, low, medium, high."
)
EXTRA_BODY = typer.Option(None, help='Fields of every request, as JSON: \'{"provider": {"sort": "price"}}\'.')
EXTRA_HEADER = typer.Option(
    None, help="A header of every request, 'NAME: VALUE' or 'NAME: env:VARIABLE'; give several."
)


_OPTIONS = {
    "model": "--llm-model",
    "api_key_env": "--api-key-env",
    "extra_body": "--extra-body",
    "extra_headers": "--extra-header",
}
_OPTIONS |= {"reply_tokens": "--reply-tokens", "thinking_tokens": "--thinking-tokens", "effort": "--effort"}


def endpoint_of(
    name: str | None,
    base_url: str | None,
    *,
    job: Endpoint | str | None = None,
    extra_body: str | None = None,
    extra_header: list[str] | None = None,
    **changes: Any,
) -> Endpoint | str | None:
    """The endpoint that options mean: a name of the configuration file, an address, or (when neither is
    given) that of the ``job``; None is the embedded model. The others are fields of the endpoint that options
    give besides, which change those that it has; None: not given.

    Raises ``InputError`` for options that would change nothing.
    """
    from featureinterp.errors import InputError
    from featureinterp.llm.config import LOCAL, Endpoint, load_config

    changes = given(**changes)
    added = given(extra_body=_fields(extra_body) or None, extra_headers=_headers(extra_header) or None)
    if name is not None and base_url is not None:
        raise InputError("an endpoint is named twice: give --llm or --base-url")
    if base_url is not None:
        if "model" not in changes:
            raise InputError("an endpoint needs the name of its model: give --llm-model")
        return Endpoint(base_url, **changes, **added)
    meant = name if name is not None else job
    if not changes and not added:
        return meant
    endpoint = load_config().endpoint(meant) if isinstance(meant, str) else meant or Endpoint()
    if endpoint.base_url in (None, LOCAL):
        for field in {**changes, **added}.keys() & _OPTIONS.keys():
            raise InputError(
                f"{_OPTIONS[field]} needs the address of an endpoint: give --base-url or --llm, or leave "
                "it out for the embedded model"
            )
    if changes.get("model", endpoint.model) != endpoint.model:  # of which nothing else is known
        changes = {"price": None, "tokenizer": None, **changes}
    for field, value in added.items():
        changes[field] = {**getattr(endpoint, field), **value}
    return replace(endpoint, **changes)


def _fields(text: str | None) -> dict[str, Any]:
    from featureinterp.errors import InputError
    from featureinterp.files import UnparsedError, parse_json

    try:
        found = parse_json(text) if text else {}
    except UnparsedError as error:
        raise InputError(f"--extra-body {error.says}: give an object such as '{{\"top_p\": 0.9}}'") from None
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
