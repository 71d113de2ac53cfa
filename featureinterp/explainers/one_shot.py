"""OneShot: one prompt with a feature's training windows, one explanation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from featureinterp.domain.chat import Request
from featureinterp.domain.explanation import Explanation, Provenance
from featureinterp.domain.record import FeatureRecord
from featureinterp.explainers.asking import Answers, ask
from featureinterp.explainers.styles import Style
from featureinterp.explainers.windows import training_windows
from featureinterp.interfaces import LanguageModel, Parts
from featureinterp.replies import object_schema


class OneShot:
    """Explains a feature with one request to ``model``; a malformed reply is asked for again, at most three
    times in all.
    """

    def __init__(
        self,
        model: LanguageModel,
        style: Style,
        *,
        n_windows: int = 10,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int = 300,
    ) -> None:
        self.model, self.style = model, style
        self.n_windows, self.temperature, self.seed, self.max_tokens = (
            n_windows,
            temperature,
            seed,
            max_tokens,
        )

    @classmethod
    def of_job(cls, parts: Parts) -> OneShot:
        """The explainer of a job."""
        return cls(parts.model, parts.job.form())

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that an explanation depends on, besides the record."""
        return {
            "explainer": "one-shot",
            "model": self.model.name,
            "prompt": self.style.prompt.name,
            "prompt_hash": self.style.prompt.hash,
            "n_windows": self.n_windows,
            "temperature": self.temperature,
            "seed": self.seed,
            "rule_cap": getattr(self.style, "rule_cap", None),
        }

    async def explain(self, record: FeatureRecord) -> Explanation:
        """Raises ``MalformedReplyError`` or ``TruncatedReplyError`` after the last attempt, and
        ``InputError`` without windows.
        """
        answers = await self.samples(record, 1)
        if not answers.found:
            assert answers.error is not None
            raise answers.error
        explanation, request = answers.found[0]
        provenance = replace(
            explanation.provenance, usage=answers.usage, temperature=request.temperature, seed=request.seed
        )
        return replace(explanation, provenance=provenance)

    async def samples(self, record: FeatureRecord, n: int) -> Answers[Explanation]:
        """Up to ``n`` explanations, in one request where the endpoint can."""
        windows = training_windows(record, self.n_windows)
        prompt = self.style.prompt
        provenance = Provenance(
            "one-shot",
            self.model.name,
            prompt.name,
            prompt.hash,
            self.temperature,
            self.seed,
            tuple(w.row for w in windows),
        )
        messages = self.style.messages(record, windows)
        request = Request(
            messages, self.max_tokens, self.temperature, self.seed, n, object_schema(self.style.fields)
        )
        return await ask(self.model, request, lambda text: self.style.read(text, provenance))
