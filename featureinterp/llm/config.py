"""Endpoints by name: one of them as a value, and the user's configuration file that lists them.

[endpoints.fast]
base_url = "http://localhost:8000/v1"
model = "Qwen/Qwen2.5-7B-Instruct"
concurrency = 64

[endpoints.paid]
base_url = "https://openrouter.ai/api/v1"
model = "vendor/model"
api_key_env = "OPENROUTER_API_KEY"
rpm = 500
price = { input = 0.15, output = 0.60 }    # USD per million tokens

[prices."some-model"]
input = 1.0
output = 4.0
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from featureinterp.errors import InputError, UnknownNameError
from featureinterp.files import UnparsedError, parse_toml
from featureinterp.llm.address import check_headers
from featureinterp.llm.prices import FREE, PRICES, Price, price_of
from featureinterp.llm.secrets import check_address, check_fields, check_variable
from featureinterp.validation import first_problem

CONFIG_VARIABLE = "FEATUREINTERP_CONFIG"
LOCAL = "local"
"""Stands for an address when the model runs in this process."""

EMBEDDED = "qwen2.5-coder-1.5b-instruct"


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint. ``base_url`` None stands for the embedded model ``model``, and
    ``"local"`` for a transformers model (a Hugging Face name or folder) that runs in this process, one
    request at a time.

    ``api_key_env``: name of the environment variable with the key; None: the endpoint needs none (OpenAI's
    own: ``OPENAI_API_KEY``). ``rpm``, ``tpm``: requests and tokens per minute at most. ``max_attempts``,
    ``max_wait_s``: how often and how long a request is tried again.
    ``price``: USD per million tokens. ``tokenizer``: Hugging Face name or folder of the model's tokenizer,
    for reading prompts token by token. ``extra_body``, ``extra_headers``: fields and headers that are added
    to every request; a header's value ``env:NAME`` is that of the variable.
    ``reply_tokens``: at least so much room for every reply (an explanation has 300 tokens, or 400 in a
    search, a verdict 4). ``thinking_tokens``: room for a model's thoughts beside it (None: 4,096 once a reply
    shows that it thinks). ``effort``: how hard it is to think, in the provider's words.
    """

    base_url: str | None = None
    model: str = EMBEDDED
    api_key_env: str | None = None
    concurrency: int = 16
    rpm: int | None = None
    tpm: int | None = None
    timeout_s: float = 120.0
    max_attempts: int = 6
    max_wait_s: float = 300.0
    price: Price | None = None
    tokenizer: str | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    extra_headers: Mapping[str, str] = field(default_factory=dict)
    reply_tokens: int | None = None
    thinking_tokens: int | None = None
    effort: str | None = None

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def name_in(self, dtype: str | None) -> str:
        """The model as results name it. One that runs in this process is named with its ``dtype``: the same
        weights answer otherwise in another one, and otherwise than behind a server.
        """
        return f"{self.model} in this process ({dtype})" if self.base_url == LOCAL else self.model

    def __post_init__(self) -> None:
        if self.base_url is not None:
            check_address(self.base_url)
        check_variable(self.api_key_env)
        check_fields(self.extra_body, "extra_body")
        check_headers(self.extra_headers)
        for name in ("concurrency", "rpm", "tpm", "max_attempts", "timeout_s", "max_wait_s", "reply_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"an endpoint's {name} of {value} is not possible: give one above 0")
        if self.thinking_tokens is not None and self.thinking_tokens < 0:
            raise InputError(
                f"an endpoint's thinking_tokens of {self.thinking_tokens} is not possible: give 0 or more"
            )


@dataclass(frozen=True)
class Config:
    """What the configuration file says; empty when there is none."""

    path: Path
    endpoints: Mapping[str, Endpoint]
    prices: Mapping[str, Price]

    def endpoint(self, name: str) -> Endpoint:
        """The endpoint of that name. Raises ``UnknownNameError`` with those that exist."""
        if name in self.endpoints:
            return self.endpoints[name]
        known = (
            f"it has {', '.join(self.endpoints)}"
            if self.endpoints
            else f"add a table [endpoints.{name}] with base_url and model"
        )
        raise UnknownNameError(f"there is no endpoint {name!r} in {self.path}: {known}")

    def price(self, endpoint: Endpoint) -> Price | None:
        """An endpoint's price: its own, the file's, or the list price; the embedded model is free."""
        if endpoint.base_url in (None, LOCAL):
            return FREE
        return endpoint.price or price_of(endpoint.model, self.prices) or price_of(endpoint.model, PRICES)


class _File(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    endpoints: dict[str, Endpoint] = {}
    prices: dict[str, Price] = {}


def config_path() -> Path:
    """Where the configuration file is looked for: ``$FEATUREINTERP_CONFIG``, or ``config.toml`` in the user's
    configuration folder.
    """
    import platformdirs

    named = os.environ.get(CONFIG_VARIABLE)
    return Path(named) if named else platformdirs.user_config_path("featureinterp") / "config.toml"


def load_config() -> Config:
    """Reads the configuration file. Raises ``InputError`` with the place of the first mistake in it."""
    path = config_path()
    if not path.is_file():
        return Config(path, {}, {})
    try:
        found = _File.model_validate(parse_toml(path.read_text(encoding="utf-8")))
    except (UnparsedError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"the configuration {path} cannot be read: {error}") from error
    except pydantic.ValidationError as error:
        raise InputError(f"the configuration {path} has a mistake: {first_problem(error)}") from error
    return Config(path, found.endpoints, found.prices)
