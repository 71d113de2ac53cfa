"""featureinterp explain"""

from __future__ import annotations

from pathlib import Path

import typer

from featureinterp.cli.demo import finish
from featureinterp.cli.screen import Screen


def explain(
    run: Path = typer.Argument(..., help="Folder that 'collect' wrote."),
    features: str = typer.Option("random:10", help="0:40, 3,17,256, random:20 or alive."),
    explainer: str = typer.Option("one-shot", help="one-shot or top-tokens."),
    style: str = typer.Option("sentence", help="Form of an explanation: sentence or rules."),
    rule_cap: int = typer.Option(5, help="At most so many rules, 1 to 10."),
    simulator: str = typer.Option("all-at-once", help="all-at-once (a local model), rated (a chat endpoint) or lexical."),
    simulator_model: str = typer.Option("qwen2.5-coder-1.5b-instruct", help="Model of the all-at-once simulator: embedded, Hugging Face or a folder."),
    device: str = typer.Option(None, help="Device of the simulator: cpu or cuda."),
    dtype: str = typer.Option(None, help="The simulator's dtype: bfloat16 (default), float16 or float32."),
    base_url: str = typer.Option(None, help="OpenAI-compatible endpoint; the embedded model when not given."),
    llm_model: str = typer.Option(None, help="The endpoint's model."),
    api_key_env: str = typer.Option("OPENAI_API_KEY", help="Name of the variable that holds the endpoint's key."),
    concurrency: int = typer.Option(16, help="Requests in flight at most."),
    timeout_s: float = typer.Option(120.0, help="Seconds that one request may take."),
    max_attempts: int = typer.Option(6, help="Attempts at one request."),
    n_test: int = typer.Option(10, help="Test windows of each kind."),
    questions: bool = typer.Option(True, help="Ask detection, fuzzing and complexity questions."),
    seed: int = typer.Option(0, help="Seed of what is drawn at random."),
    out: Path = typer.Option(None, help="Folder for results and report; RUN/explain when not given."),
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Explain features of a run and score the explanations; what was paid for is kept and never paid twice.

    Example: featureinterp explain RUN --features 0:40 --base-url http://localhost:8000/v1 --llm-model NAME --api-key-env KEY
    """
    from featureinterp import api
    from featureinterp.errors import InputError
    from featureinterp.jobs.explain import Plan
    from featureinterp.records.build import RecordPolicy

    if base_url is not None and llm_model is None:
        raise InputError("an endpoint needs the name of its model: give --llm-model")
    endpoint = api.Endpoint(base_url, llm_model or api.EXPLAINER, api_key_env or None, concurrency, timeout_s, max_attempts)
    screen = Screen(as_json=as_json)
    with screen.live():
        results = api.explain(
            run,
            features,
            out=out,
            explainer=explainer,
            style=style,
            rule_cap=rule_cap,
            simulator=simulator,
            simulator_model=simulator_model,
            simulator_device=device,
            simulator_dtype=dtype,
            endpoint=endpoint,
            plan=Plan(n_test=n_test, detection=questions, fuzzing=questions, complexity=questions, concurrency=concurrency, seed=seed),
            policy=RecordPolicy(seed=seed),
            on_event=screen.event,
            steps=screen.step,
        )
    finish(screen, results)
