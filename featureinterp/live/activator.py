"""New texts through the subject model and an SAE: what a feature does on text that no corpus holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import anyio.to_thread
import numpy as np
import torch
from jaxtyping import Float32

from featureinterp.codes.collect import check_finite, check_sae, check_subject, rows_where, scored_by_norm
from featureinterp.codes.fit import check_fit
from featureinterp.codes.store import CodesStore
from featureinterp.corpus.cut import piece_ends
from featureinterp.domain.feature import FeatureId
from featureinterp.domain.record import Window
from featureinterp.errors import IncompatibleError
from featureinterp.machine.accelerator import fit_of, in_parts, on_gpu, to_host
from featureinterp.sae.load import LoadedSae
from featureinterp.subject.load import PrependToken, Subject
from featureinterp.subject.reading import BATCH_TOKENS, CHUNK_TOKENS


class TextActivator:
    """An :class:`Activator` on a subject model and one SAE. Texts are read exactly as they are, up to
    ``max_tokens`` tokens (the model's context when not given); the sink policy is that of collecting, so that
    a window of a corpus, read as text, has the activations that it had."""

    def __init__(self, subject: Subject, sae: LoadedSae, *, max_tokens: int | None = None) -> None:
        check_fit(subject, sae)
        self.subject, self.sae = subject, sae
        room = (subject.context_length or 2048) - int(isinstance(subject.sink, PrependToken))
        self.max_tokens = room if max_tokens is None else min(max_tokens, room)
        self._busy = threading.Lock()

    @property
    def settings(self) -> dict[str, str | int]:
        """What the activations depend on, besides the texts."""
        found: dict[str, str | int] = {"model": self.subject.fingerprint, "sae": self.sae.fingerprint}
        return found | {"max_tokens": self.max_tokens}

    async def run(self, feature: FeatureId, texts: Sequence[str]) -> list[Window]:
        """One window per text, in a worker thread. ``row`` is the text's place in ``texts``; a text without
        any token gives an empty window.
        """
        if feature.sae != self.sae.name:
            raise IncompatibleError(f"feature {feature} is not one of the SAE {self.sae.name}")
        return await anyio.to_thread.run_sync(lambda: self.read([feature.index], texts)[0])

    def read(self, features: Sequence[int], texts: Sequence[str]) -> list[list[Window]]:
        """The same for several features, for callers without an event loop: the texts are read once.
        ``[feature][text]``.
        """
        encodings = self.subject.encoder.encode(texts)
        found: list[list[Window]] = [[_empty(i) for i in range(len(texts))] for _ in features]
        ids = [encoding.ids[: self.max_tokens] for encoding in encodings]
        order = sorted((i for i, row in enumerate(ids) if row), key=lambda i: len(ids[i]))
        with self._busy:
            for batch, activations in self._batches(ids, order, list(features)):
                for i, dense in zip(batch, activations, strict=True):
                    n = len(ids[i])
                    ends = piece_ends(texts[i], encodings[i].offsets)[:n].tolist()
                    pieces = tuple(texts[i][a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))
                    for place in range(len(features)):
                        found[place][i] = Window(i, i, np.asarray(ids[i], np.int32), pieces, dense[place])
        return found

    def _batches(
        self, ids: Sequence[Sequence[int]], order: list[int], features: list[int]
    ) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """(Texts, their activations), the last of ``order`` first; ``order`` is used up."""
        device, fit = self.subject.device, fit_of(self.subject.model, "reading texts")
        wanted = CHUNK_TOKENS if on_gpu(device) else BATCH_TOKENS
        while order:
            longest = len(ids[order[-1]])
            batch = [order.pop() for _ in range(min(len(order), fit.rows(longest, wanted)))]

            def work(part: slice, batch: list[int] = batch) -> list[np.ndarray]:
                return self._activations([ids[i] for i in batch[part]], features)

            for part, found in in_parts(len(batch), longest, wanted, fit, device, work):
                yield batch[part], found

    @torch.inference_mode()
    def _activations(
        self, rows: Sequence[Sequence[int]], features: list[int]
    ) -> list[Float32[np.ndarray, "feature _token"]]:
        """For each row of ids. Rows are filled up on the right, which no token before can see."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
        residual = self.subject.residual(ids, self.sae.hook)
        norms = torch.from_numpy(to_host(residual.float().norm(dim=-1))[0])
        scored = np.zeros(ids.shape, bool)
        for row, own, found in zip(rows, norms, scored, strict=True):
            check_finite(bool(torch.isfinite(own[: len(row)]).all()), self.subject)
            found[: len(row)] = scored_by_norm(own[None, : len(row)], self.subject)[0].numpy()
        dense = np.zeros((*ids.shape, len(features)), np.float32)
        codes = self.sae.sae.encode(rows_where(residual, scored))
        dense[scored] = to_host(codes.columns(features).float())[0]
        return [values[: len(row)].T for row, values in zip(rows, dense, strict=True)]


def live_settings(store: CodesStore, dtype: str | None = None) -> dict[str, str]:
    """What new texts through a run's model and SAE depend on: both, and the ``dtype`` that the model runs in
    now where the run was made in another."""
    settings = {name: str(store.meta[name]["fingerprint"]) for name in ("model", "sae")}
    if dtype is None or dtype == store.meta["model"]["dtype"]:
        return settings
    return settings | {"dtype": dtype}


class RunActivator:
    """New texts through the model and the SAE that made a run; both are loaded when the first text comes.
    ``settings``: what the activations depend on.
    """

    def __init__(
        self, store: CodesStore, load: Callable[[], tuple[Subject, LoadedSae]], *, dtype: str | None = None
    ) -> None:
        self.settings = live_settings(store, dtype)
        self._store, self._load = store, load
        self._loading = threading.Lock()
        self._loaded: TextActivator | None = None

    async def run(self, feature: FeatureId, texts: Sequence[str]) -> list[Window]:
        """One window per text. Raises ``IncompatibleError`` when model or SAE are others than the run's."""
        return await anyio.to_thread.run_sync(self._read, feature.index, texts)

    def _read(self, index: int, texts: Sequence[str]) -> list[Window]:
        with self._loading:
            if self._loaded is None:
                subject, sae = self._load()
                check_sae(self._store, sae)
                check_subject(self._store, subject)
                self._loaded = TextActivator(subject, sae)
        return self._loaded.read([index], texts)[0]


def _empty(row: int) -> Window:
    return Window(row, row, np.zeros(0, np.int32), (), np.zeros(0, np.float32))
