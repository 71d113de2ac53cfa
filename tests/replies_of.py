"""Replies as models and servers of the world write them: whole ones in many dresses, and broken ones, from a
seed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from featureinterp.domain.chat import Reply
from featureinterp.domain.usage import Usage
from featureinterp.falsification.writing import read_texts

MARKERS = (
    "```", "```json", "~~~", "<think>", "</think>", "[THINK]", "[/THINK]", "<|channel|>final<|message|>",
    "<|channel|>analysis<|message|>",
    "<|end|>", "<|im_end|>", "<|return|>", "</s>", "assistantfinal", "analysis", "{", "}", "[", "]",
    '{"rules": []}', '{"explanation": "no"}',
    '"', "'", "“q”", "\\", "\n", "\t", "\n```\n", "1. ", ", ", ": ", '", "', '"}', "]}", "// no", "...",
    "null", "true", "NaN", "é", "😀", "\u2028",
)  # fmt: skip
"""Everything that the reading of replies gives a meaning to, put into texts."""
DRESSES: dict[str, Callable[[str], str]] = {
    "plain": lambda answer: answer,
    "fence": lambda answer: f"```json\n{answer}\n```",
    "fence in prose": lambda answer: f"Sure, here it is:\n\n```json\n{answer}\n```\nAnything else?",
    "fence behind a word": lambda answer: f"Sure: ```json\n{answer}\n```",
    "prose": lambda answer: f"The answer is this.\n{answer}\nI hope that helps!",
    "end of turn": lambda answer: f"{answer}<|im_end|>",
    "byte order mark": lambda answer: f"\ufeff{answer}\n",
    "answer tag": lambda answer: f"<answer>\n{answer}\n</answer>",
}
THOUGHTS: dict[str, Callable[[str, str], str]] = {
    "think": lambda thought, answer: f"<think>\n{thought}\n</think>\n\n{answer}",
    "think without a beginning": lambda thought, answer: f"{thought}\n</think>\n\n{answer}",
    "thinking": lambda thought, answer: f"<thinking>{thought}</thinking>{answer}",
    "empty think": lambda _, answer: f"<think>\n\n</think>\n\n{answer}",
    "magistral": lambda thought, answer: f"[THINK]{thought}[/THINK]{answer}",
    "kimi": lambda thought, answer: f"◁think▷{thought}◁/think▷{answer}",
    "cohere": lambda thought, answer: (
        f"<|START_THINKING|>{thought}<|END_THINKING|><|START_RESPONSE|>{answer}<|END_RESPONSE|>"
    ),
    "seed": lambda thought, answer: f"<seed:think>{thought}</seed:think>{answer}",
    "harmony": lambda thought, answer: (
        f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{answer}<|return|>"
    ),
    "harmony with a form": lambda thought, answer: (
        f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final "
        f"<|constrain|>json<|message|>{answer}"
    ),
    "harmony without marks": lambda thought, answer: f"analysis{thought}assistantfinal{answer}",
    "gemma": lambda thought, answer: f"<|channel>thought\n{thought}<channel|>{answer}",
    "none": lambda _, answer: answer,
}
"""How models give their thoughts away; what they are called by."""


@dataclass(frozen=True)
class Played:
    """A reply. ``said``: the texts of its answer, with their strengths where they are rules. ``last``: its
    answer alone, as it is written.
    """

    reply: str
    kind: str
    said: list[tuple[str, int]]
    last: str


def text_of(luck: random.Random, number: int) -> str:
    """A text between two words that no other text has, with markers in it."""
    inner = " ".join(luck.choice([*MARKERS, "words", "of war", "the sea"]) for _ in range(luck.randint(0, 5)))
    return f"alpha{number} {inner} omega{number}"


def whole(luck: random.Random) -> Played:
    """A reply whose answer is JSON as it should be, somewhere in it."""
    kind = luck.choice(("explanation", "rules", "texts"))
    n = 1 if kind == "explanation" else luck.randint(1, 7)
    said = [(text_of(luck, i), luck.randint(1, 5)) for i in range(n)]
    return _dressed(luck, kind, said, _written(luck, kind, said))


def _written(luck: random.Random, kind: str, said: list[tuple[str, int]]) -> str:
    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    ascii_only, indent = luck.random() < 0.3, luck.choice((None, None, 1, 2))
    if kind == "explanation":
        return dump({"explanation": said[0][0]})
    items: list[Any] = (
        [{"activates_on": t, "strength": s} for t, s in said] if kind == "rules" else [t for t, _ in said]
    )
    way = luck.random()
    if way < 0.15 and len(items) > 1:  # several objects where one was asked for
        at = luck.randint(1, len(items) - 1)
        return dump({kind: items[:at]}) + luck.choice(("\n", ", ", "\n\n")) + dump({kind: items[at:]})
    if way < 0.25 and kind == "rules":
        return "\n".join(map(dump, items))
    if way < 0.35:
        return dump(items)
    return dump({kind: items})


def _dressed(luck: random.Random, kind: str, said: list[tuple[str, int]], answer: str) -> Played:
    draft = luck.choice(
        (
            "Let me see.",
            '{"explanation": "beta draft"}',
            'Perhaps {"rules": [{"activates_on": "beta draft", "strength": 4}]}',
            '{"texts": ["beta',
        )
    )
    dress = luck.choice(list(DRESSES)) if luck.random() < 0.6 else "plain"
    thought = luck.choice(list(THOUGHTS)) if luck.random() < 0.5 else "none"
    return Played(THOUGHTS[thought](draft, DRESSES[dress](answer)), kind, said, answer)


def broken(luck: random.Random) -> Played:
    """A reply whose answer was damaged at one to three places: cut, or with characters taken out, put in or
    exchanged.
    """
    good = whole(luck)
    answer = good.last
    for _ in range(luck.randint(1, 3)):
        answer = luck.choice(_DAMAGES)(luck, answer)
    return _dressed(luck, good.kind, good.said, answer)


def _cut(luck: random.Random, answer: str) -> str:
    return answer[: luck.randint(0, len(answer))]


def _front(luck: random.Random, answer: str) -> str:
    return answer[luck.randint(0, len(answer)) :]


def _out(luck: random.Random, answer: str) -> str:
    at = luck.randint(0, len(answer))
    return answer[:at] + answer[at + luck.choice((1, 1, 1, 2, 5)) :]


def _in(luck: random.Random, answer: str) -> str:
    at = luck.randint(0, len(answer))
    return answer[:at] + luck.choice([*MARKERS, '"strength": 2, ', '"explanation": ']) + answer[at:]


def _quotes(luck: random.Random, answer: str) -> str:
    return answer.replace('"', luck.choice(("'", "“", '""', "")))


def _unescaped(_: random.Random, answer: str) -> str:
    return answer.replace('\\"', '"').replace("\\n", "\n")


def _trailing(_: random.Random, answer: str) -> str:
    return answer.replace("}", ",}").replace("]", ",]")


_DAMAGES = (_cut, _cut, _front, _out, _out, _in, _in, _quotes, _unescaped, _trailing)


YES_NO: dict[str, bool | None] = {
    "Yes": True, "yes.": True, " No\n": False, "**Yes**": True, '"Yes"': True, "Answer: Yes": True,
    "(No)": False, "`no`": False, "Final answer: No.": False,
    "The answer is **No**": False, "<answer>Yes</answer>": True, '{"answer": "Yes"}': True,
    "\\boxed{No}": False, "No, it does not": False, "Yes - it does": True,
    "YES!": True, "“Yes”": True, "No mention of it": False, "<think>No? Yes.</think>No": False,
    "hm</think>\n\nYes": True,
    "Yesterday": None, "Not sure": None, "None": None, "Nothing fits": None, "No idea": None,
    "Yes and no": None, "Yes/No": None, "yes or no": None,
    "Maybe": None, "": None, "It does": None, "I cannot say yes": None, "no-one": None, "Nope": None,
    "<think>Yes": None, "Norway": None,
}  # fmt: skip
"""Replies to a question and what they say; None: neither."""
RATINGS: dict[str, int | None] = {
    "3": 3, "3.": 3, " 0\n": 0, "**4**": 4, '"2"': 2, "(5)": 5, "Rating: 3": 3, "Complexity: 3": 3,
    "The rating is 2.": 2, "4/5": 4, "4 out of 5": 4, "- 3": 3,
    "3, a kind of word": 3, "3 (a topic)": 3, "<think>5?</think>1": 1, "Level 4": 4,
    "10": None, "4.5": None, "-1": None, "−1": None, "+1": None, "6": None, "3-4": None, "3 to 4": None,
    "2 or 3": None, "7/10": None, "3/10": None, "3rd": None,
    "3%": None, "30": None, "0.5": None, "": None, "high": None, "<think>3": None, "1,5": None, "not 3": None,
}  # fmt: skip
"""Replies to a request for a rating and what they say; None: nothing that could be used."""


def logged(text: str, *tokens: tuple[str, dict[str, float]]) -> dict[str, Any]:
    """A chat completion with log-probabilities: of each token, what it is and how probable what could stand
    in its place is (0 to 1).
    """
    content = [
        {
            "token": t,
            "logprob": -0.1,
            "bytes": None,
            "top_logprobs": [{"token": a, "logprob": math.log(p), "bytes": None} for a, p in others.items()],
        }
        for t, others in tokens
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": {"content": content},
    }
    usage = {"prompt_tokens": 9, "completion_tokens": len(tokens), "total_tokens": 9 + len(tokens)}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def texts_in(reply: str) -> list[str]:
    """What the product reads of a list of texts that came whole."""
    return read_texts(Reply((reply,), (False,), Usage()))
