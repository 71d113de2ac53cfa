"""featureinterp explain"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from featureinterp.cli.demo import finish
from featureinterp.cli.endpoint import (
    EFFORT,
    EXTRA_BODY,
    EXTRA_HEADER,
    MAX_ATTEMPTS,
    REPLY_TOKENS,
    RPM,
    THINKING_TOKENS,
    TIMEOUT_S,
    TPM,
    endpoint_of,
)
from featureinterp.cli.options import (
    CONCURRENCY,
    DEVICE,
    FEATURES_AT_ONCE,
    REPLACE_JOB,
    RETRY_FAILED,
    SIMULATOR_DEVICE,
    SUBJECT_DEVICE,
    given,
)
from featureinterp.cli.screen import Screen


def explain(
    run: Path = typer.Argument(..., help="Folder that 'collect' wrote."),
    features: str = typer.Option("random:10", help="0:40, 3,17,256, random:20 or alive."),
    explainer: str = typer.Option(
        "one-shot", help="one-shot, tree (a search that is shown its errors) or top-tokens."
    ),
    style: str = typer.Option("sentence", help="Form of an explanation: sentence or rules."),
    rule_cap: int = typer.Option(5, help="At most so many rules, 1 to 10."),
    holistic: str = typer.Option(None, help="Show which tokens cause the activations: exact or gradient."),
    few_shot: Path = typer.Option(None, help="JSON file with worked examples in place of the style's own."),
    negatives: str = typer.Option(
        None,
        help="Kinds of windows to judge by, the main one first: "
        "random,similar_negative,projected_similar_negative …",
    ),
    projection: str = typer.Option(
        "closed-form", help="Projection of projected_similar windows: closed-form or info-nce."
    ),
    tree_depth: int = typer.Option(3, help="Levels of a tree search."),
    model: str = typer.Option(
        None, help="Where the subject model is now; by the name that the run recorded when not given."
    ),
    sae: str = typer.Option(
        None, help="Where the SAE is now; by the name that the run recorded when not given."
    ),
    simulator: str = typer.Option(
        "token-wise",
        help="token-wise or all-at-once (a local model), prompt-logprobs or rated (the endpoint), or "
        "lexical.",
    ),
    simulator_model: str = typer.Option(
        "qwen2.5-coder-1.5b-instruct", help="Model of a local simulator: embedded, Hugging Face or a folder."
    ),
    simulator_chat: bool = typer.Option(
        False, help="Put the all-at-once prompt as turns of a chat, by the tokenizer's own template."
    ),
    device: str = DEVICE,
    subject_device: str = SUBJECT_DEVICE,
    simulator_device: str = SIMULATOR_DEVICE,
    dtype: str = typer.Option(
        None, help="The simulator's dtype: auto (what is fast here), bfloat16, float16 or float32."
    ),
    llm: str = typer.Option(
        None, help="An endpoint of the configuration file, by name ('featureinterp llm list')."
    ),
    base_url: str = typer.Option(None, help="OpenAI-compatible endpoint; the embedded model when not given."),
    llm_model: str = typer.Option(None, help="The endpoint's model."),
    api_key_env: str = typer.Option(
        None,
        help="Name of the variable that holds the endpoint's key; only OpenAI's own has a default, "
        "OPENAI_API_KEY.",
    ),
    concurrency: int = CONCURRENCY,
    features_at_once: int = FEATURES_AT_ONCE,
    rpm: int = RPM,
    tpm: int = TPM,
    timeout_s: float = TIMEOUT_S,
    max_attempts: int = MAX_ATTEMPTS,
    reply_tokens: int = REPLY_TOKENS,
    thinking_tokens: int = THINKING_TOKENS,
    effort: str = EFFORT,
    extra_body: str = EXTRA_BODY,
    extra_header: list[str] = EXTRA_HEADER,
    budget_usd: float = typer.Option(None, help="Stop when this much is spent."),
    max_minutes: float = typer.Option(None, help="Stop after this time."),
    n_test: int = typer.Option(10, help="Test windows of each kind."),
    questions: bool = typer.Option(True, help="Ask detection, fuzzing and complexity questions."),
    seed: int = typer.Option(0, help="Seed of what is drawn at random."),
    out: Path = typer.Option(None, help="Folder for results and report; RUN/explain when not given."),
    retry_failed: bool = RETRY_FAILED,
    replace: bool = REPLACE_JOB,
    as_json: bool = typer.Option(False, "--json", help="Print the results as JSON."),
) -> None:
    """Explain features of a run and score the explanations; what was paid for is kept and never paid twice.

    Example: featureinterp explain RUN --features 0:40 --base-url http://localhost:8000/v1 --llm-model NAME
        --api-key-env KEY
    """
    from featureinterp import api
    from featureinterp.jobs.budget import Budget
    from featureinterp.records.policy import RecordPolicy

    endpoint = endpoint_of(
        llm,
        base_url,
        model=llm_model,
        api_key_env=api_key_env,
        concurrency=concurrency,
        rpm=rpm,
        tpm=tpm,
        timeout_s=timeout_s,
        max_attempts=max_attempts,
        reply_tokens=reply_tokens,
        thinking_tokens=thinking_tokens,
        effort=effort,
        extra_body=extra_body,
        extra_header=extra_header,
    )
    plan: dict[str, Any] = {} if negatives is None else {"negatives": sources_of(negatives)}
    plan |= {"n_test": n_test, "seed": seed, **given(features_at_once=features_at_once)}
    screen = Screen(as_json=as_json)
    screen.machine(dtype, simulator_device or device, what="simulator and judge run, where they are local,")
    with screen.live():
        results = api.explain(
            run,
            features,
            out=out,
            explainer=explainer,
            style=style,
            rule_cap=rule_cap,
            holistic=holistic,
            few_shot=few_shot,
            tree={"depth": tree_depth},
            model=model,
            sae=sae,
            simulator=simulator,
            simulator_model=simulator_model,
            simulator_chat=simulator_chat,
            simulator_dtype=dtype,
            llm=endpoint,
            stages=("explain", "simulate", "score") if questions else ("explain", "simulate"),
            plan=plan,
            records=RecordPolicy(seed=seed, projection=projection),
            budget=Budget(budget_usd, minutes=max_minutes),
            retry_failed=retry_failed,
            replace=replace,
            on_event=screen.event,
            steps=screen.step,
            **given(device=device, subject_device=subject_device, simulator_device=simulator_device),
        )
    finish(screen, results)


def sources_of(text: str) -> tuple[str, ...]:
    """The kinds of windows in a list with commas. Raises ``InputError`` for one that does not exist or fires
    by its nature.
    """
    from featureinterp.errors import InputError
    from featureinterp.registry import WINDOWS

    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    known = WINDOWS.names()
    for source in found or ("",):
        if source not in known or WINDOWS.has(source, "fires"):
            beside = ", ".join(name for name in known if not WINDOWS.has(name, "fires"))
            raise InputError(f"{source!r} is no kind of window to judge by: choose from {beside}")
    return found
