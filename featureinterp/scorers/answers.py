"""Short answers: what of a reply is a yes or no, or a level, and which probabilities speak of it.

A token's probabilities count when the answers hold at least ``MIN_SHARE`` of them: what is left of a token
that is hardly ever an answer says nothing. The first token is looked at, then those behind a beginning that
is no answer itself (a line break, ``**``, ``Answer:``), then the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from featureinterp.domain.chat import Reply, cut_short
from featureinterp.errors import LanguageModelError, MalformedReplyError
from featureinterp.replies import answer_of

MIN_SHARE = 0.1
"""Answers have to hold this share of a token's probability."""
LEVELS = tuple("012345")
_QUOTES = r"\s\"'“”‘’«»*_`~#>(\[{<$\\"
_LABEL = (
    r"(?:the\s+|my\s+|final\s+|correct\s+)*"
    r"(?:answer|verdict|response|reply|output|rating|score|level|complexity|text|boxed)\b"
)
_LEAD = rf"[{_QUOTES}]*(?:{_LABEL}[{_QUOTES}:=]*(?:is\b[{_QUOTES}:]*)?)*"
_WHOLE_LEAD = re.compile(rf"(?:{_LEAD}|[{_QUOTES}]*(?:the|my|final|correct)\s*)", re.IGNORECASE)
_YES_NO = re.compile(rf"\A{_LEAD}(yes|no)(?!\w|[-'’]\w|\s*/)", re.IGNORECASE)
_UNSURE = re.compile(
    r"\A(?:yes|no)\s*(?:and|or)\s*(?:yes|no)\b|\Ano\s+(?:idea|clue|answer|opinion|way\s+to|one\s+knows|comment)\b",
    re.IGNORECASE,
)
_LEVEL = re.compile(
    rf"\A{_LEAD}(?:[-*•]\s+)?([0-5])(?![\w%]|[.,:]\d|\s*(?:[-–—+~]|to\b|or\b|and\b|/(?!\s*5\b)|out\s+of\s+(?!5\b))\s*\d?)",
    re.IGNORECASE,
)
_STRIPPED = " \t\r\n\"'“”‘’«»*_`()[]{}.,:;!"


def read_yes(reply: Reply) -> tuple[bool, float | None]:
    """Whether a reply says yes, and its probability of yes, P(yes) / (P(yes) + P(no)); None where no
    probabilities count. Raises ``MalformedReplyError`` for what is neither yes nor no, and
    ``TruncatedReplyError`` where it was cut before."""
    text = answer_of(reply.text)
    said = _yes(text)
    mass = masses(reply, ("yes", "no"), begins=said is None and _begins(text, ("yes", "no")))
    if mass is not None:
        probability = mass["yes"] / sum(mass.values())
        return probability > 0.5, probability
    if said is None:
        raise _no_answer(reply, "neither yes nor no")
    return said, None


def read_level(reply: Reply) -> float:
    """Σ level · P(level) / Σ P(level), or the level that the reply says where no probabilities count. Raises
    ``MalformedReplyError`` for what is no level from 0 to 5, and ``TruncatedReplyError`` where it was cut
    before."""
    text = answer_of(reply.text)
    said = _LEVEL.match(text)
    mass = masses(reply, LEVELS, begins=said is None and _begins(text, (*"0123456789", "-", "−", "+")))
    if mass is not None:
        return sum(int(level) * p for level, p in mass.items()) / sum(mass.values())
    if said is None:
        raise _no_answer(reply, "no number from 0 to 5")
    return float(said[1])


def _no_answer(reply: Reply, what: str) -> LanguageModelError:
    if any(reply.truncated):
        return cut_short(reply)
    return MalformedReplyError(f"the reply is {what}: {reply.text[:60]!r}")


def masses(reply: Reply, answers: Sequence[str], *, begins: bool = False) -> dict[str, float] | None:
    """The probability of each answer at the first token where they hold their share; None where there is
    none. ``begins``: the text begins with an answer and goes on to something else (``Yesterday``, ``10``), so
    that no token of it is one."""
    if begins:
        return None
    head = reply.tokens[0] if reply.tokens else ()
    places = head or ((reply.text, reply.first_token[0] if reply.first_token else {}),)
    before = ""
    for token, alternatives in places:
        if before and not _WHOLE_LEAD.fullmatch(before):
            return None
        mass = expected_masses(alternatives, answers)
        if sum(mass.values()) >= MIN_SHARE:
            return mass
        before += token
    return None


def expected_masses(alternatives: Mapping[str, float], answers: Sequence[str]) -> dict[str, float]:
    """The probability of each answer among a token's alternatives (log-probabilities); white space, case, and
    quotes or punctuation that a token holds besides are ignored."""
    mass = dict.fromkeys(answers, 0.0)
    for token, log_probability in alternatives.items():
        word = token.strip(_STRIPPED).lower()
        if word in mass:
            mass[word] += math.exp(min(0.0, log_probability))
    return mass


def _yes(text: str) -> bool | None:
    found = _YES_NO.match(text)
    if found is None or _UNSURE.match(text[found.start(1) :]):
        return None
    return found[1].lower() == "yes"


def _begins(text: str, answers: Sequence[str]) -> bool:
    """Whether what follows the beginning of a text starts with one of the answers."""
    lead = re.match(_LEAD, text, re.IGNORECASE)
    assert lead is not None
    return text[lead.end() :].lower().startswith(tuple(answers))
