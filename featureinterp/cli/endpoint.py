"""Options that say which endpoint is meant and how it is asked; the same for every verb."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featureinterp.cli.options import LIMITS, Concurrency, given

if TYPE_CHECKING:
    from featureinterp.llm.config import Endpoint

ASKED = "Language model"


@dataclass(frozen=True)
class LlmOptions:
    """The language model that is asked, and how. Without ``llm`` and ``base_url``: that of the job, or the
    embedded one; the other options change it.
    """

    llm: Annotated[
        str | None,
        typer.Option(
            "--llm",
            metavar="NAME",
            help="Endpoint by its name in the configuration file ('featureinterp llm list').",
            rich_help_panel=ASKED,
        ),
    ] = None
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url",
            metavar="URL",
            help="Address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1. Without it and "
            "--llm: the endpoint of the job, or the embedded model.",
            rich_help_panel=ASKED,
        ),
    ] = None
    llm_model: Annotated[
        str | None,
        typer.Option("--llm-model", metavar="NAME", help="The endpoint's model.", rich_help_panel=ASKED),
    ] = None
    api_key_env: Annotated[
        str | None,
        typer.Option(
            "--api-key-env",
            metavar="VARIABLE",
            help="Name of the environment variable that holds the endpoint's key. Only OpenAI's own has a "
            "default, OPENAI_API_KEY.",
            rich_help_panel=ASKED,
        ),
    ] = None
    effort: Annotated[
        str | None,
        typer.Option(
            "--effort",
            help="How hard a reasoning model thinks, in its provider's words: none, minimal, low, medium, "
            "high.",
            rich_help_panel=ASKED,
        ),
    ] = None
    extra_body: Annotated[
        str | None,
        typer.Option(
            "--extra-body",
            metavar="JSON",
            help='Fields of every request, such as \'{"provider": {"sort": "price"}}\'.',
            rich_help_panel=ASKED,
        ),
    ] = None
    extra_header: Annotated[
        list[str] | None,
        typer.Option(
            "--extra-header",
            metavar="'NAME: VALUE'",
            help="A header of every request; a value env:VARIABLE is that of the variable. Give several.",
            rich_help_panel=ASKED,
        ),
    ] = None
    concurrency: Concurrency = None
    rpm: Annotated[
        int | None, typer.Option("--rpm", help="Requests per minute at most.", rich_help_panel=LIMITS)
    ] = None
    tpm: Annotated[
        int | None, typer.Option("--tpm", help="Tokens per minute at most.", rich_help_panel=LIMITS)
    ] = None
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout-s",
            help="Seconds that one request may take; 120, or what the configuration file says.",
            rich_help_panel=LIMITS,
        ),
    ] = None
    max_attempts: Annotated[
        int | None,
        typer.Option(
            "--max-attempts",
            help="Attempts at one request; 6, or what the configuration file says.",
            rich_help_panel=LIMITS,
        ),
    ] = None
    reply_tokens: Annotated[
        int | None,
        typer.Option(
            "--reply-tokens",
            help="Least room for a reply, in tokens; what each kind of question needs when not given.",
            rich_help_panel=LIMITS,
        ),
    ] = None
    thinking_tokens: Annotated[
        int | None,
        typer.Option(
            "--thinking-tokens",
            help="Room for a model's thoughts beside its reply, in tokens; 4096 once it turns out to think.",
            rich_help_panel=LIMITS,
        ),
    ] = None

    def endpoint(self, job: Endpoint | str | None = None) -> Endpoint | str | None:
        """What is meant; see :func:`endpoint_of`."""
        options = asdict(self)
        name, base_url, model = (options.pop(each) for each in ("llm", "base_url", "llm_model"))
        return endpoint_of(name, base_url, job=job, model=model, **options)


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
