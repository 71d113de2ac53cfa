"""What is measured of features without an explanation: sensitivity, and what labels say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featureinterp.api.common import SAE, SUBJECT, Steps, outside, silent
from featureinterp.api.results import Probe, Sensitivity
from featureinterp.api.runs import open_run
from featureinterp.errors import InputError

if TYPE_CHECKING:
    from featureinterp.falsification.sensitivity import FeatureSensitivity
    from featureinterp.probing.study import StudySettings
    from featureinterp.subject.load import Subject

_PUBLISHED = {"corpus": "dataset", "max_tokens": "total_tokens", "window": "context_size"}
"""What the published pipeline for sensitivity calls a thing."""


def sensitivity(
    *,
    out: str | Path,
    model: str = SUBJECT,
    saes: Sequence[str] = (SAE,),
    on_feature: Callable[[FeatureSensitivity, int, int], None] = silent,
    on_sae: Callable[[Sensitivity], None] = silent,
    steps: Steps = silent,
    **fields: Any,
) -> list[Sensitivity]:
    """How often features fire on new texts that a language model writes like their examples; see
    ``docs/falsification.md``. ``fields``: ``features``, ``corpus``, ``max_tokens``, ``window`` (or by their
    published names ``dataset``, ``total_tokens``, ``context_size``), ``examples`` (``corpus`` or
    ``saebench``), ``llm``, ``plan`` (``SensitivityPlan``), ``budget``, ``device``, ``dtype``. Writes six
    tables and a summary per SAE under ``out``, and plots over them. What was paid for is kept: the same call
    goes on where it stopped and pays nothing twice."""
    from featureinterp.jobs.sensitivity_run import SensitivityJobSpec, run_sensitivity
    from featureinterp.reports.sensitivity import plot_sensitivity, write_sensitivity

    try:
        named = {_PUBLISHED.get(name, name): value for name, value in fields.items()}
        spec = SensitivityJobSpec(model=model, saes=tuple(saes), out=Path(out), **named)
    except TypeError as error:
        raise InputError(f"the measurement has a mistake: {error}") from error

    async def measure() -> list[Sensitivity]:
        found = []
        async for measured in run_sensitivity(spec, on_feature=on_feature, steps=steps):
            summary = write_sensitivity(
                measured.folder, measured.features, measured.about, per_call=spec.plan.texts_per_call
            )
            gaps = sum(f.failure is None and len(f.texts) < spec.plan.n_texts for f in measured.features)
            found.append(
                Sensitivity(
                    measured.about["sae_name"],
                    measured.folder,
                    summary,
                    measured.features,
                    measured.stopped,
                    gaps,
                )
            )
            on_sae(found[-1])
        return found

    results = outside(measure)
    if results and len(results) == len(spec.saes):
        from contextlib import suppress

        with suppress(InputError):  # without matplotlib there are tables and no plots
            plot_sensitivity(Path(out), [r.summary for r in results])
    return results


def probe(
    run: str | Path,
    labels: str | Path | Mapping[str, str] | Callable[[str], Any] | None = None,
    *,
    out: str | Path | None = None,
    settings: StudySettings | None = None,
    dense: bool = True,
    corpus: str | None = None,
    text_field: str | None = None,
    document_separator: str | None = None,
    model: str | None = None,
    device: str | None = None,
    steps: Steps = silent,
) -> Probe:
    """What labelled concepts say about every feature of a run at once; see ``docs/probing.md``.

    ``labels``: a ``.jsonl`` file of spans, a ``.toml`` file or a mapping of regular expressions, a function
    of a document's text that gives (start, end, label), names of ready concepts, or None for all of those.
    ``dense``: also decodes the activations that the SAE read, for which the model (``model``: where it is
    now, when not by the name that the run recorded) runs over the windows once. ``corpus``, ``text_field``,
    ``document_separator``: where the documents' text is now, when not as the run recorded; labels from a file
    of spans do not need it. Writes tables, plots and a page to ``out`` (the run's folder ``probe`` when not
    given), from which reports on the run's explanations take the annotations.
    """
    from featureinterp.claims import CODES, STUDY, claim, owned, reading
    from featureinterp.codes.dense import dense_twin
    from featureinterp.corpus.text import load_corpus
    from featureinterp.jobs.resolved import live_choice
    from featureinterp.probing.buffer import ActivationBuffer
    from featureinterp.probing.labels import load_labels
    from featureinterp.probing.study import study
    from featureinterp.probing.tokens import RunTokens
    from featureinterp.reports.probing import about_study, write_study
    from featureinterp.subject.load import load_subject

    store = open_run(run)
    wanted = load_labels(labels)
    how = dict(store.windows.meta.get("reading", {}))
    how |= {
        name: value
        for name, value in (("text_field", text_field), ("document_separator", document_separator))
        if value is not None
    }
    texts = None if wanted.listed is not None else load_corpus(corpus or store.meta["corpus"]["name"], **how)
    tokens = RunTokens(store)
    found = tokens.labelled(wanted, texts)

    def subject() -> Subject:
        name = model or store.meta["model"]["name"]
        return load_subject(name, device=device, dtype=live_choice(store, device=device).dtype)

    folder = Path(out) if out else Path(run) / "probe"
    with owned(folder, "probe"), reading(Path(run), CODES, "probe"):
        claim(folder, STUDY, {}, earlier=dict)
        twin = None
        if dense:
            with owned(Path(run) / "dense", "probe", waiting=silent):
                twin = dense_twin(
                    store,
                    Path(run),
                    subject,
                    progress=lambda done, total: steps("tokens read again", done, total),
                )
        buffer = ActivationBuffer(
            tokens.codes, found.labels, found.names, twin, found.instances, tokens.documents, tokens.texts
        )
        judged = study(buffer, settings, steps=steps)
        positions = {name: tokens.positions[found.labels[:, i]] for i, name in enumerate(found.names)}
        page = write_study(
            folder,
            judged,
            positions,
            about_study(store.meta, wanted.source, judged, found.n_spans, found.n_outside)
            | {"codes": store.fingerprint},
        )
        return Probe(judged, folder, page, found.n_spans, found.n_outside)
