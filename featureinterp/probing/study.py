"""Everything that labels say about a dictionary, on documents that chose nothing: for each concept its best
features and decoders, for each feature its concept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from featureinterp.domain.score import Interval
from featureinterp.errors import InputError
from featureinterp.probing.annotate import Annotation, annotate_features
from featureinterp.probing.auroc import auroc_all, auroc_vec
from featureinterp.probing.buffer import ActivationBuffer
from featureinterp.probing.columns import Columns
from featureinterp.probing.decode import LAMBDAS, fit_logreg
from featureinterp.probing.domain_f1 import THRESHOLDS, DomainF1, domain_f1
from featureinterp.probing.nulls import (
    N_SHIFTS,
    as_documents,
    auroc_interval,
    auroc_null,
    f1_interval,
    f1_null,
    p_values,
)
from featureinterp.probing.splits import split_indices
from featureinterp.validation import check_seed

Steps = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StudySettings:
    """``test_fraction``: share of the tokens on which everything is reported, in documents of their own.
    ``top``: features per concept. ``min_auroc``, ``min_f1``, ``alpha``, ``n_shifts``: what an annotation
    needs (:func:`annotate_features`). ``decoders``: whether linear decoders of all features are fitted."""

    test_fraction: float = 0.4
    top: int = 5
    min_auroc: float = 0.85
    min_f1: float = 0.5
    alpha: float = 0.05
    n_shifts: int = N_SHIFTS
    decoders: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top < 1:
            raise InputError(f"{self.top} features per concept are none: ask for at least 1")
        if self.n_shifts < 1:
            raise InputError(f"{self.n_shifts} shifts of the labels are no null: ask for at least 1")
        for name in ("min_auroc", "min_f1", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} = {getattr(self, name):g} is not possible: give one from 0 to 1")
        check_seed(self.seed)


@dataclass(frozen=True, slots=True)
class ConceptFeature:
    """A feature for a concept. ``sign`` −1: it is silent where the concept is. ``train_auroc`` chose it;
    ``auroc`` is of the test tokens, in the direction of the sign. ``f1``, ``precision``, ``recall``: of the
    test tokens at ``threshold``, which the training tokens chose."""

    feature: int
    sign: int
    train_auroc: float
    auroc: float | None
    f1: float | None
    precision: float | None
    recall: float | None
    threshold: float | None


@dataclass(frozen=True)
class Concept:
    """What is known of one concept. ``n_tokens``, ``n_instances``, ``n_documents``: of all tokens;
    ``n_test``: labelled test tokens. ``by_auroc``: features in order of training AUROC; ``by_f1``: the
    feature with the best training F1. ``auroc_interval``, ``f1_interval``: of the first of each, over
    documents; ``auroc_null``, ``f1_null``: the 95 % quantile of that feature's score with shifted labels, and
    ``auroc_p``, ``f1_p`` the share of shifts that reach it. ``codes_auroc``, ``dense_auroc``: of a linear
    decoder of all features, and of the dense activations, with intervals and the strength of their penalty.
    ``undefined``: why there is nothing to report."""

    name: str
    n_tokens: int
    n_instances: int
    n_documents: int
    n_test: int
    by_auroc: tuple[ConceptFeature, ...] = ()
    auroc_interval: Interval | None = None
    auroc_null: float | None = None
    auroc_p: float | None = None
    by_f1: ConceptFeature | None = None
    f1_interval: Interval | None = None
    f1_null: float | None = None
    f1_p: float | None = None
    codes_auroc: float | None = None
    codes_interval: Interval | None = None
    codes_l2: float | None = None
    dense_auroc: float | None = None
    dense_interval: Interval | None = None
    dense_l2: float | None = None
    undefined: str | None = None


@dataclass(frozen=True)
class Study:
    """``annotations``: by AUROC, then by F1. ``n_tokens``, ``n_documents``: of all tokens; ``n_test``: test
    tokens. ``n_repeated``: tokens that are on neither side, as windows of training documents have their text.
    """

    concepts: tuple[Concept, ...]
    annotations: tuple[Annotation, ...]
    n_tokens: int
    n_test: int
    n_documents: int
    n_features: int
    settings: StudySettings
    n_repeated: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return asdict(self)


def study(
    buffer: ActivationBuffer, settings: StudySettings | None = None, *, steps: Steps = lambda *_: None
) -> Study:
    """Judges every feature and decoder by every label of a buffer. Raises ``InputError`` when its documents
    cannot be split.
    """
    settings = settings or StudySettings()
    documents, groups = buffer.documents, buffer.groups
    train, test = split_indices(len(buffer), settings.test_fraction, settings.seed, documents, buffer.texts)
    sides = _Sides.of(buffer, train, test)
    n_labels = len(buffer.label_names)
    train_table, test_table = (
        auroc_all(sides.learnt, buffer.labels[train]),
        auroc_all(sides.held, buffer.labels[test]),
    )
    steps("AUROC of every feature", 1, 1)
    tried, found = sides.f1()
    steps("F1 of every feature", 1, 1)
    choices = [_ranked(train_table[:, i], settings.top) for i in range(n_labels)]
    best_f1 = [int(np.argmax(np.nan_to_num(tried.f1[:, i]))) for i in range(n_labels)]
    nulls = sides.nulls([c[0] if len(c) else 0 for c in choices], train_table, best_f1, tried, settings)
    steps("shifted labels", 1, 1)
    decoded = _decoders(buffer, train, test, settings, steps) if settings.decoders else {}

    def of(feature: int, label: int) -> ConceptFeature:
        sign = 1 if train_table[feature, label] >= 0.5 else -1
        at = int(np.argmax(np.nan_to_num(tried.curve[feature, :, label])))
        fires = sides.fires(feature, at)
        inside = buffer.labels[test, label]
        values = (sign * (table[feature, label] - 0.5) + 0.5 for table in (train_table, test_table))
        before, after = (_known(v) for v in values)
        assert before is not None
        precision = float(inside[fires].mean()) if fires.any() else None
        f1 = _known(found.curve[feature, at, label])
        recall = None if f1 is None else sides.recall(fires, label)
        return ConceptFeature(feature, sign, before, after, f1, precision, recall, float(THRESHOLDS[at]))

    concepts = []
    for i, name in enumerate(buffer.label_names):
        ids = sides.ids[i]
        here = buffer.labels[:, i]
        of_documents = np.unique(as_documents(documents, len(buffer))[here])
        concept: dict[str, Any] = {
            "name": name,
            "n_tokens": int(here.sum()),
            "n_instances": len(np.unique(ids[ids >= 0])),
            "n_documents": len(of_documents),
        }
        concept["n_test"] = int(buffer.labels[test, i].sum())
        if not len(choices[i]) or np.isnan(test_table[:, i]).all():
            where = "training" if not len(choices[i]) else "test"
            concepts.append(Concept(**concept, undefined=_why(where, here, train, test)))
            continue
        ranked = tuple(of(int(f), i) for f in choices[i])
        first, by_f1 = ranked[0], of(best_f1[i], i)
        scores = first.sign * sides.held.dense(np.array([first.feature]))[:, 0]
        held = None if groups is None else groups[test]
        at = THRESHOLDS.index(by_f1.threshold or THRESHOLDS[0])
        concepts.append(
            Concept(
                **concept,
                by_auroc=ranked,
                auroc_interval=auroc_interval(scores, buffer.labels[test, i], held, seed=settings.seed),
                auroc_null=nulls.auroc[i],
                auroc_p=nulls.p(first.auroc, i, "auroc"),
                by_f1=by_f1,
                f1_interval=f1_interval(
                    sides.fires(by_f1.feature, at),
                    buffer.labels[test, i],
                    ids[test],
                    held,
                    seed=settings.seed,
                ),
                f1_null=nulls.f1[i],
                f1_p=nulls.p(by_f1.f1, i, "f1"),
                **decoded.get(i, {}),
            )
        )
    annotations = _annotations(buffer, (train, test), settings, steps)
    n_documents = len(np.unique(as_documents(documents, len(buffer))))
    n_repeated = len(buffer) - len(train) - len(test)
    return Study(
        tuple(concepts),
        annotations,
        len(buffer),
        len(test),
        n_documents,
        buffer.codes.n_features,
        settings,
        n_repeated,
    )


def _why(where: str, labelled: np.ndarray, train: np.ndarray, test: np.ndarray) -> str:
    """Why nothing is known of a label on one side."""
    repeated = int(labelled.sum() - labelled[train].sum() - labelled[test].sum())
    if where == "test" and repeated and not labelled[test].any():
        return (
            f"no test token has it, since {repeated:,} labelled ones are in windows whose text is in "
            "training, too: label texts that differ"
        )
    return f"no {where} token has it, or every one: label more documents"


@dataclass(frozen=True)
class _Nulls:
    """95 % quantiles by label (None: undefined), and the shifts that they come from ``[shift, label]``."""

    auroc: list[float | None]
    f1: list[float | None]
    shifts: dict[str, np.ndarray]

    def p(self, observed: float | None, label: int, score: str) -> float | None:
        return (
            None
            if observed is None
            else _known(float(p_values(np.array([observed]), self.shifts[score][:, label])[0]))
        )


@dataclass(frozen=True)
class _Sides:
    """Training and test tokens."""

    learnt: Columns
    held: Columns
    buffer: ActivationBuffer
    train: np.ndarray
    test: np.ndarray
    ids: list[np.ndarray]

    @classmethod
    def of(cls, buffer: ActivationBuffer, train: np.ndarray, test: np.ndarray) -> _Sides:
        ids = [buffer.instances_of(name) for name in buffer.label_names]
        return cls(buffer.codes.take(train), buffer.codes.take(test), buffer, train, test, ids)

    def f1(self) -> tuple[DomainF1, DomainF1]:
        """On training and on test tokens, each scaled by the other's maxima."""
        labels = self.buffer.labels
        tried = domain_f1(
            self.learnt, self.held.maxima, labels[self.train], [i[self.train] for i in self.ids]
        )
        return tried, domain_f1(
            self.held, self.learnt.maxima, labels[self.test], [i[self.test] for i in self.ids]
        )

    def fires(self, feature: int, at: int) -> np.ndarray:
        """Test tokens on which a feature exceeds a threshold, bool ``[token]``."""
        largest = float(self.learnt.maxima[feature])
        return np.asarray(self.held.dense(np.array([feature]))[:, 0] > THRESHOLDS[at] * largest) & (
            largest > 0
        )

    def recall(self, fires: np.ndarray, label: int) -> float:
        """Share of the instances among the test tokens in which it does."""
        ids = self.ids[label][self.test]
        ids = ids if ids.ndim == 2 else ids[:, None]
        met = np.unique(ids[fires])
        return float((met >= 0).sum() / max(1, len(np.unique(ids[ids >= 0]))))

    def nulls(
        self,
        by_auroc: list[int],
        table: np.ndarray,
        by_f1: list[int],
        tried: DomainF1,
        settings: StudySettings,
    ) -> _Nulls:
        """Scores of each label's chosen feature with the labels of the test tokens shifted."""
        labels, groups = (
            self.buffer.labels[self.test],
            None if self.buffer.groups is None else self.buffer.groups[self.test],
        )
        each = np.eye(len(by_auroc), dtype=bool)
        options: dict[str, Any] = {"among": each, "n_shifts": settings.n_shifts, "seed": settings.seed}
        signs = np.where(table[by_auroc, np.arange(len(by_auroc))] >= 0.5, 1, -1)
        areas = (
            signs * (auroc_null(self.held.select(np.array(by_auroc)), labels, groups, **options) - 0.5) + 0.5
        )
        chosen = np.array(by_f1)
        at = np.argmax(np.nan_to_num(tried.curve[chosen]), axis=1)
        ids = [i[self.test] for i in self.ids]
        f1 = f1_null(
            self.held.select(chosen), self.learnt.maxima[chosen], labels, ids, groups, at=at, **options
        )
        quantiles = [
            [_known(float(np.quantile(column, 0.95))) for column in shifts.T] for shifts in (areas, f1)
        ]
        return _Nulls(quantiles[0], quantiles[1], {"auroc": areas, "f1": f1})


def _ranked(column: np.ndarray, n: int) -> np.ndarray:
    """The features that separate a label best in training, in either direction; none when that is
    undefined.
    """
    return (
        np.zeros(0, np.int64)
        if np.isnan(column).all()
        else np.argsort(-np.abs(column - 0.5), kind="stable")[:n]
    )


def _decoders(
    buffer: ActivationBuffer, train: np.ndarray, test: np.ndarray, settings: StudySettings, steps: Steps
) -> dict[int, dict[str, Any]]:
    """Per label the AUROC of linear decoders on the test tokens."""
    groups = buffer.groups
    usable = [i for i in range(len(buffer.label_names)) if 0 < buffer.labels[train, i].sum() < len(train)]
    out: dict[int, dict[str, Any]] = {i: {} for i in usable}
    inputs = {"codes": buffer.codes, **({} if buffer.dense is None else {"dense": buffer.dense})}
    for place, (name, x) in enumerate(inputs.items()):
        for number, i in enumerate(usable):  # one after the other, so that each has the penalty that suits it
            decoder = fit_logreg(
                x,
                buffer.labels[:, i],
                train,
                l2=LAMBDAS,
                groups=groups,
                texts=buffer.texts,
                seed=settings.seed,
            )
            logits = decoder.predict(x, test)[:, 0]
            wanted = buffer.labels[test, i]
            out[i][f"{name}_auroc"] = _known(auroc_vec(logits, wanted))
            out[i][f"{name}_interval"] = auroc_interval(
                logits, wanted, None if groups is None else groups[test], seed=settings.seed
            )
            out[i][f"{name}_l2"] = decoder.l2
            steps("decoders", place * len(usable) + number + 1, len(usable) * len(inputs))
    return out


def _annotations(
    buffer: ActivationBuffer, split: tuple[np.ndarray, np.ndarray], settings: StudySettings, steps: Steps
) -> tuple[Annotation, ...]:
    ids = {name: buffer.instances_of(name) for name in buffer.label_names}
    found: list[Annotation] = []
    methods: tuple[Literal["auroc", "domain_f1"], ...] = ("auroc", "domain_f1")
    for number, method in enumerate(methods, 1):
        found += annotate_features(
            buffer.codes,
            buffer.labels,
            buffer.label_names,
            settings.min_auroc,
            method=method,
            min_f1=settings.min_f1,
            documents=buffer.documents,
            texts=buffer.texts,
            instances=ids,
            split=split,
            alpha=settings.alpha,
            n_shifts=settings.n_shifts,
            seed=settings.seed,
        )
        steps("annotations", number, 2)
    return tuple(found)


def _known(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(value)
