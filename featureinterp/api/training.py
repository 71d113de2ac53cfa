"""The verbs of training as Python functions: extract, train, evaluate, doctor, layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featureinterp.errors import IncompatibleError, InputError, UnknownNameError
from featureinterp.files import sha256_of
from featureinterp.stored.sums import read_marker, write_marker
from featureinterp.training.settings import Recipe, load_recipe, make_recipe
from featureinterp.validation import check_seed

if TYPE_CHECKING:
    from featureinterp.probing.labels import Labels
    from featureinterp.sae.load import LoadedSae
    from featureinterp.training.doctor.bench import Speed
    from featureinterp.training.doctor.check import Check
    from featureinterp.training.evaluate import Evaluation
    from featureinterp.training.extract import Extracted
    from featureinterp.training.layers import LayerStudy
    from featureinterp.training.recipe import Trained
    from featureinterp.training.store import ActivationStore

Steps = Callable[[str, int, int], None]


def _silent(*_: Any) -> None:
    pass


def recipe_of(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None, changes: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe from a TOML file, the name of an embedded one (``demo``), tables, or nothing but defaults;
    ``changes``: ``{"sae.k": 64}``.
    """
    found = (
        recipe
        if isinstance(recipe, Recipe)
        else load_recipe(recipe)
        if isinstance(recipe, str | Path)
        else make_recipe(dict(recipe or {}))
    )
    return found.changed(changes) if changes else found


def extract(
    out: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    part: int = 0,
    parts: int = 1,
    device: str | None = None,
    replace: bool = False,
    steps: Steps = _silent,
) -> Extracted:
    """Writes the activations of a recipe's corpus at its hook into ``out/train`` and, for the documents that
    are held out, ``out/test``. ``part`` of ``parts``: the share of one worker among several, whose folders
    :func:`merge` puts together. ``replace``: what another request left in ``out`` is deleted; else it is
    refused."""
    from dataclasses import replace as replaced

    from featureinterp.claims import check_free
    from featureinterp.training.parts import Parts, resolved, writable

    out = Path(out)
    check_free(out)
    writable(out)
    wanted = recipe_of(recipe, changes)
    loaded = Parts(resolved(wanted, device), device)
    settings = replaced(loaded.extract_settings(), part=part, parts=parts)
    return loaded.extract(out, steps, settings, replace=replace)


def merge(folders: Sequence[str | Path], out: str | Path, *, replace: bool = False) -> Extracted:
    """One extraction from those of several workers; ``replace``: what another request left in ``out`` is
    deleted. Raises ``IncompleteStoreError`` when one is missing or unfinished.
    """
    from featureinterp.training.extract import merge

    return merge([Path(f) for f in folders], Path(out), replace=replace)


def train(
    out: str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    device: str | None = None,
    replace: bool = False,
    steps: Steps = _silent,
    on_line: Callable[[dict[str, Any]], None] = _silent,
) -> Trained:
    """Runs a recipe in the folder ``out``: activations, training, ``sae/`` and ``saelens/``,
    ``metrics.json``, plots and a page. The same call goes on with what was interrupted; a run of another
    recipe is refused, or deleted with ``replace``. ``on_line`` is given every line of the log."""
    from featureinterp.reports.training import write_training
    from featureinterp.training.recipe import train

    done = train(
        recipe_of(recipe, changes), Path(out), device=device, steps=steps, on_line=on_line, replace=replace
    )
    if done.leads:
        write_training(done.folder, done.about, done.recipe.model_dump(mode="json"), done.log, done.metrics)
    return done


def evaluate(
    sae: str | Path,
    activations: str | Path | None = None,
    *,
    out: str | Path | None = None,
    model: str | None = None,
    max_rows: int | None = None,
    pca: int = 32,
    ce_windows: int = 256,
    seed: int = 0,
    device: str | None = None,
    steps: Steps = _silent,
) -> Evaluation:
    """Judges an SAE, by name, its folder or the folder of its run, on the held-out activations of an
    extraction (that of the run when not given). ``model``: where the subject is now, by the name that the
    activations recorded when not given. ``out``: a folder for ``metrics.json``, where an earlier evaluation
    is replaced; that of a training run, which has its own, is refused."""
    from contextlib import ExitStack

    from featureinterp.claims import EVALUATION, EXTRACTION, check_free, claim, owned, reading
    from featureinterp.codes.fit import named_alike
    from featureinterp.machine import pick_device
    from featureinterp.sae.load import load_sae
    from featureinterp.training.asked import source_of
    from featureinterp.training.extract import Extracted
    from featureinterp.training.store import TEST

    check_seed(seed)
    if out is not None:
        check_free(Path(out))
    run = Path(sae)
    about = _about(run)
    loaded = load_sae(str(run / "sae") if about else str(sae), device=pick_device(device))
    folder = activations or (about or {}).get("activations")
    if folder is None:
        raise InputError(
            "there are no activations to judge by: give --activations, a folder that 'featureinterp "
            "extract' wrote"
        )
    found = Extracted.open(Path(folder))
    if found.test is None:
        raise InputError(f"{folder} holds no held-out activations: extract with --held-out")
    source = source_of(Path(folder) / TEST)
    if source["hook"] != loaded.hook:
        raise IncompatibleError(
            f"{loaded.name} reads {loaded.hook}, and {folder} holds {source['hook']}: give activations of "
            "the SAE's hook"
        )
    if not named_alike(loaded.model, source["model"]["name"]):
        raise IncompatibleError(
            f"{loaded.name} was made for {loaded.model}, and {folder} holds activations of "
            f"{source['model']['name']}: give activations of the SAE's model",
        )
    with ExitStack() as held:
        held.enter_context(reading(Path(folder), EXTRACTION, "evaluate"))
        if out is not None:
            held.enter_context(owned(Path(out), "evaluate"))
            claim(Path(out), EVALUATION, {}, earlier=dict)
        judged = _judged(
            found,
            found.test,
            source,
            loaded,
            model=model,
            max_rows=max_rows,
            pca=pca,
            ce_windows=ce_windows,
            seed=seed,
            device=device,
            steps=steps,
        )
        if out is not None:
            write_marker(Path(out) / "metrics.json", judged.to_json())
    return judged


def _judged(
    found: Extracted,
    test: ActivationStore,
    source: Mapping[str, Any],
    loaded: LoadedSae,
    *,
    model: str | None,
    max_rows: int | None,
    pca: int,
    ce_windows: int,
    seed: int,
    device: str | None,
    steps: Steps,
) -> Evaluation:
    """An SAE on the held-out activations of an extraction that fits it."""
    from dataclasses import replace

    from featureinterp.machine import this_machine
    from featureinterp.subject.load import as_subject, check_same_model, load_causal_lm
    from featureinterp.training.evaluate import check_apart, evaluate, held_out_windows, loss_recovered

    sample = None
    if found.train is not None:
        check_apart(found.train, test)
        sample = found.train.sample(max(20_000, 20 * pca), seed=seed)
    judged = evaluate(
        loaded.sae,
        test,
        sample,
        max_rows=max_rows,
        pca=pca,
        seed=seed,
        progress=lambda done, total: steps("evaluating", done, total),
    )
    if ce_windows:
        name = model or source["model"]["name"]
        made_in = source["model"]["dtype"]
        lm, tokenizer = load_causal_lm(
            name, device=device, dtype=this_machine().dtype(None, device, made_in=made_in)
        )
        check_same_model(as_subject(name, lm, tokenizer), source["model"], "the activations")
        windows = held_out_windows(test, ce_windows, seed)
        loss = loss_recovered(
            lm,
            tokenizer,
            loaded.hook,
            loaded.sae,
            found.windows,
            windows,
            progress=lambda done, total: steps("cross-entropy", done, total),
        )
        judged = replace(judged, loss=loss)
    return judged


def labels_key(source: str | Path | None, labels: Labels) -> str:
    """What a study depends on of its labels: the content of their file, or their names."""
    named = Path(source) if source is not None else None
    return sha256_of(named) if named is not None and named.is_file() else labels.source


def _about(run: Path) -> dict[str, Any] | None:
    """What a run folder says of itself; None when it is none."""
    path = run / "run.json"
    if not path.exists():
        return None
    if not (run / "sae").exists():
        raise UnknownNameError(
            f"the run {run} has no SAE yet: run the same 'featureinterp train' again to finish it"
        )
    from featureinterp.training.recipe import AGAIN

    return read_marker(path, AGAIN).value


def doctor(
    folder: str | Path | None = None,
    *,
    model: str | None = None,
    hook: str | None = None,
    corpus: str | None = None,
    text_field: str = "text",
    document_separator: str | None = None,
    window: int | None = None,
    load_model: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    steps: Steps = _silent,
) -> Iterator[Check]:
    """Looks for the known mistakes in what it is given, check by check: ``folder``, of a run or of
    activations; a ``model``, by that of the activations when not given (``load_model`` False: none); a
    ``corpus``. What is wrong is a finding; raises ``InputError`` only when there is nothing to look at."""
    from dataclasses import replace

    from featureinterp.claims import EXTRACTION, while_reading
    from featureinterp.machine import this_machine
    from featureinterp.training.doctor.examine import Patient, examine, patient_of, recorded

    check_seed(seed)
    patient = Patient() if folder is None else patient_of(Path(folder))
    known = recorded(patient.activations) if patient.activations is not None else None
    if known is not None and load_model:
        live = this_machine().dtype(None, device, made_in=known["model"]["dtype"])
        patient = replace(patient, model=known["model"]["name"], dtype=live, hook=known["hook"])
    patient = replace(
        patient,
        text_field=text_field,
        document_separator=document_separator,
        model=patient.model if model is None else model,
        hook=patient.hook if hook is None else hook,
        corpus=patient.corpus if corpus is None else corpus,
        device=patient.device if device is None else device,
        dtype=patient.dtype if dtype is None else dtype,
        window=patient.window if window is None else window,
    )
    if patient == Patient(text_field=text_field, document_separator=document_separator):
        raise InputError(
            "there is nothing to examine: give a folder of a run or of activations, --model or --corpus"
        )
    found = examine(patient, seed=seed, steps=steps)
    return (
        found
        if patient.activations is None
        else while_reading(patient.activations, EXTRACTION, "doctor", found)
    )


def speeds(
    model: str | None,
    folder: str | Path | None,
    hook: str | None,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Speed]:
    """Tokens per second and peak memory of a model up to a hook, by batch and window length; the model and
    hook of the activations in ``folder`` when not given."""
    from featureinterp.machine import this_machine
    from featureinterp.subject.load import load_subject
    from featureinterp.training.doctor.bench import speeds
    from featureinterp.training.doctor.examine import patient_of, recorded

    activations = patient_of(Path(folder)).activations if folder is not None else None
    known = recorded(activations) if activations is not None else None
    if known is not None:
        dtype = this_machine().dtype(dtype, device, made_in=known["model"]["dtype"])
        model, hook = model or known["model"]["name"], hook or known["hook"]
    if model is None or hook is None:
        raise InputError("a benchmark needs a model and a hook: give --model and --hook")
    return list(speeds(load_subject(model, device=device, dtype=dtype), hook))


def layers(
    *,
    model: str = "smollm2-135m-instruct",
    corpus: str = "sotu",
    text_field: str = "text",
    document_separator: str | None = None,
    labels: str | Path | None = None,
    blocks: Sequence[int] | None = None,
    max_tokens: int = 50_000,
    window: int = 64,
    out: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    replace: bool = False,
    steps: Steps = _silent,
) -> LayerStudy:
    """Compares layers on one sample of a corpus: linear probes of labelled concepts (``labels`` as for
    ``probe``; the ready ones when None) and the spectrum of the activations. ``blocks``: all when None.
    ``out``: a folder for the table and the plot; one that holds another comparison is refused, or with
    ``replace`` written anew."""
    from contextlib import ExitStack
    from functools import partial

    from featureinterp.claims import LAYERS, claim, owned
    from featureinterp.codes.collect import in_dtype_of, windows_request
    from featureinterp.corpus.text import load_corpus
    from featureinterp.corpus.windows import WindowPolicy
    from featureinterp.probing.labels import load_labels
    from featureinterp.reports.layers import write_layers
    from featureinterp.subject.load import load_subject
    from featureinterp.training.layers import choose_layer
    from featureinterp.training.parts import writable

    check_seed(seed)
    if out is not None:
        writable(Path(out))
    text, wanted = (
        load_corpus(corpus, text_field=text_field, document_separator=document_separator),
        load_labels(labels),
    )
    policy = WindowPolicy(window, min(8, window), max_tokens)
    subject = load_subject(model, device=device, dtype=dtype)
    with ExitStack() as held:
        if out is not None:
            held.enter_context(owned(Path(out), "layers"))
            asked: dict[str, Any] = {
                "model": subject.fingerprint,
                "dtype": str(subject.dtype).removeprefix("torch."),
                "blocks": blocks,
            }
            asked |= {
                **windows_request(text, subject, policy),
                "labels": labels_key(labels, wanted),
                "seed": seed,
            }
            claim(
                Path(out),
                LAYERS,
                asked,
                about={"model": model},
                replace=replace,
                options={"dtype": "--dtype {}"},
                alike=partial(in_dtype_of, subject),
            )
        found = choose_layer(subject, text, wanted, policy, blocks=blocks, seed=seed, steps=steps)
        if out is not None:
            write_layers(Path(out), found.to_json())
    return found
