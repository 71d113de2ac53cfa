"""A small table of results for a notebook."""

from __future__ import annotations

from collections.abc import Sequence

from featureinterp.domain.result import FeatureResult
from featureinterp.reports.render import environment

_TABLE = """<table><thead><tr><th>feature</th><th>explanation</th><th>correlation</th>
<th>95 % interval</th><th>null</th><th>top tokens</th></tr></thead><tbody>
{% for r in results %}{% set s = r.score("correlation") %}{% set b = r.baseline_score("correlation") %}
<tr><td>{{ r.feature }}</td>
<td style="text-align:left">
{{- r.explanation.text if r.explanation
    else "none: " ~ (r.failures[0].message if r.failures else "not run") -}}
</td><td>{{ (s.value if s else none) | number }}</td>
<td>{% if s and s.interval %}{{ s.interval.low | number }} to {{ s.interval.high | number }}{% endif %}</td>
<td>{{ (s.null if s else none) | number }}</td><td>{{ (b.value if b else none) | number }}</td></tr>
{% endfor %}</tbody></table>"""


def results_table(results: Sequence[FeatureResult]) -> str:
    """HTML of one row per feature; everything is escaped."""
    return environment().from_string(_TABLE).render(results=results)
