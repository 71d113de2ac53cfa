"""Reading a model's reply: JSON where it is JSON, repaired where it nearly is, refused where it is not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from featureinterp.errors import MalformedReplyError

Form = TypeVar("Form", bound=pydantic.BaseModel)
_MAX_REPLY = 20_000
_EVEN = r"(?<!\\)((?:\\\\)*)"
_PAIR = re.compile(_EVEN + r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_UNKNOWN = re.compile(_EVEN + r"\\([f/])")
"""Escapes of JSON that the library leaves as they stand."""
_CUT_ESCAPE = re.compile(_EVEN + r"(?:\\u[dD][89abAB][0-9a-fA-F]{2})?(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z")
"""What is left of an escape, or of a pair of them, where the reply ends within it. ``_EVEN`` holds the escaped backslashes before it."""


def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of an object with exactly these properties."""
    return {"type": "object", "properties": dict(properties), "required": list(properties), "additionalProperties": False}


def parse_reply(text: str, form: type[Form]) -> Form:
    """The reply as ``form``. Accepts JSON inside prose or a code fence and repairs small errors of syntax.

    Raises ``MalformedReplyError``, quoting the start of the reply, when it does not have the form.
    """
    if len(text) > _MAX_REPLY:
        raise MalformedReplyError(f"the reply has {len(text):,} characters, more than {_MAX_REPLY:,}")
    body = re.sub(r"\A.*?```(?:json)?\s*|```.*\Z", "", text, flags=re.DOTALL) if "```" in text else text
    start = min((i for i in (body.find("{"), body.find("[")) if i >= 0), default=-1)
    problem = "it holds no JSON"
    if start >= 0:
        try:
            return form.model_validate(_loads(body[start:]))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
        except RecursionError:
            problem = "its brackets are nested too deeply"
        except ValueError as error:
            problem = f"it cannot be read: {' '.join(str(error).split())[:100]}"
    raise MalformedReplyError(f"the reply does not have the form that was asked for ({problem}): {' '.join(text.split())[:120]!r}")


def _loads(text: str) -> Any:
    import json_repair

    paired = _PAIR.sub(lambda m: m[1] + bytes.fromhex(m[2] + m[3]).decode("utf-16-be"), text.rstrip())
    known = _UNKNOWN.sub(lambda m: m[1] + {"f": "\\u000c", "/": "/"}[m[2]], paired)
    return json_repair.loads(_CUT_ESCAPE.sub(r"\1", known))
