"""The first tokens of an answer with their alternatives, where an endpoint gives log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featureinterp.replies import answer_of

KEPT = 8
"""So many tokens of an answer are kept with their alternatives."""
Token = tuple[str, Mapping[str, float]]
"""A token as it was chosen, and the natural-log probabilities of what could have stood in its place."""


def answer_tokens(content: Sequence[Mapping[str, Any]], text: str) -> tuple[Token, ...]:
    """The first tokens of an answer from the log-probabilities of a choice (OpenAI's ``logprobs.content``),
    behind the thoughts that servers count among its tokens. ``text``: the choice's whole text."""
    pieces = [str(t["token"]) for t in content]
    start = _first(pieces, text)
    kept = zip(pieces[start:], content[start : start + KEPT], strict=False)
    return tuple(
        (piece, {str(a["token"]): float(a["logprob"]) for a in t.get("top_logprobs") or ()})
        for piece, t in kept
    )


def _first(pieces: Sequence[str], text: str) -> int:
    """The place of the token in which the answer begins; 0 where nothing but white space stands in front of
    it, or it is not found.
    """
    answer, said = answer_of(text), "".join(pieces)
    start = said.rfind(answer) if answer else -1
    if start <= 0 or not said[:start].strip():
        return 0
    if said.lstrip().startswith(text.strip()) and answer == text.strip():
        return 0
    end = 0
    for place, piece in enumerate(pieces):
        end += len(piece)
        if end > start:
            return place
    return 0
