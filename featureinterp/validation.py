"""Values that settings of many rooms have in common, and what pydantic found wrong, in one sentence."""

from __future__ import annotations

import pydantic

from featureinterp.errors import InputError

LARGEST_SEED = 2**32 - 1


def check_seed(seed: object) -> None:
    """Raises ``InputError`` for what cannot be the seed of every generator that is used."""
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"the seed {seed!r} is not possible: give a whole number from 0 to {LARGEST_SEED:,}")


def first_problem(error: pydantic.ValidationError) -> str:
    """The place and the nature of the first problem, with the value that has it when it is short."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(p) for p in first["loc"]) or "the whole"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place} is no known field"
    value = repr(first["input"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" + (
        f" (it is {value})" if first["type"] != "missing" and len(value) <= 60 else ""
    )
