"""featureinterp explain"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from featureinterp.cli.demo import finish
from featureinterp.cli.endpoint import LlmOptions
from featureinterp.cli.options import (
    AsJson,
    Devices,
    Features,
    FeaturesAtOnce,
    Holistic,
    Limits,
    Model,
    ModelDtype,
    NTest,
    Out,
    ProjectionOf,
    Replace,
    RetryFailed,
    Run,
    Sae,
    Seed,
    Simulator,
    given,
    named,
)
from featureinterp.cli.screen import Screen
from featureinterp.cli.verb import Else
from featureinterp.domain.choices import Form
from featureinterp.registry import EXPLAINERS


def explain(
    run: Run,
    asked: LlmOptions,
    limits: Limits,
    devices: Devices,
    features: Features = "random:10",
    explainer: Annotated[
        str,
        named(
            EXPLAINERS,
            "--explainer",
            "What writes the explanations: one request, a tree search that is shown its errors, or the "
            "list of top tokens.",
        ),
    ] = "one-shot",
    style: Annotated[Form, typer.Option(help="Form of an explanation.")] = "sentence",
    rule_cap: Annotated[int, typer.Option(help="Rules at most, 1 to 10.")] = 5,
    tree_depth: Annotated[int, typer.Option(help="Levels of a tree search.")] = 3,
    holistic: Holistic = None,
    few_shot: Annotated[
        Path | None, typer.Option(help="JSON file with worked examples, in place of the style's own.")
    ] = None,
    negatives: Annotated[
        str | None,
        typer.Option(
            help="Kinds of windows to judge by, the main one first, such as "
            "random,similar_negative,projected_similar_negative."
        ),
    ] = None,
    projection: ProjectionOf = "closed-form",
    model: Annotated[Model, Else("the run's own")] = None,
    sae: Annotated[Sae, Else("the run's own")] = None,
    simulator: Simulator = "token-wise",
    simulator_model: Annotated[
        str,
        typer.Option(
            help="Model of a simulator on this machine: embedded, a Hugging Face name, or a folder."
        ),
    ] = "qwen2.5-coder-1.5b-instruct",
    simulator_chat: Annotated[
        bool,
        typer.Option(
            "--simulator-chat/--no-simulator-chat",
            help="Put the all-at-once prompt as turns of a chat, by the tokenizer's own template.",
        ),
    ] = False,
    n_test: NTest = 10,
    questions: Annotated[
        bool,
        typer.Option("--questions/--no-questions", help="Ask detection, fuzzing and complexity questions."),
    ] = True,
    seed: Seed = 0,
    features_at_once: FeaturesAtOnce = None,
    dtype: ModelDtype = None,
    out: Annotated[Out, Else("RUN/explain")] = None,
    retry_failed: RetryFailed = False,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Explain features of a run and score the explanations. What was paid for is kept and never paid twice.

    --dtype is that of models on this machine that simulate and judge; the subject runs in what the run was
    made in.

    Example: featureinterp explain RUN --features 0:40 --base-url http://localhost:8000/v1 --llm-model NAME
    """
    from featureinterp import api
    from featureinterp.jobs.budget import Budget
    from featureinterp.sampling.policy import RecordPolicy

    plan: dict[str, Any] = {} if negatives is None else {"negatives": sources_of(negatives)}
    plan |= {"seed": seed, **given(n_test=n_test, features_at_once=features_at_once)}
    endpoint = asked.endpoint()
    screen = Screen(as_json=as_json)
    screen.machine(dtype, devices.simulator, what="simulator and judge run, where they are local,")
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
            budget=Budget(limits.budget_usd, minutes=limits.max_minutes),
            retry_failed=retry_failed,
            replace=replace,
            on_event=screen.event,
            steps=screen.step,
            **devices.fields(),
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
