"""featureinterp sensitivity"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

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
from featureinterp.cli.options import DOCUMENT_SEPARATOR, FEATURES_AT_ONCE, RETRY_FAILED, given
from featureinterp.cli.screen import Screen, end_with, one_line, plain, put, say_causes

if TYPE_CHECKING:
    from featureinterp.api import Sensitivity


def sensitivity(
    more_saes: list[str] = typer.Argument(
        None, help="Further SAEs, as in --sae-names A B C.", show_default=False
    ),
    model: str = typer.Option(
        "smollm2-135m-instruct", help="The subject: embedded, a Hugging Face name or a folder."
    ),
    sae_names: list[str] = typer.Option(["demo"], help="SAEs of that model ('featureinterp saes list')."),
    features: str = typer.Option("50", help="How many alive features at random, or which: 3,17 or 0:50."),
    dataset_name: str = typer.Option("sotu", help="Corpus of the examples, as for 'collect --corpus'."),
    text_field: str = typer.Option("text", help="Field or column that holds the text."),
    document_separator: str = DOCUMENT_SEPARATOR,
    total_tokens: int = typer.Option(2_000_000, help="About so many tokens of the corpus."),
    context_size: int = typer.Option(128, help="Tokens per window."),
    n_top_ex_for_generation: int = typer.Option(10, help="Top-activating examples that the writer is shown."),
    n_iw_ex_for_generation: int = typer.Option(5, help="Importance-weighted examples that it is shown."),
    samples: int = typer.Option(10, help="New texts per feature."),
    num_per_call: int = typer.Option(10, help="Texts per request."),
    use_saebench_examples: bool = typer.Option(
        False, "--use-saebench-examples", help="Take features and examples from SAEBench's published results."
    ),
    llm: str = typer.Option(
        None, help="An endpoint of the configuration file, by name ('featureinterp llm list')."
    ),
    base_url: str = typer.Option(None, help="OpenAI-compatible endpoint; the embedded model when not given."),
    llm_model: str = typer.Option(None, help="The endpoint's model."),
    api_key_env: str = typer.Option(None, help="Name of the variable that holds the endpoint's key."),
    concurrency: int = typer.Option(
        None,
        "--concurrency",
        "--max-workers",
        help="Requests in flight at most; 16 when nothing else is known.",
    ),
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
    seed: int = typer.Option(0, help="Seed of what is drawn at random."),
    device: str = typer.Option(
        None, help="Device of model and SAEs: auto (the GPU when there is one), cpu, cuda or mps."
    ),
    dtype: str = typer.Option(
        None, help="The model's dtype: auto (what is fast here), bfloat16, float16 or float32."
    ),
    output_path: Path = typer.Option(
        Path("sensitivity"), "--output-path", "--out", help="Folder for tables, plots and what is kept."
    ),
    retry_failed: bool = RETRY_FAILED,
    value_dtype: str = typer.Option("float16", help="How codes are stored: float16 or float32."),
    replace: bool = typer.Option(
        False, "--replace", help="Delete codes of another request that are in the folder."
    ),
    verbose: bool = typer.Option(False, "--verbose", help="Show every text with what it activates."),
    as_json: bool = typer.Option(False, "--json", help="Print the summaries as JSON."),
) -> None:
    """Measure how often features fire on new texts that a language model writes like their examples.

    Example: featureinterp sensitivity --model pythia-160m-deduped --sae-names py_4k_btopk_s0 py_16k_btopk_s0
        --dataset-name CORPUS
    """
    from featureinterp import api
    from featureinterp.jobs.budget import Budget
    from featureinterp.jobs.sensitivity import SensitivityPlan

    names = [n for text in (*sae_names, *(more_saes or ())) for n in text.split(",") if n]
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
    plan = SensitivityPlan(
        samples,
        num_per_call,
        n_top_ex_for_generation,
        n_iw_ex_for_generation,
        seed=seed,
        **given(features_at_once=features_at_once),
    )
    screen = Screen(as_json=as_json)
    screen.machine(dtype, device)

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
            out=output_path,
            model=model,
            saes=names,
            features=int(features) if features.isdecimal() else features,
            dataset=dataset_name,
            total_tokens=total_tokens,
            context_size=context_size,
            examples="saebench" if use_saebench_examples else "corpus",
            llm=endpoint,
            plan=plan,
            budget=Budget(budget_usd, minutes=max_minutes),
            device=device,
            dtype=dtype,
            text_field=text_field,
            document_separator=document_separator,
            value_dtype=value_dtype,
            retry_failed=retry_failed,
            replace=replace,
            on_feature=each_feature,
            steps=screen.step,
        )
    finish(screen, results, output_path)


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
