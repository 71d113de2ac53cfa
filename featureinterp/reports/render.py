"""Results → one self-contained HTML page. Everything that came from a text or a model is escaped by the
template engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import jinja2

from featureinterp.domain.explanation import SearchNode
from featureinterp.domain.result import FeatureResult, ShownWindow
from featureinterp.domain.score import Score
from featureinterp.domain.trial import TrialText
from featureinterp.errors import DamagedStoreError, InputError
from featureinterp.files import opened_file, parse_json, replaced_atomically
from featureinterp.probing.agreement import Agreement
from featureinterp.registry import STAGES
from featureinterp.stored.sums import SummedFile, read_marker, write_marker
from featureinterp.visible import visible as seen

SOURCE_NAMES = {
    "top": "Top-activating",
    "weighted": "Importance-weighted",
    "quantile": "By quantile",
    "random": "Random",
    "random_negative": "Random, silent",
    "similar": "Similar",
    "similar_negative": "Similar, silent",
    "projected_similar": "Similar after projection",
    "projected_similar_negative": "Similar after projection, silent",
    "coactive_negative": "Where a neighbouring feature fires, silent",
}
WINDOW_KINDS = {
    "random": "random",
    "similar": "similar",
    "projected_similar": "projected similar",
    "random_negative": "random silent",
    "similar_negative": "similar silent",
    "projected_similar_negative": "projected similar silent",
    "coactive_negative": "co-active silent",
}
"""What stands beside the top windows, in the names of scores."""
SCORE_NAMES = {
    "correlation": "Correlation, top + random",
    **{f"correlation_{source}": f"Correlation, top + {kind}" for source, kind in WINDOW_KINDS.items()},
    "explained_variance": "Explained variance",
    "deviation_explained": "Deviation explained",
    **{
        f"false_positives_{source}": f"False positives per {kind} window"
        for source, kind in WINDOW_KINDS.items()
    },
    "detection_balanced_accuracy": "Detection, balanced accuracy",
    "detection_f1": "Detection, F1",
    "detection_auroc": "Detection, AUROC",
    "detection_calibrated_accuracy": "Detection, calibrated accuracy",
    "fuzzing_balanced_accuracy": "Fuzzing, balanced accuracy",
    "fuzzing_f1": "Fuzzing, F1",
    "fuzzing_auroc": "Fuzzing, AUROC",
    "fuzzing_calibrated_accuracy": "Fuzzing, calibrated accuracy",
    "complexity": "Complexity of rules, 0–5",
    "trial_precision": "On trial: texts that fit it fire",
    "trial_recall": "On trial: texts that fire fit it",
    "steering_effect": "Steered: match over random directions",
}
BINS = 12


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is drawn: visible text, true activation as a share of the scale (0–1), predicted level, a
    title, and its holistic activation as a share of the feature's largest (0–1)."""

    text: str
    breaks: int
    true: float
    predicted: float | None
    title: str
    cause: float = 0.0


def write_report(
    path: Path,
    results: Sequence[FeatureResult],
    about: Mapping[str, Any],
    labels: Mapping[int, Sequence[Agreement]] | None = None,
) -> Path:
    """Writes the page for ``results``; ``about`` is shown as the run's particulars, ``labels`` beside the
    explanations. Raises ``InputError`` without results."""
    if not results:
        raise InputError("there is no result to report on: run 'featureinterp explain' first")
    with replaced_atomically(path) as file:
        for part in _parts(results, about, labels):
            file.write(part.encode())
    return path


def _parts(
    results: Sequence[FeatureResult],
    about: Mapping[str, Any],
    labels: Mapping[int, Sequence[Agreement]] | None,
) -> Iterator[str]:
    """The page piece by piece; results are gone through several times, one at a time."""
    page = environment().get_template("report.html")
    holistic = any(r.holistic for r in results)
    yield from page.generate(
        results=results, about=about, summary=summarise(results), labels=labels or {}, holistic=holistic
    )


def environment() -> jinja2.Environment:
    """What pages are drawn with: everything is escaped, and a name that is missing is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("featureinterp.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": number,
        "score_name": lambda n: SCORE_NAMES.get(n, n.replace("_", " ")),
        "source_name": lambda s: SOURCE_NAMES.get(s, s),
    }
    used = (tokens, trial_tokens, visible, whisker, groups, largest_cause, search_rows, note_rows)
    made.globals |= {function.__name__: function for function in used}
    made.globals["stage_parts"] = [*STAGES.own, "notes"]
    return made


@dataclass(frozen=True, slots=True)
class _Figures:
    """What the front page needs of one feature."""

    explained: bool
    failures: int
    main: Score | None
    baseline: float | None
    beats_baseline: bool | None

    @classmethod
    def of(cls, result: FeatureResult) -> _Figures:
        main, floor = result.score("correlation"), result.baseline_score("correlation")
        return cls(
            result.explanation is not None,
            len(result.failures),
            main if main is not None and main.value is not None else None,
            floor.value if floor else None,
            result.beats_baseline(),
        )


def summarise(results: Iterable[FeatureResult]) -> dict[str, Any]:
    """The front page's figures: how many were explained, how many beat the null and the baseline, and the
    distribution of r. Goes through ``results`` once."""
    figures = [_Figures.of(r) for r in results]
    defined = [f.main for f in figures if f.main is not None]
    values = [s.value for s in defined if s.value is not None]
    nulls = [s.null for s in defined if s.null is not None]
    against_baseline = [f.beats_baseline for f in figures if f.beats_baseline is not None]
    return {
        "n": len(figures),
        "n_explained": sum(f.explained for f in figures),
        "n_scored": len(defined),
        "n_failures": sum(f.failures for f in figures),
        "beats_null_value": sum(s.beats_null for s in defined),
        "clear_of_null": sum(s.clear_of_null for s in defined),
        "n_null": len(nulls),
        "beats_baseline": sum(against_baseline),
        "n_baseline": len(against_baseline),
        "median": _median(values),
        "median_null": _median(nulls),
        "median_baseline": _median([f.baseline for f in figures if f.baseline is not None]),
        "histogram": histogram({"explanation": values, "null": nulls}),
    }


def _median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    if not ordered:
        return None
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def histogram(series: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Counts of correlations in equal bins from −0.2 to 1 (what lies below goes into the first), and the
    largest count.
    """
    low, high = -0.2, 1.0
    counts = {}
    for name, values in series.items():
        row = [0] * BINS
        for value in values:
            row[min(BINS - 1, max(0, math.floor((value - low) / (high - low) * BINS + 1e-9)))] += 1
        counts[name] = row
    edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
    return {"counts": counts, "edges": edges, "most": max((max(c) for c in counts.values()), default=0)}


def number(value: float | None, digits: int = 2) -> str:
    """A figure as it is shown, with a real minus sign; a dash when it is undefined."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def whisker(score: Score) -> dict[str, float | None]:
    """Places of a score, its interval and its null on a bar from −0.2 to 1.0, in percent."""

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * min(1.0, max(0.0, (value + 0.2) / 1.2)), 2)

    interval, null = score.interval, score.null_interval
    return {
        "value": place(score.value),
        "low": place(interval.low if interval else None),
        "high": place(interval.high if interval else None),
        "null": place(score.null),
        "null_low": place(null.low if null else None),
        "null_high": place(null.high if null else None),
    }


_VISIBLE = {"\n": "⏎", "\t": "⇥"}


def largest_cause(result: FeatureResult) -> float:
    """The largest holistic activation of a feature's windows; 0 where there are none."""
    return max((h for w in result.windows for h in w.holistic or ()), default=0.0)


def search_rows(nodes: Sequence[SearchNode]) -> list[SearchNode]:
    """The nodes of a search as a tree is read: every node before what was made of it, siblings by their
    number.
    """
    children: dict[int | None, list[SearchNode]] = {}
    for node in nodes:
        children.setdefault(node.parent, []).append(node)
    out: list[SearchNode] = []
    waiting = children.get(None, [])[::-1]
    while waiting:
        node = waiting.pop()
        out.append(node)
        waiting += children.get(node.number, [])[::-1]
    return out


def note_rows(note: Any) -> list[tuple[str, Any]]:
    """What a stage noted, as names and values."""
    if isinstance(note, Mapping):
        return [
            (str(name), value if isinstance(value, str) else _text(value)) for name, value in note.items()
        ]
    return [("found", note if isinstance(note, str) else _text(note))]


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def tokens(window: ShownWindow, scale: float, largest: float = 0.0) -> list[Token]:
    """The tokens of a window for drawing; ``largest``: that of :func:`largest_cause`. Control characters are
    shown as escapes, so that no text can hide or break the page."""
    out = []
    for i, (piece, activation) in enumerate(zip(window.pieces, window.activations, strict=True)):
        predicted = None if window.predicted is None else window.predicted[i]
        cause = 0.0 if window.holistic is None or largest <= 0 else max(0.0, window.holistic[i] / largest)
        title = f"activation {number(activation)}" + (
            "" if predicted is None else f", predicted level {number(predicted, 1)}"
        )
        title += (
            f", causes {number(100 * cause, 0)} % of the most that any token does" if cause >= 0.05 else ""
        )
        out.append(
            Token(
                visible(piece),
                piece.count("\n"),
                0.0 if scale <= 0 else min(1.0, activation / scale),
                predicted,
                title,
                cause,
            )
        )
    return out


def trial_tokens(text: TrialText, scale: float) -> list[Token]:
    """The tokens of a text that was written to test an explanation."""
    pairs = zip(text.pieces, text.activations, strict=True)
    return [
        Token(
            visible(piece),
            piece.count("\n"),
            0.0 if scale <= 0 else min(1.0, a / scale),
            None,
            f"activation {number(a)}",
        )
        for piece, a in pairs
    ]


def visible(piece: str) -> str:
    """A token's text with line breaks and tabs as symbols, and whatever else cannot be seen as escapes."""
    return seen("".join(_VISIBLE.get(c, c) for c in piece))


def shown(value: object) -> object:
    """A value as a page may show it: of texts that are no markup of the page's own, what cannot be seen is
    escaped.
    """
    return seen(value, "\n\t") if isinstance(value, str) and not hasattr(value, "__html__") else value


def groups(result: FeatureResult) -> list[tuple[str, str, list[ShownWindow]]]:
    """A feature's windows by split and source, test first."""
    order = {split: i for i, split in enumerate(("test", "train", "valid"))}
    found: dict[tuple[str, str], list[ShownWindow]] = {}
    for window in result.windows:
        found.setdefault((window.split, window.source), []).append(window)
    return [
        (*key, windows) for key, windows in sorted(found.items(), key=lambda item: order.get(item[0][0], 9))
    ]


class StoredResults(Sequence[FeatureResult]):
    """The results of a JSONL file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Reads every line once. Raises ``InputError`` for one that is no result."""
        self.path = path
        self._starts: list[int] = []
        with opened_file(path) as file:
            place = 0
            for line in file:
                self._result(line)
                self._starts.append(place)
                place += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> FeatureResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[FeatureResult]: ...
    def __getitem__(self, index: int | slice) -> FeatureResult | list[FeatureResult]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with opened_file(self.path) as file:
            file.seek(self._starts[index])
            return self._result(file.readline())

    def __iter__(self) -> Iterator[FeatureResult]:
        with opened_file(self.path) as file:
            for line in file:
                yield self._result(line)

    def _result(self, line: bytes) -> FeatureResult:
        try:
            return FeatureResult.from_json(parse_json(line))
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(self.path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} cannot be read ({error}): it was changed or made by another version; run 'featureinterp "
        "explain' again"
    )


def read_results(folder: Path) -> tuple[Sequence[FeatureResult], dict[str, Any]]:
    """The results and particulars that an explain job wrote into ``folder``; results are read one at a time.

    Raises ``InputError`` when there are none or they cannot be read.
    """
    path, about = folder / "results.jsonl", folder / "about.json"
    if not path.exists() or not about.exists():
        raise InputError(
            f"{folder} holds no results (results.jsonl): give the folder that 'featureinterp explain' "
            "wrote with --out"
        )
    remedy = "run the same 'featureinterp explain' again, which writes it anew from the journal"
    marker = read_marker(about, remedy)
    if marker.files is not None:
        if path.name not in marker.files:
            raise DamagedStoreError(f"{about} has no checksums of {path.name}: {remedy}")
        if why := marker.files[path.name].damage(path):
            raise DamagedStoreError(f"{why}: {remedy}")
    return StoredResults(path), marker.value


def write_results(folder: Path, results: Iterable[FeatureResult], about: Mapping[str, Any]) -> None:
    """Writes what :func:`read_results` reads, one result at a time."""
    with replaced_atomically(folder / "results.jsonl") as file:
        out = SummedFile(file)
        for result in results:
            out.write(json.dumps(result.to_json(), ensure_ascii=False).encode() + b"\n")
    write_marker(folder / "about.json", about, {"results.jsonl": out.sums})
