"""Answers of an endpoint that wants harm, by name: too much, in forms that nobody sends, with counts that
nothing has, with the key in them.
"""

from __future__ import annotations

import base64
import gzip
import json
import urllib.parse
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from endpoint import KEY, completion, play

MB = 2**20
Hostile = Callable[[dict[str, Any]], Any]


def _whole(body: dict[str, Any], text: str) -> dict[str, Any]:
    """The usual reply to a request with another text in it, in the form that was asked for."""
    reply = play(body)
    for choice in reply["choices"]:
        written = choice["message"]["content"]
        choice["message"]["content"] = json.dumps({"explanation": text}) if written.startswith("{") else text
    return reply


@cache
def _bomb(size: int, rounds: int = 1) -> bytes:
    data = bytes(size)
    for _ in range(rounds):
        data = gzip.compress(data, 1)
    return data


TOO_MUCH: dict[str, Hostile] = {
    "a body of 64 MB": lambda body: (200, {}, b'{"choices": "' + b"x" * (64 * MB) + b'"}'),
    "a text of 3 MB": lambda body: completion("word " * (3 * MB // 5)),
    "a gzip bomb": lambda body: (200, {"Content-Encoding": "gzip"}, _bomb(64 * MB)),
    "a gzip bomb in a gzip bomb": lambda body: (200, {"Content-Encoding": "gzip, gzip"}, _bomb(64 * MB, 2)),
    "a deflate bomb": lambda body: (200, {"Content-Encoding": "deflate"}, zlib.compress(bytes(64 * MB), 1)),
    "gzip forty times over": lambda body: (200, {"Content-Encoding": ", ".join(["gzip"] * 40)}, _bomb(MB)),
    "gzip that is none": lambda body: (200, {"Content-Encoding": "gzip"}, b"nothing of the kind"),
    "an error of 64 MB": lambda body: (400, {}, b'{"error": {"message": "' + b"x" * (64 * MB) + b'"}}'),
    "an error as a bomb": lambda body: (500, {"Content-Encoding": "gzip"}, _bomb(64 * MB)),
    "nested too deep": lambda body: (200, {}, b"[" * 200_000),
    "an error nested too deep": lambda body: (400, {}, b'{"error": ' * 100_000),
    "choices without end": lambda body: completion("x") | {"choices": completion("x")["choices"] * 20_000},
    "alternatives without end": lambda body: completion("x", logprobs={f"t{i}": -1.0 for i in range(40_000)}),
    "an integer of 5,000 digits": lambda body: (
        200,
        {},
        b'{"choices": [], "created": ' + b"9" * 5_000 + b"}",
    ),
    "a header of 100 KB": lambda body: (200, {"X-Long": "x" * 100_000}, completion("x")),
    "a thousand headers": lambda body: (200, {f"X-{i}": "x" for i in range(1_000)}, completion("x")),
    "cookies": lambda body: (200, {"Set-Cookie": "a=" + "x" * 4_000}, completion("Yes")),
}

IN_USAGE: dict[str, Any] = {
    "negative": {"prompt_tokens": -5, "completion_tokens": -1_000_000},
    "beyond 64 bits": {"prompt_tokens": 2**63, "completion_tokens": 2**64},
    "a billion": {"prompt_tokens": 10**9, "completion_tokens": 1},
    "text": {"prompt_tokens": "many", "completion_tokens": "3"},
    "truth": {"prompt_tokens": True, "completion_tokens": False},
    "a fraction": {"prompt_tokens": 3.5, "completion_tokens": 1},
    "infinite": {"prompt_tokens": float("inf"), "completion_tokens": 1},
    "a list": {"prompt_tokens": [3], "completion_tokens": {"a": 1}},
    "a negative total": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": -8},
    "a cost below zero": {"prompt_tokens": 3, "completion_tokens": 1, "cost": -34_450.0},
    "a cost that is text": {"prompt_tokens": 3, "completion_tokens": 1, "cost": "free"},
    "a cost of a million": {"prompt_tokens": 3, "completion_tokens": 1, "cost": 1e6},
    "an infinite cost": {"prompt_tokens": 3, "completion_tokens": 1, "cost": float("inf")},
}
"""Counts that no reply can have."""


def usage_of(name: str) -> Hostile:
    """The usual reply with such counts."""
    return lambda body: play(body) | {"usage": IN_USAGE[name]}


def key_forms(key: str) -> dict[str, str]:
    """A key in the forms that an endpoint may repeat it in."""
    return {
        "as it is": key,
        "within words": f"the word{key}word",
        "in capitals": key.upper(),
        "backwards": key[::-1],
        "in base64": base64.b64encode(key.encode()).decode(),
        "in base64 after a word": base64.b64encode(b"Bearer " + key.encode()).decode(),
        "in base64 for addresses": base64.urlsafe_b64encode(b"key=" + key.encode()).decode(),
        "in hexadecimal": key.encode().hex(),
        "in capital hexadecimal": key.encode().hex(" ").upper(),
        "in an address": urllib.parse.quote(key.replace("-", "%2D"), safe="%"),
        "wholly in an address": "".join(f"%{b:02X}" for b in key.encode()),
        "in HTML": "".join(f"&#{b};" for b in key.encode()),
        "in HTML in part": key.replace("-", "&#45;"),
        "escaped": "".join(f"\\u{ord(c):04x}" for c in key),
        "escaped in part": key.replace("e", "\\u0065"),
        "escaped as bytes": "".join(f"\\x{b:02x}" for b in key.encode()),
        "as codes": ", ".join(str(b) for b in key.encode()),
        "spaced": " ".join(key),
        "with marks that nobody sees": "\u200b".join(key),
    }


WITH_KEY: dict[str, Hostile] = {
    **{
        f"a text, {name}": (lambda body, form=form: _whole(body, f"about {form} it is"))
        for name, form in key_forms(KEY).items()
    },
    "in JSON's own escapes": lambda body: (
        200,
        {},
        json.dumps(_whole(body, "KEY")).replace("KEY", _escaped(KEY)).encode(),
    ),
    "in other fields": lambda body: (
        play(body) | {"id": KEY, "model": KEY, "system_fingerprint": KEY, KEY: KEY}
    ),
    "in the counts": lambda body: play(body) | {"usage": {"prompt_tokens": KEY, "completion_tokens": KEY}},
    "in log-probabilities": lambda body: completion("Yes", logprobs={KEY: -0.1, "Yes": -2.0}),
    "in pieces": lambda body: completion("x") | {"choices": [KEY[i : i + 3] for i in range(0, len(KEY), 3)]},
    "as the finish": lambda body: completion("Yes", finish=KEY),
    "in headers": lambda body: (
        200,
        {"X-Request-Id": KEY, "X-Echo": f"Bearer {KEY}", "Set-Cookie": f"k={KEY}"},
        play(body),
    ),
    "in an error's headers": lambda body: (429, {"Retry-After": KEY, "X-Request-Id": KEY}, {}),
    "in an error": lambda body: (
        400,
        {},
        {"error": {"message": f"your key {KEY} may not", "param": KEY, "code": KEY}},
    ),
    "in an error of another form": lambda body: (422, {}, {"detail": [{"loc": ["header", KEY], "msg": KEY}]}),
    "in a plain error": lambda body: (400, {"Content-Type": "text/plain"}, f"bad key {KEY}".encode()),
    "in a long error": lambda body: (400, {}, {"error": {"message": "x" * (300 - len(KEY) // 2) + KEY}}),
    "in a refused key": lambda body: (401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
    "in an overload": lambda body: (503, {}, {"error": {"message": f"no room for {KEY}"}}),
    "in what is no JSON": lambda body: (200, {}, f"<html>{KEY}</html>".encode()),
    "in half a reply": lambda body: (200, {}, json.dumps(_whole(body, KEY)).encode()[:-20]),
    "in another form": lambda body: {"choices": [{"message": KEY}], KEY: 1},
    "in no choice": lambda body: {"choices": [], "error": {"message": KEY}},
    "in thoughts": lambda body: {
        "choices": [{"index": 0, "message": {"content": None, "reasoning_content": KEY}}]
    },
    "in a refusal": lambda body: {"choices": [{"index": 0, "message": {"content": None, "refusal": KEY}}]},
}


def _escaped(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" for c in text)
