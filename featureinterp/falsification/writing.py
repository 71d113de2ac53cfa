"""A language model writes new texts that should make a feature fire, from marked examples alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic

from featureinterp.domain.chat import Message, Reply, Request, cut_short
from featureinterp.errors import (
    EndpointRefusedError,
    JobStoppedError,
    LanguageModelError,
    MalformedReplyError,
)
from featureinterp.files import valid_unicode
from featureinterp.interfaces import LanguageModel
from featureinterp.prompts import load_prompt
from featureinterp.replies import answer_of, object_schema, parse_with_end

SPARE_CALLS = 2
"""So many calls more than needed are made when replies hold too few texts."""
_MARK = re.compile(r"<<(.*?)>>", re.DOTALL)
_NUMBER = re.compile(r"\s*\(?(\d{1,3})[.):]\s+")
_LINE_NUMBER = re.compile(r"^[ \t]*\(?(\d{1,3})[.)][ \t]+", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Call:
    """One request for texts. ``texts``: exactly as the reply holds them. ``reply`` None and ``failure``: what
    went wrong instead.
    """

    system: str
    user: str
    asked: int
    reply: str | None
    texts: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def status(self) -> str:
        """``success``, ``short`` (fewer texts than asked for) or ``failed: CAUSE``."""
        if self.failure is not None:
            return f"failed: {self.failure}"
        return "success" if len(self.texts) >= self.asked else "short"


class TextWriter:
    """Asks ``model`` for texts like marked examples. ``per_call``: texts per request."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        per_call: int = 10,
        temperature: float = 0.8,
        version: str = "v1",
        seed: int = 0,
    ) -> None:
        self.model, self.per_call, self.temperature, self.seed = model, per_call, temperature, seed
        self.prompt = load_prompt("write-texts", version)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the texts depend on, besides the examples and how many are wanted."""
        return {
            "model": self.model.name,
            "prompt": self.prompt.name,
            "prompt_hash": self.prompt.hash,
            "per_call": self.per_call,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    async def write(self, examples: Sequence[str], n: int) -> list[Call]:
        """Calls until ``n`` texts are there, or until two more calls than should be needed were made; a text
        counts once, in whichever call it comes. A call that failed is the last, but for one whose reply
        cannot be read: the next one has another seed."""
        words = max(8, round(sum(len(e.split()) for e in examples) / max(1, len(examples))))
        system = self.prompt.text("system.txt")
        calls: list[Call] = []
        seen: set[str] = set()
        for number in range(-(-n // self.per_call) + SPARE_CALLS):
            missing = n - sum(len(c.texts) for c in calls)
            if missing <= 0:
                break
            asked = min(self.per_call, missing)
            user = self.prompt.render("user.j2", examples=examples, n=asked, words=words)
            messages = (Message("system", system), *self._shots(), Message("user", user))
            schema = object_schema(
                {
                    "texts": {
                        "type": "array",
                        "items": {"type": "string"},
                        "minItems": asked,
                        "maxItems": asked,
                    }
                }
            )
            request = Request(
                messages,
                200 + asked * max(64, 4 * words),
                self.temperature,
                self.seed + number,
                schema=schema,
                check=read_texts,
            )
            try:
                reply = await self.model.complete(request)
                new = new_texts(read_texts(reply), seen)[:asked]
                seen |= set(map(same_text, new))
                calls.append(Call(system, user, asked, reply.text, tuple(new)))
            except (EndpointRefusedError, JobStoppedError):
                raise
            except MalformedReplyError as error:
                calls.append(Call(system, user, asked, None, failure=f"{type(error).__name__}: {error}"))
            except LanguageModelError as error:
                calls.append(Call(system, user, asked, None, failure=f"{type(error).__name__}: {error}"))
                break
        return calls

    def _shots(self) -> Iterator[Message]:
        for shot in self.prompt.json("few_shot.json"):
            yield Message(
                "user",
                self.prompt.render(
                    "user.j2", examples=shot["examples"], n=len(shot["texts"]), words=shot["words"]
                ),
            )
            yield Message("assistant", json.dumps({"texts": shot["texts"]}, ensure_ascii=False))


class _Written(pydantic.BaseModel):
    texts: list[str] = pydantic.Field(min_length=1)


def read_texts(reply: Reply) -> list[str]:
    """The texts of a reply, without the last one where it was cut. Raises ``MalformedReplyError`` when there
    is none, and ``TruncatedReplyError`` when it was cut before there was one.
    """
    try:
        found, cut = _texts(reply.text)
    except MalformedReplyError:
        if reply.truncated[0]:
            raise cut_short(reply) from None
        raise
    if reply.truncated[0] or cut:
        found = found[:-1]  # the last one was cut
    if not found and reply.truncated[0]:
        raise cut_short(reply)
    if not found:
        raise MalformedReplyError(f"the reply holds no text: {' '.join(reply.text.split())[:80]!r}")
    return found


def _texts(reply: str) -> tuple[list[str], bool]:
    """The texts in a reply, exactly as they stand in its JSON, or in its numbered list where it holds no
    JSON; those that are empty or there twice are left out, and so are the numbers of texts that are numbered
    in order. And whether the reply ends within the last one. Raises ``MalformedReplyError``."""
    try:
        written, cut = parse_with_end(reply, _Written)
        texts = without_numbers(written.texts)
    except MalformedReplyError:
        texts, cut = _numbered_list(valid_unicode(answer_of(reply))), False
        if not texts:
            raise
    return new_texts(texts, set()), cut


def without_numbers(texts: Sequence[str]) -> list[str]:
    """Texts that are all numbered, in order (``1. …``, ``2) …``), without their numbers; others as they
    are.
    """
    found = [_NUMBER.match(text) for text in texts]
    numbers = [int(m[1]) for m in found if m is not None]
    if len(texts) < 2 or numbers != list(
        range(numbers[0] if numbers else 0, len(texts) + (numbers[0] if numbers else 0))
    ):
        return list(texts)
    return [text[m.end() :] for text, m in zip(texts, found, strict=True) if m is not None]


def _numbered_list(answer: str) -> list[str]:
    """The items of a plain list that is numbered from 1, each up to an empty line; nothing for any other
    text.
    """
    starts = list(_LINE_NUMBER.finditer(answer))
    if "{" in answer or len(starts) < 2 or [int(m[1]) for m in starts] != list(range(1, len(starts) + 1)):
        return []
    ends = [*(m.start() for m in starts[1:]), len(answer)]
    items = (
        answer[m.end() : end].strip().split("\n\n")[0].strip() for m, end in zip(starts, ends, strict=True)
    )
    return [
        item[1:-1] if len(item) > 1 and item[0] == item[-1] == '"' and '"' not in item[1:-1] else item
        for item in items
    ]


def same_text(text: str) -> str:
    """What two texts have in common that are the same but for white space and copied marks."""
    return " ".join(without_marks(text).split())


def new_texts(texts: Sequence[str], known: set[str]) -> list[str]:
    """The texts that are not empty and not among the known (by :func:`same_text`), each once."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(same_text(text), text)
    return [text for key, text in found.items() if key and key not in known]


def without_marks(text: str) -> str:
    """The text without ``<<`` and ``>>`` around a part of it, which a model may have copied from the
    examples.
    """
    return _MARK.sub(r"\1", text)
