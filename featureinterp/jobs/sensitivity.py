"""Sensitivity as a job: texts that are paid for once, kept in a journal, within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pydantic

from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import Window
from featureinterp.domain.score import Failure
from featureinterp.errors import InputError, JobStoppedError
from featureinterp.falsification.sensitivity import FeatureSensitivity
from featureinterp.falsification.writing import Call, TextWriter, without_marks
from featureinterp.files import content_key
from featureinterp.formerly import readable_as, take
from featureinterp.interfaces import Activator
from featureinterp.jobs.budget import Budget, Guard
from featureinterp.jobs.journal import Journal
from featureinterp.jobs.stored_features import StoredFeatures
from featureinterp.llm.metered import Meter
from featureinterp.llm.tally import tally
from featureinterp.validation import check_seed

FORMAT = 1
OnFeature = Callable[[FeatureSensitivity, int, int], None]
"""Called with (a feature that is through, how many are, of how many)."""
ExamplesOf = Callable[[Sequence[int]], Iterator[FeatureSensitivity]]


@dataclass(frozen=True)
class SensitivityPlan:
    """``n_texts``: new texts per feature; ``texts_per_call``: of one request. ``n_top``, ``n_weighted``:
    examples that the writer is shown; ``n_held_out``: further ones of each kind that it is not.
    ``half_width``: tokens of an example on each side of its strongest one. ``features_at_once``: how many are
    worked on at once. The former names ``samples``, ``per_call`` and ``concurrency`` are taken, too."""

    n_texts: int = 10
    texts_per_call: int = 10
    n_top: int = 10
    n_weighted: int = 5
    n_held_out: int = 2
    half_width: int = 10
    temperature: float = 0.8
    features_at_once: int = 16
    seed: int = 0
    concurrency: InitVar[int | None] = None
    samples: InitVar[int | None] = None
    per_call: InitVar[int | None] = None

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    def __post_init__(self, concurrency: int | None, samples: int | None, per_call: int | None) -> None:
        take(self, features_at_once=concurrency, n_texts=samples, texts_per_call=per_call)
        for name in ("n_texts", "texts_per_call", "features_at_once"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} leaves nothing to do: give at least 1")
        if (
            self.n_top + self.n_weighted < 1
            or min(self.n_top, self.n_weighted, self.n_held_out, self.half_width) < 0
        ):
            raise InputError(
                "a writer needs at least one example: give positive numbers of top or importance-weighted "
                "ones"
            )
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"a temperature of {self.temperature:g} is not possible: give 0 or more")
        check_seed(self.seed)


readable_as("concurrency", "features_at_once", SensitivityPlan)
readable_as("samples", "n_texts", SensitivityPlan)
readable_as("per_call", "texts_per_call", SensitivityPlan)


class SensitivityJob:
    """The features of one SAE. ``sae``: its name; ``source``: what the activations depend on (model, SAE),
    for the journal's keys. ``base_rate`` is given a feature and the lengths of its texts in tokens.
    ``guard``: the limits of all jobs of a run together."""

    def __init__(
        self,
        journal: Journal,
        writer: TextWriter,
        activator: Activator,
        plan: SensitivityPlan,
        *,
        sae: str,
        source: Any,
        base_rate: Callable[[int, Sequence[int]], float | None] = lambda *_: None,
        meter: Meter | None = None,
        guard: Guard | None = None,
        on_feature: OnFeature = lambda *_: None,
    ) -> None:
        self.journal, self.writer, self.activator, self.plan = journal, writer, activator, plan
        self.sae, self.source, self.base_rate, self.on_feature = sae, source, base_rate, on_feature
        self.meter = meter or Meter()
        self.guard = guard or Guard(Budget(), lambda: self.meter.usage)
        self.meter.before, self.meter.fits = self.guard.before, self.guard.fits
        self.stopped: JobStoppedError | None = None
        self._folder = Path(journal.path).parent if journal.path != ":memory:" else None

    async def run(self, features: Sequence[int], examples: ExamplesOf) -> StoredFeatures:
        """Gives features texts and activations, as far as it gets: ``stopped`` says why it ended early.
        ``examples`` gives features with their examples, in order. What failed has its cause in it. Few
        features are in memory at once. Raises ``EndpointRefusedError`` and ``StorageError``."""
        order = list(dict.fromkeys(features))
        number = self.journal.start(content_key({"sensitivity": self.sae, "source": self.source}), len(order))
        ended = "interrupted"
        try:
            written = await self._write_all(order, examples)
            done = await self._read_all([f for f in order if f in written.indices], written, len(order))
            ended = type(self.stopped).__name__ if self.stopped else "done"
            return done
        except Exception as error:
            ended = type(error).__name__
            raise
        finally:
            self.journal.end(number, ended, self.meter.usage)

    async def _write_all(self, order: Sequence[int], examples: ExamplesOf) -> StoredFeatures:
        """The features that have their texts, or a failure."""
        written = StoredFeatures(self._folder)
        limit = anyio.Semaphore(self.plan.features_at_once)
        broken: list[Exception] = []

        async def one(feature: FeatureSensitivity) -> None:
            try:
                if not broken:
                    written.add(await self._written(feature))
            except JobStoppedError as error:
                self.stopped = self.stopped or error
                broken.append(error)
            except Exception as error:
                broken.append(error)
            finally:
                limit.release()

        found = examples(order)
        async with anyio.create_task_group() as group:
            for _ in order:
                await limit.acquire()
                if broken:
                    break
                try:
                    feature = await anyio.to_thread.run_sync(next, found)
                except Exception as error:  # what is in flight is let finish: it may be paid for
                    broken.append(error)
                    break
                group.start_soon(one, feature)
        for cause in broken:
            if not isinstance(cause, JobStoppedError):
                raise cause
        return written

    async def _written(self, feature: FeatureSensitivity) -> FeatureSensitivity:
        """The feature with texts that were written for it, from the journal where they are there."""
        shown = [e.shown for e in feature.examples if not e.held_out]
        if not shown:
            failure = Failure(
                feature.feature,
                "examples",
                "InputError",
                "it fires in no window of the corpus that could be shown",
            )
            return replace(feature, failure=failure)
        depends = {"examples": shown, "samples": self.plan.n_texts, **self.writer.settings}
        key = content_key({"format": FORMAT, "stage": "write-texts", **depends})
        known = self.journal.get(key)
        if known is not None and known.status == "done":
            return _with_calls(feature, [Call(**{**c, "texts": tuple(c["texts"])}) for c in known.value])
        with tally() as spent:
            calls = await self.writer.write(shown, self.plan.n_texts)
        texts = [t for c in calls for t in c.texts]
        failed = next((c.failure for c in calls if c.failure), None)
        if not texts:
            error, _, message = (failed or "MalformedReplyError: no text came back").partition(": ")
            failure = Failure(feature.feature, "write-texts", error, message)
            self.journal.failed(key, failure, usage=spent.usage)
            self.guard.outcome(failure)
            return replace(feature, calls=tuple(calls), failure=failure)
        gaps = [c.failure for c in calls if c.failure]
        if not gaps and len(texts) < self.plan.n_texts:
            gaps = [f"{len(texts)} of {self.plan.n_texts} texts came"]
        value = [asdict(c) for c in calls]
        self.journal.stage(
            key,
            feature.feature,
            "write-texts",
            value,
            usage=spent.usage,
            provenance=self.writer.settings,
            gaps=gaps,
        )
        self.guard.outcome(None)
        return _with_calls(feature, calls)

    async def _read_all(self, order: Sequence[int], written: StoredFeatures, total: int) -> StoredFeatures:
        """The features with activations: on their own texts, on their examples, and on the texts of the next
        feature that has any.
        """
        writers = [f for f in order if written.of(f).texts]
        following = dict(zip(writers, [*writers[1:], *writers[:1]], strict=True)) if len(writers) > 1 else {}
        done = StoredFeatures(self._folder)
        for index in order:
            other = following.get(index)
            done.add(
                await self._with_activations(written.of(index), other, written.of(other).texts)
                if other is not None
                else await self._with_activations(written.of(index), None, ())
            )
            self.on_feature(done[-1], len(done), total)
        return done

    async def _with_activations(
        self, feature: FeatureSensitivity, other: int | None, theirs: Sequence[str]
    ) -> FeatureSensitivity:
        """``theirs``: the texts that were written for the feature ``other``."""
        own = [without_marks(t) for t in feature.texts]
        texts = [*own, *(e.text for e in feature.examples), *map(without_marks, theirs)]
        windows = await self._read(feature.feature, texts) if feature.examples else []
        n, m = len(own), len(feature.examples)
        samples = tuple(windows[:n])
        rate = await anyio.to_thread.run_sync(
            partial(self.base_rate, feature.feature, [len(w.pieces) for w in samples])
        )
        return replace(
            feature,
            samples=samples,
            originals=tuple(windows[n : n + m]),
            control=tuple(w.max_activation for w in windows[n + m :]),
            control_of=other,
            base_rate=rate,
        )

    async def _read(self, feature: int, texts: Sequence[str]) -> list[Window]:
        """Windows of the texts, from the journal where they are there."""
        key = content_key(
            {
                "format": FORMAT,
                "stage": "read-texts",
                "source": self.source,
                "feature": feature,
                "texts": list(texts),
            }
        )
        known = self.journal.get(key)
        if known is None:
            windows = await self.activator.run(FeatureId(self.sae, feature), texts)
            value = [
                [w.token_ids.tolist(), list(w.pieces), np.round(w.activations.astype(float), 6).tolist()]
                for w in windows
            ]
            self.journal.stage(key, feature, "read-texts", value)
        else:
            value = known.value
        return [
            Window(i, i, np.array(ids, np.int32), tuple(pieces), np.array(a, np.float32))
            for i, (ids, pieces, a) in enumerate(value)
        ]


def _with_calls(feature: FeatureSensitivity, calls: Sequence[Call]) -> FeatureSensitivity:
    return replace(feature, calls=tuple(calls), texts=tuple(t for c in calls for t in c.texts))
