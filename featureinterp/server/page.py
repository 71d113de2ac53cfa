"""The page of all jobs. What jobs say is shown as text: markup is escaped, and so is what would steer or
hide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import jinja2

from featureinterp import __version__
from featureinterp.server.views import ENDED, JobView
from featureinterp.visible import UNSEEN, visible

PAGE = 100
"""The page shows so many jobs, the newest."""


def front_page(views: Sequence[JobView]) -> str:
    """The page as HTML."""
    return _template().render(
        jobs=[v.to_json() for v in views],
        ended=ENDED,
        page=PAGE,
        version=__version__,
        unseen=script_pattern(UNSEEN),
    )


def script_pattern(pattern: re.Pattern[str]) -> str:
    """A pattern as JavaScript writes it, for its mode ``u``."""
    return re.sub(r"\\U([0-9a-f]{8})", lambda m: f"\\u{{{int(m[1], 16):x}}}", pattern.pattern)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("featureinterp.server"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["visible"] = _shown
    return environment.get_template("index.html")


def _shown(value: Any) -> str:
    return visible(str(value))
