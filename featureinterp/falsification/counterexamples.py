"""Counterexamples: a language model writes texts that fit an explanation, texts that miss it narrowly, and
texts like the feature's examples, which a judge holds against the explanation; the subject model decides who
is right.

Texts that fit show what is too broad; those like the examples, on which the feature fires though they do not
fit, show what is too narrow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pydantic

from featureinterp.domain.chat import Message, Request
from featureinterp.domain.explanation import Explanation
from featureinterp.domain.record import FeatureRecord, SplitName, Window
from featureinterp.domain.trial import Trial, TrialText
from featureinterp.errors import InputError, LanguageModelError, MalformedReplyError
from featureinterp.falsification.sensitivity import examples_of
from featureinterp.falsification.writing import TextWriter, new_texts, read_texts, same_text, without_marks
from featureinterp.interfaces import Activator, Judge, LanguageModel, Settled, settings_of
from featureinterp.prompts import escape, load_prompt
from featureinterp.replies import object_schema

Kind = Literal["fitting", "near"]
N_EXAMPLES, HALF_WIDTH = (10, 5), 10
"""Top and importance-weighted examples that the writer is shown at most, and tokens on each side of their
strongest one.
"""
MAX_ATTEMPTS, SEEDS_APART = 3, 1000
"""A reply without a text that can be read is asked for again, this often in all, with seeds so far apart."""
_QUOTED = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class TrialSettings:
    """``n_texts``: of each of the three kinds. ``rounds``: explanations that are tried at most, the first one
    included; each further one is a revision. ``fires_above``: share of the feature's scale that a text has to
    reach to count as firing."""

    n_texts: int = 8
    rounds: int = 2
    fires_above: float = 0.1

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        if self.n_texts < 1 or self.rounds < 1:
            raise InputError(
                f"a trial of {self.n_texts} texts in {self.rounds} rounds is none: give at least 1 of both"
            )
        if not 0 <= self.fires_above < 1:
            raise InputError(
                f"fires_above = {self.fires_above:g} is not possible: give a share of the scale from 0 to "
                "below 1"
            )


class Falsifier:
    """Puts explanations on trial. ``model`` writes, ``judge`` says which of the texts that are like the
    examples fit, ``activator`` decides.
    """

    def __init__(
        self,
        model: LanguageModel,
        activator: Activator,
        judge: Judge,
        settings: TrialSettings | None = None,
        *,
        temperature: float = 0.8,
        version: str = "v1",
        seed: int = 0,
    ) -> None:
        self.model, self.activator, self.judge, self.trial = (
            model,
            activator,
            judge,
            settings or TrialSettings(),
        )
        self.temperature, self.seed = temperature, seed
        self.prompt = load_prompt("falsify", version)
        self.writer = TextWriter(model, per_call=self.trial.n_texts, temperature=temperature, seed=seed)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a trial depends on, besides the explanation and the feature."""
        own = {
            "model": self.model.name,
            "prompt": self.prompt.name,
            "prompt_hash": self.prompt.hash,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        parts: dict[str, Settled] = {
            "activator": self.activator,
            "judge": self.judge,
            "writer": self.writer,
        }
        return {
            **own,
            "n_texts": self.trial.n_texts,
            "fires_above": self.trial.fires_above,
            "n_examples": N_EXAMPLES,
            **{name: settings_of(part) for name, part in parts.items()},
        }

    async def run(self, explanation: Explanation, record: FeatureRecord) -> Trial:
        """One trial. Near misses that hold a word which the explanation names in quotes are left out. Raises
        the ``LanguageModelError`` of a request that failed, as half a trial says nothing."""
        written: list[tuple[str, bool]] = []
        for kind in ("fitting", "near"):
            texts = [without_marks(t) for t in await self._write(kind, explanation)]
            new = new_texts(texts, {same_text(known) for known, _ in written})
            written += [
                (t, kind == "fitting")
                for t in new
                if kind == "fitting" or not names_a_word_of(explanation, t)
            ]
        alike = new_texts(await self._like_examples(record), {same_text(known) for known, _ in written})
        judged = zip(alike, await self.judge(explanation, alike) if alike else (), strict=True)
        known = [(t, p > 0.5) for t, p in judged if p is not None]
        if alike and not known:
            raise LanguageModelError("none of the texts that are like the examples could be judged")
        windows = await self.activator.run(record.feature, [text for text, _ in (*written, *known)])
        tried = tuple(
            TrialText(
                text,
                fits,
                w.pieces,
                tuple(np.round(w.activations.astype(float), 4).tolist()),
                i >= len(written),
            )
            for i, ((text, fits), w) in enumerate(zip((*written, *known), windows, strict=True))
        )
        return Trial(explanation.rules, tried, self.trial.fires_above * record.scale)

    async def _like_examples(self, record: FeatureRecord) -> list[str]:
        """New texts like the feature's training examples; none where it has no such example."""
        shown = [e.shown for e in examples_of(record, *N_EXAMPLES, HALF_WIDTH) if not e.held_out]
        if not shown:
            return []
        calls = await self.writer.write(shown, self.trial.n_texts)
        texts = [without_marks(t) for c in calls for t in c.texts]
        if not texts:
            raise LanguageModelError(f"no text like the examples was written: {calls[-1].failure}")
        return new_texts(texts, set())[: self.trial.n_texts]

    async def _write(self, kind: Kind, explanation: Explanation) -> list[str]:
        n = self.trial.n_texts
        user = self.prompt.render(f"{kind}.j2", description=escape(explanation.text), n=n)
        messages = (Message("system", self.prompt.text("system.txt")), *self._shots(), Message("user", user))
        schema = object_schema(
            {"texts": {"type": "array", "items": {"type": "string"}, "minItems": n, "maxItems": n}}
        )
        problem: MalformedReplyError | None = None
        for attempt in range(MAX_ATTEMPTS):  # with other seeds: the same request has the same reply
            seed = self.seed + SEEDS_APART * attempt
            request = Request(messages, 100 + 64 * n, self.temperature, seed, schema=schema, check=read_texts)
            try:
                return read_texts(await self.model.complete(request))[:n]
            except MalformedReplyError as error:
                problem = error
        assert problem is not None
        raise problem

    def _shots(self) -> Iterator[Message]:
        for shot in self.prompt.json("few_shot.json"):
            yield Message(
                "user",
                self.prompt.render(
                    f"{shot['kind']}.j2", description=shot["description"], n=len(shot["texts"])
                ),
            )
            yield Message("assistant", json.dumps({"texts": shot["texts"]}, ensure_ascii=False))


def names_of_words(explanation: Explanation) -> set[str]:
    """The words that an explanation names in quotes, lower case."""
    return {
        word.strip().lower()
        for rule in explanation.rules
        for word in _QUOTED.findall(rule.activates_on)
        if word.strip()
    }


def names_a_word_of(explanation: Explanation, text: str) -> bool:
    """Whether a text holds a word that the explanation names, and so is no near miss, whatever its writer
    meant.
    """
    return any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text.lower()) for word in names_of_words(explanation)
    )


def with_counterexamples(record: FeatureRecord, trials: Sequence[Trial]) -> FeatureRecord:
    """The record with the trials' texts among its training and validation windows, alternately, those that
    contradict their explanation first, so that a search learns from some of them and is judged by others."""
    texts = [
        t
        for trial in trials
        for t in (*trial.contradictions, *(t for t in trial.texts if t not in trial.contradictions))
    ]
    windows = [
        Window(
            -1 - i,
            -1 - i,
            np.full(len(t.pieces), -1, np.int32),
            t.pieces,
            np.array(t.activations, np.float32),
        )
        for i, t in enumerate(texts)
        if t.pieces
    ]
    splits = dict(record.splits)
    shown: tuple[SplitName, ...] = ("train", "valid")
    for place, name in enumerate(shown):
        splits[name] = {**record.splits.get(name, {}), "counterexample": tuple(windows[place::2])}
    return replace(record, splits=splits)
