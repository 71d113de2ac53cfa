"""featureinterp steer"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from featureinterp.cli.endpoint import EFFORT, EXTRA_BODY, EXTRA_HEADER, REPLY_TOKENS, THINKING_TOKENS, endpoint_of
from featureinterp.cli.screen import Screen, end, one_line, plain, put

if TYPE_CHECKING:
    from featureinterp.domain.intervention import Intervention


def steer(
    folder: Path = typer.Argument(..., metavar="RUN", help="The folder of a job that explained features, or the run folder above it."),
    doses: str = typer.Option("0,0.5,1,2", help="How much is added, in units of the feature's largest activation."),
    openings: list[str] = typer.Option(None, "--opening", help="What a text begins with; give several. The demo's own when not given."),
    random_directions: int = typer.Option(2, help="Random directions of the same length, as a control."),
    max_tokens: int = typer.Option(32, help="Tokens per text."),
    temperature: float = typer.Option(0.7, help="Of the subject while it writes."),
    model: str = typer.Option(None, help="Where the subject model is now; by the name that the run recorded when not given."),
    sae: str = typer.Option(None, help="Where the SAE is now; by the name that the run recorded when not given."),
    llm: str = typer.Option(None, help="The endpoint that judges, by name; that of the job when not given."),
    base_url: str = typer.Option(None, help="OpenAI-compatible endpoint; that of the job when not given."),
    llm_model: str = typer.Option(None, help="The endpoint's model."),
    api_key_env: str = typer.Option(None, help="Name of the variable that holds the endpoint's key."),
    concurrency: int = typer.Option(16, help="Requests in flight at most."),
    reply_tokens: int = REPLY_TOKENS,
    thinking_tokens: int = THINKING_TOKENS,
    effort: str = EFFORT,
    extra_body: str = EXTRA_BODY,
    extra_header: list[str] = EXTRA_HEADER,
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Have the subject model write while each explained feature is pushed, beside random directions, and judge whether the texts fit the explanation.

    Example: featureinterp steer RUN --doses 0,1,2,4
    """
    from featureinterp import api
    from featureinterp.errors import InputError

    try:
        amounts = tuple(float(d) for d in doses.split(","))
    except ValueError as error:
        raise InputError(f"{doses!r} are no doses: write numbers with commas, such as 0,0.5,1,2") from error
    steering: dict[str, Any] = {"doses": amounts, "n_random": random_directions, "max_tokens": max_tokens, "temperature": temperature}
    if openings:
        steering["openings"] = tuple(openings)
    how = (reply_tokens, thinking_tokens, effort, extra_body, extra_header)
    endpoint = endpoint_of(llm, base_url, llm_model, api_key_env, concurrency, None, None, 120.0, 6, *how)
    fields: dict[str, Any] = {name: value for name, value in (("llm", endpoint), ("model", model), ("sae", sae)) if value is not None}
    screen = Screen(as_json=as_json)
    with screen.live():
        results = api.steer(folder, steering=steering, on_event=screen.event, steps=screen.step, **fields)
    finish(screen, results)


def finish(screen: Screen, results: Any) -> None:
    """Prints the match at every dose, and sets the exit code: 1 when something failed."""
    if screen.as_json:
        screen.result(results.to_json())
    else:
        known = [r for r in results if r.intervention is not None]
        doses = known[0].intervention.doses if known else ()
        rows = []
        for r in known:
            said = one_line(r.explanation.text, 44) if r.explanation else "none"
            rows.append((str(r.feature), said, *(_match(r.intervention, dose) for dose in doses)))
        screen.table(rows, ("feature", "explanation", *(f"dose {d:g}" for d in doses)))
        put("match with the explanation: the feature's direction / random directions")
        put(f"Report: {(results.folder / 'report.html').resolve()}")
    end(screen, results.stopped, bool(results.n_failures))


def _match(found: Intervention, dose: float) -> str:
    """The match at a dose: with the feature's direction and with random ones."""
    own = plain(found.match(dose, "feature"))
    return f"{own}/{plain(found.match(dose, 'random'))}" if dose else own
