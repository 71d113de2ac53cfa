"""What was learnt about an endpoint, kept between runs, so that nobody pays for learning it twice."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

from featureinterp.errors import StorageError
from featureinterp.files import content_key
from featureinterp.llm.accepts import Accepts, ReplyForm
from featureinterp.llm.address import PATHS
from featureinterp.stored.sums import read_cache, write_marker

VARIABLE = "FEATUREINTERP_LEARNT"
"""Names another folder for it; empty: nothing is kept."""
KEPT_DAYS = 7
"""A server may be another one by then, and take more."""


def folder() -> Path | None:
    """Where it is kept."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    from featureinterp.assets import cache_folder

    return cache_folder() / "learnt"


def recall(base_url: str, model: str, now: float | None = None) -> Accepts | None:
    """What is known of an endpoint and a model; None when there is nothing, or it is older than a week."""
    path = _file(base_url, model)
    if path is None:
        return None
    kept = read_cache(path)
    if kept is None or (kept.get("endpoint"), kept.get("model")) != (base_url, model):
        return None
    try:
        age = (time.time() if now is None else now) - float(kept["at"])
        known = {f.name for f in fields(Accepts)}
        found = Accepts(**{name: value for name, value in kept["accepts"].items() if name in known})
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None
    return found if 0 <= age < KEPT_DAYS * 86400 and _sound(found) else None


def remember(base_url: str, model: str, accepts: Accepts, now: float | None = None) -> None:
    """Keeps it. Whether prompts can be read is asked anew each time, because it depends on how a server was
    started.
    """
    path = _file(base_url, model)
    if path is None:
        return
    kept = asdict(replace(accepts, prompt_logprobs="prompt_logprobs"))
    try:
        write_marker(
            path,
            {
                "endpoint": base_url,
                "model": model,
                "at": time.time() if now is None else now,
                "accepts": kept,
            },
        )
    except (OSError, StorageError):
        return  # it is learnt again next time


def forget(base_url: str, model: str) -> None:
    """Removes it, so that the next request tries everything again."""
    path = _file(base_url, model)
    if path is not None:
        path.unlink(missing_ok=True)


def _file(base_url: str, model: str) -> Path | None:
    where = folder()
    return None if where is None else where / f"{content_key([base_url, model])}.json"


def _sound(found: Accepts) -> bool:
    switches = ("logprobs", "seed", "temperature", "several", "stop", "system", "stream", "thinks")
    limits = (found.most_tokens, found.most_logprobs)
    return (
        found.reply_form in get_args(ReplyForm)
        and found.length_field in ("max_tokens", "max_completion_tokens")
        and found.prompt_logprobs in ("prompt_logprobs", "echo", None)
        and all(isinstance(getattr(found, name), bool) for name in switches)
        and all(n is None or _is_limit(n) for n in limits)
        and found.most_tokens != 0
        and _is_limit(found.least_tokens)
        and found.path in (None, *PATHS)  # it stands in the address that the key is sent to
    )


def _is_limit(value: object) -> bool:
    return type(value) is int and 0 <= value < 10_000_000
