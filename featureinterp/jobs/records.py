"""From a run folder to records: embeddings computed once, everything else in one pass."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from featureinterp.claims import owned
from featureinterp.codes.store import CodesStore
from featureinterp.domain.record import FeatureRecord
from featureinterp.errors import InputError
from featureinterp.interfaces import Embedder
from featureinterp.registry import EMBEDDERS
from featureinterp.sampling.build import ALIVE_ABOVE, RecordBuilder
from featureinterp.sampling.kinds import Neighbours
from featureinterp.sampling.policy import RecordPolicy
from featureinterp.sampling.similar import (
    SentenceEmbedder,
    SimilarWindows,
    window_embeddings,
)


def parse_features(text: str, store: CodesStore) -> list[int]:
    """Feature indices from ``A:B`` (B excluded), ``A,B,C``, ``random:N`` (N alive ones) or ``alive``; several
    joined by commas.

    Raises ``InputError`` for another form and ``FeatureRangeError`` for an index outside the dictionary.
    """
    chosen: dict[int, None] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        try:
            chosen.update(dict.fromkeys(_features_of(part, store)))
        except ValueError as error:
            raise InputError(
                f"{part!r} names no features: write 0:40, 3,17,256, random:20 or alive"
            ) from error
    if not chosen:
        raise InputError(f"{text!r} names no features: write 0:40, 3,17,256, random:20 or alive")
    return list(chosen)


def _features_of(part: str, store: CodesStore) -> Sequence[int]:
    """The features of one part; ``ValueError`` when it names none."""
    head, colon, tail = part.partition(":")
    if part == "alive":
        return list(alive_features(store).tolist())
    if head == "random":
        return random_features(store, _index(tail), seed=0)
    start = _index(head) if head or not colon else 0
    end = start + 1 if not colon else _index(tail) if tail else store.n_features
    if end <= start:
        raise ValueError(part)
    store.check_feature(start)
    store.check_feature(end - 1)
    return range(start, end)


def _index(text: str) -> int:
    """An integer in plain digits: no separators, no digits of other scripts."""
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise ValueError(text)
    return int(text)


def alive_features(store: CodesStore) -> np.ndarray:
    """Features that fire on more than 15 tokens."""
    return np.flatnonzero(store.counts() > ALIVE_ABOVE)


def random_features(store: CodesStore, n: int, *, seed: int, min_windows: int = 1) -> list[int]:
    """``n`` different alive features at random that fire in at least ``min_windows`` windows, in random
    order.

    Raises ``InputError`` when there are not as many.
    """
    if n < 1:
        raise InputError(f"{n} features are none: ask for at least 1")
    chosen = []
    for index in np.random.default_rng(seed).permutation(alive_features(store)).tolist():
        if len(np.unique(store.feature(index).positions // store.windows.length)) >= min_windows:
            chosen.append(index)
            if len(chosen) == n:
                return chosen
    raise InputError(
        f"only {len(chosen)} features fire in at least {min_windows} windows, but {n} were asked for: "
        "collect more tokens or ask for fewer"
    )


def embedder_of(name: str) -> Embedder:
    """An embedder of the registry, or a sentence-transformers model by its hub name or folder."""
    return EMBEDDERS.load(name)() if name in EMBEDDERS.names() else SentenceEmbedder(name)


def build_records(
    run: Path,
    store: CodesStore,
    features: Sequence[int],
    policy: RecordPolicy,
    *,
    embedder: Embedder | None = None,
    neighbours: Neighbours | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[FeatureRecord]:
    """Records of ``features``. Windows are embedded when the policy asks for similar ones, once per run
    folder.
    """
    for index in features:
        store.check_feature(index)
    similar = None
    if policy.embeds:
        folder = run / "embeddings"
        with (
            owned(folder, "embeddings", waiting=lambda _: None) if os.access(run, os.W_OK) else nullcontext()
        ):
            embeddings = window_embeddings(
                store.windows, embedder or SentenceEmbedder(), folder, progress=progress
            )
        similar = SimilarWindows(embeddings)
    return RecordBuilder(store, policy, similar, neighbours).build(features)
