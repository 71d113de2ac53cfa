"""Options that several verbs share, and what they change of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

RETRY_FAILED = typer.Option(
    False,
    "--retry-failed",
    help="Ask again also what was answered and could not be used; else only what got no answer is.",
)
REPLACE_JOB = typer.Option(
    False,
    "--replace",
    help="Delete a job on other codes that is in the folder; replies that were paid for stay.",
)
CONCURRENCY = typer.Option(
    None, help="Requests in flight at most; 16, or what the endpoint of the configuration file says."
)
FEATURES_AT_ONCE = typer.Option(None, help="Features that are worked on at once.")
SUBJECT_DEVICE = typer.Option(None, help="Device of the subject and the SAE: auto, cpu, cuda or mps.")
SIMULATOR_DEVICE = typer.Option(
    None, help="Device of models of this process that simulate and judge: auto, cpu, cuda or mps."
)
DOCUMENT_SEPARATOR = typer.Option(
    None,
    help="Between documents of a text file: lines, blank-lines, none, or a text; recognised when not given.",
)
DEVICE = typer.Option(None, help="Both devices, where they are not named.")


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def budget_of(usd: float | None, minutes: float | None) -> Mapping[str, float]:
    """What options say of a budget."""
    return given(usd=usd, minutes=minutes)
