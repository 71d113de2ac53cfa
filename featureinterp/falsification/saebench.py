"""Examples in SAEBench's published results: the table that its interpretability evaluation logged of each
feature.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from featureinterp.errors import InputError
from featureinterp.falsification.sensitivity import Example
from featureinterp.falsification.writing import without_marks
from featureinterp.prompts import escape

_PHASE = "generation phase"
_ROW = re.compile(r"^\s*[│┃|║]\s*([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*[│┃|║](.*?)[│┃|║]?\s*$")
_PLAIN_ROW = re.compile(r"^\s*([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s{2,}(\S.*?)\s*$")
_INDEX = re.compile("[0-9]{1,12}")
_BREAK = "↵"
_MARK = re.compile(r"<<(.*?)>>", re.DOTALL)


def examples_in(results: Any) -> dict[int, tuple[Example, ...]]:
    """The examples of every feature in an evaluation's JSON: ``eval_result_unstructured`` maps features to
    (or lists) objects with ``logs``. Features without a readable table are left out. Raises ``InputError``
    when nothing can be read."""
    found = {}
    for feature, logs in _logs(results):
        if examples := examples_of_log(logs):
            found[feature] = examples
    if not found:
        raise InputError(
            "the published results hold no table of examples under 'eval_result_unstructured': leave "
            "--use-saebench-examples out"
        )
    return found


def _logs(results: Any) -> Iterator[tuple[int, str]]:
    table = results.get("eval_result_unstructured") if isinstance(results, Mapping) else None
    if isinstance(table, Mapping):
        entries: list[tuple[Any, Any]] = list(table.items())
    elif isinstance(table, list):
        entries = [
            (e.get("latent", e.get("feature", i)), e) for i, e in enumerate(table) if isinstance(e, Mapping)
        ]
    else:
        entries = []
    for key, entry in entries:
        logs = entry.get("logs") if isinstance(entry, Mapping) else entry
        if isinstance(logs, str) and (number := _INDEX.fullmatch(str(key).strip())):
            yield int(number[0]), logs


def examples_of_log(logs: str) -> tuple[Example, ...]:
    """The rows of the table "Generation phase" (Top act | Sequence), whatever it is drawn with. A line break
    of the text is a ``↵`` there.
    """
    lines = logs.splitlines()
    start = next((i for i, line in enumerate(lines) if _PHASE in line.lower()), None)
    if start is None:
        return ()
    found = []
    for line in lines[start + 1 :]:
        if "phase" in line.lower() and not line.lstrip().startswith(tuple("│┃|║0123456789")):
            break  # the next table
        row = _ROW.match(line) or _PLAIN_ROW.match(line)
        if row is None or not math.isfinite(float(row[1])):
            continue
        text = row[2].strip(" ").replace(_BREAK, "\n")
        shown = "".join(
            f"<<{escape(part)}>>" if i % 2 else escape(part) for i, part in enumerate(_MARK.split(text))
        )
        found.append(Example(without_marks(text), shown, float(row[1]), ()))
    return tuple(found)
