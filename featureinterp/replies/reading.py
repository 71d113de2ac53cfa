"""Reading a model's reply: its thoughts are dropped, JSON is read where it is JSON or nearly is, and refused
where it is not.

Nothing is read that is not in the reply, and nothing of an answer is dropped. The whole answer is parsed
strictly first. Then each JSON value in it is a candidate, strict or, where small errors of syntax leave no
doubt (:mod:`featureinterp.replies.lenient`), mended. One object is asked for: the last whole one counts. A
list is asked for: objects that stand together are read together. An object that is broken and could be the
answer makes the reply malformed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin

import pydantic

from featureinterp.errors import MalformedReplyError
from featureinterp.files import whole_characters
from featureinterp.replies.lenient import balanced_end, parse_lenient
from featureinterp.replies.strict import UnreadableError, decoder
from featureinterp.replies.thoughts import answer_of

Form = TypeVar("Form", bound=pydantic.BaseModel)
_MAX_REPLY, _MAX_WITH_THOUGHTS = 20_000, 1_000_000
_MAX_STARTS = 500
"""So many brackets that begin no value are looked at."""
_FENCE = re.compile(r"^[ \t]{0,3}(?:```|~~~)[^\n`]*$", re.MULTILINE)
_BRACKET = re.compile(r"[\[{]")
_LIKE_JSON = re.compile(r"\{\s*(?:[\"'“}]|[A-Za-z_]\w*\s*:)|\[\s*(?:[\"'“\[{\]]|-?\d)")
_TOGETHER = re.compile(r"(?:```\w*|\d{1,3}[.)]|[^\w])*")
"""What may stand between objects that are read together: white space, punctuation, fences, a bullet or
number; no words.
"""
_PART = re.compile(r"[\"“”']\s*(?:,?\s*[}\]]|:\s*[\"“'\[{\d])")
_SYNTAX = re.compile(r"[\"“”{}\[\]]")
"""What is no prose: a text's end before a bracket, a name and its value; any mark of JSON."""
_GOES_ON = re.compile(r"[ \t]*,?[ \t]*[\"'”]")
"""Behind a value that is not at its end: a quotation mark, so that its last string was cut short by one of
its own.
"""


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a level is a number from 0 to 5, not true or false")
    return value


def _within_range(value: int) -> int:
    if not 0 <= value <= 5:
        raise ValueError(f"the level {value} lies outside 0 to 5")
    return value


Level = Annotated[int, pydantic.BeforeValidator(_no_truth_value), pydantic.AfterValidator(_within_range)]
"""A level of a reply, 0 to 5."""


def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def parse_reply(text: str, form: type[Form]) -> Form:
    """The reply as ``form``; see this module's docstring. A form with one field that is a list is asked for
    as a list.

    Raises ``MalformedReplyError``, quoting the start of the reply, when it does not have the form.
    """
    return parse_with_end(text, form)[0]


def parse_with_end(text: str, form: type[Form]) -> tuple[Form, bool]:
    """The reply as ``form``, and whether it ends within what was read, so that the last of it may not be
    whole.
    """
    answer = answer_of(text) if len(text) <= _MAX_WITH_THOUGHTS else text
    if len(answer) > _MAX_REPLY:
        raise MalformedReplyError(f"the reply has {len(answer):,} characters, more than {_MAX_REPLY:,}")
    try:
        found = _candidates(answer)
        field = _list_field(form)
        value, cut = _one(found, form) if field is None else _list(answer, found, form, field)
        if cut and not text.rstrip().endswith(answer):
            raise UnreadableError("it ends within a text")
        return value, cut
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    except UnreadableError as error:
        problem = str(error) if answer or not text.strip() else "it holds thoughts and no answer"
    quoted = " ".join((answer or text).split())[:120]
    raise MalformedReplyError(f"the reply does not have the form that was asked for ({problem}): {quoted!r}")


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A JSON value of an answer. ``problem``: why it cannot be read (``value`` is then None). ``cut``: the
    answer ends within it.
    """

    start: int
    end: int
    text: str
    value: Any = None
    problem: str | None = None
    cut: bool = False

    def speaks_of(self, names: Any) -> bool:
        """Whether it has one of these keys, or looks so where it cannot be read."""
        if self.problem is None:
            return isinstance(self.value, dict) and not self.value.keys().isdisjoint(names)
        return any(name in self.text for name in names)


def _candidates(answer: str) -> list[_Candidate]:
    """The JSON values of an answer, in order; one that holds everything comes alone."""
    stripped = answer.strip()
    try:
        found = [_Candidate(0, len(answer), stripped, whole_characters(decoder.decode(stripped)))]
    except (ValueError, RecursionError):
        bounds = [0, *(x for m in _FENCE.finditer(answer) for x in m.span()), len(answer)]
        found = [
            c
            for start, end in zip(bounds[::2], bounds[1::2], strict=True)
            for c in _within(answer, start, end)
        ]
        _check_gaps(answer, found)
    return [c for candidate in found for c in _members(candidate)]


def _check_gaps(answer: str, found: list[_Candidate]) -> None:
    """Raises ``UnreadableError`` when what stands between the values looks like a part of them: they are then
    not whole themselves.
    """
    places = [0, *(x for c in found for x in (c.start, c.end)), len(answer)]
    gaps = [answer[start : end + 1] for start, end in zip(places[::2], places[1::2], strict=True)]
    for number, gap in enumerate(gaps):
        behind_a_cut = number > 0 and found[number - 1].cut
        if (
            _PART.search(gap)
            or _closes_too_much(gap[:-1] if number < len(found) else gap.replace("}", ""))
            or (behind_a_cut and _SYNTAX.search(gap))
        ):
            raise UnreadableError("a part of a value stands beside it")


def _closes_too_much(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth < 0:
            return True
    return False


def _members(candidate: _Candidate) -> list[_Candidate]:
    """A list of objects as its objects."""
    value = candidate.value
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        return [candidate]
    start, end = candidate.start, candidate.end
    return [
        _Candidate(start if i == 0 else end, end, candidate.text, v, None, candidate.cut)
        for i, v in enumerate(value)
    ]


def _within(answer: str, start: int, end: int) -> Iterator[_Candidate]:
    """The values between two places of an answer."""
    failed = 0
    while (bracket := _BRACKET.search(answer, start, end)) is not None:
        at = bracket.start()
        try:
            value, stop = decoder.raw_decode(answer[:end], at)
            value, start = whole_characters(value), stop
            problem = _goes_on(answer, at, start, end)
            yield _Candidate(at, start, answer[at:end], None if problem else value, problem)
        except (ValueError, RecursionError):
            failed += 1
            if failed > _MAX_STARTS:
                raise UnreadableError("it has too many brackets") from None
            if not _LIKE_JSON.match(answer, at, end):
                start = at + 1
                continue
            made = _mended(answer, at, end)
            start = made.end
            yield made


def _goes_on(answer: str, start: int, stop: int, end: int) -> str | None:
    """What is wrong with a value behind which a quotation mark stands that does not stand in front of it,
    too.
    """
    found = _GOES_ON.match(answer, stop, end)
    wrapped = found is not None and start > 0 and answer[start - 1] == found[0][-1]
    return "a quotation mark stands behind its end" if found and not wrapped else None


def _mended(answer: str, start: int, end: int) -> _Candidate:
    try:
        value, stop, cut = parse_lenient(answer, start, end)
        if problem := _goes_on(answer, start, stop, end):
            raise UnreadableError(problem)
        return _Candidate(start, stop, answer[start:stop], value, cut=cut)
    except UnreadableError as error:
        stop = balanced_end(answer, start, end)
        return _Candidate(start, stop, answer[start:stop], problem=str(error))


def _one(found: list[_Candidate], form: type[Form]) -> tuple[Form, bool]:
    """The last candidate that speaks of the form and is not cut; the last of all where each is cut."""
    speaking = [c for c in found if c.speaks_of(form.model_fields)]
    if not speaking:
        return form.model_validate(_anything(found)), False
    chosen = next((c for c in reversed(speaking) if not c.cut), speaking[-1])
    return form.model_validate(_readable(chosen)), chosen.cut


def _readable(candidate: _Candidate) -> Any:
    if candidate.problem is not None:
        raise UnreadableError(f"it cannot be read: {candidate.problem}")
    return candidate.value


def _anything(found: list[_Candidate]) -> Any:
    """The last value that can be read, for a form to refuse by name."""
    if not found:
        raise UnreadableError("it holds no JSON")
    return _readable(found[-1])


def _list_field(form: type[pydantic.BaseModel]) -> str | None:
    """The name of a form's only field, when that is a list."""
    names = list(form.model_fields)
    return (
        names[0] if len(names) == 1 and get_origin(form.model_fields[names[0]].annotation) is list else None
    )


def _list(answer: str, found: list[_Candidate], form: type[Form], field: str) -> tuple[Form, bool]:
    """All items of the last objects that stand together, or all single items wherever they stand."""
    for candidate in found:  # it may hold a part of the list
        _readable(candidate)
    (item,) = get_args(form.model_fields[field].annotation)
    of_item = (
        set(item.model_fields) if isinstance(item, type) and issubclass(item, pydantic.BaseModel) else set()
    )
    lists = [_wrapped(c, field, form) for c in found]
    relevant = [
        (c, w) for c, w in zip(found, lists, strict=True) if w is not None or c.speaks_of({field, *of_item})
    ]
    if not relevant:
        return form.model_validate(_anything(found)), False
    if any(w is not None for _, w in relevant):
        relevant = _last_together(answer, relevant)
        _check_names(answer, found, relevant[0][0])
    elif len(relevant) < len(found):
        raise UnreadableError("an object of another form stands beside those that were asked for")
    rows = [w if w is not None else [c.value] for c, w in relevant]
    if all(row == rows[0] for row in rows):  # it repeats itself
        rows = rows[:1]
    return form.model_validate({field: [x for row in rows for x in row]}), relevant[-1][0].cut


def _check_names(answer: str, found: list[_Candidate], first: _Candidate) -> None:
    """Raises ``UnreadableError`` when beside the objects that are read, with ``first`` in front, stands one
    with a list by another name.
    """
    place = found.index(first)
    while place > 0 and not _apart(answer, found[place - 1], found[place]):
        place -= 1
    names = first.value if isinstance(first.value, dict) else ()
    for candidate in found[place:]:
        value = candidate.value
        known = candidate is first or candidate.speaks_of(names)
        if isinstance(value, dict) and not known and any(isinstance(v, list) for v in value.values()):
            raise UnreadableError(f"it holds a list by the name {next(iter(value))[:40]!r}")


def _wrapped(candidate: _Candidate, field: str, form: type[pydantic.BaseModel]) -> list[Any] | None:
    """The items of a candidate that is such a list, by its name or without it."""
    value = candidate.value
    if isinstance(value, dict) and isinstance(value.get(field), list):
        return list(value[field])
    if isinstance(value, list):
        try:
            form.model_validate({field: value})
        except pydantic.ValidationError:
            return None
        return value
    return None


def _last_together(
    answer: str, relevant: list[tuple[_Candidate, list[Any] | None]]
) -> list[tuple[_Candidate, list[Any] | None]]:
    """The last of the candidates between which nothing stands, and with them all that follow but are
    broken.
    """
    first = len(relevant) - 1
    while first > 0 and (
        _apart(answer, relevant[first - 1][0], relevant[first][0]) is False or relevant[first][1] is None
    ):
        first -= 1
    return relevant[first:]


def _apart(answer: str, one: _Candidate, other: _Candidate) -> bool:
    between = answer[one.end : other.start] if other.start >= one.end else ""
    return not _TOGETHER.fullmatch(between)
