"""featureinterp falsify"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from featureinterp.cli.endpoint import EFFORT, EXTRA_BODY, EXTRA_HEADER, REPLY_TOKENS, THINKING_TOKENS, endpoint_of
from featureinterp.cli.screen import Screen, end, one_line, plain, put


def falsify(
    folder: Path = typer.Argument(..., metavar="RUN", help="The folder of a job that explained features, or the run folder above it."),
    texts: int = typer.Option(8, help="Texts that should fire, and as many near misses, per explanation."),
    rounds: int = typer.Option(2, help="Explanations that are tried at most: the first, and revisions of it."),
    fires_above: float = typer.Option(0.1, help="Share of the feature's largest activation above which a text counts as firing."),
    llm: str = typer.Option(None, help="An endpoint of the configuration file; that of the job when not given."),
    base_url: str = typer.Option(None, help="OpenAI-compatible endpoint; that of the job when not given."),
    llm_model: str = typer.Option(None, help="The endpoint's model."),
    api_key_env: str = typer.Option(None, help="Name of the variable that holds the endpoint's key."),
    concurrency: int = typer.Option(16, help="Requests in flight at most."),
    reply_tokens: int = REPLY_TOKENS,
    thinking_tokens: int = THINKING_TOKENS,
    effort: str = EFFORT,
    extra_body: str = EXTRA_BODY,
    extra_header: list[str] = EXTRA_HEADER,
    budget_usd: float = typer.Option(None, help="Stop when this much is spent."),
    max_minutes: float = typer.Option(None, help="Stop after this time."),
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Have a language model write texts that test each explanation, let the subject model decide, and revise what was contradicted.

    Example: featureinterp falsify RUN --texts 12
    """
    from featureinterp import api
    from featureinterp.jobs.budget import Budget

    how = (reply_tokens, thinking_tokens, effort, extra_body, extra_header)
    endpoint = endpoint_of(llm, base_url, llm_model, api_key_env, concurrency, None, None, 120.0, 6, *how)
    fields: dict[str, Any] = {} if endpoint is None else {"llm": endpoint}
    screen = Screen(as_json=as_json)
    with screen.live():
        results = api.falsify(
            folder,
            trial={"n_texts": texts, "rounds": rounds, "fires_above": fires_above},
            budget=Budget(budget_usd, minutes=max_minutes),
            on_event=screen.event,
            steps=screen.step,
            **fields,
        )
    finish(screen, results)


def finish(screen: Screen, results: Any) -> None:
    """Prints how the explanations held, and sets the exit code: 1 when something failed."""
    if screen.as_json:
        screen.result(results.to_json())
    else:
        rows = []
        for r in results:
            first = r.trials[0] if r.trials else None
            broken = "" if first is None else f"{len(first.contradictions)} of {len(first.texts)}"
            figures = (plain(first.precision.value), plain(first.recall.value)) if first else ("–", "–")
            said = one_line(r.explanation.text, 60) if r.explanation else "none"
            rows.append((str(r.feature), said, *figures, broken, one_line(r.revised.text, 40) if r.revised else ""))
        screen.table(rows, ("feature", "explanation", "precision", "recall", "broken by", "revised"))
        put(f"Report: {(results.folder / 'report.html').resolve()}")
    end(screen, results.stopped, bool(results.n_failures))
