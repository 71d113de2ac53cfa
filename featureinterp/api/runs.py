"""Runs: their codes, and what is known of their features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featureinterp.api.common import CORPUS, SAE, SUBJECT, Steps, silent
from featureinterp.api.local import holistic_of, near_directions
from featureinterp.errors import InputError

if TYPE_CHECKING:
    from featureinterp.codes.store import CodesStore
    from featureinterp.domain.record import FeatureRecord
    from featureinterp.sampling.policy import RecordPolicy


def collect(
    *,
    out: str | Path,
    model: str = SUBJECT,
    sae: str = SAE,
    corpus: str = CORPUS,
    max_tokens: int | None = None,
    window: int = 32,
    text_field: str = "text",
    document_separator: str | None = None,
    max_per_document: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    value_dtype: str = "float16",
    batch_tokens: int | None = None,
    replace: bool = False,
    steps: Steps = silent,
) -> CodesStore:
    """Runs a subject model and an SAE over a corpus and stores every positive code under ``out``.

    Reuses what is complete there and goes on with what is not. What another request left there is refused
    with ``IncompatibleError``, or with ``replace`` deleted. Raises an ``InputError`` before anything is
    written when the parts do not exist or do not fit together, and ``FolderInUseError`` when another process
    works in ``out``.
    """
    from featureinterp.claims import check_free
    from featureinterp.codes.collect import collect as run_collect
    from featureinterp.codes.fit import check_fit
    from featureinterp.corpus.text import load_corpus
    from featureinterp.corpus.windows import WindowPolicy
    from featureinterp.machine import pick_device
    from featureinterp.sae.load import load_sae
    from featureinterp.subject.load import load_subject
    from featureinterp.subject.reading import BATCH_TOKENS

    policy = WindowPolicy(window, min(8, window), max_tokens, max_per_document)
    check_free(Path(out))
    loaded_sae = load_sae(sae, device=pick_device(device), steps=steps)
    texts = load_corpus(corpus, text_field=text_field, document_separator=document_separator)
    subject = load_subject(model, device=device, dtype=dtype)
    check_fit(subject, loaded_sae)
    return run_collect(
        subject,
        loaded_sae,
        texts,
        Path(out),
        policy,
        value_dtype=value_dtype,
        batch_tokens=batch_tokens or BATCH_TOKENS,
        progress=lambda done, total: steps("tokens", done, total),
        replace=replace,
    )


def open_run(run: str | Path) -> CodesStore:
    """Opens the codes that ``collect`` stored. Raises ``InputError`` or ``IncompleteStoreError`` when there
    are none.
    """
    from featureinterp.codes.store import CodesStore

    if not Path(run).is_dir():
        raise InputError(
            f"there is no run folder {run}: give the folder that 'featureinterp collect' wrote with --out"
        )
    return CodesStore.open(Path(run))


def records(
    run: str | Path,
    features: str | Sequence[int] = "0:100",
    *,
    policy: RecordPolicy | None = None,
    embedder: str | None = None,
    holistic: Literal["exact", "gradient"] | None = None,
    model: str | None = None,
    sae: str | None = None,
    device: str | None = None,
    steps: Steps = silent,
) -> Iterator[FeatureRecord]:
    """Records of features of a run: indices, or text such as ``0:100``, ``3,17``, ``random:20``, ``alive``.

    ``holistic``: adds holistic activations to the training windows that fire. ``model``, ``sae``: where the
    run's own are found now, when not by the names that it recorded; they are needed for holistic activations
    and co-active windows.
    """
    from featureinterp.claims import CODES, while_reading
    from featureinterp.jobs.records import build_records, embedder_of, parse_features
    from featureinterp.jobs.resolved import live_choice
    from featureinterp.sampling.policy import RecordPolicy

    store = open_run(run)
    chosen = parse_features(features, store) if isinstance(features, str) else list(features)
    policy = policy or RecordPolicy()
    built = build_records(
        Path(run),
        store,
        chosen,
        policy,
        embedder=embedder_of(embedder) if embedder else None,
        neighbours=near_directions(store, live_choice(store, model, sae, device), policy.n_neighbours)
        if policy.wants("coactive_negative")
        else None,
        progress=lambda done, total: steps("windows embedded", done, total),
    )
    if holistic is not None:
        built = holistic_of(store, live_choice(store, model, sae, device), holistic).add(built)
    return while_reading(Path(run), CODES, "records", built)
