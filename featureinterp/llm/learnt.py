"""What was learnt about an endpoint, kept between runs, so that nobody pays for learning it twice."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

from featureinterp.errors import StorageError
from featureinterp.files import content_key, parse_json, write_json
from featureinterp.llm.accepts import Accepts, ReplyForm

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
    try:
        kept = parse_json(path.read_text(encoding="utf-8"))
        age = (time.time() if now is None else now) - float(kept["at"])
        known = {f.name for f in fields(Accepts)}
        found = Accepts(**{name: value for name, value in kept["accepts"].items() if name in known})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return found if _sound(found) and 0 <= age < KEPT_DAYS * 86400 else None


def remember(base_url: str, model: str, accepts: Accepts, now: float | None = None) -> None:
    """Keeps it. Whether prompts can be read is asked anew each time, because it depends on how a server was
    started.
    """
    path = _file(base_url, model)
    if path is None:
        return
    kept = asdict(replace(accepts, prompt_logprobs="prompt_logprobs"))
    try:
        write_json(
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
    numbers = (found.least_tokens, found.most_tokens or 0, found.most_logprobs or 0)
    return (
        found.reply_form in get_args(ReplyForm)
        and found.length_field in ("max_tokens", "max_completion_tokens")
        and all(isinstance(getattr(found, name), bool) for name in switches)
        and all(isinstance(n, int) and 0 <= n < 10_000_000 for n in numbers)
        and (found.path is None or isinstance(found.path, str))
    )
